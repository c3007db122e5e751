"""The protocol of an evaluation.

The protocols in `msae_plugin/recipes/` show every key with its type and default. Paths in a file
are relative to the file's folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import yaml
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import (
    RECIPE,
    Text,
    Whole,
    as_mapping,
    coerce,
    did_you_mean,
    find_recipe,
    read_recipe,
    unknown_key_message,
    with_overrides,
)
from msae_plugin.data.labelled_texts import LABELLED_SOURCES
from msae_plugin.data.text_files import is_text_file
from msae_plugin.models.hook_names import parse_hook_name
from msae_plugin.models.transformer_lens import TransformerLensLoader
from msae_plugin.saes.load import transformer_lens_hook

_EVERYWHERE = {
    "model_name": "the model is model.name",
    "random_seed": "seeds are in seeds",
    "llm_dtype": "the model's dtype is model.dtype",
}
# Whole numbers that may be zero or negative.
_ANY_NUMBER = frozenset({"prompt_token_pos"})
_ZERO_ALLOWED = frozenset({
    "heldout_documents", "buffer", "n_iw_sampled_ex_for_generation", "n_iw_sampled_ex_for_scoring",
    "n_random_ex_for_scoring", "override_latents", "early_stopping_patience",
})  # fmt: skip
_SHARES = frozenset({"train_test_split", "min_GT_probe_f1", "act_threshold_frac"})
_OWN_TYPES = {"number": int, "switch": bool, "text": str | None, "paths": dict[str, str]}


@dataclasses.dataclass(frozen=True)
class EvaluationSchema:
    """One evaluation, as `evaluations.yaml` describes it."""

    package: str
    config: str
    results: str
    own: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the types themselves
    fixed: Mapping[str, str] = field(default_factory=dict[str, str])
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    counted: tuple[str, str] | None = None
    sets: bool = False
    bridge: bool = True


def _schemas() -> dict[str, EvaluationSchema]:
    file = Path(__file__).with_name("evaluations.yaml")
    described = cast("dict[str, dict[str, Any]]", yaml.safe_load(file.read_text(encoding="utf-8")))
    for values in described.values():
        values["own"] = {key: _OWN_TYPES[kind] for key, kind in values.get("own", {}).items()}
    return {name: EvaluationSchema(**values) for name, values in described.items()}


SCHEMAS = _schemas()
"""The evaluations that `msae eval` runs, by the name in a config file."""


def check_settings(evaluation: str, settings: object) -> dict[str, Any]:
    """Check the settings of an evaluation against SAEBench's class and ours."""
    if evaluation not in SCHEMAS:
        hint = did_you_mean(evaluation, SCHEMAS, "choose from ", shown=str)
        raise InputError(f"evaluation {evaluation!r} is not known: {hint}")
    schema, cls = SCHEMAS[evaluation], config_class(evaluation)
    where = f"evaluations.{evaluation}"
    fixed = {**_EVERYWHERE, **schema.fixed}
    hints = {} if cls is None else get_type_hints(cls)
    theirs = {} if cls is None else {item.name: hints[item.name] for item in fields(cls)}
    kinds = {**theirs, **schema.own}
    checked: dict[str, Any] = {}
    for key, value in as_mapping({} if settings is None else settings, where).items():
        if key in fixed:
            raise InputError(f"{where}.{key} is not to be set: {fixed[key]}")
        if key not in kinds and cls is not None:
            raise InputError(unknown_key_message(key, kinds.keys() - fixed.keys(), where))
        # `llm_batch_size: int = None` is how SAEBench says that a default depends on the model;
        # null for n_latents is no default, but goes with override_latents.
        if value is None and key in theirs and key not in schema.own:
            if key == "n_latents":
                checked[key] = None
                continue
            if default_of(evaluation, key) is None:
                continue
        checked[key] = coerce(value, kinds.get(key, Any), f"{where}.{key}")
        if key in schema.choices and checked[key] not in schema.choices[key]:
            raise InputError(
                f"{where}.{key} must be {' or '.join(schema.choices[key])}, not {value!r}"
            )
    if cls is not None:
        given = {key: value for key, value in checked.items() if key not in schema.own}
        _check_against(cls, evaluation, given, where)
    for key, value in checked.items():
        _check_values(key, value, f"{where}.{key}")
    return checked


def config_class(evaluation: str) -> type[Any] | None:
    """SAEBench's config class of an evaluation; None where sae-bench is not installed."""
    return _class_of(SCHEMAS[evaluation].package, "eval_config", SCHEMAS[evaluation].config)


def default_of(evaluation: str, key: str) -> Any:
    """SAEBench's default of a field; None where sae-bench is not installed."""
    cls = config_class(evaluation)
    return None if cls is None else getattr(cls(), key)


