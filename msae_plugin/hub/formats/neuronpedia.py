"""Neuronpedia: the entry of SAELens' list, the rows of its source set, and SAEBench's results.

Schema: the tables `SourceSet`, `Source` and `Eval` of apps/webapp/prisma/schema.prisma in
github.com/hijohnnylin/neuronpedia, a JSON row a line in the files that SAEDashboard's
`neuronpedia_export` has for them. An `Eval` holds SAEBench's own JSON, from whose schemas
Neuronpedia has its types; there is one per source and evaluation: of several seeds the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from sae_lens.constants import SAE_CFG_FILENAME

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import CardEntry, hub_dataset
from msae_plugin.hub.formats.request import ExportRequest
from msae_plugin.hub.plan import PublishOptions, SAEFolder, build_folders, uploaded_entry
from msae_plugin.hub.publish import plain_path, pretrained_saes_stanza

_DETAILS = ("eval_result_details", "eval_result_unstructured")


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Write pretrained_saes.yaml, and MODEL/SOURCE/*.jsonl per SAE."""
    repo = request.repo
    if repo is None:
        raise InputError("Neuronpedia loads SAEs from the Hub: publish them, and give --repo")
    folders = build_folders(request.run, repo, PublishOptions(evaluation=request.evaluation))
    found = [(folder, uploaded_entry(folder)) for folder in folders]
    entries = [entry for _, entry in found]
    stanza = yaml.safe_load(pretrained_saes_stanza(repo, entries))
    if not stanza:
        raise InputError("Neuronpedia loads with SAELens alone: no SAE has a jumprelu copy")
    user, name = repo.split("/", 1)
    ids = dict(zip((e.folder for e in entries), _source_ids(entries, _id(name)), strict=True))
    for listed in (listed for release in stanza.values() for listed in release["saes"]):
        listed["neuronpedia"] = "/".join(ids[listed["id"]])
    (folder / "pretrained_saes.yaml").write_text(yaml.safe_dump(stanza, sort_keys=False))
    for sae, entry in found:
        path, (model, source) = plain_path(entry), ids[entry.folder]
        if path is None:
            continue
        shared = {"modelId": model, "visibility": "PUBLIC"}
        description = f"{entry.trained_as} SAEs of {model}"
        set_row = {"name": _id(name), "description": description, "type": entry.trained_as}
        set_row |= {"creatorName": user, "urls": [f"https://huggingface.co/{repo}"], **shared}
        text = hub_dataset(str(entry.metadata.get("dataset_path")))
        # Of the folder that is named, which may be the jumprelu copy.
        config = sae.json_file(f"{path}/{SAE_CFG_FILENAME}".removeprefix(f"{entry.folder}/"))
        row = {"id": source, "setName": _id(name), "hfRepoId": repo, "hfFolderId": path, **shared}
        row |= {"saelensRelease": repo, "saelensSaeId": path, "saelensConfig": config}
        row |= {"dataset": text, "num_tokens_in_prompt": entry.metadata.get("context_size")}
        place = folder / model / source
        place.mkdir(parents=True)
        evaluations = [{"modelId": model, "sourceId": source, **e} for e in _evaluations(sae)]
        for table, rows in (("sourceset", [set_row]), ("source", [row]), ("eval", evaluations)):
            lines = "".join(json.dumps(line) + "\n" for line in rows)
            (place / f"{table}.jsonl").write_text(lines, encoding="utf-8")
    return ["the entry is for SAELens' pretrained_saes.yaml; the rows are for Neuronpedia's upload"]


def _id(name: str) -> str:
    """A name as Neuronpedia takes them."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")


def _source_ids(entries: Sequence[CardEntry], name: str) -> list[tuple[str, str]]:
    """(model, source) of each SAE: LAYER-SET, and behind `__` what tells those of a layer apart."""
    plain: list[tuple[str, str]] = []
    for entry in entries:
        layer = re.search(r"\d+", entry.recorded("hook_name"))
        model = _id(entry.recorded("model_name").rsplit("/", 1)[-1])
        plain.append((model, f"{layer.group() if layer else 0}-{name}"))
    return [
        found
        if plain.count(found) == 1
        else (found[0], f"{found[1]}__{_id(entry.folder.rsplit('/', 1)[-1])}")
        for found, entry in zip(plain, entries, strict=True)
    ]


def _evaluations(sae: SAEFolder) -> Iterator[Mapping[str, Any]]:
    results = [] if sae.measured is None else sae.measured.summary["results"]
    for file in (entry["files"][0] for entry in results if entry["files"]):
        stored = sae.files[file]
        output = json.loads(stored if isinstance(stored, bytes) else stored.read_bytes())
        details = {key: output.pop(key, None) for key in _DETAILS}
        row = {"typeName": output["eval_type_id"], "output": output}
        yield row | {"detailedMetrics": details[_DETAILS[0]]}
