"""JSON schemas of the recipes, made of their pydantic classes: what an editor completes and checks.

`recipes/schemas/` holds them as files, so that `msae init` names one without importing anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from msae_plugin.architecture.presets import preset_names
from msae_plugin.common.files import write_text_atomic
from msae_plugin.common.recipes import SHIPPED
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.evaluation.recipe import SCHEMAS, EvalConfig
from msae_plugin.training.recipe import RunConfig

CONFIGS: Mapping[str, Any] = {"train": RunConfig, "compare": CompareConfig, "eval": EvalConfig}


def recipe_schema(command: str) -> dict[str, Any]:
    """The schema of a command's recipes."""
    schema = TypeAdapter(CONFIGS[command]).json_schema()
    properties = schema["properties"]
    for key in ("sae", "common"):
        if key in properties:
            properties[key] |= {"properties": _sae_keys()}
    if "saes" in properties:
        properties["saes"]["additionalProperties"] = {
            "type": ["object", "null"],
            "properties": _sae_keys(),
        }
    if command == "compare":
        # Where `CompareConfig.load` takes a name or a path, the class holds what it stands for.
        properties["evaluation"]["anyOf"].append({"type": "string"})
    if command == "eval":
        properties["evaluations"]["propertyNames"] = {"enum": list(SCHEMAS)}
    return {"$schema": GenerateJsonSchema.schema_dialect, **_with_underscores(schema)}


def _with_underscores(schema: Any) -> Any:
    """Whole numbers may be text for an editor: `400_000` is a number in YAML 1.1 alone."""
    if isinstance(schema, list):
        return [_with_underscores(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_underscores(value) for key, value in cast("dict[str, Any]", schema).items()}
    if found.get("type") == "integer":
        found |= {"type": ["integer", "string"], "pattern": "^[-+]?[0-9][0-9_]*$"}
    return found


def _sae_keys() -> dict[str, Any]:
    """Of an SAE's settings those that are the same in every version of SAELens."""
    return {
        "architecture": {"type": "string", "description": "multiscale, or any of SAELens'."},
        "preset": {"enum": preset_names(), "description": "Of multiscale."},
        "d_sae": {"type": "integer", "minimum": 1, "description": "Latents."},
        "lr": {"type": "number", "exclusiveMinimum": 0, "description": "In place of training.lr."},
    }


def write_schemas(folder: Path) -> None:
    """Write the file of every command."""
    for command in CONFIGS:
        text = json.dumps(recipe_schema(command), indent=1, ensure_ascii=False)
        write_text_atomic(folder / f"{command}.json", text + "\n")


if __name__ == "__main__":
    write_schemas(SHIPPED / "schemas")
