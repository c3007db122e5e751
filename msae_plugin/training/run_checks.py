"""What a recipe's numbers must satisfy, checked before anything is loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from msae_plugin.common.errors import InputError
from msae_plugin.training.schedules import GradientRateConfig
from msae_plugin.training.settings import DataSection, LoggingSection, TrainingSection

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
