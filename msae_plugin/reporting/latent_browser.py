"""A folder in which every latent of every SAE can be looked at, from a file or a static host.

`index.html` is the page of the package, unchanged; what it shows lies in `chunks/`, scripts that
call `msae(name, value)`, because a page that was opened from a file may fetch nothing.

    catalogue.js    the SAEs, and the texts of all tokens that anything refers to
    text.js         the text, one token after another: an example is an address in it
    S.js            of SAE number S a column per statistic, for the list
    S-C.js          of each of its latents from 128 C on, everything else
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import folder_written_atomically, held_in
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.comparison.results import COMPARISON_FILE
from msae_plugin.data.text import first_windows
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.evaluation.heldout import HeldoutMetrics, evaluate_many
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.reporting import latents as known
from msae_plugin.reporting.document import asset
from msae_plugin.reporting.sources import read_sources, trained_saes
from msae_plugin.saes.load import EvaluatedSAE, load_saes
from msae_plugin.saes.run_record import RUN_FILE, read_run_record
from msae_plugin.training.inputs import load_data
from msae_plugin.training.plans import default_device
from msae_plugin.training.recipe import DataSettings

PAGE_FILE, CHUNKS_FOLDER = "index.html", "chunks"
BROWSER_FOLDER = "latents"
"""Where a report looks for one, in the folder of a run or a comparison."""
CATALOGUE, TEXT = "catalogue", "text"
LATENTS_PER_CHUNK = 128
LOGITS, NEIGHBOURS, LOGITS_IN_LIST = 10, 6, 3
_CALL = 'msae("{}",{})\n'
# Their firings are held at the same time; each group costs one pass of the model.
_AT_ONCE = 8
# Whole batches of them: the pass measures the loss too, which the page shows.
_LOSS_TOKENS = 2048


@dataclass(frozen=True)
class BrowsedSAE:
    """An SAE of the browser, and which others are the same thing trained with other seeds."""

    evaluated: EvaluatedSAE
    name: str
    method: str
    l0_target: float | None
    seed: int | None
    text: tuple[DataSettings, int] | None  # that it was trained on, and the seed of the split

    def same_but_seed(self, other: BrowsedSAE) -> bool:
        """Whether only the seed of the training differs."""
        mine, theirs = (
            (s.method, s.l0_target, s.evaluated.hook_name, s.evaluated.sae.cfg.d_in)
            for s in (self, other)
        )
        return mine == theirs and None not in (self.seed, other.seed) and self.seed != other.seed


@dataclass(frozen=True)
class LatentBrowser:
    """What was written."""

    page: Path
    rows: list[dict[str, Any]]  # per SAE: its name, latents, L0, dead latents, bytes per latent


def write_latents(
    references: Sequence[str],
    output: Path,
    *,
    text: str | None = None,
    tokens: int = 100_000,
    model: str | None = None,
    loader: str = "auto",
    only: Sequence[str] = (),
    language_model: LanguageModel | None = None,
    report: Report = warnings_alone,
) -> LatentBrowser:
    """Write the browser of some SAEs of one language model.

    `text` stands in for the one the SAEs were trained beside, of which `tokens` are read; `model`
    is for SAEs that name none; `loader` is as `model.loader` of a recipe; `only` names SAEs or
    methods.
    """
    _check_output(output)
    device = default_device("auto")
    browsed = _browsed(references, device, model, report)
    if only:
        browsed = [s for s in browsed if {s.name, s.method} & set(only)]
    if not browsed:
        raise InputError(f"no SAE is named {', '.join(only)}: give --only the name of one")
    settings, seed = _text_of(browsed, text)
    evaluated = [each.evaluated for each in browsed]
    if language_model is None:
        hooks = list({sae.hook_name: None for sae in evaluated})
        report("loading the language model")
        language_model = load_language_model(
            model_for(model, evaluated), hooks, device, loader=loader
        )
    loaded = load_data(settings, seed, report, vocabulary=language_model.vocabulary)
    source = _Text(language_model, settings, loaded.heldout_texts(language_model.tokenizer), tokens)
    with folder_written_atomically(output) as folder:
        (folder / CHUNKS_FOLDER).mkdir()
        (folder / PAGE_FILE).write_text(asset("latents.html"), encoding="utf-8")
        writer = _Writer(folder / CHUNKS_FOLDER, browsed, source, report)
        for start in range(0, len(browsed), _AT_ONCE):
            writer.write_group(range(start, min(start + _AT_ONCE, len(browsed))))
        writer.write_catalogue(loaded.description)
    return LatentBrowser(output / PAGE_FILE, writer.rows)


def read_chunk(folder: Path, name: str) -> Any:
    """What a chunk of a browser holds."""
    path = folder / CHUNKS_FOLDER / f"{name}.js"
    if not path.is_file():
        raise InputError(f"{str(folder)!r} is no output of msae latents: {path} is missing")
    return json.loads(path.read_text(encoding="utf-8").partition(",")[2].rstrip()[:-1])


def is_browser(folder: Path) -> bool:
    """Whether a folder is an output of `msae latents`."""
    return (folder / CHUNKS_FOLDER / f"{CATALOGUE}.js").is_file()


def _check_output(output: Path) -> None:
    names = set(held_in(output))
    if names - {PAGE_FILE, CHUNKS_FOLDER} or (names and not is_browser(output)):
        raise InputError(
            f"--output {str(output)!r} is not empty and no earlier output of msae latents",
            "give another",
        )


def _browsed(
    references: Sequence[str], device: str, model: str | None, report: Report
) -> list[BrowsedSAE]:
    """The SAEs of runs and comparisons with what these record, then the others."""
    folders = [
        Path(text)
        for text in references
        if (Path(text) / COMPARISON_FILE).is_file() or (Path(text) / RUN_FILE).is_file()
    ]
    load = partial(load_saes, device=device, model_name=model)
    found: list[BrowsedSAE] = []
    if folders:
        sources = read_sources(folders)
        contents = {source.label: source.content for source in sources.all}
        trained = {s.export.resolve(): s for s in trained_saes(sources) if s.export is not None}
        if not trained:
            raise InputError(f"{str(folders[0])!r} holds no SAE yet: let it finish")
        for evaluated in load(
            [str(export) for export in trained],
            on_broken=lambda name, reason: report(f"{name} is left out: {reason}"),
        ):
            assert evaluated.folder is not None, "it was given as one"
            sae = trained[evaluated.folder.resolve()]
            data = _data_of(contents[sae.source])
            found.append(BrowsedSAE(evaluated, sae.name, sae.method, sae.l0_target, sae.seed, data))
    others = [text for text in references if Path(text) not in folders]
    for evaluated in load(others) if others or not folders else ():
        above = () if evaluated.folder is None else evaluated.folder.resolve().parents
        records = (read_run_record(folder) for folder in islice(above, 2))
        data = next((_data_of(record) for record in records if record), None)
        found.append(BrowsedSAE(evaluated, evaluated.name, evaluated.name, None, None, data))
    return found


def _data_of(record: Mapping[str, Any]) -> tuple[DataSettings, int] | None:
    config = record.get("config") or {}
    if not config.get("data"):
        return None
    return DataSettings(**config["data"]), int((config.get("training") or {}).get("seed", 42))


def _text_of(browsed: Sequence[BrowsedSAE], given: str | None) -> tuple[DataSettings, int]:
    """The text, cut into windows as the SAEs' metadata say where no recipe does."""
    metadata = browsed[0].evaluated.sae.cfg.metadata
    if given is not None:
        size, bos = metadata.context_size, metadata.prepend_bos
        return DataSettings(given, context_size=size or 128, prepend_bos=bos is not False), 0
    lacking = next((s.name for s in browsed if s.text is None), None)
    if lacking is not None:
        raise InputError(f"the text that {lacking!r} was trained on is not recorded: give --text")
    texts = [each.text for each in browsed if each.text is not None]
    if any(each != texts[0] for each in texts):
        raise InputError("the SAEs were trained on different texts: give --text")
    return texts[0]


