"""Folders import in one direction, files never in a circle, and imported packages are declared."""

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on Python 3.10

ROOT = Path(__file__).parents[1]
# Each may import from those before it. `msae_plugin` is its __init__.py.
ORDER = [
    "upstream",
    "common",
    "architecture",
    "registration",
    "models",
    "data",
    "saes",
    "training",
    "evaluation",
    "comparison",
    "reporting",
    "hub",
    "schema",
    "demo",
    "api",
    "msae_plugin",
    "msae_cli",
    "__main__",
]
# Not declared here, and why.
BROUGHT_BY_OTHERS = {"triton": "torch's CUDA builds bring theirs; imported only where it is found"}


def modules() -> dict[str, Path]:
    """Every module of both packages and its file."""
    found = {}
    for path in sorted(
        p for name in ("msae_plugin", "msae_cli") for p in (ROOT / name).rglob("*.py")
    ):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: Iterable[str]) -> set[str]:
    """Modules a file imports: at its top, in functions and behind TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


def graph() -> dict[str, set[str]]:
    """The project's modules that each module imports."""
    known = modules()
    return {name: imports(path, known) & known.keys() for name, path in known.items()}


def folder(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "msae_plugin" and len(parts) > 1 else parts[0]


def wrong_way(arrows: Mapping[str, set[str]]) -> list[str]:
    """Imports of a folder that stands further right."""
    return [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in sorted(others)
        if ORDER.index(folder(other)) > ORDER.index(folder(name))
    ]


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, empty without one."""
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_folder_has_its_place() -> None:
    assert {folder(name) for name in modules()} == set(ORDER)


def test_folders_import_from_the_left_only() -> None:
    assert wrong_way(graph()) == []


def test_no_files_import_in_a_circle() -> None:
    assert circle(graph()) == []


def test_a_wrong_import_and_a_circle_are_found(tmp_path: Path) -> None:
    file = tmp_path / "models.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from msae_plugin.hub import card\n"
        "def f():\n    import msae_plugin.data.text\n"
    )
    known = ["msae_plugin.hub.card", "msae_plugin.data.text"]
    found = imports(file, known) & set(known)
    assert len(wrong_way({"msae_plugin.models.x": found})) == 2
    assert circle({"a": {"b"}, "b": {"a"}}) != []


def declared() -> tuple[set[str], set[str]]:
    """Names of the required distributions, and of those in an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(lines: Iterable[str]) -> set[str]:
        return {canonicalize_name(Requirement(line).name) for line in lines}

    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return names(project["dependencies"]), names(extras)


@pytest.mark.parametrize("lazy", [False, True])
def test_every_imported_package_is_declared(lazy: bool) -> None:
    required, extra = declared()
    distributions = packages_distributions()
    missing: dict[str, set[str]] = {}
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # Imported only where the extra `eval` or `serve` is.
        optional = lazy or ".saebench." in name or name.endswith("reporting.serve")
        nodes = ast.walk(tree) if lazy else tree.body
        for node in nodes:
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops = {(node.module or "").split(".")[0]}
            else:
                continue
            for top in tops - {"msae_plugin", "msae_cli"} - BROUGHT_BY_OTHERS.keys():
                if top in sys.stdlib_module_names:
                    continue
                found = {canonicalize_name(d) for d in distributions.get(top, [top])}
                if not found & (required | extra if optional else required):
                    missing.setdefault(top, set()).add(name)
    assert missing == {}


def test_where_numpy_1_comes_in_pyarrow_imports_beside_it() -> None:
    """Sae-bench asks for numpy 1; pyarrow 26 needs numpy 2 and does not declare it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(line) for line in project["optional-dependencies"]["eval"]]
    [pyarrow] = [each for each in asked if each.name == "pyarrow"]
    [bench] = [each for each in asked if each.name == "sae-bench"]
    assert not pyarrow.specifier.contains("26.0.0")
    assert pyarrow.specifier.contains("25.0.1")
    assert pyarrow.marker == bench.marker
