"""What the latent browser says of a latent, against all latents of all tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latent_inputs import CONTEXT, HELDOUT, HOOK, write_latents_inputs
from sae_lens import SAE

from msae_plugin.common.errors import InputError
from msae_plugin.common.seeding import derive_seed
from msae_plugin.data.text import iterate_windows, load_text
from msae_plugin.reporting.latent_browser import LATENTS_PER_CHUNK, read_chunk, write_latents
from msae_plugin.reporting.look import open_sae

TOKENS = 40 * CONTEXT


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model_dir, tiny_texts) -> Path:
    return write_latents_inputs(tmp_path_factory.mktemp("latents"), tiny_model_dir, tiny_texts)


@pytest.fixture(scope="module")
def browser(source, tiny_language_model) -> Path:
    output = source.parent / "out"
    write_latents([str(source)], output, tokens=TOKENS, language_model=tiny_language_model)
    return output


@pytest.fixture(scope="module")
def dense(source, tiny_language_model) -> dict[str, Any]:
    """(tokens, d_sae) latents of the first SAE, zero at special tokens."""
    model, tokenizer = tiny_language_model.model, tiny_language_model.tokenizer
    texts = load_text(
        source.parent / "notes.jsonl", heldout_documents=HELDOUT, seed=derive_seed(7, "text")
    ).heldout
    windows = list(iterate_windows(model, tokenizer, texts, CONTEXT))[: TOKENS // CONTEXT]
    ids = torch.stack([window.tokens for window in windows])
    sae = SAE.load_from_disk(source / "saes/tiny_seed1/sae")
    with torch.no_grad():
        latents = sae.encode(model.run_with_cache(ids)[1][HOOK].flatten(0, 1))
    kept = ~torch.isin(ids.flatten(), torch.tensor(tokenizer.all_special_ids))
    documents = torch.cat([window.documents for window in windows])
    return {
        "latents": latents * kept[:, None], "kept": kept, "ids": ids.flatten(),
        "documents": documents, "sae": sae,
    }  # fmt: skip


def details(browser: Path, sae: int, d_sae: int) -> list[dict[str, Any]]:
    chunks = range(-(-d_sae // LATENTS_PER_CHUNK))
    return [latent for chunk in chunks for latent in read_chunk(browser, f"{sae}-{chunk}")]


def test_statistics_of_every_latent(browser, dense, tiny_language_model):
    catalogue, columns = read_chunk(browser, "catalogue"), read_chunk(browser, "0")
    known = details(browser, 0, 48)
    latents, sae, W_dec = dense["latents"], dense["sae"], dense["sae"].W_dec.detach()
    fired = latents > 0
    entry = catalogue["saes"][0]
    assert (entry["name"], entry["d_sae"], entry["prefixes"]) == ("tiny_seed1", 48, [12, 24, 48])
    assert entry["n_tokens"] == int(dense["kept"].sum())
    close: Any = lambda values: pytest.approx(values, rel=0.006, abs=2e-3)  # noqa: E731
    assert columns["rate"] == close((fired.sum(0) / dense["kept"].sum()).tolist())
    assert columns["rate"][0] == 1
    assert columns["rate"][47] == 0
    assert columns["max"] == close(latents.amax(0).tolist())
    aligned = torch.cosine_similarity(sae.W_enc.detach(), W_dec.T, dim=0)
    assert columns["align"] == close(aligned.tolist())
    cosines = W_dec @ W_dec.T - 2 * torch.eye(48)
    assert columns["near"] == close(cosines.amax(1).tolist())
    model = tiny_language_model.model
    effect = (W_dec * model.ln_final.w) @ model.W_U
    effect = effect - effect.mean(1, keepdim=True)
    norms = latents.norm(dim=0).clamp_min(1e-9)
    for i, latent in enumerate(known):
        assert sum(latent["bins"]) == int(fired[:, i].sum())
        numbers, values = latent["up"]
        assert values == close(effect[i].topk(10).values.tolist())
        best = [tiny_language_model.tokenizer.decode([t]) for t in effect[i].topk(3).indices]
        assert [catalogue["tokens"][n] for n in numbers[:3]] == best
        assert latent["down"][1] == close((-effect[i]).topk(10).values.neg().tolist())
        for other, cosine, together, share in latent["near"]:
            assert cosine == close(float(W_dec[i] @ W_dec[other]))
            shared = float(latents[:, i] @ latents[:, other] / norms[i] / norms[other])
            assert together == close(shared)
            both = (fired[:, i] & fired[:, other]).sum() / fired[:, i].sum().clamp_min(1)
            assert share == close(float(both) if fired[:, other].any() else 0.0)


def test_examples_are_the_strongest_of_their_documents_and_shaded_over_the_context(browser, dense):
    catalogue, words = read_chunk(browser, "catalogue"), read_chunk(browser, "text")
    columns, latents, documents = read_chunk(browser, "0"), dense["latents"], dense["documents"]
    assert len(words) == TOKENS
    several = 0
    for i, latent in enumerate(details(browser, 0, 48)):
        best = [
            float(latents[documents == d, i].max())
            for d in documents.unique()
            if latents[documents == d, i].max() > 0
        ]
        if not best:
            assert latent["examples"] == []
            continue
        strongest, *others = latent["examples"]
        addresses = [example[0] for example in strongest]
        assert columns["peaks"][i] == addresses
        expected = sorted(best, reverse=True)[: len(addresses)]
        assert len(addresses) == min(6, len(best))
        assert latents[addresses, i].tolist() == pytest.approx(expected)
        for group in latent["examples"]:
            of = documents[[example[0] for example in group]].tolist()
            assert len(set(of)) == len(of)
        shown = [example[0] for group in latent["examples"] for example in group]
        assert len(set(shown)) == len(shown)
        ranks = latents[:, i].sort(descending=True).values[: int((latents[:, i] > 0).sum())]
        for group, quantile in zip(others, catalogue["quantiles"], strict=True):
            start = int((1 - quantile) * len(ranks))
            # Equal to the quantile or up to 50 firings below it.
            low, high = float(ranks[min(len(ranks) - 1, start + 49)]), float(ranks[start])
            for address, *_ in group:
                assert low - 1e-5 <= float(latents[address, i]) <= high + 1e-5
        several += all(others)
        for address, *pairs in (e for group in latent["examples"] for e in group):
            start = address - address % CONTEXT
            inside = torch.arange(start, start + CONTEXT)
            inside = inside[documents[inside] == documents[address]]
            inside = inside[latents[inside, i] > 0]
            assert [start + place for place in pairs[::2]] == inside.tolist()
            shades = torch.tensor(pairs[1::2]) / catalogue["shades"]
            assert torch.allclose(shades, latents[inside, i] / latents[:, i].max(), atol=0.002)
    assert several > 20


def test_a_latent_that_another_seed_has_too_is_found_in_it(browser):
    catalogue, columns = read_chunk(browser, "catalogue"), read_chunk(browser, "0")
    assert catalogue["saes"][0]["others"] == [1, 2]
    for i, latent in enumerate(details(browser, 0, 48)):
        (match, cosine), (_, other) = latent["seeds"]
        assert columns["seeds"][i] == (i < 24)
        assert other < catalogue["recurs_from"]
        if i < 24:
            assert (match, cosine) == (23 - i, 1)


def test_the_text_is_whole_and_scripts_are_ascii(browser, tiny_language_model, dense):
    catalogue, words = read_chunk(browser, "catalogue"), read_chunk(browser, "text")
    shown = "".join(catalogue["tokens"][number] for number in words)
    assert shown == tiny_language_model.tokenizer.decode(dense["ids"])
    assert all(path.read_bytes().isascii() for path in (browser / "chunks").iterdir())
    assert "http" not in (browser / "index.html").read_text().replace("http://www.w3.org/2000", "")


def test_an_earlier_browser_is_replaced_and_nothing_else(
    source, browser, tmp_path, tiny_language_model
):
    made = write_latents(
        [str(source)], browser, tokens=TOKENS, only=["tiny"], language_model=tiny_language_model
    )
    assert [row["latents"] for row in made.rows] == [48, 48, 48]
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InputError, match="no earlier output of msae latents"):
        write_latents([str(source)], tmp_path)
    with pytest.raises(InputError, match="no SAE is named other"):
        write_latents([str(source)], tmp_path / "new", only=["other"])


def test_looking_at_a_text_shows_the_strongest_latents_of_each_token(
    source, browser, tiny_language_model
):
    model = tiny_language_model.model
    text = "A rose in the garden"
    reference = str(source / "saes/tiny_seed1")
    opened = open_sae(reference, browser=browser, language_model=tiny_language_model)
    found = opened.look(text, top=3)
    ids = model.to_tokens(text)
    sae = SAE.load_from_disk(source / "saes/tiny_seed1/sae")
    with torch.no_grad():
        latents = sae.encode(model.run_with_cache(ids)[1][HOOK][0])
    assert {row.position for row in found.rows} == set(range(1, ids.shape[1]))
    for position in range(1, ids.shape[1]):
        rows = [row for row in found.rows if row.position == position]
        best = latents[position].topk(3)
        assert [row.latent for row in rows] == [
            int(i) for i in best.indices if latents[position, i]
        ]
        assert [row.activation for row in rows] == pytest.approx(best.values[: len(rows)].tolist())
    assert found.l0 == pytest.approx(float((latents[1:] > 0).sum(1).float().mean()))
    assert all(row.promotes for row in found.rows)
    assert found.rows[0].latent == 0
    assert found.rows[0].fires_on
    assert opened.look("a byte that is no text: \udcff").rows
    with pytest.raises(InputError, match="the text is empty"):
        opened.look("")
