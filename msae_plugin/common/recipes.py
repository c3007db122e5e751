"""Recipes: YAML files, `--set`, and pydantic dataclasses that refuse what they do not understand.

YAML's own surprises are repaired here: PyYAML reads `3e-4` as text because YAML 1.1 wants a dot in
a float, and `on` as a boolean. Text becomes a number where the type asks for one, not in the
loader: an SAE's keys stay as they were written, because finished SAEs are recognised by a digest of
them.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo
from typing_extensions import get_type_hints, is_typeddict

from msae_plugin.common.errors import InputError, shown

RECIPE = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Of every pydantic dataclass of a recipe; the text below a field is its description."""


def _number(value: Any) -> Any:
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _whole(value: Any) -> Any:
    # 1e6 is a natural way to write a number of tokens.
    number = _number(value) if isinstance(value, str) else value
    return int(number) if isinstance(number, float) and number.is_integer() else value


def _for_torch(value: Any) -> Any:
    largest = 2**63 - 1 if isinstance(value, int) else 3.4e38
    if value > largest:
        raise ValueError(f"at most {largest}")
    return value


def _on_off(value: Any) -> Any:
    # `tensorboard: on` reaches us as True, `off` as False: YAML 1.1 booleans.
    return ("on" if value else "off") if isinstance(value, bool) else value


Flag: TypeAlias = Annotated[bool, Strict()]
Text: TypeAlias = Annotated[str, Strict()]
Whole: TypeAlias = Annotated[int, Strict(), BeforeValidator(_whole), AfterValidator(_for_torch)]
Count: TypeAlias = Annotated[Whole, Field(ge=1)]
CountOrZero: TypeAlias = Annotated[Whole, Field(ge=0)]
_AnyNumber: TypeAlias = Annotated[float, Strict(), BeforeValidator(_number)]
Number: TypeAlias = Annotated[_AnyNumber, AllowInfNan(False), AfterValidator(_for_torch)]
Positive: TypeAlias = Annotated[Number, Field(gt=0)]
PositiveOrZero: TypeAlias = Annotated[Number, Field(ge=0)]
ON_OFF = BeforeValidator(_on_off)

_STRICT: Mapping[Any, Any] = {bool: Flag, str: Text, int: Whole, float: _AnyNumber}
_SPOKEN: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping of keys to values",
}
SHIPPED = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""
# Where they were in a clone before: commands of that time still work.
_EARLIER_FOLDERS = ("examples", "eval_configs")
# What `--set GROUP.NAME=null` removes, by group.
_CAN_BE_LEFT_OUT = {"saes": "SAE", "evaluations": "evaluation"}


