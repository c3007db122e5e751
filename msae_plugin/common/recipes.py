"""From YAML to typed dataclasses, refusing what it does not understand.

YAML's own surprises are repaired here: PyYAML reads `3e-4` as a string because YAML 1.1 wants a
dot in a float, and `yes` as a boolean.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from msae_plugin.common.errors import InputError

T = TypeVar("T")


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """One line naming the unknown key, where it stands, and the nearest known name."""
    names = sorted(known)
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(names)}"
    place = f" in {where!r}" if where else ""
    return f"unknown key {key!r}{place}: {hint}"


def as_mapping(value: object, where: str) -> dict[str, Any]:
    """Check that a value is a mapping with string keys.

    Raises:
        InputError: If it is anything else.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{where!r} must be a mapping of keys to values, not {value!r}")
    mapping = cast("Mapping[Any, Any]", value)
    for key in mapping:
        if not isinstance(key, str):
            raise InputError(f"{where!r} has the key {key!r}: keys must be text")
    return dict(mapping)


def build(cls: type[T], values: object, where: str) -> T:
    """Build a dataclass from a mapping, coercing every value to its field's annotation.

    Args:
        cls: A dataclass whose fields all have defaults. Nested dataclasses are built recursively.
        values: The mapping read from YAML.
        where: Dotted path of the mapping, for messages.

    Raises:
        InputError: For an unknown key or a value of the wrong type, naming its dotted path.
    """
    mapping = as_mapping(values, where)
    known = {field.name for field in dataclasses.fields(cast(Any, cls))}
    for key in mapping:
        if key not in known:
            raise InputError(unknown_key_message(key, known, where))
    hints = get_type_hints(cls)
    return cls(
        **{key: coerce(value, hints[key], _join(where, key)) for key, value in mapping.items()}
    )


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """Check a value against an annotation, turning `"3e-4"` into a float and 1 into 1.0.

    Args:
        value: The value read from YAML.
        annotation: A type, a Literal, a union, a list or dict of these, or a dataclass.
        where: Dotted path of the value, for messages.

    Raises:
        InputError: If the value does not fit.
    """
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        return _coerce_literal(value, get_args(annotation), where)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(annotation), where)
    if origin in (list, dict):
        return _coerce_collection(value, origin, get_args(annotation), where)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return value if isinstance(value, annotation) else build(annotation, value, where)
    if annotation in (bool, int, float, str, list, dict):
        return _coerce_scalar(value, annotation, where)
    return value


def _coerce_scalar(value: Any, wanted: type[Any], where: str) -> Any:
    if wanted is float and not isinstance(value, bool):
        if isinstance(value, int):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    # 1e6 is a float to YAML and a natural way to write a number of tokens.
    if wanted is int and isinstance(value, (float, str)):
        number = _whole_number(value)
        if number is not None:
            return number
    if isinstance(value, wanted) and not (isinstance(value, bool) and wanted in (int, float)):
        return value
    raise InputError(f"{where!r} must be {_spoken(wanted)}, not {value!r}")


def _whole_number(value: float | str) -> int | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _coerce_literal(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    # `tensorboard: on` reaches us as True, `off` as False: YAML 1.1 booleans.
    if isinstance(value, bool) and value not in [item for item in allowed if item is value]:
        value = "on" if value else "off"
    if value in allowed:
        return value
    raise InputError(f"{where!r} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def _coerce_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in members:
        return None
    wanted = [member for member in members if member is not type(None)]
    # An exact match wins, so that `bool | list[int]` keeps a boolean a boolean.
    for member in wanted:
        if isinstance(member, type) and type(value) is member:
            return value
    messages: list[str] = []
    for member in wanted:
        try:
            return coerce(value, member, where)
        except InputError as error:
            messages.append(str(error))
    if len(messages) == 1:
        raise InputError(messages[0])
    names = " or ".join(_spoken(member) for member in wanted)
    raise InputError(f"{where!r} must be {names}, not {value!r}")


def _coerce_collection(value: Any, origin: Any, members: tuple[Any, ...], where: str) -> Any:
    if origin is dict:
        mapping = as_mapping(value, where)
        return {key: coerce(item, members[1], _join(where, key)) for key, item in mapping.items()}
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where!r} must be a list, not {value!r}")
    items = cast("list[Any]", value)
    return [coerce(item, members[0], f"{where}[{index}]") for index, item in enumerate(items)]


def _spoken(wanted: Any) -> str:
    spoken: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return spoken.get(wanted, str(wanted))


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
