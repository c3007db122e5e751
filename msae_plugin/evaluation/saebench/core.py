"""SAEBench's core evaluation of many SAEs over one pass of the language model.

`sae_bench.evals.core.main.run_evals` runs unchanged, once per SAE; what it is given are the tokens
and activations from disk (`model_side`) and, in place of `get_recons_loss`, that function's
results. That function runs the model three times per batch and SAE: unchanged, with zeros, with the
SAE. Only the third depends on the SAE, and of it only the layers after the hook. The formulas are
SAEBench's; `tests/evaluation/saebench/test_core.py` compares the numbers with its own.

Numbers that SAEBench gets wrong stand beside a right one under a name of its own: explained
variance by the streaming definition, KL from float32 log-probabilities, the mean squared error per
token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sae_bench.evals.core import main as core_main
from sae_bench.sae_bench_utils import (
    general_utils,
    get_eval_uuid,
    get_sae_bench_version,
    get_sae_lens_version,
)
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from typing_extensions import override

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.progress import Report
from msae_plugin.evaluation.outcomes import SAEBENCH_ID, ScoreResult, failure, require_real
from msae_plugin.evaluation.saebench.adapter import Adapter
from msae_plugin.evaluation.saebench.model_side import CoreModelSide, core_tokens, ignored_tokens
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.saes.export import dense
from msae_plugin.saes.load import EvaluatedSAE

logger = logging.getLogger(__name__)

# Their activations are (batch, seq, heads, d_head).
_HEAD_HOOKS = ("hook_q", "hook_k", "hook_v", "hook_z")


def not_special(tokens: torch.Tensor, ignored: set[int]) -> torch.Tensor:
    """(batch, seq) bool: tokens that are none of the ignored ones."""
    return ~torch.isin(tokens, torch.tensor(sorted(ignored), device=tokens.device))


@torch.no_grad()
def measure_reconstruction(
    side: CoreModelSide,
    saes: Mapping[str, SAE[Any]],
    ignored: set[int],
    *,
    exclude_special_tokens: bool,
    report: Report,
) -> tuple[dict[str, list[dict[str, torch.Tensor]]], dict[str, ScoreResult]]:
    """The results of `get_recons_loss` for every batch and SAE.

    By SAE a dictionary per batch, of (prompts, context) or (prompts, context - 1) tensors under the
    names of SAEBench, and `kl_..._float32`; and the SAEs that failed.
    """
    found: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in saes}
    failed: dict[str, ScoreResult] = {}
    for index in range(side.n_reconstruction):
        clean, ce_clean, zeros = side.clean(index)
        activations = side.activations(index)
        tokens = side.batch(index)
        keep = not_special(tokens, ignored if exclude_special_tokens else set())
        for name, sae in saes.items():
            if name in failed:
                continue
            report("core: reconstruction", index * len(saes), side.n_reconstruction * len(saes))
            try:
                values = _reconstructed(sae, activations, keep, side.hook_name)
                predictions = side.predictions_with(tokens, clean, values)
            # Whatever one SAE raises is its own outcome: the others go on.
            except Exception as error:  # noqa: BLE001
                failed[name] = failure(error)
                del found[name]
                continue
            found[name].append(
                {
                    "kl_div_with_sae": predictions.kl,
                    "kl_div_with_ablation": zeros.kl,
                    "ce_loss_with_sae": predictions.ce,
                    "ce_loss_without_sae": ce_clean,
                    "ce_loss_with_ablation": zeros.ce,
                    "kl_div_with_sae_float32": predictions.kl_float32,
                    "kl_div_with_ablation_float32": zeros.kl_float32,
                }
            )
    return found, failed


def _reconstructed(
    sae: SAE[Any], activations: torch.Tensor, keep: torch.Tensor, hook_name: str
) -> torch.Tensor:
    """The hook's activations with the SAE's reconstruction at the positions `keep`, (batch, seq).

    As in SAEBench an SAE reads one head, or all of them as one vector.
    """
    head: int | None = sae.cfg.metadata.hook_head_index
    several = head is None and any(part in hook_name for part in _HEAD_HOOKS)
    read = activations if head is None else activations[:, :, head]
    sae_in = read.flatten(-2, -1) if several else read
    sae_out = sae.decode(sae.encode(sae_in.to(sae.device))).to(activations).reshape(read.shape)
    written = torch.where(keep[..., None, None] if several else keep[..., None], sae_out, read)
    if head is None:
        return written
    whole = activations.clone()
    whole[:, :, head] = written
    return whole


# Without these two SAEBench 0.6 cannot write its results: fields that they fill are required ("7
# validation errors for MiscMetrics").
FEATUREWISE = (
    "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics",
)  # fmt: skip
# What `python -m sae_bench.evals.core.main` computes beside.
COMPUTED = (
    "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics",
    "compute_variance_metrics",
)  # fmt: skip


class Core(Adapter):
    """Reconstruction over batches for all SAEs of a hook, then SAEBench's function SAE by SAE."""

    @override
    def prepare(self) -> dict[str, ScoreResult]:
        for name in FEATUREWISE:
            if self.settings.get(name) is False:
                raise InputError(f"core.{name}: SAEBench cannot write its results without it")
        self._config = self.config(**dict.fromkeys(COMPUTED + FEATUREWISE, True))
        self._ignored = ignored_tokens(self.context.language_model.tokenizer)
        self._sides: dict[str, CoreModelSide] = {}
        self._reconstruction: dict[str, list[dict[str, torch.Tensor]]] = {}
        # SAEs that share hook and token settings share the model's side.
        groups: dict[tuple[Any, ...], list[EvaluatedSAE]] = {}
        for evaluated in self.saes:
            metadata = evaluated.sae.cfg.metadata
            key = (evaluated.hook_name, metadata.prepend_bos, str(metadata.seqpos_slice))
            groups.setdefault(key, []).append(evaluated)
        outcomes: dict[str, ScoreResult] = {}
        refusals: list[InputError] = []
        for group in groups.values():
            try:
                outcomes |= self._prepare_group(group)
            # Whatever one hook raises is the outcome of its SAEs: the other hooks go on.
            except Exception as error:
                logger.info("core: hook %s failed", group[0].hook_name, exc_info=True)
                outcomes |= {evaluated.name: failure(error) for evaluated in group}
                refusals += [error] if isinstance(error, InputError) else []
        if len(refusals) == len(groups):
            raise refusals[0]  # the text's fault or a setting's
        return outcomes

    def _prepare_group(self, saes: Sequence[EvaluatedSAE]) -> dict[str, ScoreResult]:
        config, n_first = self._config, self._config.n_eval_reconstruction_batches
        self.report("core: reading text")
        tokens = core_tokens(
            self.context,
            {**vars(config), **self.settings},
            saes[0],
            self.seed,
            n_first + config.n_eval_sparsity_variance_batches,
        )
        side = CoreModelSide(self.context, saes[0].hook_name, tokens, n_first)
        side.prepare(self.report)
        reconstruction, failed = measure_reconstruction(
            side,
            {evaluated.name: self.copy_of(evaluated) for evaluated in saes},
            self._ignored,
            exclude_special_tokens=config.exclude_special_tokens_from_reconstruction,
            report=self.report,
        )
        self._sides |= dict.fromkeys(reconstruction, side)
        self._reconstruction |= reconstruction
        return failed

    @override
    def copy_of(self, evaluated: EvaluatedSAE, dtype: torch.dtype | None = None) -> SAE[Any]:
        sae = super().copy_of(evaluated, dtype)
        # SAEBench switches hook_z's reshaping off around the whole evaluation.
        if sae.hook_z_reshaping_mode:
            sae.turn_off_forward_pass_hook_z_reshaping()
        return sae

    @override
    def evaluate(self, evaluated: EvaluatedSAE) -> ScoreResult:
        side, sae = self._sides[evaluated.name], self.copy_of(evaluated)
        reconstruction = self._reconstruction[evaluated.name]
        general_utils.load_and_format_sae(evaluated.name, sae, self.context.device)
        served = _Served(side)
        observed = _Observed(sae, served, self._ignored)
        with replaced(core_main, "get_recons_loss", _serve(reconstruction)):
            metrics, features = core_main.run_evals(
                sae=observed,  # pyright: ignore[reportArgumentType] - stands for the SAE
                activation_store=served,  # pyright: ignore[reportArgumentType] - its tokens
                model=served,  # pyright: ignore[reportArgumentType] - its activations
                eval_config=self._config,
                ignore_tokens=set(self._ignored),
            )
        metrics["misc_metrics"] = core_main.calculate_misc_metrics(features)
        flat = {name: float(value) for part in metrics.values() for name, value in part.items()}
        flat |= observed.metrics() | _float32_divergences(reconstruction, side, self._ignored)
        if flat["l0"] == 0:
            raise RunFailure(
                f"core of {evaluated.name}: no latent is active on any token (L0 is 0): is it "
                "trained, and is the hook the one it was trained on?"
            )
        require_real(flat, f"core of {evaluated.name}")
        result: dict[str, Any] = {
            "metrics": metrics,
            "eval_cfg": self._config,
            "sae_set": evaluated.name,
            "sae_id": SAEBENCH_ID,
            "feature_metrics": features,
        }
        save = partial(
            core_main.save_single_eval_result,
            core_main.replace_nans_with_negative_one(result),  # of latents that never fire
            get_eval_uuid(),
            get_sae_lens_version(),
            get_sae_bench_version(),
            sae=sae,
        )
        file = self.keep_result(evaluated, save)
        return ScoreResult("measured", flat, file, facts={"text": str(side.key["tokens"])})


