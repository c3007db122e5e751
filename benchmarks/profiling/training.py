"""A training step, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sae_lens.saes.sae import TrainStepInput

from msae_plugin import MultiScaleTrainingSAE, preset
from msae_plugin.architecture.kernels.decoding import DecodeKernel, MachineSettings
from msae_plugin.architecture.losses import Reconstructions, auxk_loss, reconstruction_losses
from msae_plugin.architecture.mechanisms.base import Latents, Step
from msae_plugin.architecture.selection import Selection
from msae_plugin.architecture.step_schedule import DeadLatents, EncoderInput, StepSchedule
from profiling.machine import Peak, Timing, timed
from profiling.parts import Part, print_parts

DEAD_SHARE = 0.05
Measure = Callable[..., Timing]


@dataclass(frozen=True)
class Setting:
    """What is measured: a size on a device."""

    d_in: int
    d_sae: int
    n_tokens: int
    k: int
    device: torch.device
    autocast: bool
    repeats: int
    preset: str
    decode_kernel: DecodeKernel = "embedding_bag"

    @property
    def title(self) -> str:
        """Size, numbers, device."""
        numbers = "bf16 autocast" if self.autocast else "float32"
        return (
            f"({self.d_in}, {self.d_sae}), {self.n_tokens} tokens, k {self.k}, {numbers}, "
            f"{self.device}"
        )

    def needed_bytes(self) -> int:
        """Weights, gradients, two moments; pre-activations, latents and what ranks them."""
        return 4 * (4 * 2 * self.d_in * self.d_sae + 5 * self.n_tokens * self.d_sae)


def batch_of(setting: Setting) -> torch.Tensor:
    """Sparse mixtures of random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * setting.d_in, setting.d_in, generator=generator)
    strength = torch.rand(setting.n_tokens, 4 * setting.d_in, generator=generator)
    return ((strength * (strength > 0.98)) @ directions).to(setting.device)


def profile_step(setting: Setting, peak: Peak) -> None:
    """Print the parts of a training step."""
    torch.manual_seed(0)
    device, n, d, width = setting.device, setting.n_tokens, setting.d_in, setting.d_sae
    cfg = preset(
        setting.preset, d_in=d, d_sae=width, k=setting.k, training_steps=1000, k_anneal_steps=0,
        device=str(device),
    )  # fmt: skip
    sae = MultiScaleTrainingSAE(cfg).train()
    sae.attach_machine(MachineSettings(setting.decode_kernel, cuda_graphs=False))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    batch = batch_of(setting)
    dead = torch.zeros(width, dtype=torch.bool, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.autocast)
    counter = iter(range(1, 10**9))

    def forward() -> torch.Tensor:
        step = TrainStepInput(batch, {}, dead, next(counter), False)
        with autocast:
            return sae.training_forward_pass(step).loss

    def whole_step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def measure(
        function: Callable[[], object], before: Callable[[], object] | None = None
    ) -> Timing:
        return timed(function, device, setting.repeats, before)

    for _ in range(3):  # the ranking learns its candidates from the step before
        whole_step()
    whole = measure(whole_step)

    with torch.no_grad(), autocast:
        given = sae.normalise(sae.process_sae_in(batch))
        hidden_pre = sae.pre_activations(given)
    selection = sae.select(hidden_pre, cfg.k)
    n_pairs = selection.values.numel()
    rows = 4.0 * n_pairs * d  # bytes of one decoder row per pair
    n_reconstructions = len(cfg.prefix_widths) + len(cfg.sparsity_scales)
    groups = float(n * n_reconstructions * d)
    parameters = sum(p.numel() for p in sae.parameters())
    half = 2 if setting.autocast else 4
    with autocast:
        coefficients = sae.decoder_coefficients(selection, given).detach()
    coefficients.requires_grad_()

    def encode() -> object:
        with torch.no_grad(), autocast:
            return sae.pre_activations(replace(given, decoder_norm=sae.decoder_norm()))

    def decode() -> Reconstructions:
        with autocast:
            return sae.reconstruct(selection, coefficients, n)

    def decode_without_graph() -> object:
        with torch.no_grad():
            return decode()

    reconstructions: list[Reconstructions] = []
    tensors: dict[str, torch.Tensor] = {}

    def all_losses() -> torch.Tensor:
        terms = reconstruction_losses(cfg, reconstructions[-1], batch, None)
        return torch.stack(list(terms.values())).sum()

    def keep_reconstructions() -> None:
        optimizer.zero_grad()
        coefficients.grad = None
        reconstructions[:] = [decode()]

    def keep_loss() -> None:
        keep_reconstructions()
        tensors["loss"] = all_losses()

    def keep_encoder_graph() -> None:
        optimizer.zero_grad()
        with autocast:
            tensors["values"] = sae.decoder_coefficients(selection, given)

    def backward_decode() -> None:
        tensors["loss"].backward()

    def backward_encode() -> None:
        tensors["values"].backward(ones)

    ones = torch.ones_like(coefficients)

    parts = [
        Part("encode: product, bias, decoder norm", measure(encode),
             2.0 * n * d * width, half * (n * d + d * width + n * width) + 4.0 * d * width),
        Part("ranking of all budgets", measure(lambda: sae.select(hidden_pre, cfg.k)),
             0, half * n * width),
        Part("decode of all groups", measure(decode_without_graph), 2.0 * n_pairs * d,
             rows + 4 * groups),
        Part("losses", measure(all_losses, keep_reconstructions), 3 * groups, 8 * groups),
        Part("backward: losses, decode", measure(backward_decode, keep_loss),
             4.0 * n_pairs * d, 2 * rows + 12 * groups + 4.0 * d * width),
        Part("backward: encode",
             measure(backward_encode, keep_encoder_graph),
             2.0 * n_pairs * d, rows + 12.0 * d * width),
    ]  # fmt: skip
    parts += _optional_parts(setting, sae, batch, hidden_pre, selection, measure)
    whole_step()
    forward().backward()
    parts += [
        Part("gradient clipping",
             measure(lambda: torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)),
             3.0 * parameters, 12.0 * parameters),
        Part("Adam", measure(optimizer.step), 12.0 * parameters, 28.0 * parameters),
    ]  # fmt: skip
    beside = [_auxk(setting, sae, batch, given, measure)]
    print_parts(f"Training step, {setting.preset}: {setting.title}", parts, whole, peak, beside)


