"""The recipe of a training run: a tree of dataclasses read from YAML.

`examples/*.yaml` show every key with its type and default. Whatever can be refused is refused
before a language model is loaded.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from typing_extensions import Self

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import as_mapping, build
from msae_plugin.models.hook_names import common_style, parse_hook_name, validate_hook
from msae_plugin.models.loading import ModelShape, describe_model
from msae_plugin.training.plans import SAEPlan, plan_saes, preset_training
from msae_plugin.training.settings import (
    DataSection,
    LoggingSection,
    ModelSection,
    TrainingSection,
    check_numbers,
    check_schedule,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Names inside a run folder that an SAE's folder must not take.
_RESERVED = frozenset({"sae", "jumprelu", "checkpoints", "tensorboard"})


@dataclass
class RunConfig:
    """A whole run. Exactly one of `sae` and `saes` is given.

    Attributes:
        model: The language model.
        data: The text.
        hooks: Where activations are read; each SAE is trained at each hook.
        sae: One SAE: `architecture` (multiscale by default, or any of SAELens'), `preset` for
            multiscale, `d_sae`, `lr` of its own, and any field of that architecture's config.
        saes: Several, by name.
        training: The training.
        logging: The logs.
        cached_activations: Folder that `msae cache` wrote for the same model, text and hooks: the
            SAEs are trained from it, without the model.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    hooks: list[str] = field(default_factory=list)
    sae: dict[str, Any] | None = None
    saes: dict[str, Any] | None = None
    training: TrainingSection = field(default_factory=TrainingSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    cached_activations: str | None = None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe.

        Args:
            path: A YAML file.
            overrides: `key.path=value` with the value in YAML, applied in order;
                `saes.NAME=null` leaves an SAE out.

        Raises:
            InputError: If the file cannot be read, a key is unknown, or a value has the wrong type.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read the config {str(path)!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"config {str(path)!r} is not a text file") from error
        return cls.from_dict(_parse_yaml(text, str(path)), overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build a recipe from plain dictionaries, as `to_dict` gives them.

        Raises:
            InputError: As `load`.
        """
        values = {key: value for key, value in values.items() if value is not None}
        for override in overrides:
            _apply_override(values, override)
        _accumulate_as_presets_ask(values)
        return build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @property
    def tokens_per_step(self) -> int:
        """Activations that one optimiser update sees."""
        return self.training.batch_size_tokens * self.training.accumulation_steps

    @property
    def total_steps(self) -> int:
        """Optimiser updates of the run."""
        return self.training.tokens // self.tokens_per_step

    def validate(self, shape: ModelShape | None = None) -> list[SAEPlan]:
        """Refuse what cannot work, before a language model is loaded.

        Args:
            shape: Sizes of the model; read from its config when not given.

        Returns:
            What will be trained, one plan per SAE and hook.

        Raises:
            InputError: Naming the field, what is wrong and what to do.
        """
        check_numbers(self.training, self.data, self.logging)
        check_schedule(self.training, self.total_steps)
        sections = self._sae_sections()
        common_style(self.hooks)
        for hook in self.hooks:
            parse_hook_name(hook)
        model = shape or describe_model(self.model.name)
        for hook in self.hooks:
            validate_hook(hook, model.n_layers)
        return plan_saes(
            sections,
            self.hooks,
            d_model=model.d_model,
            training_steps=self.total_steps,
            accumulation_steps=self.training.accumulation_steps,
        )

    def _sae_sections(self) -> dict[str, dict[str, Any]]:
        if (self.sae is None) == (self.saes is None):
            raise InputError("give exactly one of 'sae' (one SAE) and 'saes' (several, by name)")
        if self.saes is None:
            return {"sae": cast("dict[str, Any]", self.sae)}
        if not self.saes:
            raise InputError("'saes' is empty: give at least one SAE")
        for name in self.saes:
            if not _NAME.fullmatch(name) or name in _RESERVED:
                raise InputError(
                    f"SAE name {name!r} cannot name a folder of the run: use letters, digits, "
                    f"'_', '-' or '.', and none of {', '.join(sorted(_RESERVED))}"
                )
        return {name: as_mapping(section, f"saes.{name}") for name, section in self.saes.items()}


def _accumulate_as_presets_ask(values: dict[str, Any]) -> None:
    """Fill in `training.accumulation_steps` where all SAEs' presets ask for the same."""
    sections = (
        [values["sae"]]
        if "sae" in values
        else list(as_mapping(values.get("saes", {}), "saes").values())
    )
    wanted = {
        preset_training(section).get("accumulation_steps", 1)
        for section in sections
        if isinstance(section, dict)
    }
    training = as_mapping(values.get("training") or {}, "training")
    if len(wanted) == 1 and "accumulation_steps" not in training:
        values["training"] = {**training, "accumulation_steps": wanted.pop()}


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        values: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{where!r} is not valid YAML: {problem}") from error
    if values is None:
        raise InputError(f"{where!r} is empty")
    return as_mapping(values, where)


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"--set {override!r} is not of the form key.path=value")
    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not valid YAML") from error
    section = values
    for depth, key in enumerate(keys[:-1]):
        nested = section.get(key)
        if nested is None:
            nested = section[key] = {}
        if not isinstance(nested, dict):
            raise InputError(f"--set {override!r}: {'.'.join(keys[: depth + 1])!r} has no keys")
        section = cast("dict[str, Any]", nested)
    if value is None and keys[:-1] == ["saes"]:
        # As `evaluations.NAME=null` of a protocol: nothing of that SAE remains.
        if keys[-1] not in section:
            raise InputError(f"--set {override!r}: the recipe has no such SAE to leave out")
        del section[keys[-1]]
        return
    section[keys[-1]] = value