def did_you_mean(
    name: str,
    known: Iterable[str],
    otherwise: str = "known are: ",
    *,
    shown: Callable[[str], str] = repr,
    n: int = 1,
    listed: int = 1000,
) -> str:
    """`did you mean 'x'?`, or `otherwise` and the known names where none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(shown, near))}?"
    return otherwise + ", ".join(names[:listed]) + (", ..." if len(names) > listed else "")


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """One line naming the unknown key, where it stands, and the nearest known name."""
    place = f" in {where!r}" if where else ""
    return f"unknown key {key!r}{place}: {did_you_mean(key, sorted(known))}"


def as_mapping(value: object, where: str) -> dict[str, Any]:
    """The value, if it is a mapping with string keys."""
    return coerce(value, dict[str, Any], where)


def read_yaml(path: Path, kind: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file; `kind` names it in messages."""
    try:
        values: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {kind} {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{kind} {str(path)!r} is not a text file") from error
    # ValueError: dates and numbers that are none. RecursionError: brackets in brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{str(path)!r} is not valid YAML: {problem}") from error
    if values is None:
        raise InputError(f"{kind} {str(path)!r} is empty")
    return as_mapping(values, str(path))


def command_of(values: Mapping[str, Any]) -> str | None:
    """The command that a recipe is for: train, compare or eval; None where it does not show."""
    kinds = (("evaluations", "eval"), ("l0", "compare"), ("sae", "train"), ("saes", "train"))
    return next((command for key, command in kinds if key in values), None)


def headline(file: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = itertools.takewhile(
        lambda line: line.startswith("# "), file.read_text(encoding="utf-8").splitlines()
    )
    return re.split(r"\.(?:\s|$)", " ".join(line.removeprefix("# ") for line in lines))[0] + "."


@functools.cache
def shipped_recipes(command: str) -> dict[str, Path]:
    """The recipes of a command that come with the package, by name."""
    files = {file.stem: file for file in SHIPPED.glob("*.yaml")}
    return {n: file for n, file in sorted(files.items()) if command_of(read_yaml(file)) == command}


def find_recipe(path: Path | str, command: str) -> Path:
    """The file that a path or the name of a shipped recipe stands for; the disk comes first."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    name = file.name.removesuffix(".yaml")
    shipped = SHIPPED / f"{name}.yaml"
    by_name = len(file.parts) == 1 or file.parent.name in _EARLIER_FOLDERS
    if by_name and not file.is_dir() and shipped.is_file():
        return shipped
    hint = did_you_mean(name, shipped_recipes(command), "shipped ones are ", shown=str)
    problem = "is a folder" if file.is_dir() else "does not exist"
    raise InputError(f"recipe {str(path)!r} {problem}; {hint}")


def read_recipe(path: Path | str, command: str) -> dict[str, Any]:
    """The values of a recipe, by path or name; refused where it is for another command."""
    values = read_yaml(find_recipe(path, command))
    found = command_of(values)
    if found not in (command, None):
        raise InputError(
            f"{str(path)!r} is a recipe for msae {found}, and this command needs one for msae "
            f"{command}"
        )
    return values


def with_only(
    values: Mapping[str, Any], names: Sequence[str], elsewhere: Iterable[str] = ()
) -> dict[str, Any]:
    """A recipe with some of its `saes` alone; as it is where no name is given.

    `elsewhere` are names of SAEs that do not stand in `saes`.
    """
    saes = as_mapping(values.get("saes") or {}, "saes")
    known = [*saes, *elsewhere]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) if known else "it has no 'saes'"
            raise InputError(f"--only {name!r} is no SAE of the recipe: {hint}")
    if not names:
        return dict(values)
    return {**values, "saes": {name: saes[name] for name in saes if name in names}}


def with_overrides(
    values: Mapping[str, Any],
    overrides: Sequence[str],
    adjust: Callable[[Any, str], Any] = lambda value, _: value,
) -> dict[str, Any]:
    """A copy of a recipe with `--set` applied, less the keys that are null.

    Overrides are `key.path=value` with the value in YAML, applied in order; `saes.NAME=null` and
    `evaluations.NAME=null` leave one out. `adjust` is applied to each value, with its path.
    """
    merged = copy.deepcopy(dict(values))
    for override in overrides:
        path, separator, text = override.partition("=")
        where = f"--set {override!r}"
        if not separator:
            raise InputError(f"{where} is not of the form key.path=value")
        try:
            value: object = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{where}: the value is not valid YAML") from error
        set_value(merged, path.strip(), adjust(value, path.strip()), where)
    return {key: value for key, value in merged.items() if value is not None}


def set_value(values: dict[str, Any], path: str, value: object, where: str) -> None:
    """Set a dotted key in nested dictionaries, making those that are missing."""
    keys = path.split(".")
    if not all(keys):
        raise InputError(f"{where} is not of the form key.path=value")
    inner = values
    for depth, key in enumerate(keys[:-1]):
        if inner.get(key) is None:
            inner[key] = {}
        if not isinstance(inner[key], dict):
            raise InputError(f"{where}: {'.'.join(keys[: depth + 1])!r} has no keys")
        inner = cast("dict[str, Any]", inner[key])
    if value is None and len(keys) == 2 and keys[0] in _CAN_BE_LEFT_OUT:
        if keys[1] not in inner:
            kind = _CAN_BE_LEFT_OUT[keys[0]]
            raise InputError(f"{where}: the recipe has no such {kind} to leave out")
        del inner[keys[1]]
    else:
        inner[keys[-1]] = value


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """Check a value against a type, turning `"3e-4"` into a float and 1e6 into a whole number.

    The type is a scalar, Literal, union, list or dict of these, or a dataclass of a recipe;
    anything else is not checked. `where` is the dotted path of the value, for messages.
    """
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        raise _one_line(error, annotation, where) from error


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_strict(annotation))


def _strict(annotation: Any) -> Any:
    """The same type without pydantic's conversions, as SAELens' and SAEBench's hints need it."""
    origin, members = get_origin(annotation), get_args(annotation)
    if annotation in _STRICT:
        return _STRICT[annotation]
    if origin is Literal:
        return Annotated[annotation, ON_OFF]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_strict, members))]  # noqa: UP007
    if origin in (list, dict):
        return cast("Any", origin)[tuple(map(_strict, members))]
    ours = origin is Annotated or hasattr(annotation, "__pydantic_config__")
    return annotation if ours or annotation in (list, dict, types.NoneType) else Any


