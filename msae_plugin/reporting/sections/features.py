"""The dictionaries themselves: diversity, firing, scales, co-activation, latents in context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from msae_plugin.common.table import CellValue, Column, Table, columns, number
from msae_plugin.reporting.analyses.features import CosineBin
from msae_plugin.reporting.analyses.per_sae import AnalysedGroup, SAEAnalysis, coactivation, grouped
from msae_plugin.reporting.document import (
    Block,
    Context,
    LatentContexts,
    Links,
    Place,
    Section,
    Subheading,
    Text,
)
from msae_plugin.reporting.figures import Style, bars, steps
from msae_plugin.reporting.sources import RunSource, is_variant

MOST_OUTLINES = 7
"""Histograms drawn over one another."""
MOST_BARS = 4
MOST_ROWS_OPEN = 24
"""Longer tables are folded."""
CLUSTER_BANDS = ((1, 1), (2, 5), (6, 20), (21, None))


def diversity_section(
    place: Place, analyses: Sequence[SAEAnalysis], styles: Mapping[str, Style]
) -> Section | None:
    """Decoder geometry and firing of every SAE on disk; None when there are none."""
    groups = [g for g in grouped(analyses) if any(a.diversity is not None for a in g.saes)]
    if not groups:
        return None
    drawn = _drawn(groups)
    blocks: list[Block] = [_decoder_table(place, groups), _cluster_table(place, groups)]
    blocks += _cosine_figure(place, drawn, styles) + _density_figure(place, drawn, styles)
    blocks += _scales(place, groups)
    blocks += _coactivation_blocks(place, drawn)
    return Section(place.named("features"), place.titled("Feature statistics"), blocks)


def _drawn(groups: Sequence[AnalysedGroup]) -> list[AnalysedGroup]:
    """Those that fit a figure: no ladder variants, and one target L0, the middle one."""
    chosen = [group for group in groups if not is_variant(group.method)] or list(groups)
    targets = list(dict.fromkeys(group.l0_target for group in chosen))
    middle = targets[len(targets) // 2]
    return [group for group in chosen if group.l0_target == middle][:MOST_OUTLINES]


def _where(groups: Sequence[AnalysedGroup]) -> str:
    l0 = groups[0].l0_target
    return "" if l0 is None else f", target L0 {l0:g}"


def _decoder_table(place: Place, groups: Sequence[AnalysedGroup]) -> Table:
    rows: list[list[CellValue]] = []
    for group in groups:
        first = group.saes[0].diversity
        norms = [a.diversity.norms for a in group.saes if a.diversity is not None]
        rows.append(
            [
                group.method,
                group.l0_target,
                len(group.saes),
                None if first is None else first.d_sae,
                group.spread("mean_max_cosine"),
                group.spread("effective_rank"),
                None if first is None else first.d_in,
                min(smallest for smallest, _, _ in norms),
                max(largest for _, _, largest in norms),
                group.spread("median_frequency"),
                group.spread("never"),
            ]
        )
    headings = (
        ("method", "method", ""), ("l0_target", "target L0", ""), ("seeds", "seeds", ""),
        ("d_sae", "latents", ""), ("mean_max_cosine", "mean max cosine", "↓"),
        ("effective_rank", "effective rank", "dimensions ↑"), ("d_in", "of", "d_in"),
        ("norm_min", "smallest norm", "decoder rows"),
        ("norm_max", "largest norm", "decoder rows"),
        ("median_frequency", "median firing", "share of tokens"),
        ("never", "never fired", "latents, end of training"),
    )  # fmt: skip
    return Table(
        place.named("decoders"),
        "Decoders and firing. Mean ± one standard deviation over seeds. Effective rank: "
        "exp(entropy) of the normalised singular values of the unit decoder rows (Roy and "
        "Vetterli 2007). Firing is that of the last window of training.",
        [replace(c, digits=4) if "norm" in c.key else c for c in columns(*headings)],
        rows,
    )


def _cluster_table(place: Place, groups: Sequence[AnalysedGroup]) -> Table:
    rows: list[list[CellValue]] = []
    thresholds: dict[float, None] = {}
    for group in groups:
        for analysis in group.saes:
            if analysis.diversity is not None:
                thresholds.update(dict.fromkeys(c.cosine for c in analysis.diversity.clusters))
    for index, cosine in enumerate(thresholds):
        for group in groups:
            sizes = [
                analysis.diversity.clusters[index].sizes
                for analysis in group.saes
                if analysis.diversity is not None
            ]
            rows.append(
                [
                    group.method,
                    group.l0_target,
                    f"{cosine:g}",
                    sum(map(len, sizes)) / len(sizes),
                    sum(max(s, default=0) for s in sizes) / len(sizes),
                    *(
                        sum(_share(s, low, high) for s in sizes) / len(sizes)
                        for low, high in CLUSTER_BANDS
                    ),
                ]
            )
    bands = [
        f"in clusters of {low}" if low == high else f"of {low} or more" if high is None
        else f"of {low} to {high}"
        for low, high in CLUSTER_BANDS
    ]  # fmt: skip
    return Table(
        place.named("clusters"),
        "Clusters of decoder directions. Latents linked by chains of cosines above a threshold; "
        "shares are of all latents, means over seeds.",
        [
            *columns(("method", "method"), ("l0_target", "target L0"), ("cosine", "cosine above")),
            Column("clusters", "clusters", digits=0),
            Column("largest", "largest", "latents", digits=0),
            *(Column(band, band, "share", digits=3) for band in bands),
        ],
        rows,
        folded=len(rows) > MOST_ROWS_OPEN,
    )


def _share(sizes: Sequence[int], low: int, high: int | None) -> float:
    total = sum(sizes)
    inside = sum(size for size in sizes if size >= low and (high is None or size <= high))
    return inside / total if total else 0.0


def _first(group: AnalysedGroup) -> SAEAnalysis:
    return next((a for a in group.saes if a.diversity is not None), group.saes[0])


def _cosine_figure(
    place: Place, groups: Sequence[AnalysedGroup], styles: Mapping[str, Style]
) -> list[Block]:
    edges = [i / 20 for i in range(21)]
    counts: dict[str, list[float]] = {}
    told: list[str] = []
    for group in groups:
        diversity = _first(group).diversity
        if diversity is not None and diversity.max_cosines.numel():
            cosines = diversity.max_cosines.clamp(0, 1)
            counts[group.method] = (torch.histc(cosines, 20, 0, 1) / cosines.numel()).tolist()
            told.append(f"{group.method} mean {diversity.mean_max_cosine:.3f}")
    if not counts:
        return []
    return [
        steps(
            place.named("max-cosines"),
            f"How close each decoder direction is to its nearest other one{_where(groups)}, first "
            "seed. Further left is less overlap.",
            f"Outlined histograms of the largest decoder cosine: {', '.join(told)}.",
            edges, counts, "cosine to the nearest other direction", "share of latents", styles,
        )
    ]  # fmt: skip


def _density_figure(
    place: Place, groups: Sequence[AnalysedGroup], styles: Mapping[str, Style]
) -> list[Block]:
    counts: dict[str, list[float]] = {}
    edges: list[float] = []
    told: list[str] = []
    silent: list[str] = []
    for group in groups:
        density = _first(group).density
        if density is None:
            continue
        edges = density.edges
        counts[group.method] = [float(count) for count in density.counts]
        median = "none fires" if density.median is None else f"median {density.median:.2g}"
        told.append(f"{group.method}: {median}, {density.never} never fired")
        silent.append(f"{group.method} {density.never}")
    if not counts:
        return []
    return [
        steps(
            place.named("firing-density"),
            f"How often latents fire{_where(groups)}, first seed, last window of training. "
            f"Latents that never fired are not drawn: {', '.join(silent)}.",
            f"Outlined histograms of log10 firing frequency. {'; '.join(told)}.",
            edges, counts,
            "log10 of the share of tokens on which a latent fires", "latents", styles,
        )
    ]  # fmt: skip


def _scales(place: Place, groups: Sequence[AnalysedGroup]) -> list[Block]:
    nested = [group for group in groups if any(a.scales for a in group.saes)]
    rows: list[list[CellValue]] = [
        [
            group.method,
            group.l0_target,
            f"{band.first:,} to {band.end - 1:,}",
            band.end - band.first,
            band.active,
            band.share,
            band.never,
        ]
        for group in nested
        for band in next(a.scales for a in group.saes if a.scales)
    ]
    if not rows:
        return [Text("Firing by scale is not shown: no SAE here has nested prefixes.")]
    headings = (
        ("method", "method", ""), ("l0_target", "target L0", ""), ("band", "latents", ""),
        ("width", "width", "latents"), ("active", "active", "latents per token"),
        ("share", "of all activity", "share"), ("never", "never fired", "latents"),
    )  # fmt: skip
    table = Table(
        place.named("scales"),
        "Firing by scale. What each nested prefix adds to the one before it; first seed, last "
        "window of training.",
        columns(*headings),
        rows,
        folded=True,
    )
    return [*_scale_figure(place, _drawn(nested)), table]


def _scale_figure(place: Place, groups: Sequence[AnalysedGroup]) -> list[Block]:
    scales = {g.method: next(a for a in g.saes if a.scales).scales for g in groups[:MOST_BARS]}
    first = next(iter(scales.values()))
    same = {
        method: bands
        for method, bands in scales.items()
        if [b.end for b in bands] == [b.end for b in first]
    }
    told = "; ".join(
        f"{method}: {', '.join(number(band.active, 1) for band in bands)}"
        for method, bands in same.items()
    )
    return [
        bars(
            place.named("firing-by-scale"),
            f"Active latents per token in what each nested prefix adds{_where(groups)}.",
            f"Bars of active latents per token by scale. {told}.",
            [f"{band.first:,}–{band.end - 1:,}" if i else f"0–{band.end - 1:,}"
             for i, band in enumerate(first)],
            {method: [band.active for band in bands] for method, bands in same.items()},
            "latents, in the exported order",
            "active per token",
        )
    ]  # fmt: skip


def _coactivation_blocks(place: Place, groups: Sequence[AnalysedGroup]) -> list[Block]:
    found: dict[str, list[CosineBin]] = {}
    samples: set[int] = set()
    for group in groups[:MOST_BARS]:
        measured = coactivation(_first(group).sae)
        if measured is not None:
            samples.add(measured[0])
            found[group.method] = measured[1]
    if not found:
        return [
            Text("Co-activation against decoder cosine is not measured: no run kept activations.")
        ]
    first = next(iter(found.values()))
    labels = [f"{b.low:g} to {b.high:g}" for b in first]
    rows: list[list[CellValue]] = [
        [method, label, b.pairs, b.coactivation, b.together]
        for method, bins in found.items()
        for label, b in zip(labels, bins, strict=True)
    ]
    told = "; ".join(
        f"{method} rises to {max((b.coactivation or 0.0) for b in bins):.3f}"
        for method, bins in found.items()
    )
    counted = " or ".join(f"{n:,}" for n in sorted(samples))
    note = f"{counted} activations kept from the export check{_where(groups)}, first seed"
    return [
        bars(
            place.named("coactivation"),
            "Do latents that point alike also fire together? Mean co-activation (cosine of the "
            f"activations) of all pairs by decoder cosine; {note}. The co-activation penalty acts "
            "on the right-hand end.",
            f"Bars of mean co-activation by decoder cosine: {told}.",
            labels,
            {method: [b.coactivation or 0.0 for b in bins] for method, bins in found.items()},
            "cosine of two decoder directions",
            "mean co-activation",
        ),
        Table(
            place.named("coactivation-table"),
            f"Co-activation by decoder cosine. On {note}. Only latents that fire there count.",
            columns(
                ("method", "method"),
                ("cosine", "decoder cosine"),
                ("pairs", "pairs"),
                ("coactivation", "co-activation", "mean cosine of activations"),
                ("together", "fire together", "share of pairs"),
            ),
            rows,
            folded=True,
        ),
    ]


CONTEXT_LATENTS = 8
"""Latents shown of each SAE."""


def contexts_section(
    runs: Sequence[RunSource], by_place: Sequence[tuple[Place, Sequence[SAEAnalysis]]]
) -> Section | None:
    """Latents with the text that activates them; None when no run stored any."""
    blocks: list[Block] = []
    for run in runs:
        if run.demo is not None and run.demo.get("strongest_latents"):
            latents = run.demo["strongest_latents"]
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
    """Links to the SAEDashboard pages."""
    intro = Text(
        "Logits, density and activations of chosen latents, drawn by SAEDashboard; files beside "
        "this page."
    )
    return Section("dashboards", "Latents in SAEDashboard", [intro, Links(dashboards)])


def _latents(latents: Sequence[Mapping[str, Any]]) -> Iterable[Block]:
    for latent in latents[:CONTEXT_LATENTS]:
        contexts = latent.get("contexts") or []
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
