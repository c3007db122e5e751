"""Latents with the text that activates them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from msae_plugin.reporting.analyses.per_sae import SAEAnalysis
from msae_plugin.reporting.document import (
    Block,
    Context,
    LatentContexts,
    Links,
    Section,
    Subheading,
    Text,
)
from msae_plugin.reporting.places import Place
from msae_plugin.reporting.sources import RunSource
from msae_plugin.reporting.variants import is_variant

CONTEXT_LATENTS = 8
"""Latents shown of each SAE."""


def contexts_section(
    runs: Sequence[RunSource], by_place: Sequence[tuple[Place, Sequence[SAEAnalysis]]]
) -> Section | None:
    """Latents with the text that activates them; None when no run stored any.

    Args:
        runs: Training runs, whose demo may have stored some.
        by_place: The SAEs on disk; variants of the ladder are left out.
    """
    blocks: list[Block] = []
    for run in runs:
        if run.demo is not None and run.demo.get("strongest_latents"):
            latents = cast("Sequence[Mapping[str, Any]]", run.demo["strongest_latents"])
            blocks.append(Subheading(f"{run.label}: the latents that move the reconstruction most"))
            blocks += _latents(latents)
    for place, analyses in by_place:
        for analysis in analyses:
            sae = analysis.sae
            latents = [] if is_variant(sae.method) else sae.contexts()
            if latents:
                blocks.append(Subheading(place.titled(sae.name)))
                blocks += _latents(latents)
    if not blocks:
        return None
    intro = Text(
        "Tokens of held-out text on which a latent is strongest, one document per line, activation "
        "in front. They were chosen by strength, not for being easy to read."
    )
    return Section("contexts", "Sample features in context", [intro, *blocks])


def dashboards_section(dashboards: Sequence[tuple[str, str]]) -> Section:
    """Where the SAEDashboard pages are.

    Args:
        dashboards: SAEs, and where the page of each lies relative to the report's.
    """
    intro = Text(
        "Logits, density and activations of chosen latents, drawn by SAEDashboard; files beside "
        "this page."
    )
    return Section("dashboards", "Latents in SAEDashboard", [intro, Links(dashboards)])


def _latents(latents: Sequence[Mapping[str, Any]]) -> Iterable[Block]:
    for latent in latents[:CONTEXT_LATENTS]:
        contexts = cast("Sequence[Mapping[str, Any]]", latent.get("contexts") or [])
        frequency, mean = latent.get("frequency"), latent.get("mean_activation")
        parts = [f"latent {latent.get('latent')}"]
        parts += [] if frequency is None else [f"fires on {float(frequency):.2%} of the tokens"]
        parts += [] if mean is None else [f"mean {float(mean):.3g} when it does"]
        yield LatentContexts(
            ", ".join(parts),
            [
                Context(
                    str(context.get("before", "")),
                    str(context.get("token", "")),
                    str(context.get("after", "")),
                    float(context.get("activation", 0.0)),
                )
                for context in contexts
            ],
        )