def _one_line(error: ValidationError, annotation: Any, where: str) -> InputError:
    """Say the first of pydantic's errors in one line that names the key and what is allowed."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    steps, value = list(first["loc"]), first["input"]
    bad_key = first["type"] == "invalid_key" or "[key]" in steps
    if bad_key:
        steps = steps[: -2 if "[key]" in steps else -1]
    wanted, limits = _bare(annotation)
    for step in steps:
        if hasattr(wanted, "__pydantic_fields__"):
            fields: dict[str, FieldInfo] = wanted.__pydantic_fields__
            if step not in fields:
                return InputError(unknown_key_message(str(step), fields, where))
            wanted, limits = _bare(fields[str(step)].annotation)
            limits = [*fields[str(step)].metadata, *limits]
        elif get_origin(wanted) in (list, dict):
            wanted, limits = _bare(get_args(wanted)[-1])
        elif is_typeddict(wanted):
            if first["type"] == "missing" and step == steps[-1]:
                place = repr(where) if where else "it"
                return InputError(f"{place} has no {step!r}")
            wanted, limits = _bare(get_type_hints(wanted).get(str(step)))
        else:
            break  # A member of a union.
        where = f"{where}[{step}]" if isinstance(step, int) else f"{where}.{step}".lstrip(".")
    if bad_key:
        wanted_keys = "whole numbers" if first["type"] == "string_pattern_mismatch" else "text"
        return InputError(f"{where!r} has the key {shown(value)}: keys must be {wanted_keys}")
    out_of_limits = first["type"].startswith(("greater_than", "less_than", "finite_number"))
    if out_of_limits:
        value = _whole(value) if wanted is int else _number(value)
    elif get_origin(wanted) is Literal:
        value = _on_off(value)
    allowed = str(cause) if cause else _spoken(wanted)
    if out_of_limits:
        allowed = _spoken_limits(limits)
    return InputError(f"{where!r} must be {allowed}, not {shown(value)}")


def _bare(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without `Annotated` and `| None`, and what stood in the former."""
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    if get_origin(annotation) is Annotated:
        wanted, limits = _bare(members[0])
        return wanted, [*members[1:], *limits]
    if get_origin(annotation) in (Union, types.UnionType) and len(members) == 1:
        return _bare(members[0])
    return annotation, []


def _spoken(wanted: Any) -> str:
    origin, members = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(_bare(member)[0]).removeprefix("one of ") for member in members)
    if hasattr(wanted, "__pydantic_fields__") or is_typeddict(wanted):
        return _SPOKEN[dict]
    return _SPOKEN.get(origin or wanted, str(wanted))


def _spoken_limits(limits: Iterable[Any]) -> str:
    flat = [item for m in limits for item in (m.metadata if isinstance(m, FieldInfo) else [m])]
    names = ("gt", "ge", "lt", "le")
    bounds = {name: getattr(item, name) for item in flat for name in names if hasattr(item, name)}
    low, high = (bounds.get(a, bounds.get(b)) for a, b in (("ge", "gt"), ("le", "lt")))
    if low is None:
        return "a finite number"
    if high is None and "gt" in bounds:
        return "a positive number"
    if high is None:
        return "0 or more" if low == 0 else f"at least {low}"
    if "gt" in bounds and "lt" in bounds:
        return f"between {low} and {high}"
    return f"in {'[' if 'ge' in bounds else '('}{low}, {high}{']' if 'le' in bounds else ')'}"
