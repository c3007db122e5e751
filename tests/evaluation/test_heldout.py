from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from msae_plugin.common.errors import InputError
from msae_plugin.data.windows import iterate_windows
from msae_plugin.evaluation import heldout
from msae_plugin.evaluation.heldout import HeldoutMetrics, LatentBatch, evaluate_many
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import load_language_model

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


@pytest.fixture(params=[HOOK, "model.layers.1"])
def model_and_hook(request, tiny_model_dir, tiny_language_model):
    if request.param == HOOK:
        return tiny_language_model, HOOK
    return load_language_model(str(tiny_model_dir), [request.param]), request.param


@pytest.fixture
def transformer(tiny_language_model):
    return tiny_language_model


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
    monkeypatch.setattr(heldout, "LATENT_ELEMENTS", 5 * 96)  # five tokens to a block
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


def test_several_saes_together_get_what_each_gets_alone(transformer, texts):
    hooks = {"a": "blocks.0.hook_resid_post", "b": HOOK}
    saes = {"a": random_sae(1), "b": random_sae(2)}
    together = evaluate_many(saes, transformer, hooks, texts, context_size=CONTEXT)
    for name, sae in saes.items():
        alone = evaluate_one(sae, transformer, hooks[name], texts, CONTEXT)
        assert together[name].to_dict() == pytest.approx(alone.to_dict())


def test_the_model_itself_runs_once_for_all_saes(transformer, texts):
    runs: list[int] = []
    handles = [
        transformer.model.blocks[layer].register_forward_hook(lambda *_, n=layer: runs.append(n))
        for layer in (0, 2)
    ]
    try:
        saes = {name: random_sae(i) for i, name in enumerate("abc")}
        evaluate_many(
            saes,
            transformer,
            HOOK,
            texts,
            context_size=CONTEXT,
            batch_size=10**6,
        )
    finally:
        for handle in handles:
            handle.remove()
    assert runs.count(0) == 1
    # Behind the hook: clean, the same again to compare, zeros, one per SAE.
    assert runs.count(2) == 1 + 1 + 1 + len(saes)


def test_limits_on_tokens(transformer, texts):
    hook = HOOK
    done: list[int] = []
    got = evaluate_many(
        {"a": random_sae()},
        transformer,
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
        transformer,
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


def test_the_observer_sees_the_latents_with_their_places(transformer, texts):
    hook = HOOK
    sae = random_sae()
    seen: list[LatentBatch] = []
    evaluate_many(
        {"a": sae}, transformer, hook, texts, context_size=CONTEXT, batch_size=2,
        observer=seen.append,
    )  # fmt: skip
    latents = torch.cat([batch.latents for batch in seen])
    with torch.no_grad():
        expected = sae.encode(kept_activations(transformer, hook, texts))
    torch.testing.assert_close(latents, expected)
    tokens = window_tokens(transformer, texts)
    places = torch.cat([batch.windows * CONTEXT + batch.positions for batch in seen])
    special = torch.tensor(transformer.tokenizer.all_special_ids)
    assert torch.equal(places, (~torch.isin(tokens.flatten(), special)).nonzero().squeeze(1))


def test_too_little_text_and_missing_hooks_are_refused_in_one_line(transformer):
    sae = random_sae()
    with pytest.raises(InputError, match="no full window of 8 tokens") as error:
        evaluate_one(sae, transformer, HOOK, ["a rose"], CONTEXT)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="'a'"):
        evaluate_many({"a": sae}, transformer, {}, ["a rose"], context_size=CONTEXT)