def _serve(results: Sequence[Mapping[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """Stands for `get_recons_loss`: the result of one batch after the other."""
    remaining = iter(results)

    def get_recons_loss(*_arguments: Any, **_options: Any) -> dict[str, torch.Tensor]:
        found = next(remaining)
        return {name: value for name, value in found.items() if not name.endswith("_float32")}

    return get_recons_loss


def _float32_divergences(
    reconstruction: Sequence[Mapping[str, torch.Tensor]], side: CoreModelSide, ignored: set[int]
) -> dict[str, float]:
    """Means over all tokens that are not special, of all batches together."""
    kept = [not_special(side.batch(index), ignored) for index in range(len(reconstruction))]

    def mean(name: str) -> float:
        values = [batch[name].double()[at] for batch, at in zip(reconstruction, kept, strict=True)]
        return float(torch.cat(values).mean())

    with_sae, ablation = mean("kl_div_with_sae_float32"), mean("kl_div_with_ablation_float32")
    return {
        "kl_div_with_sae_float32": with_sae,
        "kl_div_with_ablation_float32": ablation,
        "kl_div_score_float32": (ablation - with_sae) / ablation,
    }


class _Served:
    """Stands for SAELens' ActivationsStore and the model: what is on disk, as `run_evals` asks."""

    def __init__(self, side: CoreModelSide) -> None:
        self._side = side
        self._next = 0
        self.context_size = int(side.tokens.shape[2])
        self.store_batch_size_prompts = int(side.tokens.shape[1])
        self.current = side.batch(0)

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        """(batch_size, context) the next tokens."""
        if batch_size != self.store_batch_size_prompts:
            raise RunFailure(f"core: SAEBench asks for {batch_size} prompts")
        self.current = self._side.batch(self._next)
        self._next += 1
        return self.current

    def reset_input_dataset(self) -> None:
        """Nothing: in SAELens 6.54 it does not reach the tokens, which go on where they were."""

    def run_with_cache(
        self, tokens: torch.Tensor, names_filter: Sequence[str], **_options: Any
    ) -> tuple[None, dict[str, torch.Tensor]]:
        """The activations of the tokens that were handed out last."""
        if tokens is not self.current:
            raise RunFailure("core: SAEBench asks for activations of other tokens")
        return None, {names_filter[0]: self._side.activations(self._next - 1)}


class _Observed:
    """The SAE as SAEBench sees it; measures what SAEBench gets wrong on the way."""

    def __init__(self, sae: SAE[Any], served: _Served, ignored: set[int]) -> None:
        self._sae = sae
        self._served = served
        self._ignored = ignored
        self._read = torch.empty(0)
        self._variance = ExplainedVarianceCalculator()
        self._variance_with_special = ExplainedVarianceCalculator()
        self._squared_error = 0.0
        self._n_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sae, name)

    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        """(..., d_sae) latents."""
        self._read = activations
        return dense(self._sae.encode(activations))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., d_in) reconstruction."""
        sae_out = self._sae.decode(latents)
        read, given = (x.float().flatten(0, 1) for x in (self._read, sae_out))
        keep = not_special(self._served.current, self._ignored).flatten().to(read.device)
        self._variance_with_special.add_batch(given, read)
        self._variance.add_batch(given[keep], read[keep])
        self._squared_error += float((read[keep] - given[keep]).double().square().sum())
        self._n_tokens += int(keep.sum())
        return sae_out

    def metrics(self) -> dict[str, float]:
        """The metrics measured so far."""
        return {
            "explained_variance_streaming": self._variance.compute(),
            "explained_variance_streaming_with_special": self._variance_with_special.compute(),
            "squared_error_per_token": self._squared_error / self._n_tokens,
            "n_tokens": float(self._n_tokens),
        }
