"""The model card of a repository: front matter, and a generated part between two markers.

Everything outside the markers belongs to the user and is carried over as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast
from urllib.parse import quote

import yaml
from huggingface_hub import CardData, RepoCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from msae_plugin.common.errors import InputError
from msae_plugin.common.table import markdown_rows
from msae_plugin.hub.card_data import (
    FACTS,
    CardEntry,
    base_terms,
    evaluated_on,
    hub_dataset,
    hub_model,
    sources_of,
)
from msae_plugin.upstream import shipped_with_transformer_lens

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
# What Markdown reads inside a line; an underscore inside a word and a pipe outside a table (see
# `_table`) mean nothing, and "<" is `_inert`'s.
_MARKUP = re.compile(r"[\\`*\[\]#~]|(?<!\w)_|_(?!\w)")
# The letter of docs/method.md in front of a mechanism, which says nothing to a reader of the card.
_LETTER = re.compile(r"^\[\w\] ")

_BETTER: Mapping[bool | None, str] = {True: "higher is better", False: "lower is better"}


def render(repo: str, entries: Sequence[CardEntry], shown: CardEntry, licence: str) -> str:
    """The generated part; the snippets load `shown`."""
    named = labels([entry.folder for entry in entries])
    hook, model = shown.recorded("hook_name"), hub_model(shown.recorded("model_name"))
    # TransformerLens' own names only; a hook of the original model has none in its cache.
    readable = model is not None and re.fullmatch(r"[\w.]+", hook) and ".hook_" in hook
    recorded = [entry.recorded("model_name") for entry in entries]
    bases = [hub_model(name) for name in recorded]
    names = [
        f"{code(name)} (a local model)"
        if base is None
        else f"[{base}](https://huggingface.co/{base})"
        for name, base in zip(recorded, bases, strict=True)
    ]
    text = _TEMPLATES.get_template("card.md.j2").render(
        repo=repo,
        entries=entries,
        shown=shown,
        licence=licence,
        named=named,
        models=list(dict.fromkeys(names)),
        sae_rows=[_sae_row(entry) for entry in entries],
        model=model,
        hook=hook,
        readable=readable,
        named_by_transformer_lens=model is not None and shipped_with_transformer_lens(model),
        evaluations=[_evaluation(*group, named) for group in _protocols(entries)],
        unmeasured=[
            named[e.folder] for e in entries if not e.evaluations() and not e.not_measured()
        ],
        figures=[
            {
                "sae": named[entry.folder],
                "title": plain(re.sub(r"[-_]+", " ", path.rsplit("/", 1)[-1].removesuffix(".png"))),
                "path": quote(path),
            }
            for entry in entries
            for path in entry.figures
        ],
        training_rows=[_training_row(entry, named) for entry in entries],
        texts=list(
            dict.fromkeys(
                f"{plain(e.recorded('training_tokens'))} tokens of {_text(e)}" for e in entries
            )
        ),
        base_models=list(dict.fromkeys(bases)),
        sources=list(
            dict.fromkeys(
                source
                for e in entries
                for source in sources_of(e.trained_as, e.details, e.evaluations())
            )
        ),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


Labels = Mapping[str, str]


def labels(folders: Sequence[str]) -> Labels:
    """Short names for folders: the last part of the path where no other has the same."""
    short = [folder.rsplit("/", 1)[-1] for folder in folders]
    return {
        folder: code(name) if short.count(name) == 1 else code(folder)
        for folder, name in zip(folders, short, strict=True)
    }


def plain(value: object) -> str:
    """A name or sentence from a file, which Markdown shows literally, on one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(value).split()))


