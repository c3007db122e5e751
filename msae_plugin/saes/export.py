"""The export at the end of a run: written whole or not at all, and checked against the trained SAE.

FOLDER/sae/        cfg.json, sae_weights.safetensors, sparsity.safetensors, runner_cfg.json
FOLDER/jumprelu/   the same SAE as SAELens' own `jumprelu`, when the mathematics allows
FOLDER/check_activations.safetensors  some of the activations of the check, for later checks
FOLDER/export.json the numbers of the check; written last, so that its presence says "complete"
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from safetensors.torch import save_file

from msae_plugin.architecture.calibration import exported_threshold
from msae_plugin.architecture.export import jumprelu_export_obstacle, save_jumprelu_export
from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import (
    TEMPORARY_PREFIX,
    file_sha256,
    folder_written_atomically,
    write_json_atomic,
)
from msae_plugin.saes.clean_config import clean_run_config
from msae_plugin.saes.health import HealthFinding, assess

# Rounding of a float32 dot product of length d_in is about sqrt(d_in) 2^-24 of its operands' size
# (3e-6 at d_in 2304); 1e-4 of a token's largest latent leaves room for the cancellation in
# x - b_dec and for folded weights, and is far below any real disagreement. Lower precisions: 4
# units of rounding.
TOLERANCE = 1e-4
# A latent whose pre-activation is within rounding of its threshold may be on in one version and off
# in the other. Of the active latents a share of about the rounding error lies that close; ten times
# the tolerance is never reached by rounding and always by a wrong threshold or a missing row.
FLIPS_PER_TOLERANCE = 10
# A handful is always allowed: the share means nothing for a few hundred active latents.
MIN_FLIPS_ALLOWED = 2


@dataclass(frozen=True)
class Agreement:
    """Differences between a trained SAE and an exported one on the same activations."""

    # Largest |difference| of a latent that both have on, divided by the largest latent of its token
    # (or by the median of those, for a token with tiny latents).
    max_latent_difference: float
    # Largest |difference| of a reconstruction divided by the norm of the trained one (same floor),
    # over tokens without a flip.
    max_reconstruction_difference: float
    flips: int  # latents on in exactly one of the two
    flips_allowed: int  # how many may be on their threshold by rounding
    active: int  # latents that are on in the trained SAE, over all tokens
    exported_active: int  # the same of the exported one
    tolerance: float  # bound on both differences

    def failure(self) -> str | None:
        """The disagreement in words, or None."""
        for what, difference, unit in (
            ("latents", self.max_latent_difference, "the token's largest"),
            ("reconstructions", self.max_reconstruction_difference, "their norm"),
        ):
            # `not <=` rather than `>`: NaN must fail.
            if not difference <= self.tolerance:
                return (
                    f"{what} differ by {difference:.2e} of {unit} "
                    f"(at most {self.tolerance:.0e} is rounding)"
                )
        if self.flips > self.flips_allowed:
            return (
                f"{self.flips} of {self.active} active latents are on in only one of the two "
                f"(at most {self.flips_allowed} can be on the threshold by rounding)"
            )
        return None


def export_order(sae: TrainingSAE[Any]) -> torch.Tensor | None:
    """(d_sae,) long: exported latent j is training latent order[j]; None where nothing moves."""
    return sae.export_order() if isinstance(sae, MultiScaleTrainingSAE) else None


def dense(latents: torch.Tensor) -> torch.Tensor:
    """Latents as a dense tensor: some of SAELens' classes encode into sparse ones."""
    return latents.to_dense() if latents.is_sparse else latents


def _decoder_norms(sae: MultiScaleTrainingSAE) -> torch.Tensor | float:
    """Factor of a training latent when its decoder row gets unit norm at export."""
    return 1.0 if sae.cfg.rescale_acts_by_decoder_norm else sae.get_W_dec_norm()


@torch.no_grad()
def trained_latents(sae: TrainingSAE[Any], activations: torch.Tensor) -> torch.Tensor:
    """Latents of a training SAE as its export must give them: in its order and its units.

    In eval mode a SAELens training SAE encodes as it is exported, with one exception: BatchTopK and
    its kin select over the batch even then, and are exported with their running threshold, which is
    therefore applied here to the training SAE's own pre-activations. The SAE is in eval mode, with
    every scaling of the activations folded in: (n, d_in) raw activations give (n, d_sae) dense
    latents.
    """
    if isinstance(sae, MultiScaleTrainingSAE):
        latents = sae.encode(activations) * _decoder_norms(sae)
        return latents[:, sae.export_order()]
    if isinstance(sae, BatchTopKTrainingSAE):
        pre = sae.encode_with_hidden_pre(activations)[1]
        return pre.relu() * (pre > exported_threshold(sae).to(pre.dtype))
    return dense(sae.encode(activations))


