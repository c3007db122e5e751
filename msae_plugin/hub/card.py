"""The model card of a repository: front matter, and a generated part between two markers.

Everything outside the markers belongs to the user and is carried over as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import yaml
from huggingface_hub import CardData, RepoCard

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import (
    CardEntry,
    base_terms,
    evaluated_on,
    hub_dataset,
    hub_model,
    sources_of,
)

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
# The letter of docs/method.md in front of a mechanism, which says nothing to a reader of the card.
_LETTER = re.compile(r"^\[\w\] ")

_BETTER: Mapping[bool | None, str] = {True: "higher is better", False: "lower is better"}

_EVALUATION_NOTES = {
    "unlearning": "`unlearning_score` is how much accuracy on dangerous-knowledge questions "
    "(WMDP-bio) an intervention on a few latents removes while accuracy elsewhere stays. It says "
    "how separable that topic is at these latents. It does not say that the knowledge is gone from "
    "the model, nor that a model with such an intervention is safe. Published scores on Gemma-2-2B "
    "lie between 0.00 and 0.20 and vary 15-fold inside one architecture (SAEBench, arXiv "
    "2503.09532): read it with its spread, and do not rank SAEs by it.",
    "absorption": "`absorption_fraction` was redefined in SAEBench 0.6: it is not comparable with "
    "numbers published before.",
    "scr": "SCR is unreliable as a metric of SAE quality (arXiv 2605.18229).",
    "tpp": "TPP is unreliable as a metric of SAE quality (arXiv 2605.18229).",
}


def render(repo: str, entries: Sequence[CardEntry], shown: CardEntry, licence: str) -> str:
    """The generated part."""
    named = labels([entry.folder for entry in entries])
    sections = (
        _what_it_is(entries),
        _list_of_saes(entries),
        _warnings(entries, named),
        _loading(repo, shown),
        _metrics(entries, named),
        _figures(entries, named),
        _training(entries, named),
        _limitations(entries),
        _terms(entries, licence),
        _sources(entries),
    )
    return "\n\n".join(section for section in sections if section)


Labels = Mapping[str, str]


def labels(folders: Sequence[str]) -> Labels:
    """Short names for folders: the last part of the path where no other has the same."""
    short = [folder.rsplit("/", 1)[-1] for folder in folders]
    return {
        folder: f"`{name}`" if short.count(name) == 1 else f"`{folder}`"
        for folder, name in zip(folders, short, strict=True)
    }


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _linked(text: str) -> str:
    """The text with a link at every arXiv number."""
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _named_model(entry: CardEntry) -> str:
    name = entry.recorded("model_name")
    found = hub_model(name)
    return (
        f"`{name}` (a local model)"
        if found is None
        else f"[{found}](https://huggingface.co/{found})"
    )


def _what_it_is(entries: Sequence[CardEntry]) -> str:
    models = ", ".join(dict.fromkeys(_named_model(entry) for entry in entries))
    what = "A sparse autoencoder" if len(entries) == 1 else f"{len(entries)} sparse autoencoders"
    return (
        f"{what} (SAE) for the activations of {models}, in the format of "
        "[SAELens](https://github.com/decoderesearch/SAELens). An SAE writes an activation as a "
        "sum of few directions out of many: `encode` gives the latents, `decode` the sum."
    )


def _list_of_saes(entries: Sequence[CardEntry]) -> str:
    rows = [
        (
            f"`{entry.folder}`",
            entry.trained_as,
            "yes" if entry.has_twin else "no" if entry.needs_plugin else "-",
            f"{entry.config['d_sae']:,}",
            "not recorded" if entry.l0 is None else f"{entry.l0:.1f}",
            entry.recorded("seed"),
            f"`{entry.recorded('hook_name')}`",
            f"{entry.config['d_in']:,}",
        )
        for entry in entries
    ]
    headings = ("folder", "architecture", "twin", "latents", "L0", "seed", "hook", "d_in")
    return (
        f"## SAEs\n\n{_table(headings, rows)}\n\n"
        "L0: active latents per token, of the exported SAE on real activations where that was "
        "measured. Twin: the same SAE once more as SAELens' own `jumprelu`, in the sub-folder "
        "`jumprelu`, for hosts without the package `msae-plugin`; `-` where SAELens alone loads "
        "the SAE anyway."
    )


def _warnings(entries: Sequence[CardEntry], named: Labels) -> str:
    lines = [f"- {named[entry.folder]}: {line}" for entry in entries for line in entry.warnings]
    return "## Warnings\n\n" + "\n".join(lines) if lines else ""


def loading_snippet(repo: str, folder: str, plugin: bool) -> str:
    """Python that loads an SAE and uses it on `activations`."""
    first = "import msae_plugin  # registers the architecture `multiscale`\n" if plugin else ""
    return (
        f"{first}from sae_lens import SAE\n\n"
        f'sae = SAE.from_pretrained(\n    "{repo}",\n    "{folder}",\n)\n'
        "latents = sae.encode(activations)\n"
        "reconstruction = sae.decode(latents)"
    )


def activations_snippet(model: str, hook: str) -> str:
    """Python that makes `activations` with TransformerLens, as SAELens does in training."""
    return (
        "from transformer_lens import HookedTransformer\n\n"
        f'model = HookedTransformer.from_pretrained_no_processing("{model}")\n'
        '_, cache = model.run_with_cache("Any text.")\n'
        f'activations = cache["{hook}"]'
    )


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _loading(repo: str, shown: CardEntry) -> str:
    hook, model = shown.recorded("hook_name"), hub_model(shown.recorded("model_name"))
    read = f"`activations` are read at `{hook}`, of shape (..., {shown.config['d_in']})"
    # TransformerLens' own names only; a hook of the original model has none in its cache.
    if model is not None and ".hook_" in hook:
        parts = [f"{read}, for example so:\n\n{_python(activations_snippet(model, hook))}"]
    else:
        parts = [f"{read}."]
    if shown.metadata.get("exclude_special_tokens"):
        parts.append(
            "Special tokens (BOS and the like) were left out of training: what the SAE makes of "
            "their activations, the first of every text among them, means nothing."
        )
    plain = _python(loading_snippet(repo, shown.folder, plugin=shown.needs_plugin))
    if not shown.needs_plugin:
        parts.append(f"With SAELens:\n\n{plain}")
    else:
        parts.append(f"With the packages `sae-lens` and `msae-plugin`:\n\n{plain}")
        if shown.has_twin:
            twin = loading_snippet(repo, f"{shown.folder}/jumprelu", plugin=False)
            parts.append(
                f"With `sae-lens` alone, the twin, whose latents are equal:\n\n{_python(twin)}"
            )
        else:
            reason = str(shown.export.get("twin_obstacle") or "it was not exported")
            parts.append(f"There is no twin that loads without the package: {reason}.")
    parts.append(
        f"`msae download {repo}:{shown.folder} --output DIR` fetches a folder with everything in it"
        f" (`{repo}@REVISION:FOLDER` of another revision)."
    )
    return "## Load\n\n" + "\n\n".join(parts)


def _protocols(entries: Sequence[CardEntry]) -> Iterator[tuple[str, list[CardEntry]]]:
    """(evaluation, SAEs measured under the same settings): numbers of one table are comparable."""
    groups: dict[tuple[str, str], list[CardEntry]] = {}
    for entry in entries:
        for evaluation in dict.fromkeys(entry.evaluations()):
            model = cast("Mapping[str, Any]", (entry.summary or {}).get("model") or {})
            protocol = json.dumps([entry.settings(evaluation), model], sort_keys=True, default=str)
            groups.setdefault((evaluation, protocol), []).append(entry)
    for (evaluation, _), members in sorted(groups.items(), key=lambda group: group[0]):
        yield evaluation, members


def _metrics(entries: Sequence[CardEntry], named: Labels) -> str:
    parts = ["## Metrics"]
    for evaluation, members in _protocols(entries):
        names = list(dict.fromkeys(s.metric for m in members for s in m.scores(evaluation)))
        rows: list[list[str]] = []
        for member in members:
            scores = {score.metric: score for score in member.scores(evaluation)}
            seeds = next(iter(scores.values())).seeds
            cells = [scores[name].text() if name in scores else "not measured" for name in names]
            rows.append([named[member.folder], *cells, ", ".join(map(str, seeds))])
        parts.append(f"### {evaluation}")
        parts.append(_protocol(evaluation, members[0]))
        parts.append(_table(["SAE", *(f"`{name}`" for name in names), "seeds"], rows))
        parts.append("\n".join(_definitions(evaluation, names, members[0])))
        parts += [
            f"{named[member.folder]}: {note}"
            for member in members
            for note in member.notes(evaluation)
        ]
        if evaluation in _EVALUATION_NOTES:
            parts.append(_linked(_EVALUATION_NOTES[evaluation]))
    failed = [f"- {named[e.folder]}: {line}" for e in entries for line in e.not_measured()]
    if failed:
        parts.append("Tried without a result:\n\n" + "\n".join(failed))
    unmeasured = [named[e.folder] for e in entries if not e.evaluations() and not e.not_measured()]
    if unmeasured:
        parts.append(f"Not evaluated, so there are no numbers: {', '.join(unmeasured)}.")
    if len(parts) > 1 and len(unmeasured) < len(entries):
        parts.append(
            "± is one standard deviation over the seeds named, which seed the evaluation; a single "
            "seed has no spread. All metrics and SAEBench's own files are in each SAE's folder "
            "(`summary.json`, one folder per evaluation)."
        )
    return "\n\n".join(parts)


def _protocol(evaluation: str, member: CardEntry) -> str:
    summary = member.summary or {}
    model = cast("Mapping[str, Any]", summary.get("model") or {})
    versions = cast("Mapping[str, Any]", summary.get("versions") or {})
    facts = [f"data: {evaluated_on(evaluation, member.settings(evaluation))}"]
    if model:
        facts.append(f"model: {model.get('name')} in {model.get('dtype')}")
    facts += [
        f"`{name}: {value}`"
        for name, value in member.settings(evaluation).items()
        if name not in ("dataset", "dataset_names") and isinstance(value, bool | int | float | str)
    ]
    facts += [
        f"{package} {versions[package]}"
        for package in ("sae-bench", "sae-probes", "sae-lens", "msae-plugin")
        if versions.get(package)
    ]
    return f"Protocol: {'; '.join(facts)}."


def _definitions(evaluation: str, names: Sequence[str], member: CardEntry) -> Iterator[str]:
    for name in names:
        meaning = member.definition(evaluation, name)
        if meaning:
            better = _BETTER.get(cast("bool | None", meaning.get("higher_is_better")))
            facts = [f"unit: {meaning.get('unit')}", str(meaning.get("tokens") or "")]
            facts += [better or "", f"computed by {meaning.get('source')}"]
            told = "; ".join(fact for fact in facts if fact)
            yield f"- `{name}`: {str(meaning.get('definition')).rstrip('.')} ({told})"


def _figures(entries: Sequence[CardEntry], named: Labels) -> str:
    parts: list[str] = []
    for entry in entries:
        for path in entry.figures:
            title = re.sub(r"[-_]+", " ", path.rsplit("/", 1)[-1].removesuffix(".png"))
            parts.append(f"{named[entry.folder]}, {title}:\n\n![{title}]({path})")
    return "## Figures\n\n" + "\n\n".join(parts) if parts else ""


def _text_of(entry: CardEntry) -> str:
    recorded = entry.recorded("dataset_path")
    on_hub = hub_dataset(recorded)
    return recorded if on_hub in (None, recorded) else f"{recorded} ({on_hub})"


def _batch(entry: CardEntry) -> str:
    """Activations per step, with the mini-batches that they were split into."""
    size, parts = entry.run.get("train_batch_size_tokens"), entry.run.get("accumulation_steps")
    if not isinstance(size, int):
        return "not recorded"
    return f"{parts} x {size:,}" if isinstance(parts, int) and parts > 1 else f"{size:,}"


def _training(entries: Sequence[CardEntry], named: Labels) -> str:
    rows = [
        (
            named[entry.folder],
            _text_of(entry),
            entry.recorded("training_tokens"),
            entry.recorded("training_steps"),
            entry.recorded("context_size"),
            _batch(entry),
            f"{entry.run['lr']:g}" if entry.run.get("lr") is not None else "not recorded",
            f"{entry.details['k']:g}" if "k" in entry.details else "-",
            entry.recorded("sae_lens_training_version"),
        )
        for entry in entries
    ]
    headings = (
        "SAE", "text", "tokens", "steps", "context", "batch", "learning rate", "k", "SAELens",
    )  # fmt: skip
    parts = [f"## Training\n\n{_table(headings, rows)}"]
    for entry in entries:
        mechanisms = ", ".join(f"`{_LETTER.sub('', name)}`" for name in entry.mechanisms)
        if mechanisms:
            parts.append(f"Switched on in {named[entry.folder]}: {mechanisms}.")
    parts.append(
        "The whole recipe is in each folder's `runner_cfg.json`, the log in `metrics.jsonl`."
    )
    return "\n\n".join(parts)


def _limitations(entries: Sequence[CardEntry]) -> str:
    texts = ", ".join(
        dict.fromkeys(
            f"{entry.recorded('training_tokens')} tokens of {_text_of(entry)}" for entry in entries
        )
    )
    points = [
        "A reconstruction is not the activation: what an SAE leaves out is lost to every analysis "
        "that uses its latents alone.",
        f"Trained on {texts}: on other text the latents, their number per token and the error "
        "differ.",
        "A latent is a direction that helped to reconstruct, not a proven concept; on many "
        "interpretability metrics even SAEs with random decoders come close (arXiv 2602.14111).",
        "SAEs of another seed find partly other latents: compare SAEs over several training seeds.",
    ]
    if any(entry.evaluations() for entry in entries):
        points.append(
            "The spread in the tables is over evaluation seeds and says nothing of other training "
            "seeds."
        )
        points.append(
            "Differences between SAEs smaller than a few standard deviations, and any difference "
            "measured with one seed, may be noise."
        )
    if any("unlearning" in entry.evaluations() for entry in entries):
        points.append("What an unlearning score does not mean is said below its table.")
    return "## Limitations\n\n" + _linked("\n".join(f"- {point}" for point in points))


def _terms(entries: Sequence[CardEntry], licence: str) -> str:
    models = dict.fromkeys(hub_model(entry.recorded("model_name")) for entry in entries)
    lines = [f"These weights: `{licence}`."]
    for model in models:
        if model is None:
            lines.append("They were computed from a local model, which has terms of its own.")
        else:
            lines.append(
                "They were computed from activations of "
                f"[{model}](https://huggingface.co/{model}), whose own terms are "
                f"{base_terms(model)}: see there what they say of derived works."
            )
    return "## Licence\n\n" + " ".join(lines)


def _sources(entries: Sequence[CardEntry]) -> str:
    found = dict.fromkeys(
        source
        for entry in entries
        for source in sources_of(entry.trained_as, entry.details, entry.evaluations())
    )
    return "## Sources\n\n" + _linked("\n".join(f"- {source}" for source in found))


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
    """The README.md of a repository.

    Raises:
        InputError: The licence is no identifier, or the existing card cannot be read.
    """
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
    data["library_name"] = "saelens"
    data["license"] = licence
    models = (hub_model(_field(entry, "model_name")) for entry in entries)
    _extend(data, "base_model", models)
    _extend(data, "datasets", (hub_dataset(_field(entry, "dataset_path")) for entry in entries))
    _extend(data, "tags", TAGS)
    own = [item for entry in entries for item in entry.model_index(name)]
    others = [
        item
        for item in cast("list[dict[str, Any]]", data.get("model-index") or [])
        if not str(item.get("name", "")).startswith(f"{name}/")
    ]
    if own or others:
        data["model-index"] = [*others, *own]
    else:
        data.pop("model-index", None)


def _field(entry: CardEntry, name: str) -> str | None:
    value = entry.metadata.get(name)
    return None if value is None else str(value)


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
