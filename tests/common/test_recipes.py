"""What values of a recipe become, and what is said of those that cannot."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import (
    ON_OFF,
    RECIPE,
    SHIPPED,
    Count,
    Flag,
    Number,
    Positive,
    Text,
    Whole,
    coerce,
    did_you_mean,
    find_recipe,
    read_recipe,
    read_yaml,
    shipped_recipes,
    with_only,
    with_overrides,
)
from msae_plugin.common.stored import StoredScore


@dataclass(config=RECIPE)
class Inner:
    """A block of a recipe."""

    rate: Positive | None = 1.0
    """Learning rate."""
    share: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    steps: Count = 1
    shown: Annotated[Literal["auto", "on", "off"], ON_OFF] = "auto"


@dataclass(config=RECIPE)
class Outer:
    """A recipe."""

    inner: Inner = Field(default_factory=Inner)
    optional: Inner | None = None
    ids: Flag | list[Whole] = True
    methods: dict[Text, dict[Text, Any]] = Field(default_factory=dict[str, dict[str, Any]])


# What YAML makes of what people write, and what each type makes of that.
ACCEPTED: list[tuple[Any, str, Any]] = [
    (bool, "yes", True),
    (bool, "off", False),
    (int, "7", 7),
    (int, "1e6", 1_000_000),
    (int, "1.0e+6", 1_000_000),
    (int, "'7'", 7),
    (int, "1_000", 1000),
    (int, "2.0", 2),
    (float, "3e-4", 3e-4),
    (float, "1", 1.0),
    (float, ".nan", float("nan")),
    (float, "-.inf", float("-inf")),
    (str, "'1'", "1"),
    (float | None, "null", None),
    (float | None, "1e-3", 1e-3),
    (list[int], "[1, 2.0, '3']", [1, 2, 3]),
    (dict[str, str], "{a: b}", {"a": "b"}),
    (Literal["auto", "on"], "on", "on"),
    (bool | Literal["auto"], "true", True),
    (bool | list[int], "[2e0]", [2]),
    (dict[str, list[tuple[str, str]]], "{a: [[b]]}", {"a": [["b"]]}),  # not ours to check
]
REFUSED: list[tuple[Any, str, str]] = [
    (bool, "1", "'x' must be true or false, not 1"),
    (bool, "'yes'", "'x' must be true or false, not 'yes'"),
    (int, "true", "'x' must be a whole number, not True"),
    (int, "1.5", "'x' must be a whole number, not 1.5"),
    (int, "1e-1", "'x' must be a whole number, not '1e-1'"),
    (int, ".inf", "'x' must be a whole number, not inf"),
    (int, "null", "'x' must be a whole number, not None"),
    (float, "fast", "'x' must be a number, not 'fast'"),
    (float, "false", "'x' must be a number, not False"),
    (str, "1", "'x' must be text, not 1"),
    (list[int], "5", "'x' must be a list, not 5"),
    (list[int], "[1, a]", "'x[1]' must be a whole number, not 'a'"),
    (dict[str, int], "{a: b}", "'x.a' must be a whole number, not 'b'"),
    (dict[str, int], "{1: 2}", "'x' has the key 1: keys must be text"),
    (Literal["auto", "on"], "of", "'x' must be one of auto, on, not 'of'"),
    (Literal["auto", "on"], "off", "'x' must be one of auto, on, not 'off'"),
    (bool | Literal["auto"], "no way", "'x' must be true or false or auto, not 'no way'"),
    (bool | list[int], "[a]", "'x' must be true or false or a list, not ['a']"),
    (Outer, "5", "'x' must be a mapping of keys to values, not 5"),
    (Outer, "{1: 2}", "'x' has the key 1: keys must be text"),
    (
        StoredScore,
        "{mean: 1.0, per_seed: {a: 1.0}}",
        "'x.per_seed' has the key 'a': keys must be whole numbers",
    ),
    (Outer, "{iner: 2}", "unknown key 'iner' in 'x': did you mean 'inner'?"),
    (Outer, "{inner: {stepps: 2}}", "unknown key 'stepps' in 'x.inner': did you mean 'steps'?"),
    (Outer, "{optional: {q: 2}}", "in 'x.optional': known are: rate, share, shown, steps"),
    (Outer, "{optional: 2}", "'x.optional' must be a mapping of keys to values, not 2"),
    (Outer, "{inner: null}", "'x.inner' must be a mapping of keys to values, not None"),
    (Outer, "{inner: {rate: 0}}", "'x.inner.rate' must be a positive number, not 0.0"),
    (Outer, "{inner: {rate: .nan}}", "'x.inner.rate' must be a positive number, not nan"),
    (Outer, "{inner: {rate: .inf}}", "'x.inner.rate' must be a positive number, not inf"),
    (Outer, "{inner: {share: 1}}", "'x.inner.share' must be in [0, 1), not 1.0"),
    (Outer, "{inner: {share: -1e-9}}", "'x.inner.share' must be in [0, 1), not -1e-09"),
    (Outer, "{inner: {steps: 0}}", "'x.inner.steps' must be at least 1, not 0"),
    (Outer, "{inner: {shown: 3}}", "'x.inner.shown' must be one of auto, on, off, not 3"),
    (Outer, "{methods: {a: null}}", "'x.methods.a' must be a mapping of keys to values, not None"),
    (Outer, "{methods: {a: {2: b}}}", "'x.methods.a' has the key 2: keys must be text"),
]


@pytest.mark.parametrize(("kind", "text", "expected"), ACCEPTED, ids=str)
def test_accepted_values(kind: Any, text: str, expected: Any) -> None:
    found = coerce(yaml.safe_load(text), kind, "x")
    assert repr(found) == repr(expected)  # also tells 1 from 1.0 and from True, and nan from nan


@pytest.mark.parametrize(("kind", "text", "message"), REFUSED, ids=str)
def test_refused_values(kind: Any, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        coerce(yaml.safe_load(text), kind, "x")
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


def test_a_block_that_is_built_already_is_taken_as_it_is() -> None:
    inner = Inner(steps=3)
    assert coerce({"inner": inner}, Outer, "").inner is inner


def test_the_text_below_a_field_describes_it() -> None:
    fields: Any = Inner.__dict__["__pydantic_fields__"]
    assert fields["rate"].description == "Learning rate."


def test_near_names_or_all_of_them() -> None:
    assert did_you_mean("tokn", ["tokens", "lr"]) == "did you mean 'tokens'?"
    assert did_you_mean("x", ["b", "a"]) == "known are: b, a"
    assert did_you_mean("x", ["a", "b", "c"], "choose from ", listed=2) == "choose from a, b, ..."
    assert did_you_mean("aab", ["aaa", "aac"], shown=str, n=2) == "did you mean aac or aaa?"


def test_overrides_change_a_copy() -> None:
    values: dict[str, Any] = {"a": {"b": 1}, "saes": {"x": {}, "y": {}}, "hook": None}
    found = with_overrides(values, ["a.b=3e-4", "a.c.d=[1]", "saes.x=null", "a.e=null", "f=null"])
    assert found == {"a": {"b": "3e-4", "c": {"d": [1]}, "e": None}, "saes": {"y": {}}}
    assert values == {"a": {"b": 1}, "saes": {"x": {}, "y": {}}, "hook": None}
    assert with_overrides({}, ["a.b=1"], lambda value, path: (value, path)) == {
        "a": {"b": (1, "a.b")}
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b", "--set 'a.b' is not of the form key.path=value"),
        ("a..b=1", "--set 'a..b=1' is not of the form key.path=value"),
        ("=1", "--set '=1' is not of the form key.path=value"),
        ("a=[", "--set 'a=[': the value is not valid YAML"),
        ("a.b.c=1", "--set 'a.b.c=1': 'a.b' has no keys"),
        ("saes.x=null", "--set 'saes.x=null': the recipe has no such SAE to leave out"),
        ("evaluations.x=null", "the recipe has no such evaluation to leave out"),
    ],
)
def test_refused_overrides(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        with_overrides({"a": {"b": 1}}, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "protocol '{}' is empty"),
        (b"- a", "'{}' must be a mapping of keys to values, not ['a']"),
        (b"1: 2", "'{}' has the key 1: keys must be text"),
        (b"a: [", "'{}' is not valid YAML: "),
        (b"\xff\xfe\xff", "protocol '{}' is not a text file"),
        (None, "cannot read the protocol '{}': No such file or directory"),
    ],
)
def test_files_that_are_no_recipe(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_yaml(path, "protocol")
    assert str(caught.value).startswith(message.format(path))
    assert "\n" not in str(caught.value)


def test_recipes_have_names_and_a_command() -> None:
    assert find_recipe("smollm2", "train") == SHIPPED / "smollm2.yaml"
    # Commands written when the recipes were in a clone's folder examples/.
    assert find_recipe("examples/smollm2.yaml", "train") == SHIPPED / "smollm2.yaml"
    assert find_recipe("../x/eval_configs/offline.yaml", "eval") == SHIPPED / "offline.yaml"
    with pytest.raises(InputError, match="'smolm2' does not exist; did you mean smollm2"):
        find_recipe("smolm2", "train")
    with pytest.raises(InputError, match=r"is a folder; shipped ones are offline,"):
        find_recipe(SHIPPED, "eval")
    with pytest.raises(InputError, match=r"other/smollm2.yaml' does not exist; did you mean"):
        find_recipe("other/smollm2.yaml", "train")
    files = {file.stem for file in SHIPPED.glob("*.yaml")}
    kinds = [set(shipped_recipes(command)) for command in ("train", "compare", "eval")]
    assert set.union(*kinds) == files
    assert sum(map(len, kinds)) == len(files)


def test_a_recipe_of_another_command_is_named_as_such() -> None:
    for name, command, own in (
        ("compare_smollm2", "train", "compare"),
        ("smollm2", "compare", "train"),
        ("offline", "train", "eval"),
    ):
        with pytest.raises(InputError, match=f"'{name}' is a recipe for msae {own}, "):
            read_recipe(name, command)


def test_only_keeps_the_named_saes() -> None:
    recipe = {"saes": {"a": {"k": 1}, "b": {}}, "l0": [3]}
    assert with_only(recipe, ["a"]) == {"saes": {"a": {"k": 1}}, "l0": [3]}
    assert with_only(recipe, []) == recipe
    with pytest.raises(InputError, match=r"--only 'c' is no SAE of the recipe: known are: a"):
        with_only(recipe, ["a", "c"])
    with pytest.raises(InputError, match="it has no 'saes'"):
        with_only({"sae": {}}, ["a"])
