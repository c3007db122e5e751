"""The model card of a repository: front matter, and a generated part between two markers.

Everything outside the markers belongs to the user and is carried over as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import yaml
from huggingface_hub import CardData, RepoCard

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import CardEntry
from msae_plugin.hub.card_sections import render
from msae_plugin.hub.sources import hub_dataset, hub_model

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

    Args:
        repo: `user/name`.
        entries: All SAEs that will be in it.
        shown: The one that the snippets load.
        existing: Its README.md so far.
        licence: Identifier of the licence; None keeps the existing one, or takes MIT.

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
