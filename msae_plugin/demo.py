"""`msae demo`: a comparison on a real language model, end to end, and what it says.

The recipe is `demo.yaml` in `recipes/`: `multiscale` and SAELens' own `batchtopk` on the same
activations at the same L0. Everything is `msae compare` and `msae report`; what is added is a short
page of their contents, `demo.md`, and the strongest latents in the terminal.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import write_text_atomic
from msae_plugin.common.progress import Report
from msae_plugin.common.recipes import SHIPPED, set_value
from msae_plugin.common.stored import read_json_object
from msae_plugin.common.table import Table
from msae_plugin.comparison.compare import RECIPE_FILE, check_comparison_folder, compare
from msae_plugin.comparison.language_model import EVALUATION_FOLDER
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.results import COMPARISON_FILE
from msae_plugin.evaluation.summary import JSON_FILE
from msae_plugin.reporting.canvas import pyplot
from msae_plugin.reporting.document import Bullets, Document, Section, markdown
from msae_plugin.reporting.report import FIGURES_FOLDER, ReportResult, report
from msae_plugin.reporting.sources import read_sources, trained_saes
from msae_plugin.reporting.terminal import (
    comparison_for_terminal,
    contexts_for_terminal,
    summary_for_terminal,
)

MARKDOWN_FILE, REPORT_FOLDER = "demo.md", "report"
HOW_TO_INSTALL = 'pip install "msae-plugin[eval]"'
_KEYS = {
    "tokens": "training.tokens", "d_sae": "common.d_sae", "model": "model.name",
    "text": "data.source", "heldout_tokens": "heldout.tokens", "loss_tokens": "heldout.loss_tokens",
}  # fmt: skip
# Counted in steps, at the length that the recipe has.
_SCHEDULE = ("lr_warm_up_steps", "lr_decay_steps", "dead_feature_window")


def demo_recipe(
    options: Mapping[str, Any], overrides: Sequence[str] = (), *, saebench: bool = True
) -> CompareConfig:
    """The demo's recipe with the options that were given, by name, and then the overrides."""
    recipe: dict[str, Any] = yaml.safe_load((SHIPPED / "demo.yaml").read_text(encoding="utf-8"))
    training = recipe["training"]
    if "tokens" in options:
        share = options["tokens"] / training["tokens"]
        for key in _SCHEDULE:
            training[key] = max(1, round(training[key] * share))
        recipe["log_every_steps"] = max(1, round(recipe["log_every_steps"] * share))
    for name, value in options.items():
        if name in _KEYS:
            set_value(recipe, _KEYS[name], value, f"--{name.replace('_', '-')}")
    if "seed" in options:
        training["seed"] = options["seed"]
    for name, key in (("k", "l0"), ("seed", "seeds"), ("hook", "hooks")):
        if name in options:
            recipe[key] = [options[name]]
    recipe["evaluation"]["evaluations"]["core"]["dataset"] = recipe["data"]["source"]
    if not saebench:
        recipe["evaluation"] = None
    return CompareConfig.from_dict(recipe, overrides)


def saebench_is_installed() -> bool:
    """Whether SAEBench's evaluations can run here."""
    return all(importlib.util.find_spec(name) for name in ("sae_bench", "sae_probes"))


@dataclasses.dataclass(frozen=True)
class Demo:
    """A demo that has ended."""

    output: Path
    page: ReportResult
    seconds: float
    complete: bool


def run_demo(config: CompareConfig, output: Path, progress: Report) -> Demo:
    """Compare, or go on where a killed demo stopped; report; write `demo.md`."""
    pyplot()  # refused before minutes of training, when matplotlib is missing
    check_comparison_folder(output)
    _refuse_other_settings(config, output)
    started = time.perf_counter()
    comparison = compare(config, output, report=progress)
    page = report([output], output / REPORT_FOLDER, progress)
    text = markdown(_short(page.document, output), f"{REPORT_FOLDER}/{FIGURES_FOLDER}")
    write_text_atomic(output / MARKDOWN_FILE, text)
    return Demo(output, page, time.perf_counter() - started, comparison.complete)


def _refuse_other_settings(config: CompareConfig, output: Path) -> None:
    if not (output / RECIPE_FILE).is_file():
        return
    stored = CompareConfig.from_dict(read_json_object(output / RECIPE_FILE)["config"])
    # Evaluations may be added to what is trained, or left out.
    if dataclasses.replace(stored, evaluation=config.evaluation) != config:
        raise InputError(
            f"--output {str(output)!r} holds a demo with other settings: choose another --output, "
            "or the same settings to go on"
        )


def _short(document: Document, output: Path) -> Document:
    """The page without what a first look does not need."""
    kept: list[Section] = []
    for section in document.sections:
        if section.name.endswith("-results"):
            tables = [b for b in section.blocks if isinstance(b, Table) and not b.folded]
            kept.append(dataclasses.replace(section, blocks=tables))
        elif section.name in ("answer", "health-section", "contexts", "missing"):
            kept.append(section)
    places = Section("where", "Where things are", [Bullets(_places(output))])
    return dataclasses.replace(document, sections=[*kept, places], files_only=())


def _places(output: Path) -> list[str]:
    found = {
        "page with every table and figure": REPORT_FOLDER + "/report.html",
        "numbers": COMPARISON_FILE,
        "SAEBench's own files": EVALUATION_FOLDER,
        "SAEs, each with its log": "saes",
        "recipe": RECIPE_FILE,
    }
    return [f"{what}: {where}" for what, where in found.items() if (output / where).exists()]


def demo_for_terminal(demo: Demo) -> RenderableType:
    """The demo's last output: answer, table, latents in context, SAEBench's numbers, places."""
    output = demo.output
    first = next(sae for sae in trained_saes(read_sources([output])) if sae.contexts())
    summary = output / EVALUATION_FOLDER / JSON_FILE
    benchmark = [summary_for_terminal(read_json_object(summary))] if summary.is_file() else []
    figure = [path for path in demo.page.figures if path.stem.endswith("-glance")]
    shown = [("page", demo.page.page), *(("figure", path) for path in figure)]
    shown += [("short", output / MARKDOWN_FILE), ("numbers", output / COMPARISON_FILE)]
    title = f"The {len(first.contexts())} strongest latents of {first.method}, in held-out text:"
    return Group(
        comparison_for_terminal(output),
        Text(""),
        Text(title, style="bold underline"),
        contexts_for_terminal(first),
        Text(""),
        *benchmark,
        Text(f"{demo.seconds / 60:.1f} minutes."),
        *(Text(f"{what}: {path}") for what, path in shown),
        Text(f"SAEs: {output / 'saes'}"),
    )
