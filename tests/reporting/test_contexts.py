from __future__ import annotations

import pytest
import torch
from rich.console import Console
from sae_lens import StandardSAE, StandardSAEConfig

from msae_plugin.data.text import iterate_windows
from msae_plugin.evaluation.contexts import (
    ContextCollector,
    ContextsForTerminal,
    LatentProfile,
    TokenContext,
)
from msae_plugin.evaluation.heldout import LatentBatch, evaluate_many

CONTEXT = 16
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def collected(tiny_language_model, tiny_texts):
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=40)).eval()
    with torch.no_grad():
        sae.b_enc.normal_(mean=-3, std=2)
        sae.b_enc[7] = -1e6
    texts = tiny_texts[:12]
    collector = ContextCollector(40, CONTEXT, contexts=3)
    batches: list[LatentBatch] = []

    def observe(batch: LatentBatch) -> None:
        batches.append(batch)
        collector.update(batch)

    # Two windows to a batch: documents run over several batches.
    evaluate_many(
        {"a": sae}, tiny_language_model, HOOK, texts, context_size=CONTEXT, batch_size=2,
        max_loss_tokens=CONTEXT, observer=observe,
    )  # fmt: skip
    return sae, collector, batches, texts


def test_statistics_and_strongest_tokens_are_those_of_all_latents_at_once(collected):
    _, collector, batches, _ = collected
    latents = torch.cat([batch.latents for batch in batches])
    documents = torch.cat([batch.documents for batch in batches])
    addresses = torch.cat([batch.windows * CONTEXT + batch.positions for batch in batches])
    assert collector.n_tokens == len(latents)
    assert torch.equal(collector.fired, (latents != 0).sum(0))
    for latent in range(40):
        best: dict[int, tuple[float, int]] = {}
        for value, document, address in zip(
            latents[:, latent].tolist(), documents.tolist(), addresses.tolist(), strict=True
        ):
            if value > best.get(document, (0.0, -1))[0]:
                best[document] = (value, address)
        expected = sorted(best.values(), reverse=True)[:6]
        values = collector._values[:, latent].tolist()
        got = [
            (value, address)
            for value, address in zip(values, collector._tokens[:, latent].tolist(), strict=True)
            if value > 0
        ]
        # Equal values (the same token in the same place of two documents) may come in any order.
        assert [value for value, _ in got] == [value for value, _ in expected]
        assert set(got) <= set(best.values())
        assert len(set(got)) == len(got)


def test_strongest_latents_are_ranked_by_mean_activation_times_decoder_norm(collected):
    sae, collector, batches, _ = collected
    latents = torch.cat([batch.latents for batch in batches])
    fired = latents != 0
    strength = (latents.sum(0) / fired.sum(0).clamp(min=1)) * sae.W_dec.norm(dim=1)
    order = collector.strongest(sae.W_dec, count=40)
    assert 7 not in order  # it never fires
    frequency = fired.float().mean(0)
    readable = [i for i in order if frequency[i] <= 0.05]
    others = [i for i in order if i not in readable]
    assert readable
    assert others
    values = strength[order]
    first = order[0]
    assert frequency[first] <= 0.05
    assert strength[first] == max(strength[i] for i in readable)
    assert torch.equal(values[-3:], values[-3:].sort(descending=True).values)
    assert order.index(first) < min(order.index(i) for i in others)


def test_profiles_mark_the_token_inside_its_own_document(
    collected, tiny_language_model, tiny_texts
):
    sae, collector, _, texts = collected
    model, tokenizer = tiny_language_model.model, tiny_language_model.tokenizer
    chosen = collector.strongest(sae.W_dec, count=5)
    profiles = collector.profiles(
        chosen, sae.W_dec, iterate_windows(model, tokenizer, texts, CONTEXT), tokenizer
    )
    assert [profile.latent for profile in profiles] == chosen
    for profile in profiles:
        assert profile.contexts
        documents = [context.document for context in profile.contexts]
        assert len(set(documents)) == len(documents) <= 3
        activations = [context.activation for context in profile.contexts]
        assert activations == sorted(activations, reverse=True)
        for context in profile.contexts:
            assert context.token
            assert context.before + context.token + context.after in texts[context.document]
            assert "<bos>" not in context.before


