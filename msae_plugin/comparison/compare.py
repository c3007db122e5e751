"""`msae compare`: train what is missing, measure everything, write comparison.json.

OUTPUT/recipe.json       the recipe, as the comparison was started last
OUTPUT/activations/      the language model's one pass
OUTPUT/search/           trials of coefficients
OUTPUT/saes/<name>/      one run folder per SAE; complete ones are not trained again
OUTPUT/heldout/, ground_truth/, evaluation/   what was measured, SAE by SAE
OUTPUT/jobs/             of `msae sweep`
OUTPUT/comparison.json   the rows, written last
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msae_plugin.common.claims import claimed_output
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import disk_errors_told, held_in, remove_leftovers, write_json_atomic
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.comparison import activations, ground_truth, training_schedule
from msae_plugin.comparison.ground_truth import GroundTruthTestbed
from msae_plugin.comparison.group_training import ComparisonRun
from msae_plugin.comparison.language_model import EVALUATION_FOLDER, LanguageModelTestbed
from msae_plugin.comparison.language_model import FOLDER as HELDOUT_FOLDER
from msae_plugin.comparison.methods import SAES_FOLDER, Entry, expand, sae_folder
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.results import (
    COMPARISON_FILE,
    comparison_contents,
    control_row,
    training_metrics,
)
from msae_plugin.comparison.training_schedule import (
    Shard,
    missing_entries,
    refuse_mixtures,
    share_of,
    train_all,
)
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.run_record import read_run_record
from msae_plugin.training.plans import default_device, require_memory

RECIPE_FILE = "recipe.json"
_OURS = frozenset(
    {
        RECIPE_FILE,
        COMPARISON_FILE,
        SAES_FOLDER,
        training_schedule.FOLDER,
        activations.FOLDER,
        training_schedule.CHECKPOINTS,
        HELDOUT_FOLDER,
        ground_truth.FOLDER,
        EVALUATION_FOLDER,
        "report",
        "jobs",
    }
)


@dataclass(frozen=True)
class Comparison:
    """A comparison that has ended."""

    output: Path
    # The contents of comparison.json; None where only a shard was trained
    contents: dict[str, Any] | None
    failures: dict[str, str]  # Reason by name, of SAEs that could not be trained
    complete: bool  # Whether everything was trained and measured


def compare(
    config: CompareConfig,
    output: Path,
    *,
    report: Report = warnings_alone,
    language_model: LanguageModel | None = None,
    shard: Shard | None = None,
    skip_missing: bool = False,
) -> Comparison:
    """Train, evaluate and write; again and again until everything is there.

    What is complete in the folder is kept: a killed comparison goes on, and SAEs that were added to
    the recipe are added to the results. A shard trains and measures a share only and writes no
    comparison.json, for several processes on one folder; controls and SAEBench's evaluations are
    left to the run without it. `skip_missing` leaves evaluations out whose data or packages are
    missing.
    """
    check_comparison_folder(output)
    shard = shard or Shard()
    share = None if shard.of == 1 else f"part-{shard.number}-of-{shard.of}"
    with claimed_output(output, share), disk_errors_told(output):
        if share is None:
            remove_leftovers(output)
        return _compare(config, output, report, language_model, shard, skip_missing=skip_missing)


def _compare(
    config: CompareConfig,
    output: Path,
    report: Report,
    language_model: LanguageModel | None,
    shard: Shard,
    *,
    skip_missing: bool,
) -> Comparison:
    testbed: LanguageModelTestbed | GroundTruthTestbed
    if config.synthetic is None:
        testbed = LanguageModelTestbed(
            config, output, report, language_model, skip_missing=skip_missing
        )
    else:
        testbed = GroundTruthTestbed(config, output, report)
    testbed.check()
    expansion = expand(config, testbed.widths())
    device = default_device(config.model.device)
    for plan in expansion.plans.values():
        # Before the model's pass, and before anything of this size is allocated.
        require_memory([plan], device)
    missing = missing_entries(expansion.entries, config, output)
    refuse_mixtures(expansion, missing, config, output)
    _require_activations(config, output, shard, missing)
    write_json_atomic(output / RECIPE_FILE, {"kind": config.kind, "config": config.to_dict()})
    record, failures = None, dict[str, str]()
    if missing or config.synthetic is not None:
        with InterruptionGuard() as guard:
            source = testbed.source(guard)
            record = source.record()
            run = ComparisonRun(config, source, output, testbed.device, guard, report)
            # The width of an MLP's inside is known once the model has run.
            expansion = expand(config, {hook: source.d_in(hook) for hook in testbed.widths()})
            failures = train_all(run, expansion.entries, shard)
    entries = share_of(expansion.entries, shard)
    trained = [entry for entry in entries if entry.name not in failures]
    if shard.of > 1:
        if trained:
            source_record = record or _source_record(output, trained[0])
            share = replace(expansion, controls=[])
            testbed.measure(share, trained, source_record, evaluations=False)
        return Comparison(output, None, failures, complete=False)
    if not trained:
        name, reason = next(iter(failures.items()))
        raise RunFailure(f"no SAE could be trained; {name}: {reason}")
    records = [_record(sae_folder(output, entry.name)) for entry in trained]
    record = record or _source_record(output, trained[0])
    measured = testbed.measure(expansion, trained, record)
    rows: list[dict[str, Any]] = []
    for of_sae in records:
        row = dict(of_sae["comparison"]["row"])
        row["health"] = of_sae["saes"][row["name"]].get("health", [])
        measured.add(str(row["name"]), training_metrics(of_sae, row))
        rows.append(row)
    for control in expansion.controls:
        if control.name in measured.metrics:
            rows.append(control_row(control, testbed.widths()[control.hook]))
    contents = comparison_contents(config, rows, measured, record, testbed.device, failures)
    write_json_atomic(output / COMPARISON_FILE, contents)
    if not config.keep_activations and not failures:
        shutil.rmtree(output / activations.FOLDER, ignore_errors=True)
    complete = not failures and all(
        item["status"] in ("skipped", "not_measurable") for item in measured.missing
    )
    return Comparison(output, contents, failures, complete)


def _record(folder: Path) -> Mapping[str, Any]:
    record = read_run_record(folder)
    assert record is not None, "it was complete a moment ago"
    return record


def _source_record(output: Path, entry: Entry) -> dict[str, Any]:
    """Model and data as an SAE recorded them, where nothing had to be trained."""
    stored = _record(sae_folder(output, entry.name))
    return {key: stored[key] for key in ("model", "data")}


def check_comparison_folder(output: Path) -> None:
    """Refuse a folder that holds something else than a comparison."""
    names = held_in(output)
    strange = [name for name in names if name not in _OURS and not name.startswith(".")]
    if strange and RECIPE_FILE not in names:
        raise InputError(
            f"--output {str(output)!r} holds {strange[0]!r} and no comparison: give a new or empty "
            "folder"
        )


def _require_activations(
    config: CompareConfig, output: Path, shard: Shard, missing: list[Entry]
) -> None:
    """Of several processes the first makes the model's pass."""
    if config.synthetic is not None or shard.number == 1 or not missing:
        return
    if activations.open_activations(output) is None:
        raise InputError(
            f"--part {shard.number}/{shard.of}: {output / activations.FOLDER} is not complete "
            f"yet: start --part 1/{shard.of} first, and this one when the model's pass is over"
        )
