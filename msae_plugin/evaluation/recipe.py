"""The protocol of an evaluation.

The protocols in `msae_plugin/recipes/` show every key with its type and default. Paths in a file
are relative to the file's folder.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import (
    RECIPE,
    Text,
    Whole,
    coerce,
    find_recipe,
    read_recipe,
    with_overrides,
)
from msae_plugin.data.text_files import is_text_file
from msae_plugin.evaluation.protocols import SCHEMAS, check_settings, default_of
from msae_plugin.models.hook_names import parse_hook_name
from msae_plugin.saes.load import transformer_lens_hook

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
        self._check_seeds()
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

    def _check_seeds(self) -> None:
        if not self.seeds:
            raise InputError("'seeds' is empty: give at least one, SAEBench's own is 42")
        for index, seed in enumerate(self.seeds):
            if not 0 <= seed <= _LARGEST_SEED:
                raise InputError(f"'seeds' has {seed}: seeds are 0 to {_LARGEST_SEED}")
            if seed in self.seeds[:index]:
                raise InputError(f"'seeds' has {seed} twice: a spread over equal seeds is none")

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
                if any(_is_part(dataset, hub_name) for dataset in wanted)
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


def _is_part(dataset: str, hub_name: str) -> bool:
    """Whether a dataset's name is a hub name, or that of a part that SAEBench cuts from it."""
    return dataset == hub_name or dataset.startswith(f"{hub_name}_")


def _absolute(value: Any, place: str, base: Path) -> Any:
    """A value of the recipe with the paths in it made absolute."""
    if isinstance(value, dict):
        inner = cast("dict[Any, Any]", value)
        return {
            key: _absolute(item, f"{place}.{key}" if place else str(key), base)
            for key, item in inner.items()
        }
    if isinstance(value, str) and (
        _matches(place, _PATHS) or (_matches(place, _PATHS_OR_NAMES) and _is_path(value, base))
    ):
        return str(base / Path(value).expanduser())
    return value


def _matches(place: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(place, pattern) for pattern in patterns)


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