def window_of(latents: torch.Tensor, document: int) -> LatentBatch:
    """A window of one document, numbered alike."""
    n = len(latents)
    number = torch.full((n,), document)
    return LatentBatch("a", latents, windows=number, positions=torch.arange(n), documents=number)


def test_a_document_in_two_batches_keeps_its_better_token():
    def batch(values: list[float], documents: list[int], start: int) -> LatentBatch:
        n = len(values)
        return LatentBatch(
            name="a",
            latents=torch.tensor(values)[:, None],
            windows=torch.zeros(n, dtype=torch.long),
            positions=torch.arange(start, start + n),
            documents=torch.tensor(documents),
        )

    for first, second, expected in ((1.0, 2.0, 1), (2.0, 1.0, 0)):
        collector = ContextCollector(1, 8, contexts=2)
        collector.update(batch([first], [0], 0))
        collector.update(batch([second, 0.5], [0, 1], 1))
        held = collector._values[:, 0] > 0
        assert collector._tokens[held, 0].tolist() == [expected, 2]
        assert collector._documents[held, 0].tolist() == [0, 1]


def test_a_latent_with_the_same_tokens_as_a_stronger_one_is_passed_over():
    collector = ContextCollector(3, 8, contexts=2)
    for document in range(4):
        latents = torch.zeros(8, 3)
        latents[2, :2] = torch.tensor([5.0, 4.0]) + document
        latents[5, 2] = 1.0
        collector.update(window_of(latents, document))
    assert collector.strongest(torch.ones(3, 2), count=3) == [0, 2]


def test_memory_does_not_grow_with_the_text():
    collector = ContextCollector(5, 8, contexts=2)
    before = {name: getattr(collector, name).numel() for name in ("_values", "_tokens")}
    for document in range(50):
        collector.update(window_of(torch.rand(8, 5), document))
    assert before == {name: getattr(collector, name).numel() for name in before}
    assert collector._documents.unique().numel() > 2


def test_identical_sentences_of_two_documents_are_shown_once(tiny_language_model):
    model, tokenizer = tiny_language_model.model, tiny_language_model.tokenizer
    texts = ["rose soil rain seed", "rose soil rain seed", "rope sail tide crane"]
    windows = list(iterate_windows(model, tokenizer, [*texts, *texts], 4))
    collector = ContextCollector(1, 4, contexts=3)
    for index, window in enumerate(windows):
        collector.update(
            LatentBatch(
                name="a",
                latents=torch.ones(4, 1),
                windows=torch.full((4,), index),
                positions=torch.arange(4),
                documents=window.documents,
            )
        )
    (profile,) = collector.profiles([0], torch.ones(1, 2), windows, tokenizer)
    shown = [(context.before, context.token) for context in profile.contexts]
    assert len(shown) == len(set(shown)) >= 1


@pytest.fixture
def profile() -> LatentProfile:
    return LatentProfile(
        latent=12,
        frequency=0.0123,
        mean_activation=4.5,
        strength=4.5,
        contexts=[TokenContext("It was\n*the* ", " worst", " film", 7.25, 3)],
    )


def test_the_terminal_shows_value_context_and_token_on_one_line(profile):
    console = Console(width=80, record=True, file=None, color_system=None, quiet=False)
    with console.capture() as capture:
        console.print(ContextsForTerminal([profile]))
    lines = capture.get().splitlines()
    assert lines[0].startswith("1. latent 12: fires on 1.23%")
    assert "7.25" in lines[1]
    assert "It was⏎*the* « worst» film" in lines[1]
    assert len(lines) == 2
    # Where there are styles, the token is marked by style.
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(ContextsForTerminal([profile]))
    assert "\x1b[1;7m worst\x1b[0m" in capture.get()
    assert "«" not in capture.get()
