"""Say every difference between two folders of `freeze.py`.

    python tests/goldens/compare.py BEFORE AFTER [--rtol 1e-4] [--atol 1e-6]

Commands, messages, names of files, keys, shapes and everything that is no number must be equal.
Numbers are equal, or close within the tolerance, or different. The exit status is 1 where anything
differs; what is close only is counted and does not count as a difference.
"""

import argparse
import difflib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")
_TENSOR = {"sha256", "shape", "dtype"}


@dataclass
class Findings:
    """What was found, by place."""

    rtol: float
    atol: float
    equal: int = 0
    close: dict[str, float] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)

    def number(self, place: str, one: float, other: float) -> None:
        """Judge two numbers."""
        if one == other:
            self.equal += 1
        elif self.near(one, other):
            scale = max(abs(one), abs(other), self.atol)
            self.close[place] = max(self.close.get(place, 0.0), abs(one - other) / scale)
        else:
            self.different.append(f"{place}: {one!r} -> {other!r}")

    def near(self, one: float, other: float) -> bool:
        """Whether two numbers are equal within the tolerance."""
        return math.isclose(one, other, rel_tol=self.rtol, abs_tol=self.atol)


def compare_values(found: Findings, place: str, one: Any, other: Any) -> None:
    """Compare two values of JSON."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            inside = f"{place} > {key}"
            if key not in other:
                found.different.append(f"{inside}: gone, was {_short(one[key])}")
            elif key not in one:
                found.different.append(f"{inside}: new, {_short(other[key])}")
            else:
                compare_values(found, inside, one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        if all(isinstance(item, str) for item in [*one, *other]):
            compare_texts(found, place, one, other)
            return
        if len(one) != len(other):
            found.different.append(f"{place}: {len(one)} items -> {len(other)}")
        for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            compare_values(found, f"{place}[{index}]", mine, theirs)
    elif _is_number(one) and _is_number(other):
        found.number(place, one, other)
    elif one == other and type(one) is type(other):
        found.equal += 1
    elif isinstance(one, str) and isinstance(other, str):
        compare_texts(found, place, [one], [other])
    else:
        found.different.append(f"{place}: {_short(one)} -> {_short(other)}")


def compare_texts(found: Findings, place: str, one: list[str], other: list[str]) -> None:
    """Compare lines of text; numbers in them may be close."""
    if one == other:
        found.equal += 1
        return
    mine, theirs = "\n".join(one), "\n".join(other)
    if _NUMBER.sub("#", mine) == _NUMBER.sub("#", theirs):
        pairs = zip(_NUMBER.findall(mine), _NUMBER.findall(theirs), strict=True)
        for before, after in pairs:
            found.number(place, float(before), float(after))
        return
    lines = [line for line in difflib.unified_diff(one, other, lineterm="", n=0)][2:]
    shown = "\n        ".join(line[:240] for line in lines[:12] if not line.startswith("@@"))
    found.different.append(f"{place}:\n        {shown}")


def compare_tensors(
    found: Findings, place: str, one: dict[str, Any], other: dict[str, Any], files: list[Path]
) -> None:
    """Compare tensors by hash, and by value where the hashes differ."""
    import torch
    from safetensors.torch import load_file

    for name in sorted(one.keys() | other.keys()):
        inside = f"{place} > {name}"
        if name not in one or name not in other:
            found.different.append(f"{inside}: {'new' if name in other else 'gone'}")
        elif one[name]["sha256"] == other[name]["sha256"] and all(
            one[name][key] == other[name][key] for key in _TENSOR
        ):
            found.equal += 1
        elif any(one[name][key] != other[name][key] for key in ("shape", "dtype")):
            found.different.append(f"{inside}: shape or dtype")
        else:
            mine, theirs = (load_file(file)[name].double() for file in files)
            largest = float((mine - theirs).abs().max() / mine.abs().max().clamp(min=found.atol))
            # In units of the largest entry: single entries near zero have no relative precision.
            if torch.isfinite(mine).all() and largest <= found.rtol:
                found.close[inside] = largest
            else:
                found.different.append(f"{inside}: largest difference {largest:.3g} of the maximum")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 120 else f"{text[:120]} ..."


def _by_words(commands: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Commands by their words; a repeated one with its number."""
    found: dict[str, dict[str, Any]] = {}
    for command in commands:
        words = " ".join(command["command"])
        repeated = sum(name.split(" (again")[0] == words for name in found)
        found[f"{words} (again, {repeated})" if repeated else words] = command
    return found


def compare_case(found: Findings, name: str, folders: list[Path]) -> None:
    """Compare one case."""
    one, other = (json.loads((folder / f"{name}.json").read_text()) for folder in folders)
    commands = [_by_words(record["commands"]) for record in (one, other)]
    for words in [*commands[0], *(words for words in commands[1] if words not in commands[0])]:
        if words in commands[0] and words in commands[1]:
            place = f"{name}: msae {words}"
            compare_values(found, place, commands[0][words], commands[1][words])
        else:
            state = "gone" if words in commands[0] else "new"
            found.different.append(f"{name}: msae {words}: command {state}")
    for path in sorted(one["files"].keys() | other["files"].keys()):
        place = f"{name}: {path}"
        mine, theirs = one["files"].get(path), other["files"].get(path)
        if path not in one["files"] or path not in other["files"]:
            found.different.append(f"{place}: {'gone' if path in one['files'] else 'new'}")
        elif mine and theirs and "tensors" in mine and "tensors" in theirs:
            files = [folder / "tensors" / name / path for folder in folders]
            compare_tensors(found, place, mine["tensors"], theirs["tensors"], files)
        else:
            compare_values(found, place, mine, theirs)


def main() -> None:
    """Compare two folders and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rtol", type=float, default=1e-4)
    parser.add_argument("--atol", type=float, default=1e-6)
    given = parser.parse_args()
    folders = [given.before, given.after]
    cases = [{path.stem for path in folder.glob("*.json")} for folder in folders]
    wrong = 0
    for name in sorted(cases[0] | cases[1]):
        if name not in cases[0] & cases[1]:
            print(f"{name}: only in {folders[name in cases[1]]}")  # noqa: T201
            wrong += 1
            continue
        found = Findings(given.rtol, given.atol)
        compare_case(found, name, folders)
        largest = max(found.close.values(), default=0.0)
        print(  # noqa: T201
            f"{name}: {found.equal} equal, {len(found.close)} close (largest relative difference "
            f"{largest:.1g}), {len(found.different)} different"
        )
        for line in found.different:
            print(f"    {line}")  # noqa: T201
        wrong += len(found.different)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
