"""The recipe of a comparison: settings of a training recipe, many SAEs, sparsities and seeds.

`msae_plugin/recipes/compare_*.yaml` show every key. Whatever can be refused is refused before a
language model is loaded; the SAEs themselves are checked by `methods.expand`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import (
    RECIPE,
    Count,
    CountOrZero,
    Flag,
    Number,
    Text,
    as_mapping,
    coerce,
    find_recipe,
    read_recipe,
    set_value,
    with_only,
    with_overrides,
)
from msae_plugin.comparison.ladder import ladder_variants
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.models.hook_names import common_style
from msae_plugin.training.recipe import (
    FOLDER_NAME,
    DataSettings,
    ModelSettings,
    TrainingSettings,
    check_buffer,
    check_length,
)


@dataclass(config=RECIPE)
class SyntheticSettings:
    """Ground truth in place of a language model and text (`sae_lens.synthetic`)."""

    model: dict[Text, Any] = Field(default_factory=dict[str, Any])
    """Fields of SAELens' `SyntheticModelConfig`. Its `seed` is that of the ground truth."""
    new_model_per_seed: Flag = False
    """Each seed has a ground truth of its own (the model's seed plus the seed); false keeps one, as
    SynthSAEBench does."""
    eval_samples: Count = 50_000
    """Samples that the exported SAEs are judged on."""
    eval_batch_size: Count = 4096
    """Samples at a time."""
    autocast: Flag = False
    """Generate the samples in bfloat16."""
    saes_at_once: Count | None = None
    """SAEs that are trained side by side on the same samples; null is all of a seed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda when there is one."""


@dataclass(config=RECIPE)
class SearchSettings:
    """How coefficients are tuned of architectures that are not told an L0."""

    tokens: Count | None = None
    """Length of a trial; null is a quarter of training.tokens."""
    tolerance: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    """Relative distance of L0 from its target at which the search ends."""
    max_trials: Count = 8
    """Short trials at most."""
    corrections: CountOrZero = 2
    """Whole runs at most that are thrown away because their L0 missed the target."""


@dataclass(config=RECIPE)
class HeldoutSettings:
    """What every SAE of a language model is measured on."""

    tokens: Count = 40_000
    """Held-out tokens for explained variance, L0 and dead latents."""
    loss_tokens: Count = 5_000
    """How many of them the losses are measured on; they need whole passes."""
    contexts: CountOrZero = 8
    """Latents whose top activating contexts are stored, for the first seed of each method at the
    first L0, less the ladder's variants that are compared with another; 0 for none."""


@dataclass(config=RECIPE)
class LadderSettings:
    """The source's runs and mechanisms as methods (see `comparison.ladder`)."""

    groups: list[Literal["cumulative", "alone", "default"]] = Field(
        default_factory=lambda: ["cumulative", "alone", "default"]
    )
    """`cumulative` (baseline and runs 1 to 10), `alone` (each mechanism on BatchTopK), `default`
    (the default preset with each of its mechanisms removed, or one more)."""
    leave_out: list[Text] = Field(default_factory=list[str])
    """Names of variants that are not trained."""


_LANGUAGE_MODEL_ONLY = ("model", "data", "hooks", "heldout", "evaluation", "keep_activations")
SYNTHETIC_HOOK = "synthetic"
"""What stands for a hook where there is no language model."""