def code(value: object) -> str:
    """A name from a file as code: on one line, no backtick that would end the code."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in line]
        for line in (headings, *rows)
    ]
    return markdown_rows(lines[0], [False] * len(headings), lines[1:])


def _mechanism(name: str) -> str:
    return code(_LETTER.sub("", name))


def _inert(value: object) -> str:
    """No HTML from names: Markdown would pass it on."""
    return str(value).replace("<", "&lt;")


_TEMPLATES = Environment(
    loader=PackageLoader("msae_plugin.hub"),
    autoescape=False,  # Markdown: `_inert` is its escaping
    finalize=_inert,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
cast("dict[str, Any]", _TEMPLATES.filters).update(
    code=code,
    linked=partial(_ARXIV.sub, r"[arXiv \1](https://arxiv.org/abs/\1)"),
    mechanism=_mechanism,
    plain=plain,
)
cast("dict[str, Any]", _TEMPLATES.globals).update(base_terms=base_terms, table=_table)


def _sae_row(entry: CardEntry) -> Sequence[object]:
    return (
        code(entry.folder),
        plain(entry.trained_as),
        "yes" if entry.has_jumprelu else "no" if entry.needs_plugin else "-",
        f"{entry.d_sae:,}",
        "not recorded" if entry.l0 is None else f"{entry.l0:.1f}",
        plain(entry.recorded("seed")),
        code(entry.recorded("hook_name")),
        f"{entry.d_in:,}",
    )


def _protocols(entries: Sequence[CardEntry]) -> Iterator[tuple[str, list[CardEntry]]]:
    """(evaluation, SAEs measured under the same settings): numbers of one table are comparable."""
    groups: dict[tuple[str, str], list[CardEntry]] = {}
    for entry in entries:
        for evaluation in dict.fromkeys(entry.evaluations()):
            model = (entry.summary or {}).get("model") or {}
            protocol = json.dumps([entry.settings(evaluation), model], sort_keys=True, default=str)
            groups.setdefault((evaluation, protocol), []).append(entry)
    for (evaluation, _), members in sorted(groups.items(), key=lambda group: group[0]):
        yield evaluation, members


def _evaluation(evaluation: str, members: Sequence[CardEntry], named: Labels) -> Mapping[str, Any]:
    """One table of metrics and what belongs to it."""
    names = list(dict.fromkeys(s.metric for m in members for s in m.scores(evaluation)))
    rows: list[list[str]] = []
    for member in members:
        scores = {score.metric: score for score in member.scores(evaluation)}
        seeds = next(iter(scores.values())).seeds
        cells = [scores[name].text() if name in scores else "not measured" for name in names]
        rows.append([named[member.folder], *cells, ", ".join(map(str, seeds))])
    return {
        "name": evaluation,
        "members": members,
        "protocol": _protocol(evaluation, members[0]),
        "headings": ["SAE", *map(code, names), "seeds"],
        "rows": rows,
        "definitions": list(_definitions(evaluation, names, members[0])),
        "remark": FACTS["notes"].get(evaluation, ""),
    }


def _protocol(evaluation: str, member: CardEntry) -> list[str]:
    summary = member.summary or {}
    model = summary.get("model") or {}
    versions = summary.get("versions") or {}
    facts = [f"data: {plain(evaluated_on(evaluation, member.settings(evaluation)))}"]
    if model:
        facts.append(plain(f"model: {model.get('name')} in {model.get('dtype')}"))
    facts += [
        code(f"{name}: {value}")
        for name, value in member.settings(evaluation).items()
        if name not in ("dataset", "dataset_names") and isinstance(value, bool | int | float | str)
    ]
    packages = ("sae-bench", "sae-probes", "sae-lens", "msae-plugin")
    return facts + [plain(f"{name} {versions[name]}") for name in packages if versions.get(name)]


def _definitions(evaluation: str, names: Sequence[str], member: CardEntry) -> Iterator[str]:
    for name in names:
        meaning = member.definition(evaluation, name)
        if meaning:
            better = _BETTER.get(cast("bool | None", meaning.get("higher_is_better")))
            facts = [f"unit: {meaning.get('unit')}", str(meaning.get("tokens") or "")]
            facts += [better or "", f"computed by {meaning.get('source')}"]
            told = "; ".join(fact for fact in facts if fact)
            sentence = str(meaning.get("definition")).rstrip(".")
            yield f"{code(name)}: {plain(f'{sentence} ({told})')}"


def _text(entry: CardEntry) -> str:
    recorded = entry.recorded("dataset_path")
    on_hub = hub_dataset(recorded)
    return plain(recorded if on_hub in (None, recorded) else f"{recorded} ({on_hub})")


def _batch(entry: CardEntry) -> str:
    """Activations per step, with the mini-batches that they were split into."""
    size, parts = entry.run.get("train_batch_size_tokens"), entry.run.get("accumulation_steps")
    if not isinstance(size, int):
        return "not recorded"
    return f"{parts} x {size:,}" if isinstance(parts, int) and parts > 1 else f"{size:,}"


def _training_row(entry: CardEntry, named: Labels) -> Sequence[object]:
    return (
        named[entry.folder],
        _text(entry),
        *map(plain, map(entry.recorded, ("training_tokens", "training_steps", "context_size"))),
        _batch(entry),
        f"{entry.run['lr']:g}" if entry.run.get("lr") is not None else "not recorded",
        f"{entry.details['k']:g}" if "k" in entry.details else "-",
        plain(entry.recorded("sae_lens_training_version")),
    )


BEGIN = "<!-- msae-plugin: generated, do not edit below this line -->"
END = "<!-- msae-plugin: end of the generated part, write below this line -->"
DEFAULT_LICENCE = "mit"
TAGS = ("sparse-autoencoder", "saelens", "mechanistic-interpretability", "msae-plugin")

_LICENCE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")


def make_card(
    repo: str,
    entries: Sequence[CardEntry],
    shown: CardEntry,
    existing: str | None,
    licence: str | None,
) -> str:
    """The README.md of a repository; `existing` is the one it has."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise InputError(
            f"--licence {licence!r} is no identifier of the Hub: use mit, apache-2.0, cc-by-4.0, "
            "gemma, other, ... (https://huggingface.co/docs/hub/repositories-licenses)"
        )
    name = repo.split("/", 1)[1]
    card = _read(repo, existing or f"---\nlibrary_name: saelens\n---\n\n# {name}\n")
    data: dict[str, Any] = card.data.to_dict()
    chosen = licence or str(data.get("license") or DEFAULT_LICENCE)
    _update_front_matter(data, name, entries, chosen)
    card.data = CardData(**data)
    card.text = _with_generated(repo, card.text, render(repo, entries, shown, chosen))
    return str(card)


