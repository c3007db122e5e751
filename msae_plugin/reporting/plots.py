"""The figures of a run, an evaluation or a comparison on their own, as a notebook shows them."""

from __future__ import annotations

from html import escape
from itertools import chain
from pathlib import Path

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import did_you_mean
from msae_plugin.reporting.document import Cohort, Figure, data_url
from msae_plugin.reporting.figures import method_styles
from msae_plugin.reporting.rows import results_of
from msae_plugin.reporting.sections.results import measured_figures
from msae_plugin.reporting.sections.training import CURVES, curves_section
from msae_plugin.reporting.sources import read_sources, trained_saes


class Figures(list[Figure]):
    """Figures, which a notebook shows one under another; each holds its PNG."""

    def save(self, folder: Path | str) -> list[Path]:
        """Write each as NAME.png."""
        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        files = [into / f"{figure.name}.png" for figure in self]
        for file, figure in zip(files, self, strict=True):
            file.write_bytes(figure.png)
        return files

    def _repr_html_(self) -> str:
        return "".join(
            f'<figure><img alt="{escape(figure.alt)}" src="{data_url(figure)}" '
            f'style="max-width: 640px"><figcaption>{escape(figure.caption)}</figcaption></figure>'
            for figure in self
        )


def plot(folder: Path, metric: str | None = None) -> Figures:
    """What was measured of a folder's SAEs, else their training; one metric or all of a report's.

    A metric has its name of headlines.yaml (`f1`), its evaluation's, or the full one (`core/l0`).
    """
    sources = read_sources([folder])
    trained = trained_saes(sources)
    measured = results_of(sources, trained)
    methods = [group.method for results in measured for group in results.groups]
    styles = method_styles([*methods, *(sae.method for sae in trained)])
    known: dict[str, None] = {}
    found = Figures()
    for results in measured:
        headlines = results.headlines()
        names = {key: (key, name.rpartition("/")[2], name) for key, name in headlines.items()}
        known |= dict.fromkeys(chain(*names.values()))
        chosen = results.headlines("front")
        if metric is not None:
            chosen = {key: name for key, name in headlines.items() if metric in names[key]}
        found += measured_figures(results, chosen, styles)
    if not found and (metric is None or metric in CURVES):
        section = curves_section(Cohort(), trained, styles)
        known |= dict.fromkeys(CURVES)
        found += [
            block
            for block in (section.blocks if section is not None else ())
            if isinstance(block, Figure)
            and (metric is None or block.name.startswith(f"training-{metric.replace('_', '-')}"))
        ]
    if metric is not None and metric not in {*known, *CURVES}:
        raise InputError(f"{metric!r} was not measured: {did_you_mean(metric, known)}")
    if not found:
        raise InputError(
            f"{str(folder)!r} holds nothing to draw: no two SAEs to compare, and no log"
        )
    return found