def result_fields(evaluation: str) -> dict[str, Any]:
    """The fields of SAEBench's results; none where sae-bench is not installed."""
    schema = SCHEMAS[evaluation]
    cls = _class_of(schema.package, "eval_output", schema.results)
    return {} if cls is None else {item.name: item for item in fields(cls)}


def reported_counts(evaluation: str) -> list[int]:
    """The numbers of latents that SAEBench's results have fields for."""
    counted = SCHEMAS[evaluation].counted
    if counted is None:
        return []
    matches = [re.fullmatch(counted[1], name) for name in result_fields(evaluation)]
    return [int(match.group(1)) for match in matches if match is not None]


def _class_of(package: str, module: str, name: str) -> type[Any] | None:
    # When settings are checked, not when this module is imported: importing sae_bench takes seconds
    # and needs the extra `eval`. Without it settings are taken as they are.
    if importlib.util.find_spec("sae_bench") is None:
        return None
    try:
        found = importlib.import_module(f"sae_bench.evals.{package}.{module}")
    except ModuleNotFoundError:
        return None  # one of its own packages; the preflight names it
    return cast("type[Any]", getattr(found, name))


def _check_against(cls: type[Any], evaluation: str, given: Mapping[str, Any], where: str) -> None:
    """What SAEBench's class refuses, and what SAEBench refuses or forgets later."""
    try:
        cls(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "assertion_error":  # AutoInterpEvalConfig's only check
            raise InputError(
                f"{where}: give either n_latents or override_latents; with override_latents set "
                "n_latents: null"
            ) from error
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}.{place}: {first['msg']}, not {first['input']!r}") from error
    schema, reported = SCHEMAS[evaluation], reported_counts(evaluation)
    if schema.counted is not None and reported:
        for count in given.get(schema.counted[0], ()):
            if count not in reported:
                raise InputError(
                    f"{where}.{schema.counted[0]}: SAEBench's results have no field for {count}: "
                    f"choose from {', '.join(map(str, reported))}"
                )
    if schema.sets and "dataset_names" in given:
        known = [*cls().dataset_names]
        if schema.package == "sparse_probing":
            known += LABELLED_SOURCES
        for name in given["dataset_names"]:
            if name not in known:
                hint = did_you_mean(name, known, "choose from ", shown=str, n=2, listed=8)
                raise InputError(f"{where}.dataset_names: {name!r} is not known: {hint}")


def _check_values(key: str, value: Any, where: str) -> None:
    """What pydantic lets through: numbers out of bounds, empty lists, things said twice."""
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            raise InputError(f"{where} must be a finite number, not {number}")
        if key in _SHARES and not 0 <= number <= 1:
            raise InputError(f"{where} must be between 0 and 1, not {number}")
        least = 0 if isinstance(number, float) or key in _ZERO_ALLOWED else 1
        least += key == "context_size"  # a token alone predicts nothing
        if key not in _ANY_NUMBER and number < least:
            raise InputError(f"{where} must be at least {least}, not {number}")
    if not values:
        raise InputError(f"{where} is empty: leave it out for SAEBench's default")
    for index, item in enumerate(values):
        if item in values[:index]:
            raise InputError(f"{where} has {item!r} twice: give it once")


logger = logging.getLogger(__name__)

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_LARGEST_SEED = 2**32 - 1
# Where a value of a file may be a path. Those of the first kind are nothing else.
_PATHS = ("cache", "datasets.*", "evaluations.*.datasets.*")
_PATHS_OR_NAMES = (
    "model.name",
    "evaluations.core.dataset",
    "evaluations.autointerp.dataset_name",
    "evaluations.unlearning.model",
    "evaluations.unlearning.forget_corpus",
    "evaluations.unlearning.retain_corpus",
    "evaluations.unlearning.questions.*",
)
_TAKES_COPIES = ("sparse_probing", "scr", "tpp", "autointerp", "ravel")
# Hub names of evaluations' data that no setting names.
_UNNAMED_DATA = {"ravel": ["adamkarvonen/ravel_prompts"]}


@dataclass(config=RECIPE)
class ModelChoice:
    """Which language model, and how it runs."""

    name: Text | None = None
    """`packaged:NAME`, a folder, or a hub name; null is the one that the SAEs are for."""
    loader: TransformerLensLoader = "auto"
    """TransformerLens' class; auto is HookedTransformer where the installed version has it, and
    unlearning takes no other."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; SAEBench casts SAEs to it."""
    device: Text = "auto"
    """Where it runs; auto is cuda when there is one."""


