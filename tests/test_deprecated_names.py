"""Names that SAELens will remove are not used: its deprecated functions, and others it warns of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import sae_lens

ROOT = Path(__file__).parents[1]
OURS = ("msae_plugin", "msae_cli", "examples", "benchmarks")
# Deprecated by a warning in SAELens' code, not by a decorator that can be asked.
WARNED = {"hook_eval"}
SET = "use_error_term"  # may be read, and is an argument of SAELens' own constructors


def decorated() -> set[str]:
    """Public functions, classes and methods of SAELens that its decorator marks."""
    public = {name: getattr(sae_lens, name) for name in sae_lens.__all__}
    methods = {
        name: value
        for found in public.values()
        if isinstance(found, type)
        for name, value in vars(found).items()
    }
    return {
        name
        for name, value in {**methods, **public}.items()
        if hasattr(getattr(value, "__func__", value), "__deprecated__")
    }


def is_loading(node: ast.AST) -> bool:
    """Whether it is `SAE.from_pretrained(...)`, of any class with SAE in its name."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and isinstance(node.func.value, ast.Name)
        and "SAE" in node.func.value.id
    )


def used(source: str, banned: set[str]) -> Iterator[str]:
    """What a module uses of the banned names, and of an SAE as the tuple it once was."""
    for node in ast.walk(ast.parse(source)):
        names = {
            getattr(node, field, None) for field in ("id", "attr", "arg", "name")
        } & banned  # a name, an attribute, an argument, an import
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in sorted(names))
        if isinstance(node, ast.Constant) and node.value in banned:
            yield f"line {node.lineno}: {node.value}"
        if isinstance(node, ast.Attribute) and node.attr == SET and isinstance(node.ctx, ast.Store):
            yield f"line {node.lineno}: {SET} is set"
        if isinstance(node, ast.Subscript) and is_loading(node.value):
            yield f"line {node.lineno}: from_pretrained(...)[...]"
        unpacked = isinstance(node, ast.Assign) and is_loading(node.value)
        if unpacked and any(isinstance(target, ast.Tuple) for target in node.targets):
            yield f"line {node.lineno}: ... , ... = from_pretrained(...)"


def test_saelens_still_marks_what_it_deprecates() -> None:
    assert {"load_from_pretrained", "SAETrainingRunner"} <= decorated()


@pytest.mark.parametrize("folder", OURS)
def test_nothing_of_ours_uses_a_name_that_saelens_will_remove(folder: str) -> None:
    banned = decorated() | WARNED
    found = [
        f"{path.relative_to(ROOT)}, {use}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for use in used(path.read_text(encoding="utf-8"), banned)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "config(hook_eval='x')",
        "sae, cfg, _ = SAE.from_pretrained('r', 'i')",
        "sae = SAE.from_pretrained('r', 'i')[0]",
        "SAE.load_from_pretrained('p')",
        "from sae_lens import SAETrainingRunner",
        "fields['hook_eval']",
        "sae.use_error_term = True",
    ],
)
def test_every_such_use_is_found(line: str) -> None:
    assert list(used(line, decorated() | WARNED))
    assert not list(used("sae = SAE.from_pretrained('r', 'i')", decorated() | WARNED))