@torch.no_grad()
def trained_reconstruction(sae: TrainingSAE[Any], latents: torch.Tensor) -> torch.Tensor:
    """Decode what `trained_latents` gave with the training SAE. (n, d_sae) -> (n, d_in)."""
    if isinstance(sae, MultiScaleTrainingSAE):
        own = torch.empty_like(latents).index_copy_(1, sae.export_order(), latents)
        latents = own / _decoder_norms(sae)
    return sae.decode(latents)


@torch.no_grad()
def compare(
    latents: torch.Tensor,
    reconstruction: torch.Tensor,
    exported: SAE[Any],
    activations: torch.Tensor,
) -> Agreement:
    """Compare an exported SAE with what the trained one gives.

    `latents` (n, d_sae) are from `trained_latents`, the reconstruction (n, d_in) is from
    `trained_reconstruction`; both are of these activations.
    """
    fed = activations.to(exported.device, exported.dtype)
    other = dense(exported.encode(fed)).to(latents.device)
    other_reconstruction = exported.decode(other).to(latents.device)
    tolerance = max(TOLERANCE, 4 * torch.finfo(exported.dtype).eps)
    on, other_on = latents != 0, other != 0
    flipped = on ^ other_on
    active = int(on.sum())
    difference = (latents.float() - other.float()).abs().masked_fill(flipped, 0.0)
    largest = _floored(latents.float().abs().amax(dim=1))
    latent_difference = (difference.amax(dim=1) / largest).max().item()
    clean = ~flipped.any(dim=1)
    norms = _floored(reconstruction.float().norm(dim=1))
    errors = (reconstruction.float() - other_reconstruction.float()).norm(dim=1) / norms
    share = FLIPS_PER_TOLERANCE * tolerance
    return Agreement(
        max_latent_difference=latent_difference,
        max_reconstruction_difference=errors[clean].max().item() if clean.any() else math.inf,
        flips=int(flipped.sum()),
        flips_allowed=max(MIN_FLIPS_ALLOWED, math.ceil(share * active)),
        active=active,
        exported_active=int(other_on.sum()),
        tolerance=tolerance,
    )


def _floored(sizes: torch.Tensor) -> torch.Tensor:
    """Sizes per token, raised to their median (and to something above zero) where tiny."""
    floor = max(sizes.median().item(), torch.finfo(torch.float32).tiny)
    return sizes.clamp(min=floor)


SAE_FOLDER = "sae"
JUMPRELU_FOLDER = "jumprelu"
REPORT_FILENAME = "export.json"
ACTIVATIONS_FILENAME = "check_activations.safetensors"
# Kept to compare a published copy with; 2 MB at d_in 2304. Never published: they show the text.
KEPT_ACTIVATIONS = 256


@dataclass(frozen=True)
class ExportReport:
    """Numbers of the export check; also in FOLDER/export.json."""

    agreement: Agreement  # exported SAE against the trained one
    # The jumprelu copy against the trained one; None without one.
    jumprelu_agreement: Agreement | None
    jumprelu_obstacle: str | None  # why there is no JumpReLU copy; None with one
    l0_target: float | None  # the k that was trained for; None for architectures without one
    l0_exported: float  # active latents per token of the exported SAE on the same activations
    explained_variance: float  # of the exported SAE on the same activations, SAELens' definition
    n_tokens: int  # activations compared
    health: list[HealthFinding]  # in which ways the SAE failed to learn; empty for a healthy one
    # Of the weights in `sae` and `jumprelu`, checked when they are loaded. Not of cfg.json: a user
    # may complete its metadata.
    weights_sha256: dict[str, str]

    @property
    def has_jumprelu(self) -> bool:
        """Whether FOLDER/jumprelu was written."""
        return self.jumprelu_agreement is not None

    @property
    def warnings(self) -> list[str]:
        """The findings as lines."""
        return [finding.message for finding in self.health]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def export_sae(
    sae: TrainingSAE[Any],
    folder: Path,
    activations: torch.Tensor,
    sparsity: torch.Tensor | None,
    runner_cfg: Mapping[str, Any],
    training_log: Sequence[Mapping[str, Any]] = (),
) -> ExportReport:
    """Write the inference export (and the jumprelu copy) of a trained SAE and check both.

    Every scaling of the activations is folded in already. The activations, (n, d_in), are real ones
    as the exported SAE will see them; `sparsity` is the (d_sae,) log10 firing frequency in the
    training SAE's order of latents. Nothing is left in the folder where the check fails.
    """
    if (folder / REPORT_FILENAME).exists():
        raise InputError(f"{folder}: it holds an export already; choose another folder")
    if activations.ndim != 2 or activations.shape[1] != sae.cfg.d_in or not len(activations):
        raise InputError(
            f"export check: activations of shape {tuple(activations.shape)} do not fit an SAE of "
            f"d_in {sae.cfg.d_in}; give (n, {sae.cfg.d_in}) with n > 0"
        )
    _require_trained(sae)
    was_training = sae.training
    sae.eval()
    try:
        # Both folders get their names when the check is over; if it raises, neither does.
        with ExitStack() as folders:
            plain = folders.enter_context(folder_written_atomically(folder / SAE_FOLDER))
            obstacle = (
                jumprelu_export_obstacle(sae.cfg)
                if isinstance(sae, MultiScaleTrainingSAE)
                else f"{sae.cfg.architecture()} is SAELens' own and loads everywhere already"
            )
            jumprelu = (
                folders.enter_context(folder_written_atomically(folder / JUMPRELU_FOLDER))
                if obstacle is None
                else None
            )
            _write(sae, plain, sparsity, runner_cfg)
            if isinstance(sae, MultiScaleTrainingSAE) and jumprelu is not None:
                save_jumprelu_export(sae, jumprelu)
            report = _check(sae, plain, jumprelu, obstacle, activations, training_log)
    finally:
        sae.train(was_training)
    _keep_activations(folder, activations)
    write_json_atomic(folder / REPORT_FILENAME, report.to_dict())
    return report


