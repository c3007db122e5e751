"""Tiny SAEs on the tiny model, as the evaluations receive them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from msae_plugin import MultiScaleSAE, MultiScaleSAEConfig
from msae_plugin.common.files import tensors_sha256
from msae_plugin.common.progress import Report
from msae_plugin.evaluation.outcomes import EvaluationRun, ModelContext, ScoreResult
from msae_plugin.evaluation.saebench.adapter import run_evaluation
from msae_plugin.saes.load import EvaluatedSAE

HOOK = "blocks.1.hook_resid_post"
D_IN = 64


def run(
    evaluation: str,
    context: ModelContext,
    settings: Mapping[str, Any],
    saes: Sequence[EvaluatedSAE],
    seed: int,
    output: Path,
    report: Report,
) -> dict[str, ScoreResult]:
    """The results of one evaluation with one seed, by SAE."""
    return run_evaluation(EvaluationRun(evaluation, context, settings, seed, output, report), saes)


def loads(context: ModelContext) -> Any:
    """In the place of a model's class that SAEBench loads by name: it gives what is loaded."""
    model = context.language_model.model
    return SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)


def make_subject(sae: SAE[Any], name: str) -> EvaluatedSAE:
    """A subject around an SAE, its decoder norms folded."""
    sae.cfg.metadata.model_name = "tiny-model"
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata.context_size = 32
    sae.cfg.metadata.prepend_bos = True
    digest = tensors_sha256(sae.state_dict())
    sae.fold_W_dec_norm()
    sae.eval()
    return EvaluatedSAE(name, name, sae, digest, "tiny-model", HOOK)


def random_standard(seed: int, d_sae: int = 96) -> SAE[Any]:
    """A random ReLU SAE that keeps some of the signal."""
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=d_sae))
    decoder = torch.randn(d_sae, D_IN)
    sae.W_dec.data = decoder
    sae.W_enc.data = 0.5 * torch.nn.functional.normalize(decoder, dim=1).T.contiguous()
    sae.b_enc.data.fill_(-0.1)
    return sae


def random_multiscale(seed: int, d_sae: int = 96) -> SAE[Any]:
    """A random multiscale SAE in inference form."""
    torch.manual_seed(seed)
    sae = MultiScaleSAE(MultiScaleSAEConfig(d_in=D_IN, d_sae=d_sae))
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, D_IN), dim=1)
    sae.W_dec.data = decoder
    sae.W_enc.data = 0.5 * decoder.T.contiguous()
    sae.threshold.data.fill_(0.15)
    return sae