@dataclass(config=RECIPE)
class EvalConfig:
    """What to evaluate, with which settings and seeds."""

    model: ModelChoice = Field(default_factory=ModelChoice)
    """The language model."""
    hook: Text | None = None
    """Where the SAEs read, in place of what their metadata say."""
    seeds: list[Whole] = Field(default_factory=lambda: [42])
    """Every evaluation runs once with each."""
    evaluations: dict[Text, Any] = Field(default_factory=dict[str, Any])
    """Settings by evaluation: fields of SAEBench's config class of that name and ours
    (`protocols`), and no others."""
    datasets: dict[Text, Text] = Field(default_factory=dict[str, str])
    """Local copy of a hub dataset by its name, in the same schema."""
    cache: Text | None = None
    """Folder for what is computed of the language model alone."""

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read an evaluation config.

        Paths in overrides are relative to the working directory, as on any command line.
        """
        file = find_recipe(path, "eval")
        values = _absolute(read_recipe(path, "eval"), "", file.resolve().parent)
        config = cls.from_dict(values, overrides)
        for warning in config.warnings():
            logger.warning("%s: %s", file.name, warning)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build a config from plain dictionaries, as `to_dict` gives them; they are not changed."""
        here = Path.cwd()
        merged = with_overrides(values, overrides, lambda value, path: _absolute(value, path, here))
        config: Self = coerce(merged, cls, "")
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries; `from_dict` is the inverse."""
        return dataclasses.asdict(cast("Any", self))

    def check(self) -> None:
        """Check all values, and give each evaluation the local copies of its datasets."""
        if not _DEVICE.fullmatch(self.model.device):
            raise InputError(
                f"'model.device' must be auto, cpu, cuda, cuda:N or mps, not {self.model.device!r}"
            )
        if self.hook is not None:
            parse_hook_name(self.hook)
            self.hook = transformer_lens_hook(self.hook)
        if not self.seeds:
            raise InputError("'seeds' is empty: give at least one, SAEBench's own is 42")
        for index, seed in enumerate(self.seeds):
            if not 0 <= seed <= _LARGEST_SEED:
                raise InputError(f"'seeds' has {seed}: seeds are 0 to {_LARGEST_SEED}")
            if seed in self.seeds[:index]:
                raise InputError(f"'seeds' has {seed} twice: a spread over equal seeds is none")
        if not self.evaluations:
            raise InputError(f"'evaluations' is empty: name one of {', '.join(SCHEMAS)}")
        self.evaluations = {
            name: check_settings(name, settings) for name, settings in self.evaluations.items()
        }
        self._hand_out_copies()

    def warnings(self) -> list[str]:
        """What works but may not be meant."""
        found: list[str] = []
        if "core" in self.evaluations and self.model.dtype != "float32":
            found.append(
                f"core in {self.model.dtype}: SAEBench rounds its numbers to 3 digits and its KL "
                "divergence may be infinite; for finer numbers set model.dtype to float32"
            )
        return found

    def _hand_out_copies(self) -> None:
        used: set[str] = set()
        for name in _TAKES_COPIES:
            settings = self.evaluations.get(name)
            if settings is None:
                continue
            wanted = datasets_of(name, settings)
            copies = {
                hub_name: path
                for hub_name, path in self.datasets.items()
                # SAEBench cuts parts from some, `NAME_PART`.
                if any(name == hub_name or name.startswith(f"{hub_name}_") for name in wanted)
            }
            used |= copies.keys()
            if copies:
                settings["datasets"] = {**copies, **settings.get("datasets", {})}
        core = self.evaluations.get("core")
        if core is not None and core.get("dataset") in self.datasets:
            used.add(core["dataset"])
            core["dataset"] = self.datasets[core["dataset"]]
        for hub_name in self.datasets.keys() - used:
            logger.warning("datasets: none of the evaluations reads %r", hub_name)


def datasets_of(evaluation: str, settings: Mapping[str, Any]) -> list[str]:
    """The names of the datasets that an evaluation with these settings reads."""
    if evaluation in _UNNAMED_DATA:
        return _UNNAMED_DATA[evaluation]
    key = "dataset_name" if evaluation == "autointerp" else "dataset_names"
    names = settings[key] if key in settings else default_of(evaluation, key)
    return [names] if isinstance(names, str) else list(names or [])


def _absolute(value: Any, place: str, base: Path) -> Any:
    """A value of the recipe with the paths in it made absolute."""
    if isinstance(value, dict):
        inner = cast("dict[Any, Any]", value)
        return {
            key: _absolute(item, f"{place}.{key}" if place else str(key), base)
            for key, item in inner.items()
        }
    if isinstance(value, str):
        always, perhaps = (
            any(fnmatchcase(place, pattern) for pattern in patterns)
            for patterns in (_PATHS, _PATHS_OR_NAMES)
        )
        if always or (perhaps and _is_path(value, base)):
            return str(base / Path(value).expanduser())
    return value


def _is_path(value: str, base: Path) -> bool:
    if ":" in value:  # packaged:NAME
        return False
    path = Path(value).expanduser()
    return (
        path.is_absolute()
        or value.startswith((".", "~"))
        or is_text_file(path)
        or (base / path).exists()
    )