def _keep_activations(folder: Path, activations: torch.Tensor) -> None:
    # Evenly over the batch: neighbouring rows may be of one document.
    step = max(1, len(activations) // KEPT_ACTIVATIONS)
    kept = activations[::step][:KEPT_ACTIVATIONS].detach().float().cpu().contiguous()
    temporary = folder / f"{TEMPORARY_PREFIX}{ACTIVATIONS_FILENAME}"
    save_file({"activations": kept}, temporary)
    temporary.replace(folder / ACTIVATIONS_FILENAME)


def _require_trained(sae: TrainingSAE[Any]) -> None:
    if sae.cfg.metadata.training_steps == 0:
        raise RunFailure(
            "export: the SAE has 0 training steps, so there is nothing to export; raise "
            "training.tokens to at least one batch"
        )
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunFailure(
                f"export: {name} holds NaN or infinite values: training diverged; lower training.lr"
            )


def _write(
    sae: TrainingSAE[Any],
    folder: Path,
    sparsity: torch.Tensor | None,
    runner_cfg: Mapping[str, Any],
) -> None:
    sae.save_inference_model(folder)
    if sparsity is not None:
        order = export_order(sae)
        if order is not None:
            sparsity = sparsity[order.to(sparsity.device)]
        save_file({"sparsity": sparsity.detach().cpu().contiguous()}, folder / SPARSITY_FILENAME)
    text = json.dumps(clean_run_config(runner_cfg), indent=2, allow_nan=False)
    (folder / RUNNER_CFG_FILENAME).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def _check(
    sae: TrainingSAE[Any],
    plain: Path,
    jumprelu: Path | None,
    obstacle: str | None,
    activations: torch.Tensor,
    training_log: Sequence[Mapping[str, Any]],
) -> ExportReport:
    """Reload what was written and compare it with the trained SAE on the activations."""
    fed = activations.to(sae.device, sae.dtype)
    latents = trained_latents(sae, fed)
    reconstruction = trained_reconstruction(sae, latents)
    written = {SAE_FOLDER: plain} | ({} if jumprelu is None else {JUMPRELU_FOLDER: jumprelu})
    agreements: dict[str, Agreement] = {}
    for name, folder in written.items():
        exported = SAE.load_from_disk(folder, device=str(sae.device))
        agreements[name] = compare(latents, reconstruction, exported, fed)
        if (failure := agreements[name].failure()) is not None:
            what = "the export" if name == SAE_FOLDER else "the jumprelu copy"
            raise RunFailure(
                f"export check: {what} does not compute what was trained: {failure}; nothing was "
                "written, the training checkpoint is kept"
            )
    target: float | None = getattr(sae.cfg, "k", None)
    l0 = agreements[SAE_FOLDER].exported_active / len(fed)
    if l0 == 0:
        raise RunFailure(
            "export check: the exported SAE is silent (L0 is 0 on real activations); train longer "
            "or check the threshold"
        )
    variance = ExplainedVarianceCalculator()
    variance.add_batch(reconstruction, fed)
    explained_variance = variance.compute()
    return ExportReport(
        agreement=agreements[SAE_FOLDER],
        jumprelu_agreement=agreements.get(JUMPRELU_FOLDER),
        jumprelu_obstacle=obstacle,
        l0_target=None if target is None else float(target),
        l0_exported=l0,
        explained_variance=explained_variance,
        n_tokens=len(fed),
        health=assess(
            training_log,
            d_sae=sae.cfg.d_sae,
            l0_target=target,
            l0_exported=l0,
            explained_variance=explained_variance,
        ),
        weights_sha256={
            name: file_sha256(folder / SAE_WEIGHTS_FILENAME) for name, folder in written.items()
        },
    )
