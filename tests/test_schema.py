"""The JSON schemas of recipes: as generated, true of every shipped recipe, named by `msae init`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from msae_cli.app import app
from msae_plugin.common.recipes import SHIPPED, shipped_recipes
from msae_plugin.schema import CONFIGS, recipe_schema

RECIPES = [(kind, file) for kind in CONFIGS for file in shipped_recipes(kind).values()]


class Editor(yaml.SafeLoader):
    """Reads `3e-4` as a number, `on` and `1_000` as text, as editors do: YAML 1.2."""


Editor.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in found if not tag.endswith((":bool", ":int", ":float"))
    ]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Editor.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
Editor.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789")
)
Editor.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)(e[-+]?\d+)?$", re.I),
    list("-+.0123456789"),
)


def errors(kind: str, values: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_schema(kind))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(values)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_files_are_what_the_classes_say(kind: str) -> None:
    stored = json.loads((SHIPPED / f"schemas/{kind}.json").read_text(encoding="utf-8"))
    assert stored == recipe_schema(kind), "python -m msae_plugin.schema writes them anew"


@pytest.mark.parametrize(("kind", "file"), RECIPES, ids=lambda value: Path(value).stem)
def test_every_shipped_recipe_is_valid(kind: str, file: Path) -> None:
    assert errors(kind, yaml.load(file.read_text(encoding="utf-8"), Editor)) == []


@pytest.mark.parametrize(
    ("kind", "name", "changes", "where"),
    [
        ("train", "smollm2", {"training": {"token": 5}}, "token"),
        ("train", "smollm2", {"training": {"lr": "fast"}}, "$.training.lr"),
        ("train", "smollm2", {"training": {"tokens": "many"}}, "$.training.tokens"),
        ("train", "smollm2", {"saes": {"a": {"preset": "defualt"}}}, "$.saes.a.preset"),
        ("compare", "compare_smollm2", {"l0": "32"}, "$.l0"),
        ("eval", "offline", {"evaluations": {"cor": {}}}, "cor"),
    ],
)
def test_a_mistake_is_found(kind: str, name: str, changes: dict[str, Any], where: str) -> None:
    values = yaml.load((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"), Editor)
    (found,) = errors(kind, values | changes)
    assert where in found


def test_init_names_the_schema_and_recipes_prints_it(tmp_path: Path) -> None:
    for kind, name in (("train", "smollm2"), ("compare", "demo"), ("eval", "offline")):
        file = tmp_path / f"{name}.yaml"
        assert CliRunner().invoke(app, ["init", name, str(file)]).exit_code == 0
        first, _, rest = file.read_text(encoding="utf-8").partition("\n")
        schema = Path(first.removeprefix("# yaml-language-server: $schema="))
        assert rest == (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
        shown = CliRunner().invoke(app, ["recipes", "--schema", kind])
        assert json.loads(shown.stdout) == json.loads(schema.read_text(encoding="utf-8"))
    refused = CliRunner().invoke(app, ["recipes", "--schema", "trains"])
    assert refused.exit_code == 2
    assert "known are train, compare, eval" in refused.output
