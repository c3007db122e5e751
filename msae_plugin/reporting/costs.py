"""Estimated memory and disk of a run, from its configuration alone.

Formulas, in bytes; W = 4 for float32:

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

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype

from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.models.loading import ModelShape
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import RunConfig

STEP_TENSORS = 10
LAYER_TENSORS = 16
HEAD_WIDTH = 64
LOADED_MODEL_FACTOR = 1.7
FLOAT32_BYTES = 4


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

    saes: dict[str, SAECost]  # cost of each SAE by name
    model_bytes: int  # language model weights
    model_forward_bytes: int  # one forward pass of the language model
    buffer_bytes: int  # activation buffer at its peak
    tokens: int  # training tokens, whole steps only
    steps: int
    forward_passes: int  # forward passes of the language model
    checkpoints_bytes: int  # disk of the checkpoints that are kept

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory without Python and the libraries.

        The SAEs are stepped one after another, and never while the model runs.
        """
        held = sum(
            c.weight_bytes + c.optimizer_bytes + c.gradient_bytes + c.recorded_bytes
            for c in self.saes.values()
        )
        step = max(c.step_bytes for c in self.saes.values())
        model = round(LOADED_MODEL_FACTOR * self.model_bytes)
        return held + model + self.buffer_bytes + max(step, self.model_forward_bytes)


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
    recorded = cuda_graphs and _is_recorded(config, sae)
    step_bytes = STEP_TENSORS * batch_size_tokens * config.d_sae * width
    return SAECost(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=parameter_bytes + buffer_bytes,
        optimizer_bytes=2 * parameter_bytes,
        gradient_bytes=parameter_bytes,
        step_bytes=step_bytes,
        recorded_bytes=step_bytes + parameter_bytes if recorded else 0,
    )


def _is_recorded(config: TrainingSAEConfig, sae: torch.nn.Module) -> bool:
    return (
        isinstance(sae, MultiScaleTrainingSAE)
        and config.device.startswith("cuda")
        and sae.can_be_recorded
    )


def buffer_bytes(rows: int, llm_batch_rows: int, d_ins: Sequence[int]) -> int:
    """Peak of the mixing buffer: its rows, overfilled by one LLM batch, and a shuffled copy."""
    return 2 * FLOAT32_BYTES * (rows + llm_batch_rows) * sum(d_ins)


def model_parameters(shape: ModelShape) -> int:
    """Estimated number of weights of a language model."""
    layers = 12 * shape.n_layers * shape.d_model**2
    return layers + 2 * shape.vocabulary * shape.d_model


def run_cost(config: RunConfig, plans: Sequence[SAEPlan], shape: ModelShape) -> RunCost:
    """Estimated memory, disk and length of a run."""
    training, context = config.training, config.data.context_size
    llm_rows = training.store_batch_size_prompts * context
    tokens = config.total_steps * config.tokens_per_step
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
        steps=config.total_steps,
        forward_passes=-(-tokens // llm_rows),
        checkpoints_bytes=kept * sum(cost.checkpoint_bytes for cost in saes.values()),
    )
