"""SAEDashboard pages of chosen latents, beside a report, where that package is installed.

A page is SAEDashboard's own: logits, density, top and quantile activations of each latent in one
file that loads nothing. The language model and the held-out text of the run are needed again, so
pages are made on request only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE

from msae_plugin.common.errors import InputError
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.data.text import iterate_windows, load_text
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.reporting.sources import Sources, TrainedSAE, is_variant
from msae_plugin.saes.export import JUMPRELU_FOLDER
from msae_plugin.saes.load import EvaluatedSAE, load_saes

PACKAGE = "sae_dashboard"
INSTALL = (
    "pip install --no-deps sae-dashboard==0.8.0 decode-clt eindex-callum dataclasses-json "
    "'marshmallow<4' typing-inspect mypy-extensions (it declares transformer-lens<3, and runs with "
    "3.9)"
)


def is_installed() -> bool:
    """Whether it can be imported here."""
    return importlib.util.find_spec(PACKAGE) is not None


DASHBOARDS_FOLDER = "dashboards"
# What SAEDashboard 0.8 can take one latent out of.
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")


@dataclass(frozen=True)
class DashboardRequest:
    """Requested pages."""

    count: int = 8  # per SAE: latents that the report shows in context, else the most frequent
    latents: tuple[int, ...] = ()  # these of every SAE instead
    windows: int = 256  # of held-out text: 33 thousand tokens at a context of 128


def require_dashboard() -> None:
    """Refuse before any work when SAEDashboard is missing."""
    if not is_installed():
        raise InputError(f"--dashboards needs SAEDashboard: {INSTALL}")


def write_dashboards(
    saes: Sequence[TrainedSAE],
    sources: Sources,
    folder: Path,
    request: DashboardRequest,
    progress: Report = warnings_alone,
) -> dict[str, Path]:
    """Write a page per SAE of a language model, at least one."""
    pages: dict[str, Path] = {}
    models: dict[tuple[str, str], LanguageModel] = {}
    texts: dict[tuple[object, ...], torch.Tensor] = {}
    wanted = [sae for sae in saes if sae.export is not None and not is_variant(sae.method)]
    for number, sae in enumerate(wanted):
        data = _data_section(sae, sources)
        if data is None:
            continue
        evaluated = _evaluated(sae)
        architecture = evaluated.sae.cfg.architecture()
        if architecture not in ARCHITECTURES:
            progress(f"no dashboard of {sae.name}: SAEDashboard does not know {architecture}")
            continue
        key = model_for(None, [evaluated]), evaluated.hook_name
        if key not in models:
            models[key] = load_language_model(key[0], [key[1]])
        progress(f"dashboard of {sae.name}", number, len(wanted))
        folder.mkdir(exist_ok=True)
        path = folder / f"{sae.name.replace('/', '_')}.html"
        latents = _latents(sae, evaluated.sae.cfg.d_sae, request)
        metadata = evaluated.sae.cfg.metadata
        text = (key, repr(data), metadata.context_size, metadata.prepend_bos)
        if text not in texts:
            texts[text] = heldout_tokens(evaluated, models[key], data, request.windows)
        _write_page(evaluated.sae, models[key], texts[text], latents, evaluated.hook_name, path)
        pages[sae.name] = path
    if not pages:
        raise InputError(
            "--dashboards: no SAE of the report is of a language model and of an architecture that "
            f"SAEDashboard knows ({', '.join(ARCHITECTURES)})"
        )
    return pages


def _data_section(sae: TrainedSAE, sources: Sources) -> Mapping[str, Any] | None:
    """`data` of the recipe that the SAE is from; None where it has no text."""
    for source in sources.all:
        if not sae.folder.resolve().is_relative_to(source.folder.resolve()):
            continue
        config = source.content.get("config") or {}
        if config.get("data"):
            return config["data"]
    return None


def _evaluated(sae: TrainedSAE) -> EvaluatedSAE:
    """The SAE in unit decoder norms; of the JumpReLU copy where there is one."""
    jumprelu = sae.folder / JUMPRELU_FOLDER
    assert sae.export is not None
    return load_saes([str(jumprelu if jumprelu.is_dir() else sae.export)])[0]


def _latents(sae: TrainedSAE, d_sae: int, request: DashboardRequest) -> list[int]:
    if request.latents:
        for latent in request.latents:
            if not 0 <= latent < d_sae:
                raise InputError(
                    f"--latents: {sae.name!r} has latents 0 to {d_sae - 1}; got {latent}"
                )
        return list(request.latents)
    shown = [int(latent["latent"]) for latent in sae.contexts()]
    if not shown:
        frequencies = sae.frequencies()
        shown = (
            list(range(d_sae))
            if frequencies is None
            else cast("list[int]", frequencies.argsort(descending=True).tolist())
        )
    return shown[: request.count]


def heldout_tokens(
    evaluated: EvaluatedSAE, language_model: LanguageModel, data: Mapping[str, Any], windows: int
) -> torch.Tensor:
    """(windows, context_size) tokens of the held-out text, laid out as in training."""
    text = load_text(
        str(data["source"]),
        split=str(data.get("split") or "train"),
        text_column=cast("str | None", data.get("text_column")),
        heldout_documents=int(data["heldout_documents"]),
    )
    found = iterate_windows(
        language_model.model,
        language_model.tokenizer,
        text.heldout_texts(language_model.tokenizer),
        int(evaluated.sae.cfg.metadata.context_size or 128),
        prepend_bos=bool(evaluated.sae.cfg.metadata.prepend_bos),
    )
    tokens = [window.tokens for window in islice(found, windows)]
    if not tokens:
        raise InputError(f"{data['source']}: its held-out text is shorter than a window")
    return torch.stack(tokens)


def _write_page(
    sae: SAE[Any],
    language_model: LanguageModel,
    tokens: torch.Tensor,
    latents: list[int],
    hook: str,
    path: Path,
) -> None:
    # SAEDashboard is optional, and imported late because it brings matplotlib and plotly.
    runner: Any = importlib.import_module("sae_dashboard.sae_vis_runner")
    data: Any = importlib.import_module("sae_dashboard.sae_vis_data")
    writing: Any = importlib.import_module("sae_dashboard.data_writing_fns")
    # Decoder rows have unit norm already, and TopK refuses to be folded.
    sae.fold_W_dec_norm = lambda: None
    config = data.SaeVisConfig(
        hook_point=hook, features=latents, minibatch_size_features=64, minibatch_size_tokens=32
    )
    found = runner.SaeVisRunner(config).run(encoder=sae, model=language_model.model, tokens=tokens)
    writing.save_feature_centric_vis(sae_vis_data=found, filename=path)
