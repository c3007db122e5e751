"""The recipe of a training run.

Those in `msae_plugin/recipes/` show every key with its type and default. Whatever can be refused is
refused before a language model is loaded.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import (
    RECIPE,
    Text,
    as_mapping,
    coerce,
    read_recipe,
    with_only,
    with_overrides,
)
from msae_plugin.models.hook_names import common_style, parse_hook_name, validate_hook
from msae_plugin.models.loading import ModelShape, describe_model
from msae_plugin.training.plans import SAEPlan, plan_saes, preset_training
from msae_plugin.training.settings import (
    DataSettings,
    LoggingSettings,
    ModelSettings,
    TrainingSettings,
    check_buffer,
    check_length,
    check_schedule,
)

# A hook's label and the mark of a temporary file are added to it.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
# What the commands put into a run's folder: an SAE's folder must not take its place.
_RESERVED = frozenset(
    {
        "sae", "jumprelu", "checkpoints", "tensorboard", "run.json", "export.json",
        "metrics.jsonl", "revivals.jsonl", "evaluation", "report", "dashboards", "readme.md",
    }
)  # fmt: skip


@dataclass(config=RECIPE)
class RunConfig:
    """A whole run. Exactly one of `sae` and `saes` is given."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    """The language model."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The text."""
    hooks: list[Text] = Field(default_factory=list[str])
    """Where activations are read; each SAE is trained at each hook."""
    sae: dict[Text, Any] | None = None
    """One SAE: `architecture` (multiscale by default, or any of SAELens'), `preset` for multiscale,
    `d_sae`, `lr` of its own, and any field of that architecture's config."""
    saes: dict[Text, dict[Text, Any]] | None = None
    """Several, by name."""
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    """The training."""
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    """The logs."""
    cached_activations: Text | None = None
    """Folder that `msae cache` wrote for the same model, text and hooks: the SAEs are trained from
    it, without the model."""

    @classmethod
    def load(
        cls, path: Path | str, overrides: Sequence[str] = (), only: Sequence[str] = ()
    ) -> Self:
        """Read a recipe by path or name; `only` names the `saes` that are trained."""
        return cls.from_dict(with_only(with_overrides(read_recipe(path, "train"), overrides), only))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build a recipe from plain dictionaries, as `to_dict` gives them; they are not changed."""
        merged = with_overrides(values, overrides)
        _accumulate_as_presets_ask(merged)
        return coerce(merged, cls, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries; `from_dict` is the inverse."""
        return dataclasses.asdict(cast("Any", self))

    @property
    def tokens_per_step(self) -> int:
        """Activations that one optimiser update sees."""
        return self.training.batch_size_tokens * self.training.accumulation_steps

    @property
    def total_steps(self) -> int:
        """Optimiser updates of the run."""
        return self.training.tokens // self.tokens_per_step

    def validate(self, shape: ModelShape | None = None) -> list[SAEPlan]:
        """Refuse what cannot work before a language model is loaded; one plan per SAE and hook.

        The model's sizes are read from its config when not given.
        """
        check_buffer(self.training, self.data)
        check_length(self.training)
        check_schedule(self.training, self.total_steps)
        saes = self._named_saes()
        common_style(self.hooks)
        for hook in self.hooks:
            parse_hook_name(hook)
        model = shape or describe_model(self.model.name)
        model.require_positions(self.data.context_size, "data.context_size")
        for hook in self.hooks:
            validate_hook(hook, model.n_layers)
        return plan_saes(
            saes,
            self.hooks,
            d_model=model.d_model,
            training_steps=self.total_steps,
            accumulation_steps=self.training.accumulation_steps,
        )

    def _named_saes(self) -> dict[str, dict[str, Any]]:
        if (self.sae is None) == (self.saes is None):
            raise InputError("give exactly one of 'sae' (one SAE) and 'saes' (several, by name)")
        if self.saes is None:
            return {"sae": self.sae or {}}
        if not self.saes:
            raise InputError("'saes' is empty: give at least one SAE")
        for name in self.saes:
            # As on a disk that does not tell upper from lower case.
            if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
                raise InputError(
                    f"SAE name {name!r} cannot name a folder of the run: use at most 80 letters, "
                    f"digits, '_', '-' or '.', and none of {', '.join(sorted(_RESERVED))}"
                )
        return self.saes


def _accumulate_as_presets_ask(values: dict[str, Any]) -> None:
    """Fill in `training.accumulation_steps` where all SAEs' presets ask for the same."""
    saes = {"sae": values["sae"]} if "sae" in values else as_mapping(values.get("saes", {}), "saes")
    wanted = {
        preset_training(sae).get("accumulation_steps", 1)
        for sae in saes.values()
        if isinstance(sae, dict)
    }
    training = as_mapping(values.get("training", {}), "training")
    if len(wanted) == 1 and "accumulation_steps" not in training:
        values["training"] = {**training, "accumulation_steps": wanted.pop()}