class _Text:
    """Windows of the held-out text, and the numbers by which the page knows its tokens."""

    def __init__(
        self, model: LanguageModel, settings: DataSettings, texts: Sequence[str], tokens: int
    ) -> None:
        self.model, self.settings, self.texts, self.tokens = model, settings, texts, tokens
        self.context_size = settings.context_size
        windows = first_windows(
            model, texts, self.context_size, tokens, prepend_bos=settings.prepend_bos
        )
        self.ids = torch.cat([window.tokens for window in windows]).numpy()
        self.documents = torch.cat([window.documents for window in windows]).numpy()
        self._numbers: dict[int, int] = {}

    def number(self, token: int) -> int:
        """Of a token; the ones that were asked for are in the catalogue."""
        return self._numbers.setdefault(int(token), len(self._numbers))

    def token_texts(self) -> list[str]:
        """By number. A tokenizer may drop the space in front of a token that stands alone."""
        tokenizer: Any = self.model.tokenizer
        first = tokenizer.encode("a", add_special_tokens=False)[-1:]
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        start = decode(first)
        pairs = ((decode([*first, token]), token) for token in self._numbers)
        return [
            text[len(start) :] if text.startswith(start) else decode([token])
            for text, token in pairs
        ]

    def special_numbers(self) -> list[int]:
        """Numbers of tokens between documents."""
        special = set(self.model.tokenizer.all_special_ids)
        return [number for token, number in self._numbers.items() if token in special]