def _read(repo: str, text: str) -> RepoCard:
    try:
        return RepoCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(
            f"README.md of {repo} has a front matter that is not YAML: repair it on the Hub first"
        ) from error


def _update_front_matter(
    data: dict[str, Any], name: str, entries: Sequence[CardEntry], licence: str
) -> None:
    data |= {"library_name": "saelens", "license": licence}
    _extend(data, "base_model", (hub_model(e.metadata.get("model_name")) for e in entries))
    _extend(data, "datasets", (hub_dataset(e.metadata.get("dataset_path")) for e in entries))
    _extend(data, "tags", TAGS)
    own = [item for entry in entries for item in entry.model_index(name)]
    others = [
        item
        for item in (data.get("model-index") or [])
        if not str(item.get("name", "")).startswith(f"{name}/")
    ]
    if own or others:
        data["model-index"] = [*others, *own]
    else:
        data.pop("model-index", None)


def _extend(data: dict[str, Any], key: str, values: Iterable[str | None]) -> None:
    """Add values to a list of the front matter; what the user wrote stays."""
    present: Any = data.get(key) or []
    so_far = cast("list[str]", present if isinstance(present, list) else [present])
    merged = list(dict.fromkeys([*so_far, *(value for value in values if value is not None)]))
    if merged:
        data[key] = merged


def _with_generated(repo: str, text: str, generated: str) -> str:
    """Replace what is between the markers; without markers, append."""
    block = f"{BEGIN}\n\n{generated}\n\n{END}"
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        return f"{text.rstrip()}\n\n{block}\n"
    if begins != 1 or ends != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(
            f"README.md of {repo} has {begins} opening and {ends} closing markers of the generated "
            "part, which should be one pair: repair or remove them on the Hub first"
        )
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return before + block + after
