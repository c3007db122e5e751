"""`msae info`: what a checkpoint is, and what a run will cost.

The cost is estimated from the configuration alone. Formulas, in bytes; W = 4 for float32:

    SAE weights        every parameter and buffer, counted on torch's meta device
    gradients          one number per parameter
    Adam               two numbers per parameter
    step               10 W batch d_sae: the (batch, d_sae) tensors alive at once in a training
                       step, for the largest SAE (measured: standard 5, topk 8, batchtopk 9,
                       gated 8, matryoshka 10, multiscale 5)
    recorded step      step and gradients once more, held by each multiscale SAE whose steps are
                       recorded on a GPU
    activation buffer  2 W (buffer + LLM batch) * sum of the hooks' d_in: SAELens' mixing buffer
                       holds its rows twice while it shuffles them
    model weights      (12 L d_model^2 + 2 V d_model) numbers: attention and MLP of L layers,
                       embedding and unembedding of V tokens (within 10 % for SmolLM2-135M and
                       Gemma-3-270M)
    model forward      LLM batch * (16 d_model + 2 context * d_model / 64) numbers: the tensors of
                       one layer, heads of 64
    loaded model       1.7 times its weights: pages of the file that stay mapped, and what was
                       freed after the conversion but is not given back (measured: SmolLM2-135M,
                       1108 MiB for 652 MiB of weights on a CPU)
    checkpoint         SAE weights and Adam, on disk

What is not counted: Python and the libraries, about 0.9 GiB. With them the estimate for `msae demo`
is 2.2 GiB; 2.3 GiB were measured while it trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype

from msae_plugin.architecture.config import ARCHITECTURE
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import human_bytes
from msae_plugin.models.loading import ModelShape, describe_model
from msae_plugin.saes.find import StoredSAE, mechanisms_on, read_folder
from msae_plugin.saes.load import check_evaluable
from msae_plugin.training.plans import SAEPlan, buffer_bytes
from msae_plugin.training.recipe import RunConfig

STEP_TENSORS = 10
LAYER_TENSORS = 16
HEAD_WIDTH = 64
LOADED_MODEL_FACTOR = 1.7


@dataclass(frozen=True)
class SAECost:
    """Memory of one SAE in training."""

    parameters: int
    weight_bytes: int  # parameters and buffers
    optimizer_bytes: int  # adam's two moments
    gradient_bytes: int
    step_bytes: int  # estimate of the tensors of one training step
    recorded_bytes: int  # what a recorded step holds all the time; 0 where steps are not recorded

    @property
    def checkpoint_bytes(self) -> int:
        """On disk, per checkpoint."""
        return self.weight_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class RunCost:
    """Memory, disk and length of a run; see the module for the formulas."""

    saes: dict[str, SAECost]  # by name
    model_bytes: int  # weights of the language model
    model_forward_bytes: int
    buffer_bytes: int  # at its peak
    tokens: int  # of training, whole steps only
    steps: int
    forward_passes: int  # of the language model
    checkpoints_bytes: int  # disk of those that are kept

    @property
    def sae_bytes(self) -> int:
        """Weights, gradients and Adam of all SAEs."""
        return sum(c.checkpoint_bytes + c.gradient_bytes for c in self.saes.values())

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory without Python and the libraries."""
        recorded = sum(cost.recorded_bytes for cost in self.saes.values())
        step = max(cost.step_bytes for cost in self.saes.values())
        model = round(LOADED_MODEL_FACTOR * self.model_bytes)
        held = self.sae_bytes + recorded + model + self.buffer_bytes
        # The SAEs are stepped one after another, and never while the model runs.
        return held + max(step, self.model_forward_bytes)


def meta_sae(config: TrainingSAEConfig) -> torch.nn.Module:
    """The training SAE of a configuration without its memory."""
    sae_class = get_sae_training_class(config.architecture())[0]
    device = config.device
    # As SAELens loads checkpoints: the module is built where tensors have shapes only.
    config.device = "meta"
    try:
        return sae_class(config)
    finally:
        config.device = device