class _Writer:
    def __init__(
        self, folder: Path, browsed: Sequence[BrowsedSAE], text: _Text, report: Report
    ) -> None:
        self._folder, self._browsed, self._text, self._report = folder, browsed, text, report
        self._entries: list[dict[str, Any]] = []
        self._unembeddings: dict[int, torch.Tensor | None] = {}
        self.rows: list[dict[str, Any]] = []

    def write_group(self, numbers: range) -> None:
        """One pass of the model for these SAEs, and their chunks."""
        text = self._text
        group = {str(number): self._browsed[number].evaluated for number in numbers}
        firings = {
            name: known.Firings(s.sae.cfg.d_sae, text.context_size) for name, s in group.items()
        }
        done, total = 0, len(text.ids)

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._report("reading the held-out text", min(done, total), total)

        metrics = evaluate_many(
            {name: each.sae for name, each in group.items()},
            text.model,
            {name: each.hook_name for name, each in group.items()},
            text.texts,
            context_size=text.context_size,
            max_tokens=text.tokens,
            max_loss_tokens=_LOSS_TOKENS,
            prepend_bos=text.settings.prepend_bos,
            observer=lambda batch: firings[batch.name].update(batch),
            progress=advance,
        )
        for number in numbers:
            self._write_sae(number, firings.pop(str(number)).sorted(), metrics[str(number)])

    @torch.no_grad()
    def _write_sae(
        self, number: int, firings: known.SortedFirings, metrics: HeldoutMetrics
    ) -> None:
        browsed = self._browsed[number]
        sae, name = browsed.evaluated.sae, browsed.name
        d_sae = int(sae.cfg.d_sae)
        others = [i for i, other in enumerate(self._browsed) if browsed.same_but_seed(other)]
        cosines, neighbours = (t.tolist() for t in known.nearest(sae.W_dec, NEIGHBOURS))
        found = [known.best_match(sae.W_dec, self._browsed[i].evaluated.sae.W_dec) for i in others]
        matches = [(cosine.tolist(), latent.tolist()) for cosine, latent in found]
        alignment = known.alignment(sae)
        logits = self._logits(sae)
        numbered = self._text.number
        columns: dict[str, list[Any]] = {
            key: [] for key in ("rate", "max", "mean", "peaks", "up", "near", "seeds")
        }
        if alignment is not None:
            columns["align"] = [_short(value) for value in alignment]
        chunk: list[dict[str, Any]] = []
        size = 0
        for latent in range(d_sae):
            addresses, values = firings.of(latent)
            size_of = np.abs(values)
            up, up_values, down, down_values = next(logits)
            up, down = [numbered(t) for t in up], [numbered(t) for t in down]
            shown = (
                known.examples(addresses, values, self._text.documents, self._text.context_size)
                if len(values)
                else []
            )
            columns["rate"].append(_short(len(values) / firings.n_tokens))
            columns["max"].append(_short(size_of.max(initial=0)))
            columns["mean"].append(_short(size_of.mean()) if len(values) else 0)
            columns["peaks"].append([example[0] for example in shown[0]] if shown else [])
            columns["up"].append(up[:LOGITS_IN_LIST])
            columns["near"].append(_short(cosines[latent][0]) if cosines[latent] else None)
            recurring = sum(cosine[latent] > known.RECURS_FROM for cosine, _ in matches)
            columns["seeds"].append(recurring)
            chunk.append(
                {
                    "bins": known.histogram(values) if len(values) else [],
                    "examples": shown,
                    "up": [up, [_short(v) for v in up_values]],
                    "down": [down, [_short(v) for v in down_values]],
                    "near": [
                        [other, _short(cosine), *map(_short, firings.together(latent, other))]
                        for other, cosine in zip(neighbours[latent], cosines[latent], strict=True)
                    ],
                    "seeds": [[ids[latent], _short(cosine[latent])] for cosine, ids in matches],
                }
            )
            if len(chunk) == LATENTS_PER_CHUNK or latent == d_sae - 1:
                size += self._write(f"{number}-{latent // LATENTS_PER_CHUNK}", chunk)
                chunk = []
                self._report(f"latents of {name}", latent + 1, d_sae)
        in_list = self._write(str(number), columns)
        self._entries.append(
            {
                "name": name, "method": browsed.method, "l0_target": browsed.l0_target,
                "seed": browsed.seed, "hook": browsed.evaluated.hook_name, "d_sae": d_sae,
                "sha256": browsed.evaluated.weights_sha256, "prefixes": known.prefix_ends(sae),
                "others": others, "n_tokens": metrics.n_tokens,
                "metrics": {
                    key: _short(value)
                    for key in ("explained_variance", "l0", "loss_recovered", "dead_latents")
                    if (value := getattr(metrics, key)) is not None
                },
            }
        )  # fmt: skip
        self.rows.append(
            {
                "sae": name, "latents": d_sae, "l0": metrics.l0, "dead": metrics.dead_latents,
                "bytes_per_latent": round((size + in_list) / d_sae), "bytes_at_start": in_list,
            }
        )  # fmt: skip

    def _logits(self, sae: Any) -> Iterator[tuple[list[int], list[float], list[int], list[float]]]:
        d_in = int(sae.cfg.d_in)
        if d_in not in self._unembeddings:
            self._unembeddings[d_in] = known.unembedding(self._text.model.model, d_in)
        matrix = self._unembeddings[d_in]
        if matrix is None:
            return iter([([], [], [], [])] * int(sae.cfg.d_sae))
        return known.logits(sae.W_dec, matrix, LOGITS)

    def write_catalogue(self, description: str) -> None:
        """The text and the list of SAEs; the last, because its tokens are numbered by then."""
        ids = self._text.ids
        distinct, place = np.unique(ids, return_inverse=True)
        numbers = np.array([self._text.number(token) for token in distinct])[place]
        self._write(TEXT, numbers.tolist())
        catalogue = {
            "saes": self._entries,
            "tokens": self._text.token_texts(),
            "special": self._text.special_numbers(),
            "context_size": self._text.context_size,
            "model": self._text.model.model_name,
            "text": description,
            "latents_per_chunk": LATENTS_PER_CHUNK,
            "quantiles": known.QUANTILES,
            "shades": known.SHADES,
            "recurs_from": known.RECURS_FROM,
        }
        self._write(CATALOGUE, catalogue)

    def _write(self, name: str, value: object) -> int:
        # ASCII alone: a script may be read in any encoding, and no line separator ends a string.
        text = _CALL.format(name, json.dumps(value, separators=(",", ":"), allow_nan=False))
        (self._folder / f"{name}.js").write_text(text, encoding="ascii")
        return len(text)


def _short(value: float) -> float | int:
    """Three digits are what a reader can use, and a third of the bytes."""
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def tokens_it_fires_on(browser: Path, evaluated: EvaluatedSAE) -> Callable[[int], list[str]]:
    """From a latent to the tokens of its strongest examples, as a browser has them."""
    catalogue = read_chunk(browser, CATALOGUE)
    hashes = [entry["sha256"] for entry in catalogue["saes"]]
    if evaluated.weights_sha256 not in hashes:
        raise InputError(f"{str(browser)!r} has not got {evaluated.name!r}: make it again with it")
    peaks = read_chunk(browser, str(hashes.index(evaluated.weights_sha256)))["peaks"]
    text = read_chunk(browser, TEXT)
    return lambda latent: [catalogue["tokens"][text[address]] for address in peaks[latent]]
