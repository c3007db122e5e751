"""Neuronpedia: the entry of SAELens' list, the rows of its source set, and SAEBench's results.

Schema: the tables `SourceRelease`, `SourceSet`, `Source` and `Eval` of Neuronpedia's
apps/webapp/prisma/schema.prisma (github.com/hijohnnylin/neuronpedia), in the files that
`sae_dashboard.neuronpedia.neuronpedia_export` of SAEDashboard writes them into, a JSON row a line.
An `Eval` holds SAEBench's own JSON, for which Neuronpedia generates its types from SAEBench's
schemas; there is one per source and evaluation, so that of several seeds the first is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import CardEntry, card_entry, hub_dataset
from msae_plugin.hub.formats.request import ExportRequest
from msae_plugin.hub.plan import PublishOptions, SAEFolder, build_folders
from msae_plugin.hub.publish import plain_path, pretrained_saes_stanza

Row = Mapping[str, Any]
_DETAILS = ("eval_result_details", "eval_result_unstructured")


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Write pretrained_saes.yaml, and MODEL/SOURCE/*.jsonl per SAE."""
    repo = request.repo
    if repo is None:
        raise InputError("Neuronpedia loads SAEs from the Hub: publish them, and give --repo")
    folders = build_folders(request.run, repo, PublishOptions(evaluation=request.evaluation))
    entries = [card_entry(f.path, f.json_file, f.sae.twin is not None, ()) for f in folders]
    user, name = repo.lower().split("/", 1)
    ids = _source_ids(entries, _id(name))
    stanza = yaml.safe_load(pretrained_saes_stanza(repo, entries)) or {}
    if not stanza:
        raise InputError("Neuronpedia loads with SAELens alone: no SAE has a jumprelu twin")
    by_folder = {entry.folder: source for entry, source in zip(entries, ids, strict=True)}
    for release in stanza.values():
        for listed in release["saes"]:
            listed["neuronpedia"] = "/".join(by_folder[listed["id"]])
    (folder / "pretrained_saes.yaml").write_text(yaml.safe_dump(stanza, sort_keys=False))
    for sae, entry, (model, source) in zip(folders, entries, ids, strict=True):
        if plain_path(entry) is None:
            continue
        shared = {"creatorName": user, "visibility": "PUBLIC"}
        description = f"{entry.trained_as} SAEs of {model}"
        rows: dict[str, list[Row]] = {
            "release": [{"name": _id(name), "description": description, **shared}],
            "sourceset": [
                {
                    "modelId": model,
                    "name": _id(name),
                    "description": description,
                    "type": entry.trained_as,
                    "urls": [f"https://huggingface.co/{repo}"],
                    "releaseName": _id(name),
                    **shared,
                }
            ],
            "source": [
                {
                    "id": source,
                    "modelId": model,
                    "setName": _id(name),
                    "visibility": "PUBLIC",
                    "saelensConfig": dict(entry.config),
                    "saelensRelease": repo,
                    "saelensSaeId": plain_path(entry),
                    "hfRepoId": repo,
                    "hfFolderId": plain_path(entry),
                    "dataset": hub_dataset(str(entry.metadata.get("dataset_path") or "")),
                    "num_tokens_in_prompt": entry.metadata.get("context_size"),
                }
            ],
            "eval": list(_evaluations(sae, model, source)),
        }
        place = folder / model / source
        place.mkdir(parents=True)
        for table, lines in rows.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (place / f"{table}.jsonl").write_text(text, encoding="utf-8")
    return ["the entry is for SAELens' pretrained_saes.yaml; the rows are for Neuronpedia's upload"]


def _id(name: str) -> str:
    """A name as Neuronpedia takes them."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")


def _source_ids(entries: list[CardEntry], name: str) -> list[tuple[str, str]]:
    """(model, source) of each SAE: LAYER-SET, and behind `__` what tells those of a layer apart."""
    plain: list[tuple[str, str]] = []
    for entry in entries:
        layer = re.search(r"\d+", entry.recorded("hook_name"))
        model = _id(entry.recorded("model_name").rsplit("/", 1)[-1])
        plain.append((model, f"{layer.group() if layer else 0}-{name}"))
    return [
        found if plain.count(found) == 1 else (found[0], f"{found[1]}__{_id(last)}")
        for found, last in zip(plain, (e.folder.rsplit("/", 1)[-1] for e in entries), strict=True)
    ]


def _evaluations(sae: SAEFolder, model: str, source: str) -> Iterator[Row]:
    measured = sae.measured
    for entry in () if measured is None else measured.summary["results"]:
        for file in list(entry["files"])[:1]:
            path = sae.files[file]
            output = json.loads(path if isinstance(path, bytes) else path.read_bytes())
            details = {key: output.pop(key) for key in _DETAILS if key in output}
            yield {
                "typeName": output.get("eval_type_id", entry["evaluation"]),
                "modelId": model,
                "sourceId": source,
                "output": output,
                "detailedMetrics": details.get(_DETAILS[0]),
            }