def sae_cost(
    config: TrainingSAEConfig, batch_size_tokens: int, *, cuda_graphs: bool = True
) -> SAECost:
    """Memory of one SAE in training."""
    sae = meta_sae(config)
    parameters = list(sae.parameters())
    parameter_bytes = sum(p.numel() * p.element_size() for p in parameters)
    buffer_bytes = sum(b.numel() * b.element_size() for b in sae.buffers())
    width = str_to_dtype(config.dtype).itemsize
    recorded = (
        cuda_graphs
        and isinstance(sae, MultiScaleTrainingSAE)
        and config.device.startswith("cuda")
        and sae.can_be_recorded
    )
    step_bytes = STEP_TENSORS * batch_size_tokens * config.d_sae * width
    return SAECost(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=parameter_bytes + buffer_bytes,
        optimizer_bytes=2 * parameter_bytes,
        gradient_bytes=parameter_bytes,
        step_bytes=step_bytes,
        recorded_bytes=step_bytes + parameter_bytes if recorded else 0,
    )


def model_parameters(shape: ModelShape) -> int:
    """Estimated number of weights of a language model."""
    layers = 12 * shape.n_layers * shape.d_model**2
    return layers + 2 * shape.vocabulary * shape.d_model


def run_cost(config: RunConfig, plans: Sequence[SAEPlan], shape: ModelShape) -> RunCost:
    """Estimated memory, disk and length of a run."""
    training, context = config.training, config.data.context_size
    llm_rows = training.store_batch_size_prompts * context
    tokens = config.training.whole_tokens
    saes = {
        plan.name: sae_cost(
            plan.config, training.batch_size_tokens, cuda_graphs=training.cuda_graphs
        )
        for plan in plans
    }
    widths = {plan.hook: plan.config.d_in for plan in plans}
    kept = min(training.keep_checkpoints, training.n_checkpoints + 1)
    forward = llm_rows * (LAYER_TENSORS * shape.d_model + 2 * context * shape.d_model // HEAD_WIDTH)
    weight = str_to_dtype(config.model.dtype).itemsize
    return RunCost(
        saes=saes,
        model_bytes=model_parameters(shape) * weight,
        model_forward_bytes=forward * weight,
        buffer_bytes=buffer_bytes(
            training.n_batches_in_buffer * context, llm_rows, list(widths.values())
        ),
        tokens=tokens,
        steps=config.training.steps,
        forward_passes=-(-tokens // llm_rows),
        checkpoints_bytes=kept * sum(cost.checkpoint_bytes for cost in saes.values()),
    )


def _facts(title: str, rows: Sequence[tuple[str, str | None]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            # Text, not markup: brackets in names and values are not styles.
            grid.add_row(Text(name), Text(value))
    return Group(Text(title, style="bold underline"), grid, Text(""))


def describe_checkpoint(name: str, info: StoredSAE) -> RenderableType:
    """One SAE on disk, as facts."""
    meta = info.metadata
    steps, tokens = meta.get("training_steps"), meta.get("training_tokens")
    trained = None if steps is None else f"{steps:,} steps"
    if trained is not None and tokens is not None:
        trained += f", {tokens:,} tokens"
    if steps == 0:
        trained = "0 steps: THIS SAE WAS NEVER TRAINED"
    architecture = info.architecture
    if info.trained_as != info.architecture:
        architecture += f" (trained as {info.trained_as})"
    l0 = None if info.kind == "training checkpoint" else "not recorded"
    if info.l0 is not None:
        l0 = f"{info.l0:.1f} active latents per token, measured at export"
    jumprelu = None
    if info.report:
        obstacle = cast("str | None", info.report.get("jumprelu_obstacle"))
        jumprelu = "yes" if obstacle is None else f"no: {obstacle}"
    warnings = info.warnings
    try:
        _ = info.weights_sha256, info.jumprelu_sha256
    except InputError as damage:
        warnings = [str(damage), *warnings]
    return _facts(
        f"{name}: {info.kind}",
        [
            ("folder", str(info.folder)),
            ("architecture", architecture),
            (
                "sizes",
                f"d_in {info.d_in:,}, d_sae {info.d_sae:,}, {info.config.get('dtype', 'float32')}",
            ),
            ("parameters", f"{info.parameters:,} ({human_bytes(info.weight_bytes)})"),
            ("model", _recorded(meta.get("model_name"))),
            ("hook", _recorded(meta.get("hook_name"))),
            ("context", _recorded(meta.get("context_size"))),
            ("trained", trained or "length not recorded"),
            ("mechanisms", "\n".join(info.mechanisms) or None),
            ("L0", l0),
            ("jumprelu copy", jumprelu),
            ("WARNING", "\n".join(warnings) or None),
        ],
    )


def _recorded(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def describe_folder(folder: Path) -> RenderableType:
    """Everything `msae info DIR` says."""
    record, saes = read_folder(folder)
    described = [describe_checkpoint(name, info) for name, info in saes.items()]
    if record is None:
        return Group(*described)
    model = record.get("model") or {}
    data = record.get("data") or {}
    planned = record.get("saes") or {}
    missing = [name for name in planned if name not in saes]
    run = _facts(
        f"{folder.resolve().name}: run, {record.get('status', 'status not recorded')}",
        [
            ("model", _recorded(model.get("name"))),
            ("text", _recorded(data.get("description"))),
            ("length", f"{record.get('steps', 0):,} steps, {record.get('tokens', 0):,} tokens"),
            ("time", f"{record.get('wall_seconds', 0):,.0f} s"),
            ("seed", _recorded(record.get("seed"))),
            ("not exported", ", ".join(missing) or None),
        ],
    )
    return Group(run, *described)


def describe_config(path: Path, overrides: Sequence[str] = ()) -> RenderableType:
    """Everything `msae info --config` says: the recipe is checked, nothing is loaded."""
    config = RunConfig.load(path, overrides)
    shape = describe_model(config.model.name)
    plans = config.validate(shape)
    check_evaluable(config.model.name, config.hooks, config.model.loader)
    cost = run_cost(config, plans, shape)
    loaded = human_bytes(LOADED_MODEL_FACTOR * cost.model_bytes)
    batch = config.training.store_batch_size_prompts * config.data.context_size
    return Group(
        _facts(
            f"{path.name}: {len(plans)} SAE{'s' if len(plans) > 1 else ''}",
            [
                ("model", f"{config.model.name}, {shape.n_layers} layers of {shape.d_model}"),
                ("text", config.data.source),
                ("hooks", ", ".join(config.hooks)),
                ("length", f"{cost.tokens:,} tokens in {cost.steps:,} steps"),
                ("LLM passes", f"{cost.forward_passes:,} of {batch:,} tokens"),
            ],
        ),
        *(_describe_plan(plan, cost) for plan in plans),
        _facts(
            "memory and disk",
            [
                ("SAEs", f"{human_bytes(cost.sae_bytes)} weights, gradients and Adam"),
                (
                    "model",
                    f"{human_bytes(cost.model_bytes)} weights, {loaded} once loaded (estimate)",
                ),
                ("buffer", f"{human_bytes(cost.buffer_bytes)} activations, while they are mixed"),
                ("one pass", f"{human_bytes(cost.model_forward_bytes)} in the model (estimate)"),
                ("peak", f"{human_bytes(cost.peak_bytes)} (estimate), + 0.9 GiB of libraries"),
                ("checkpoints", f"{human_bytes(cost.checkpoints_bytes)} on disk"),
            ],
        ),
    )


def _describe_plan(plan: SAEPlan, cost: RunCost) -> RenderableType:
    item, config = cost.saes[plan.name], plan.config
    k = getattr(config, "k", None)
    multiscale = config.architecture() == ARCHITECTURE
    sizes = f"d_in {config.d_in:,}, d_sae {config.d_sae:,}"
    recorded = f"{human_bytes(item.recorded_bytes)} held (estimate); "
    recorded += "training.cuda_graphs: false holds none"
    return _facts(
        f"{plan.name}: {config.architecture()} at {plan.hook}",
        [
            ("sizes", sizes + (f", k {k:g}" if k else "")),
            ("parameters", f"{item.parameters:,} ({human_bytes(item.weight_bytes)} with buffers)"),
            ("Adam", human_bytes(item.optimizer_bytes)),
            ("one step", f"{human_bytes(item.step_bytes)} (estimate)"),
            ("recorded step", recorded if item.recorded_bytes else None),
            ("mechanisms", "\n".join(mechanisms_on(vars(config))) or None if multiscale else None),
        ],
    )