@dataclass(config=RECIPE)
class CompareConfig:
    """A whole comparison: `saes` x `hooks` x `l0` x `seeds`."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    """The language model."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The text."""
    synthetic: SyntheticSettings | None = None
    """Ground truth in place of `model`, `data` and `hooks`."""
    hooks: list[Text] = Field(default_factory=list[str])
    """Where activations are read; every method is trained at each."""
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    """As in a recipe. `tokens` is the length of each SAE's training, `seed` orders the text;
    warm-up and decay are counted in mini-batches, so that an SAE that accumulates has the same
    schedule in tokens."""
    common: dict[Text, Any] = Field(default_factory=dict[str, Any])
    """Keys of an SAE that every method has which does not set them itself: `d_sae`,
    `normalize_activations` and the like."""
    l0: list[Number] = Field(default_factory=list[float])
    """Target L0s."""
    seeds: list[CountOrZero] = Field(default_factory=lambda: [0])
    """Of initialisation, of the order of the activations, and of what an SAE draws."""
    saes: dict[Text, dict[Text, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    """Methods by name: the keys of an SAE in a recipe, less what sets its L0; `peer` (see
    `architecture.peers`); `control` (residual_stream, permuted_decoder of NAME, frozen_decoder);
    `accumulation_steps` of its own."""
    ladder: LadderSettings | None = None
    """The source's ladder as further methods."""
    search: SearchSettings = Field(default_factory=SearchSettings)
    """How coefficients are tuned."""
    heldout: HeldoutSettings = Field(default_factory=HeldoutSettings)
    """What is measured on held-out text."""
    evaluation: dict[Text, Any] | None = None
    """An evaluation config, its path or its name; null measures held-out text alone."""
    reference: Text | None = None
    """Method that reports compare the others with; null lets them choose."""
    quick: dict[Text, Any] = Field(default_factory=dict[str, Any])
    """What `--quick` changes, as `--set` would: dotted key to value."""
    log_every_steps: Count = 20
    """Steps between two rows of metrics.jsonl."""
    keep_activations: Flag = True
    """Keep the stored activations at the end, for SAEs that are added later."""

    @classmethod
    def load(
        cls,
        path: Path | str,
        overrides: Sequence[str] = (),
        *,
        quick: bool = False,
        only: Sequence[str] = (),
    ) -> Self:
        """Read the recipe of a comparison by path or name.

        `quick` applies what its `quick` says, overrides come last; `only` names the methods that
        are compared, of `saes` and of the ladder.
        """
        folder = find_recipe(path, "compare").resolve().parent
        return cls.from_dict(
            read_recipe(path, "compare"), overrides, quick=quick, folder=folder, only=only
        )

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        quick: bool = False,
        folder: Path | None = None,
        only: Sequence[str] = (),
    ) -> Self:
        """Build a comparison from plain dictionaries, as `to_dict` gives them; they do not change.

        Paths in the values are relative to `folder`.
        """
        merged = with_overrides(_quick(values) if quick else values, overrides)
        if only:
            merged = _with_only(merged, only)
        if "synthetic" in merged:
            for key in _LANGUAGE_MODEL_ONLY:
                if key in merged:
                    raise InputError(
                        f"{key!r} belongs to a language model and 'synthetic' has none: remove one"
                    )
        # A finished SAE is in saes/: its checkpoints are of no more use.
        training = as_mapping(merged.get("training", {}), "training")
        merged["training"] = {"keep_checkpoints": 0, **training}
        if "evaluation" in merged:
            merged["evaluation"] = _evaluation(merged["evaluation"], folder)
        config: Self = coerce(merged, cls, "")
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries; `from_dict` is the inverse."""
        values = dataclasses.asdict(cast("Any", self))
        if self.synthetic is not None:
            for key in _LANGUAGE_MODEL_ONLY:
                values.pop(key)
        return values

    @property
    def kind(self) -> str:
        """`language_model` or `ground_truth`."""
        return "language_model" if self.synthetic is None else "ground_truth"

    @property
    def search_tokens(self) -> int:
        """Length of a short trial of the search."""
        tokens = self.search.tokens
        return self.training.tokens // 4 if tokens is None else tokens

    def eval_config(self) -> EvalConfig | None:
        """The evaluation config, None without one."""
        return None if self.evaluation is None else EvalConfig.from_dict(self.evaluation)

    def check(self) -> None:
        """Refuse lists and names that cannot work, and a buffer or a run too small for one step."""
        self._check_lists()
        if self.synthetic is None:
            # Samples of a ground truth are made as they are needed, without a buffer.
            check_buffer(self.training, self.data)
        check_length(self.training)
        if self.training.calibrate_batches < 1:
            raise InputError("'training.calibrate_batches' must be at least 1 to match L0s")
        if self.synthetic is None:
            if not self.hooks:
                raise InputError("'hooks' is empty: name at least one, or give 'synthetic'")
            common_style(self.hooks)
        if not self.saes and self.ladder is None:
            raise InputError("there is nothing to compare: give 'saes' or 'ladder'")
        for name in self.saes:
            if not FOLDER_NAME.fullmatch(name):
                raise InputError(
                    f"method name {name!r} cannot name a folder: use at most 80 letters, digits, "
                    "'_', '-' and '.'"
                )
        if len({name.lower() for name in self.saes}) < len(self.saes):
            raise InputError("two methods have names that differ in case alone: rename one")

    def _check_lists(self) -> None:
        if not self.l0:
            raise InputError("'l0' is empty: give at least one target L0")
        for index, value in enumerate(self.l0):
            if not value > 0:
                raise InputError(f"'l0[{index}]' must be positive, not {value}")
        for name, listed in (("l0", self.l0), ("seeds", self.seeds), ("hooks", self.hooks)):
            repeated = [item for index, item in enumerate(listed) if item in listed[:index]]
            if repeated:
                raise InputError(f"{name!r} has {repeated[0]} twice")
        if not self.seeds:
            raise InputError("'seeds' is empty: give at least one")


def _with_only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The recipe with some of its methods, of `saes` and of the ladder."""
    ladder = values.get("ladder")
    variants = [] if ladder is None else [variant.name for variant in ladder_variants()]
    merged = with_only(values, names, variants)
    left_out = [name for name in variants if name not in names]
    if len(left_out) < len(variants):
        merged["ladder"] = {**as_mapping(ladder, "ladder"), "leave_out": left_out}
    else:
        merged.pop("ladder", None)
    if merged.get("reference") not in names:
        merged.pop("reference", None)
    return merged


def _quick(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what its `quick` says."""
    merged = copy.deepcopy(dict(values))
    changes = as_mapping(merged.get("quick") or {}, "quick")
    if not changes:
        raise InputError("--quick: the recipe has no 'quick' that says what it changes")
    for key, value in changes.items():
        set_value(merged, key, value, f"quick {key!r}")
    return merged


def _evaluation(value: Any, folder: Path | None) -> dict[str, Any]:
    """The evaluation config as plain dictionaries, from a path, a name or as it is."""
    if isinstance(value, Mapping):
        return EvalConfig.from_dict(as_mapping(cast("object", value), "evaluation")).to_dict()
    if not isinstance(value, str):
        raise InputError(f"'evaluation' must be a path, a name or a mapping, not {value!r}")
    beside = None if folder is None else folder / value
    return EvalConfig.load(beside if beside is not None and beside.is_file() else value).to_dict()
