from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from tolerance import rounding_tolerance

from msae_plugin.common.errors import InputError
from msae_plugin.data.text import iterate_windows
from msae_plugin.evaluation import heldout
from msae_plugin.evaluation.heldout import (
    ActivationByWord,
    HeldoutMetrics,
    LatentBatch,
    Words,
    evaluate_many,
    mean_max_decoder_cosine,
)
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import load_language_model
from msae_plugin.saes.health import dense_share, encoder_decoder_alignment

D_IN = 64
HOOK = "blocks.1.hook_resid_post"
CONTEXT = 8


def random_sae(seed: int = 0, d_sae: int = 96) -> StandardSAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=d_sae))
    with torch.no_grad():
        sae.b_dec.normal_(std=0.1)
        sae.b_enc.normal_(std=0.5)
    return sae.eval()


def identity_sae() -> StandardSAE:
    sae = random_sae(d_sae=2 * D_IN)
    with torch.no_grad():
        identity = torch.eye(D_IN)
        sae.W_enc.copy_(torch.cat([identity, -identity], dim=1))
        sae.W_dec.copy_(torch.cat([identity, -identity]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def zero_sae() -> StandardSAE:
    sae = random_sae()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.zero_()
    return sae


@pytest.fixture(params=[HOOK, "model.layers.1", "TransformerBridge"])
def model_and_hook(request, tiny_model_dir, tiny_language_model):
    if request.param == HOOK:
        return tiny_language_model, HOOK
    if request.param == "TransformerBridge":
        return load_language_model(str(tiny_model_dir), [HOOK], loader=request.param), HOOK
    return load_language_model(str(tiny_model_dir), [request.param]), request.param


@pytest.fixture
def texts(tiny_texts) -> list[str]:
    return [text[: 40 + 7 * i] for i, text in enumerate(tiny_texts[:5])]


def window_tokens(pair, texts) -> torch.Tensor:
    windows = iterate_windows(pair.model, pair.tokenizer, texts, CONTEXT)
    return torch.stack([window.tokens for window in windows])


def literal_losses(pair, hook, texts, sae, exclude_special):
    """Clean, SAE and zero losses and KL, one window and one position after another, in float64."""
    special = set(pair.tokenizer.all_special_ids)
    sums = {"clean": 0.0, "sae": 0.0, "zero": 0.0, "kl": 0.0}
    count = 0
    for tokens in window_tokens(pair, texts):
        kept = [not (exclude_special and int(token) in special) for token in tokens]

        def with_sae(activations, hook, kept=kept):
            changed = activations.clone()
            for position, keep in enumerate(kept):
                if keep:
                    changed[0, position] = sae(activations[0, position : position + 1])[0]
            return changed

        def with_zeros(activations, hook, kept=kept):
            changed = activations.clone()
            for position, keep in enumerate(kept):
                if keep:
                    changed[0, position] = 0
            return changed

        log_probs = {}
        for name, hooks in (
            ("clean", []),
            ("sae", [(hook, with_sae)]),
            ("zero", [(hook, with_zeros)]),
        ):
            with torch.no_grad():
                logits = pair.model.run_with_hooks(tokens[None], fwd_hooks=hooks)
            log_probs[name] = logits[0].double().log_softmax(-1)
        for position in range(CONTEXT - 1):
            if not kept[position]:
                continue
            count += 1
            for name, values in log_probs.items():
                sums[name] -= values[position, tokens[position + 1]].item()
            p, q = log_probs["clean"][position], log_probs["sae"][position]
            sums["kl"] += (p.exp() * (p - q)).sum().item()
    return {name: value / count for name, value in sums.items()}, count


def evaluate_one(sae, pair, hook, texts, context_size, **options) -> HeldoutMetrics:
    return evaluate_many({"sae": sae}, pair, hook, texts, context_size=context_size, **options)[
        "sae"
    ]


@pytest.mark.parametrize("exclude_special", [True, False])
def test_losses_agree_with_a_literal_computation(
    model_and_hook, texts, exclude_special, monkeypatch
):
    monkeypatch.setattr(heldout, "BLOCK_ELEMENTS", 3 * 512)  # three positions to a block
    pair, hook = model_and_hook
    sae = random_sae()
    expected, count = literal_losses(pair, hook, texts, sae, exclude_special)
    got = evaluate_one(
        sae, pair, hook, texts, CONTEXT, batch_size=3, exclude_special=exclude_special
    )
    assert got.n_loss_tokens == count
    assert got.ce_clean == pytest.approx(expected["clean"], rel=1e-5)
    assert got.ce_sae == pytest.approx(expected["sae"], rel=1e-5)
    assert got.ce_zero == pytest.approx(expected["zero"], rel=1e-5)
    assert got.kl == pytest.approx(expected["kl"], rel=1e-4)
    assert abs(expected["zero"] - expected["clean"]) > 1e-3
    assert got.loss_recovered == pytest.approx(
        (expected["zero"] - expected["sae"]) / (expected["zero"] - expected["clean"]), rel=1e-3
    )


def test_an_identity_recovers_all_and_zeros_recover_nothing(model_and_hook, texts):
    pair, hook = model_and_hook
    got = evaluate_many(
        {"identity": identity_sae(), "zero": zero_sae()}, pair, hook, texts, context_size=CONTEXT
    )
    assert got["identity"].loss_recovered == pytest.approx(1, abs=1e-5)
    assert got["identity"].explained_variance == pytest.approx(1, abs=1e-6)
    assert got["identity"].kl == pytest.approx(0, abs=1e-6)
    assert got["zero"].loss_recovered == pytest.approx(0, abs=1e-6)


def kept_activations(pair, hook, texts) -> torch.Tensor:
    tokens = window_tokens(pair, texts)
    activations = activations_at(pair.model, tokens, [hook])[hook]
    special = torch.tensor(pair.tokenizer.all_special_ids)
    return activations[~torch.isin(tokens, special)]


def test_explained_variance_l0_and_dead_latents_are_those_of_a_plain_formula(
    model_and_hook, texts, monkeypatch
):
    monkeypatch.setattr(heldout, "BLOCK_ELEMENTS", 5 * 96)  # five tokens to a block
    pair, hook = model_and_hook
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc[:4] = -1e6
    got = evaluate_one(sae, pair, hook, texts, CONTEXT, batch_size=2)
    x = kept_activations(pair, hook, texts)
    with torch.no_grad():
        latents = sae.encode(x)
        residual = (x - sae.decode(latents)).double().numpy()
    x64 = x.double().numpy()
    total = ((x64 - x64.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert got.n_tokens == len(x)
    assert got.explained_variance == pytest.approx(
        1 - (residual**2).sum(axis=1).mean() / total, abs=1e-5
    )
    active = latents.numpy() != 0
    assert got.l0 == pytest.approx(active.sum(axis=1).mean())
    assert got.dead_latents == int((~active.any(axis=0)).sum()) >= 4
    np.testing.assert_allclose(got.firing_frequency.numpy(), active.mean(axis=0), rtol=1e-6)


def test_several_saes_together_get_what_each_gets_alone(tiny_language_model, texts):
    hooks = {"a": "blocks.0.hook_resid_post", "b": HOOK}
    saes = {"a": random_sae(1), "b": random_sae(2)}
    together = evaluate_many(saes, tiny_language_model, hooks, texts, context_size=CONTEXT)
    for name, sae in saes.items():
        alone = evaluate_one(sae, tiny_language_model, hooks[name], texts, CONTEXT)
        assert together[name].to_dict() == pytest.approx(alone.to_dict())


def test_the_model_itself_runs_once_for_all_saes(tiny_language_model, texts):
    runs: list[int] = []
    handles = [
        tiny_language_model.model.blocks[layer].register_forward_hook(
            lambda *_, n=layer: runs.append(n)
        )
        for layer in (0, 2)
    ]
    try:
        saes = {name: random_sae(i) for i, name in enumerate("abc")}
        evaluate_many(
            saes, tiny_language_model, HOOK, texts, context_size=CONTEXT, batch_size=10**6
        )
    finally:
        for handle in handles:
            handle.remove()
    assert runs.count(0) == 1
    # Behind the hook: clean, the same again to compare, zeros, one per SAE.
    assert runs.count(2) == 1 + 1 + 1 + len(saes)


def test_limits_on_tokens(tiny_language_model, texts):
    hook = HOOK
    done: list[int] = []
    got = evaluate_many(
        {"a": random_sae()},
        tiny_language_model,
        hook,
        texts,
        context_size=CONTEXT,
        batch_size=1,
        max_tokens=5 * CONTEXT,
        max_loss_tokens=2 * CONTEXT,
        exclude_special=False,
        progress=done.append,
    )["a"]
    assert got.n_tokens == sum(done) == 5 * CONTEXT
    assert got.n_loss_tokens == 2 * (CONTEXT - 1)
    # Losses on few tokens cost no larger a batch.
    few = evaluate_many(
        {"a": random_sae()},
        tiny_language_model,
        hook,
        texts,
        context_size=CONTEXT,
        batch_size=10**6,
        max_tokens=5 * CONTEXT,
        max_loss_tokens=2 * CONTEXT - 1,
        exclude_special=False,
    )["a"]
    assert few.n_loss_tokens == got.n_loss_tokens
    assert few.ce_sae == pytest.approx(got.ce_sae, rel=1e-5)


def test_the_observer_sees_the_latents_with_their_places(tiny_language_model, texts):
    hook = HOOK
    sae = random_sae()
    seen: list[LatentBatch] = []
    evaluate_many(
        {"a": sae}, tiny_language_model, hook, texts, context_size=CONTEXT, batch_size=2,
        observer=seen.append,
    )  # fmt: skip
    latents = torch.cat([batch.latents for batch in seen])
    with torch.no_grad():
        expected = sae.encode(kept_activations(tiny_language_model, hook, texts))
    torch.testing.assert_close(latents, expected)
    tokens = window_tokens(tiny_language_model, texts)
    places = torch.cat([batch.windows * CONTEXT + batch.positions for batch in seen])
    special = torch.tensor(tiny_language_model.tokenizer.all_special_ids)
    assert torch.equal(places, (~torch.isin(tokens.flatten(), special)).nonzero().squeeze(1))


def test_too_little_text_and_missing_hooks_are_refused_in_one_line(tiny_language_model):
    sae = random_sae()
    with pytest.raises(InputError, match="no full window of 8 tokens") as error:
        evaluate_one(sae, tiny_language_model, HOOK, ["a rose"], CONTEXT)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="'a'"):
        evaluate_many({"a": sae}, tiny_language_model, {}, ["a rose"], context_size=CONTEXT)


class _Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return {5: " Film", 6: "film", 7: " good", 8: "FILM"}[ids[0]]


def test_tokens_that_differ_in_case_or_space_are_one_word() -> None:
    words = Words(_Tokenizer())
    first = words.of(torch.tensor([5, 7, 6]))
    assert first[0] == first[2] != first[1]
    assert words.of(torch.tensor([8]))[0] == first[0]


@pytest.mark.parametrize("buffered", [2**20, 3])
def test_a_latent_with_half_of_its_activation_on_one_word_counts(
    buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "_BUFFERED_PAIRS", buffered)
    n_tokens = 40
    latents = torch.zeros(n_tokens, 4)
    word = torch.arange(n_tokens) % 10
    latents[:20, 0] = 1.0  # two firings on each of ten words
    latents[:, 1] = torch.where(word == 3, 9.0, 1.0)  # 36 of 72 on word 3
    latents[:, 2] = torch.where(word == 3, 8.9, 1.0)  # 35.6 of 71.6
    latents[:19, 3] = torch.where(word[:19] == 3, 1.0, 0.0)  # too rare to be judged
    sums = ActivationByWord()
    for rows in torch.arange(n_tokens).split(7):
        sums.add(latents[rows], word[rows])
    share = sums.single_word_share((latents != 0).sum(0))
    assert share == pytest.approx(1 / 3)


def test_nothing_to_judge_gives_none() -> None:
    assert ActivationByWord().single_word_share(torch.tensor([100])) is None


def test_dense_share_counts_firings_on_more_than_a_tenth_of_the_tokens() -> None:
    # 50 and 11 of 100 tokens are dense, 10 and 4 are not: 61 of 75 firings.
    assert float(dense_share(torch.tensor([50, 11, 10, 4]), 100)) == pytest.approx(61 / 75)
    assert float(dense_share(torch.zeros(3), 100)) == 0


def test_alignment_is_the_mean_cosine_of_the_live_latents() -> None:
    sae = torch.nn.Module()
    sae.W_enc = torch.nn.Parameter(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    sae.W_dec = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    # Cosines 1, 0 and 1; the last latent is dead.
    assert encoder_decoder_alignment(sae, torch.tensor([True, True, False])) == pytest.approx(0.5)
    assert encoder_decoder_alignment(sae, torch.zeros(3, dtype=torch.bool)) is None
    assert encoder_decoder_alignment(torch.nn.Module(), torch.ones(3, dtype=torch.bool)) is None


def naive(W_dec: torch.Tensor) -> float:
    rows = W_dec.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2)
    return cosines.max(dim=1).values.mean().item()


@settings(max_examples=25)
@given(d_sae=st.integers(2, 60), d_in=st.integers(1, 12), block=st.integers(1, 400))
def test_blocks_give_what_the_whole_matrix_gives(d_sae, d_in, block):
    generator = torch.Generator().manual_seed(d_sae * 100 + d_in)
    W_dec = torch.randn(d_sae, d_in, generator=generator) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout, "BLOCK_ELEMENTS", block)
        # Two norms and the product of the unit vectors; the mean adds numbers of at most one.
        atol = rounding_tolerance(3 * (d_in + 2) + d_sae, 1.0)
        assert mean_max_decoder_cosine(W_dec) == pytest.approx(naive(W_dec), abs=atol)


def test_orthogonal_rows_do_not_overlap_and_pairs_do():
    assert mean_max_decoder_cosine(torch.eye(5)) == pytest.approx(0, abs=1e-7)
    assert mean_max_decoder_cosine(torch.eye(5).repeat(2, 1)) == pytest.approx(1)


def test_rows_of_zeros_and_single_rows_are_no_neighbours():
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_max_decoder_cosine(W_dec) == pytest.approx(2**-0.5)
    assert mean_max_decoder_cosine(torch.ones(1, 4)) == 0.0


def test_no_block_holds_more_than_its_budget(monkeypatch):
    monkeypatch.setattr(heldout, "BLOCK_ELEMENTS", 2**12)
    sizes: list[int] = []
    original = torch.Tensor.__matmul__

    def recorded(self, other):
        product = original(self, other)
        sizes.append(product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", recorded)
    mean_max_decoder_cosine(torch.randn(500, 4))
    assert sizes
    assert max(sizes) <= 2**12