def _optional_parts(
    setting: Setting,
    sae: MultiScaleTrainingSAE,
    batch: torch.Tensor,
    hidden_pre: torch.Tensor,
    selection: Selection,
    measure: Measure,
) -> list[Part]:
    """Penalty and statistics."""
    n, d, width = setting.n_tokens, setting.d_in, setting.d_sae
    found: list[Part] = []
    chunk = min(sae.cfg.orthogonality_chunk_size, width)
    step = Step(sae, batch, StepSchedule.at(sae.cfg, 1, n), list(sae.mechanisms))
    penalty = sae.mechanisms.orthogonality
    if penalty is not None:
        timing = measure(lambda: penalty.loss(step))
        found.append(
            Part("penalty and its gradient", timing, 2.0 * width * chunk * d, 8.0 * width * d)
        )
    acts = torch.zeros_like(hidden_pre)
    acts[selection.tokens, selection.latents] = selection.values * selection.active()
    active = selection.active().long()

    def statistics() -> None:
        fired = torch.zeros(width, dtype=torch.int64, device=acts.device)
        fired.index_add_(0, selection.latents, active)
        threshold = selection.threshold.float()
        latents = Latents(acts, selection.tokens, selection.latents, fired, threshold)
        with torch.no_grad():
            for mechanism in sae.mechanisms:
                mechanism.on_latents(latents, step)

    found.append(Part("statistics", measure(statistics), 0, 24.0 * selection.values.numel()))

    def dense() -> None:
        latents = acts.new_zeros(n, width)
        latents[selection.tokens, selection.latents] = selection.values

    found.append(Part("dense latents for the host", measure(dense), 0, 4.0 * n * width))
    return found


def _auxk(
    setting: Setting,
    sae: MultiScaleTrainingSAE,
    batch: torch.Tensor,
    given: EncoderInput,
    measure: Measure,
) -> Part:
    mask = torch.arange(setting.d_sae, device=batch.device) % int(1 / DEAD_SHARE) == 0
    dead = DeadLatents.listed(mask)
    assert dead is not None, "every twentieth is"

    def auxk() -> None:
        auxk_loss(given, batch, sae.W_enc, sae.b_enc, sae.W_dec, dead).backward()
        sae.zero_grad()

    flops = 10.0 * setting.n_tokens * setting.d_in * int(mask.sum())
    name = f"beside it: AuxK with {DEAD_SHARE:.0%} dead, forward and backward"
    return Part(name, measure(auxk), flops, 16.0 * sae.W_dec.numel())
