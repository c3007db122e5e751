"""`msae report`: what was measured, as tables, figures and one page that can be forwarded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from os.path import relpath
from pathlib import Path

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import folder_written_atomically, held_in, versions
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.common.recipes import did_you_mean
from msae_plugin.common.stored import read_json_object
from msae_plugin.evaluation.summary import standings
from msae_plugin.reporting.analyses import SAEAnalysis, analyse
from msae_plugin.reporting.answer import answers, findings_of, health_section
from msae_plugin.reporting.canvas import pyplot
from msae_plugin.reporting.document import (
    Answer,
    Bullets,
    Cohort,
    Document,
    Figure,
    Section,
    cohorts,
    data_url,
    markdown,
    page,
)
from msae_plugin.reporting.figures import Glance, Style, glance, method_styles, published
from msae_plugin.reporting.latent_browser import BROWSER_FOLDER, is_browser
from msae_plugin.reporting.latent_browser import PAGE_FILE as BROWSER_PAGE
from msae_plugin.reporting.results import Results
from msae_plugin.reporting.rows import results_of
from msae_plugin.reporting.sections import features, ladder, training
from msae_plugin.reporting.sections import results as result_sections
from msae_plugin.reporting.sources import Sources, is_variant, read_sources, trained_saes

PAGE_FILE, MARKDOWN_FILE, RECORD_FILE = "report.html", "report.md", "report.json"
TABLES_FOLDER, FIGURES_FOLDER = "tables", "figures"
FORMAT = 1
MOST_AT_A_GLANCE = 4
"""More SAEs would hide one another in the figure at the top."""
# Reports of earlier versions have dashboards.
_OWN = {PAGE_FILE, MARKDOWN_FILE, RECORD_FILE, TABLES_FOLDER, FIGURES_FOLDER, "dashboards"}


@dataclass(frozen=True)
class ReportResult:
    """Files of a report."""

    output: Path
    page: Path  # the page, one self-contained file
    tables: list[Path]
    figures: list[Path]
    not_measured: int  # how many items the list of what was not measured has
    document: Document


def report(
    folders: Sequence[Path],
    output: Path,
    progress: Report = warnings_alone,
) -> ReportResult:
    """Make a report of runs, evaluations and comparisons; it replaces an earlier one whole.

    The same data gives the same bytes: nothing of the time or the place of the report is in it.
    """
    sources = read_sources(folders)
    _check_output(output, sources)
    pyplot()  # refused before minutes of analysis, when matplotlib is missing
    browsers = [(source.label, source.folder / BROWSER_FOLDER) for source in sources.all]
    with folder_written_atomically(output) as folder:
        # The browser stays where it is: the page points at it from its own folder.
        every = [
            (f"Every latent of {label}", relpath(path / BROWSER_PAGE, output))
            for label, path in browsers
            if is_browser(path)
        ]
        document, not_measured = build(sources, progress, every)
        progress("writing")
        _write(document, folder)
        names = [source.label for source in sources.all]
        record = {"format": FORMAT, "sources": names, "page": PAGE_FILE}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return ReportResult(
        output=output,
        page=output / PAGE_FILE,
        tables=sorted((output / TABLES_FOLDER).glob("*.csv")),
        figures=sorted((output / FIGURES_FOLDER).glob("*.png")),
        not_measured=not_measured,
        document=document,
    )


def build(
    sources: Sources,
    progress: Report = warnings_alone,
    browsers: Sequence[tuple[str, str]] = (),
) -> tuple[Document, int]:
    """The document of a report, and how many things were not measured."""
    trained = trained_saes(sources)
    measured = results_of(sources, trained)
    analyses = analyse(trained, progress)
    progress("drawing")
    methods = [group.method for results in measured for group in results.groups]
    methods += [sae.method for sae in trained]
    # Those that share a figure with others come first: their styles differ most.
    styles = method_styles(sorted(methods, key=is_variant))
    findings = findings_of(sources)
    first: list[Answer | Figure] = list(answers(measured, findings))
    for results in measured:
        first += _glance(results, analyses, styles)
    parts: list[Section | None] = [
        Section("answer", "The answer", first),
        health_section(findings),
        result_sections.protocol_section(measured) if measured else None,
    ]
    for results in measured:
        if len(results.frame):
            parts.append(result_sections.results_section(results, styles))
            parts.append(result_sections.differences_section(results, styles))
            parts.append(ladder.ladder_section(results, styles))
    among = [item for source in sources.evaluations for item in standings(source.content)]
    if among:
        told = Bullets([line for standing in among for line in standing.lines()])
        drawn = [published(standing, styles) for standing in among]
        parts.append(Section("published", "Among SAEBench's published SAEs", [told, *drawn]))
    by_cohort = cohorts(analyses, lambda analysis: analysis.sae.cohort)
    optional: dict[str, list[Section | None]] = {
        "training runs": [training.runs_section(sources.runs)],
        "training curves": [
            training.curves_section(cohort, [analysis.sae for analysis in members], styles)
            for cohort, members in by_cohort
        ],
        "revival": [training.revival_section(cohort, members) for cohort, members in by_cohort],
        "feature statistics": [
            features.diversity_section(cohort, members, styles) for cohort, members in by_cohort
        ],
        "sample features": [features.contexts_section(by_cohort)],
    }
    absent: list[str] = []
    for name, sections in optional.items():
        parts += sections
        if name != "training runs" and not any(sections):
            absent.append(name)
    if browsers:
        parts.append(features.browsers_section(browsers))
    missing = [item for results in measured for item in results.missing]
    missing += training.missing_of_runs(
        sources.runs, evaluated=bool(sources.comparisons or sources.evaluations)
    )
    parts += [
        result_sections.missing_section(missing, absent),
        result_sections.definitions_section(measured),
    ]
    [made_by] = versions("msae-plugin").values()
    document = Document(
        title=_title(sources, measured),
        lead=_lead(measured, analyses, sources),
        sections=[part for part in parts if part is not None],
        origin=f"Made by msae_plugin {made_by} from {_names(sources)}.",
        files_only=[
            result_sections.all_metrics_table(results) for results in measured if len(results.frame)
        ],
    )
    return document, len(missing)


def _glance(
    results: Results, analyses: Sequence[SAEAnalysis], styles: Mapping[str, Style]
) -> list[Figure]:
    """The figure at the top: one SAE per method at the middle L0, where they are few."""
    targets = list(dict.fromkeys(group.l0_target for group in results.candidates))
    of_source = {a.sae.recorded_as: a for a in analyses if a.sae.source == results.source}
    shown: list[Glance] = []
    for group in results.candidates:
        analysis = of_source.get(str(group.fact("name")))
        if group.l0_target != targets[len(targets) // 2] or analysis is None:
            continue
        keys = ("tokens", "explained_variance", "l0")
        curve = [
            (float(row["tokens"]), float(row["explained_variance"]), float(row["l0"]))
            for row in analysis.sae.rows
            if all(row.get(key) is not None for key in keys)
        ]
        density = analysis.density
        if len(curve) < 2 or density is None:
            continue
        means = {key: group.mean(metric) for key, metric in results.headlines("glance").items()}
        values = {key: value for key, value in means.items() if value is not None}
        shown.append(
            Glance(group.method, curve, values, (density.edges, density.counts, density.never))
        )
    if not 1 <= len(shown) <= MOST_AT_A_GLANCE:
        return []
    return [glance(f"{results.name}-glance", results.title, shown, results, styles)]


def _write(document: Document, folder: Path) -> None:
    for name in (TABLES_FOLDER, FIGURES_FOLDER):
        (folder / name).mkdir()
    for table in [*document.tables(), *document.files_only]:
        (folder / TABLES_FOLDER / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
    for figure in document.figures():
        (folder / FIGURES_FOLDER / f"{figure.name}.png").write_bytes(figure.png)
    (folder / MARKDOWN_FILE).write_text(markdown(document, FIGURES_FOLDER), encoding="utf-8")
    (folder / PAGE_FILE).write_text(page(document), encoding="utf-8")


def _check_output(output: Path, sources: Sources) -> None:
    names = held_in(output)
    if output.resolve() in {source.folder.resolve() for source in sources.all}:
        raise InputError(
            f"--output {str(output)!r} is a folder of the report's own data: give another"
        )
    record = output / RECORD_FILE
    if not names:
        return
    if not record.is_file() or read_json_object(record).get("page") != PAGE_FILE:
        raise InputError(f"--output {str(output)!r} is not empty and holds no report: give another")
    if strange := [name for name in names if name not in _OWN]:
        raise InputError(
            f"--output {str(output)!r} holds {strange[0]!r} beside a report, and a report replaces "
            "the whole folder: move it or give another folder"
        )


def _title(sources: Sources, measured: Sequence[Results]) -> str:
    kinds = dict.fromkeys(results.title for results in measured)
    if kinds:
        return f"Sparse autoencoders compared: {', '.join(kinds)}"
    return f"Training runs: {', '.join(source.label for source in sources.all)}"


def _names(sources: Sources) -> str:
    return ", ".join(dict.fromkeys(source.label for source in sources.all))


def _lead(measured: Sequence[Results], analyses: Sequence[SAEAnalysis], sources: Sources) -> str:
    rows = sum(len(results.saes) for results in measured)
    methods = {name for results in measured for name in results.saes["method"]}
    parts: list[str] = []
    if rows:
        parts.append(f"{_counted(rows, 'measured row')} of {_counted(len(methods), 'method')}")
    if analyses:
        parts.append(f"{_counted(len(analyses), 'SAE')} on disk")
    if sources.runs:
        parts.append(_counted(len(sources.runs), "training run"))
    return (
        f"{'; '.join(parts)}. Spreads are standard deviations over seeds; a difference counts only "
        "when its 95 % interval leaves out zero; what was not measured is listed as such."
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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
        found += result_sections.measured_figures(results, chosen, styles)
    if not found and (metric is None or metric in training.CURVES):
        section = training.curves_section(Cohort(), trained, styles)
        known |= dict.fromkeys(training.CURVES)
        found += [
            block
            for block in (section.blocks if section is not None else ())
            if isinstance(block, Figure)
            and (metric is None or block.name.startswith(f"training-{metric.replace('_', '-')}"))
        ]
    if metric is not None and metric not in {*known, *training.CURVES}:
        raise InputError(f"{metric!r} was not measured: {did_you_mean(metric, known)}")
    if not found:
        raise InputError(
            f"{str(folder)!r} holds nothing to draw: no two SAEs to compare, and no log"
        )
    return found
