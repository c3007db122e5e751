"""The dictionaries themselves: diversity, firing, scales, co-activation, latents in context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch

from msae_plugin.common.table import Table, number
from msae_plugin.evaluation.contexts import TokenContext
from msae_plugin.reporting.analyses import (
    AnalysedGroup,
    CosineBin,
    DecoderDiversity,
    SAEAnalysis,
    ScaleFiring,
    coactivation,
    grouped,
)
from msae_plugin.reporting.document import (
    Block,
    Cells,
    Cohort,
    LatentContexts,
    Links,
    Section,
    Subheading,
    Text,
    cell,
    spread_cell,
    table_of,
)
from msae_plugin.reporting.figures import Style, bars, steps
from msae_plugin.reporting.sources import is_variant

MOST_OUTLINES = 7
"""Histograms drawn over one another."""
MOST_BARS = 4
MOST_ROWS_OPEN = 24
"""Longer tables are folded."""
CLUSTER_BANDS = {
    "in clusters of 1": (1, 1), "of 2 to 5": (2, 5), "of 6 to 20": (6, 20),
    "of 21 or more": (21, inf),
}  # fmt: skip
MOST_LATENTS = 10
"""Latents shown of each SAE."""


def diversity_section(
    cohort: Cohort, analyses: Sequence[SAEAnalysis], styles: Mapping[str, Style]
) -> Section | None:
    """Decoder geometry and firing of every SAE on disk; None when there are none."""
    groups = [g for g in grouped(analyses) if any(a.diversity is not None for a in g.saes)]
    if not groups:
        return None
    drawn = _drawn(groups)
    blocks: list[Block] = [
        _decoder_table(cohort, groups),
        _cluster_table(cohort, groups),
        *_cosine_figure(cohort, drawn, styles),
        *_density_figure(cohort, drawn, styles),
        *_scales(cohort, groups, styles),
        *_coactivation_blocks(cohort, drawn, styles),
    ]
    return Section(cohort.named("features"), cohort.titled("Feature statistics"), blocks)


def _drawn(groups: Sequence[AnalysedGroup]) -> list[AnalysedGroup]:
    """Those that fit a figure: no ladder variants, and one target L0, the middle one."""
    chosen = [group for group in groups if not is_variant(group.method)] or list(groups)
    targets = list(dict.fromkeys(group.l0_target for group in chosen))
    middle = targets[len(targets) // 2]
    return [group for group in chosen if group.l0_target == middle][:MOST_OUTLINES]


def _where(groups: Sequence[AnalysedGroup]) -> str:
    l0 = groups[0].l0_target
    return "" if l0 is None else f", target L0 {l0:g}"


def _diversities(group: AnalysedGroup) -> list[DecoderDiversity]:
    return [a.diversity for a in group.saes if a.diversity is not None]


def _decoder_table(cohort: Cohort, groups: Sequence[AnalysedGroup]) -> Table:
    def norm(key: str, heading: str, extreme: Callable[[Iterable[float]], float]) -> Cells:
        def of_group(group: AnalysedGroup) -> float:
            return extreme(extreme(d.norms) for d in _diversities(group))

        return cell(key, heading, of_group, "decoder rows", digits=4)

    return table_of(
        cohort.named("decoders"),
        "Decoders and firing. Mean ± one standard deviation over seeds. Effective rank: "
        "exp(entropy) of the normalised singular values of the unit decoder rows (Roy and "
        "Vetterli 2007). Firing is that of the last window of training.",
        groups,
        [
            cell("method", "method"),
            cell("l0_target", "target L0"),
            cell("seeds", "seeds", lambda g: len(g.saes)),
            cell("d_sae", "latents", lambda g: _diversities(g)[0].d_sae),
            spread_cell("mean_max_cosine", "mean max cosine", "↓"),
            spread_cell("effective_rank", "effective rank", "dimensions ↑"),
            cell("d_in", "of", lambda g: _diversities(g)[0].d_in, "d_in"),
            norm("norm_min", "smallest norm", min),
            norm("norm_max", "largest norm", max),
            spread_cell("median_frequency", "median firing", "share of tokens"),
            spread_cell("never", "never fired", "latents, end of training"),
        ],
    )


def _cluster_table(cohort: Cohort, groups: Sequence[AnalysedGroup]) -> Table:
    found = [
        (group, clusters.cosine, [d.clusters[index].sizes for d in _diversities(group)])
        for index, clusters in enumerate(_diversities(groups[0])[0].clusters)
        for group in groups
    ]

    def mean(value: Callable[[list[int]], float]) -> Callable[[Any], float]:
        return lambda row: sum(map(value, row[2])) / len(row[2])

    def inside(low: int, high: float) -> Callable[[list[int]], float]:
        def share(sizes: list[int]) -> float:
            return sum(n for n in sizes if low <= n <= high) / (sum(sizes) or 1)

        return share

    return table_of(
        cohort.named("clusters"),
        "Clusters of decoder directions. Latents linked by chains of cosines above a threshold; "
        "shares are of all latents, means over seeds.",
        found,
        [
            cell("method", "method", lambda row: row[0].method),
            cell("l0_target", "target L0", lambda row: row[0].l0_target),
            cell("cosine", "cosine above", lambda row: f"{row[1]:g}"),
            cell("clusters", "clusters", mean(len), digits=0),
            cell("largest", "largest", mean(partial(max, default=0)), "latents", digits=0),
            *(
                cell(band, band, mean(inside(*ends)), "share", digits=3)
                for band, ends in CLUSTER_BANDS.items()
            ),
        ],
        folded=len(found) > MOST_ROWS_OPEN,
    )  # fmt: skip


def _first(group: AnalysedGroup) -> SAEAnalysis:
    return next((a for a in group.saes if a.diversity is not None), group.saes[0])


def _cosine_figure(
    cohort: Cohort, groups: Sequence[AnalysedGroup], styles: Mapping[str, Style]
) -> list[Block]:
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
            cohort.named("max-cosines"),
            f"How close each decoder direction is to its nearest other one{_where(groups)}, first "
            "seed. Further left is less overlap.",
            f"Outlined histograms of the largest decoder cosine: {', '.join(told)}.",
            [i / 20 for i in range(21)], counts,
            "cosine to the nearest other direction", "share of latents", styles,
        )
    ]  # fmt: skip


def _density_figure(
    cohort: Cohort, groups: Sequence[AnalysedGroup], styles: Mapping[str, Style]
) -> list[Block]:
    found = {g.method: density for g in groups if (density := _first(g).density) is not None}
    if not found:
        return []
    told: list[str] = []
    for method, density in found.items():
        median = "none fires" if density.median is None else f"median {density.median:.2g}"
        told.append(f"{method}: {median}, {density.never} never fired")
    silent = ", ".join(f"{method} {density.never}" for method, density in found.items())
    return [
        steps(
            cohort.named("firing-density"),
            f"How often latents fire{_where(groups)}, first seed, last window of training. "
            f"Latents that never fired are not drawn: {silent}.",
            f"Outlined histograms of log10 firing frequency. {'; '.join(told)}.",
            next(iter(found.values())).edges,
            {method: [float(n) for n in density.counts] for method, density in found.items()},
            "log10 of the share of tokens on which a latent fires", "latents", styles,
        )
    ]  # fmt: skip


def _scales(
    cohort: Cohort, groups: Sequence[AnalysedGroup], styles: Mapping[str, Style]
) -> list[Block]:
    nested = [group for group in groups if any(a.scales for a in group.saes)]
    if not nested:
        return [Text("Firing by scale is not shown: no SAE here has nested prefixes.")]
    table = table_of(
        cohort.named("scales"),
        "Firing by scale. What each nested prefix adds to the one before it; first seed, last "
        "window of training.",
        [(group, band) for group in nested for band in _bands(group)],
        [
            cell("method", "method", lambda row: row[0].method),
            cell("l0_target", "target L0", lambda row: row[0].l0_target),
            cell("band", "latents", lambda row: f"{row[1].first:,} to {row[1].end - 1:,}"),
            cell("width", "width", lambda row: row[1].end - row[1].first, "latents"),
            cell("active", "active", lambda row: row[1].active, "latents per token"),
            cell("share", "of all activity", lambda row: row[1].share, "share"),
            cell("never", "never fired", lambda row: row[1].never, "latents"),
        ],
        folded=True,
    )
    scales = {group.method: _bands(group) for group in _drawn(nested)[:MOST_BARS]}
    first = next(iter(scales.values()))
    ends = [band.end for band in first]
    same = {
        method: [band.active for band in bands]
        for method, bands in scales.items()
        if [band.end for band in bands] == ends
    }
    told = "; ".join(
        f"{m}: {', '.join(number(n, 1) for n in active)}" for m, active in same.items()
    )
    figure = bars(
        cohort.named("firing-by-scale"),
        f"Active latents per token in what each nested prefix adds{_where(_drawn(nested))}.",
        f"Bars of active latents per token by scale. {told}.",
        [f"{band.first:,}–{band.end - 1:,}" for band in first],
        same,
        "latents, in the exported order",
        "active per token",
        styles,
    )
    return [figure, table]


def _bands(group: AnalysedGroup) -> Sequence[ScaleFiring]:
    return next(analysis.scales for analysis in group.saes if analysis.scales)


def _coactivation_blocks(
    cohort: Cohort, groups: Sequence[AnalysedGroup], styles: Mapping[str, Style]
) -> list[Block]:
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
    told = "; ".join(
        f"{method} rises to {max((b.coactivation or 0.0) for b in bins):.3f}"
        for method, bins in found.items()
    )
    counted = " or ".join(f"{n:,}" for n in sorted(samples))
    note = f"{counted} activations kept from the export check{_where(groups)}, first seed"
    return [
        bars(
            cohort.named("coactivation"),
            "Do latents that point alike also fire together? Mean co-activation (cosine of the "
            f"activations) of all pairs by decoder cosine; {note}. The co-activation penalty acts "
            "on the right-hand end.",
            f"Bars of mean co-activation by decoder cosine: {told}.",
            [_bin(b) for b in next(iter(found.values()))],
            {method: [b.coactivation or 0.0 for b in bins] for method, bins in found.items()},
            "cosine of two decoder directions",
            "mean co-activation",
            styles,
        ),
        table_of(
            cohort.named("coactivation-table"),
            f"Co-activation by decoder cosine. On {note}. Only latents that fire there count.",
            [(method, b) for method, bins in found.items() for b in bins],
            [
                cell("method", "method", lambda row: row[0]),
                cell("cosine", "decoder cosine", lambda row: _bin(row[1])),
                cell("pairs", "pairs", lambda row: row[1].pairs),
                cell(
                    "coactivation",
                    "co-activation",
                    lambda row: row[1].coactivation,
                    "mean cosine of activations",
                ),
                cell("together", "fire together", lambda row: row[1].together, "share of pairs"),
            ],
            folded=True,
        ),
    ]


def _bin(found: CosineBin) -> str:
    return f"{found.low:g} to {found.high:g}"


def contexts_section(by_cohort: Sequence[tuple[Cohort, Sequence[SAEAnalysis]]]) -> Section | None:
    """Latents with the text that activates them; None when no run stored any."""
    blocks: list[Block] = []
    for cohort, analyses in by_cohort:
        for sae in (analysis.sae for analysis in analyses):
            latents = [] if is_variant(sae.method) else sae.contexts()
            if latents:
                blocks += [Subheading(cohort.titled(sae.name)), *latent_blocks(latents)]
    if not blocks:
        return None
    intro = Text(
        "Tokens of held-out text on which a latent is strongest, one document per line, activation "
        "in front. They were chosen by strength, not for being easy to read."
    )
    return Section("contexts", "Sample features in context", [intro, *blocks])


def latent_blocks(latents: Sequence[Mapping[str, Any]]) -> Iterable[Block]:
    """Stored latents in context."""
    for latent in latents[:MOST_LATENTS]:
        frequency, mean = latent.get("frequency"), latent.get("mean_activation")
        parts = [f"latent {latent.get('latent')}"]
        parts += [] if frequency is None else [f"fires on {float(frequency):.2%} of the tokens"]
        parts += [] if mean is None else [f"mean {float(mean):.3g} when it does"]
        contexts = [
            TokenContext(
                *(str(context.get(part, "")) for part in ("before", "token", "after")),
                activation=float(context.get("activation", 0.0)),
                document=0,
            )
            for context in latent.get("contexts") or []
        ]
        yield LatentContexts(", ".join(parts), contexts)


def browsers_section(browsers: Sequence[tuple[str, str]]) -> Section:
    """Links to the outputs of `msae latents`."""
    intro = Text(
        "Examples, logits, neighbours and seeds of every latent, searchable; another page, which "
        "`msae latents` wrote."
    )
    return Section("every-latent", "Every latent", [intro, Links(browsers)])
