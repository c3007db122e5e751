"""Evaluate SAEs: model outside, SAEs inside, every result on disk as soon as it exists.

`evaluate` is what `msae eval` runs. The order is fixed: check everything, load the model, then each
evaluation with each seed for all SAEs together. A killed evaluation is taken up where it stopped:
outcomes are kept per evaluation and seed, under a key of everything they depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.claims import claimed_output
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import (
    default_cache,
    disk_errors_told,
    files_sha256,
    held_in,
    key_digest,
    tensors_sha256,
    versions,
    write_json_atomic,
)
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.common.stored import StoredOutcome, checked, read_json_object
from msae_plugin.evaluation.outcomes import (
    EvaluationRun,
    MetricDefinition,
    ModelContext,
    ScoreResult,
    definitions,
    described,
    reliability,
)
from msae_plugin.evaluation.preflight import preflight, refuse_missing
from msae_plugin.evaluation.recipe import EvalConfig, reported_counts, result_fields
from msae_plugin.evaluation.summary import JSON_FILE, result_entry, summary, write_summary
from msae_plugin.models.loading import HOOKED_MODULES, LanguageModel, load_language_model
from msae_plugin.models.packaged import PACKAGED_MODELS, PACKAGED_PREFIX, is_installed
from msae_plugin.saes.load import EvaluatedSAE, sae_record
from msae_plugin.training.plans import default_device

FILE = "outcomes.json"


def read_outcomes(folder: Path, keys: Mapping[str, str]) -> dict[str, ScoreResult]:
    """Read the results measured before with the same key.

    Only measured outcomes are taken up: what failed may work now.
    """
    found: dict[str, ScoreResult] = {}
    for name, stored in _read(folder).items():
        if name not in keys or stored["status"] != "measured":
            continue
        if stored["key"] != keys[name]:
            raise InputError(
                f"{folder} holds results of {name!r} from other weights, settings or versions: "
                "give another --output"
            )
        file = folder / str(stored["file"])
        if file.is_file():
            found[name] = ScoreResult("measured", stored["metrics"], file, facts=stored["facts"])
    return found


def write_outcomes(
    folder: Path, keys: Mapping[str, str], outcomes: Mapping[str, ScoreResult]
) -> None:
    """Add outcomes to those that the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = _read(folder)
    for name, outcome in outcomes.items():
        file = None if outcome.file is None else outcome.file.name
        everything[name] = {"key": keys[name], **asdict(outcome), "file": file}
    write_json_atomic(folder / FILE, everything)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = read_json_object(path)
        return {name: checked(found[name], f"{name!r} in it", StoredOutcome) for name in found}
    except InputError as error:
        raise InputError(
            f"{path} is damaged ({error}): delete it or give another --output"
        ) from error


_VERSIONS = ("sae-bench", "sae-probes", "sae-lens", "transformer-lens", "torch")


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation."""

    summary: dict[str, Any]  # the contents of `summary.json`
    output: Path
    complete: bool  # whether everything that was asked for was measured or skipped as asked


def evaluate(
    config: EvalConfig,
    saes: Sequence[EvaluatedSAE],
    output: Path,
    *,
    language_model: LanguageModel | None = None,
    skip_missing: bool = False,
    broken: Mapping[str, str] | None = None,
    report: Report = warnings_alone,
) -> EvaluationResult:
    """Run the evaluations of a config on SAEs and write SAEBench's JSON and a summary.

    A folder that holds results of the same config and other SAEs is added to; results of another
    config are never overwritten. `broken` are SAEs that have no numbers (`load_saes`' `on_broken`),
    by name with the reason: they stand in the summary as failed. With `skip_missing` evaluations
    whose data, keys or packages are missing, and SAEs that do not fit the model, are left out, and
    the summary says so.
    """
    if broken and not saes:
        raise RunFailure("; ".join(broken.values()))
    if not saes:
        raise InputError("no SAE to evaluate: name at least one")
    output = output.resolve()  # some evaluations work in a directory of their own
    device, dtype = default_device(config.model.device), config.model.dtype
    name = model_for(config.model.name, saes)
    missing, unfit = _missing(config, saes, name, language_model, skip_missing)
    saes = [evaluated for evaluated in saes if evaluated.name not in unfit]
    left_out = {sae: ScoreResult("skipped", reason=reason) for sae, reason in unfit.items()}
    left_out |= {sae: ScoreResult("failed", reason=why) for sae, why in (broken or {}).items()}
    hooks = list(dict.fromkeys(evaluated.hook_name for evaluated in saes))
    _check_output(output, config)
    with claimed_output(output), disk_errors_told(output):
        if language_model is None and len(missing) < len(config.evaluations):
            report(f"loading {name}")
            language_model = load_language_model(
                name, hooks, device, dtype, loader=config.model.loader, report=report
            )
        context = None if language_model is None else _context(config, language_model, device)
        entries: list[dict[str, Any]] = []
        explained: dict[str, dict[str, MetricDefinition]] = {}
        contents: dict[str, Any] = {}
        for evaluation, settings in config.evaluations.items():
            found: dict[str, dict[int, ScoreResult]] = {evaluated.name: {} for evaluated in saes}
            at = context
            if evaluation not in missing and settings.get("model") is not None:
                # Unlearning asks an instruct model.
                other = load_language_model(settings["model"], hooks, device=device, dtype=dtype)
                at = _context(config, other, device)
            for seed in config.seeds:
                if evaluation in missing or at is None:
                    skipped = ScoreResult("skipped", reason=missing[evaluation])
                    outcomes = dict.fromkeys(found, skipped)
                else:
                    folder = output / evaluation / f"seed_{seed}"
                    run = EvaluationRun(evaluation, at, settings, seed, folder, report)
                    outcomes = _run(run, saes)
                for sae, outcome in outcomes.items():
                    found[sae][seed] = outcome
            explained[evaluation] = {
                metric: definition_of(evaluation, metric)
                for by_seed in found.values()
                for outcome in by_seed.values()
                for metric in outcome.metrics
            }
            found |= {sae: dict.fromkeys(config.seeds, why) for sae, why in left_out.items()}
            entries += [result_entry(sae, evaluation, o, output) for sae, o in found.items()]
            contents = summary(
                model={
                    "name": name if context is None else context.name,
                    "source": name,
                    "weights_sha256": None if context is None else context.weights_sha256,
                    "dtype": dtype,
                    "device": None if context is None else device,
                },
                seeds=config.seeds,
                config=config.to_dict(),
                saes={evaluated.name: sae_record(evaluated) for evaluated in saes},
                results=entries,
                definitions=explained,
            )
            write_summary(contents, output)
        complete = all(entry["status"] in ("measured", "skipped") for entry in entries)
        return EvaluationResult(contents, output, complete)


def model_for(asked: str | None, saes: Sequence[EvaluatedSAE]) -> str:
    """The language model to load.

    Weights that a package carries are taken for a model of that name when the package is installed:
    an SAE that was trained on them records the name on the hub.
    """
    if asked is not None:
        return asked
    names = {evaluated.model_name for evaluated in saes}
    if None in names:
        nameless = next(s for s in saes if s.model_name is None)
        raise InputError(
            f"SAE {nameless.reference!r} does not say which model it was trained on: give --model"
        )
    if len(names) > 1:
        raise InputError(
            f"the SAEs are of different models ({', '.join(sorted(map(str, names)))}): evaluate "
            "each model's SAEs by themselves, or give --model"
        )
    name = str(names.pop())
    for package in PACKAGED_MODELS.values():
        if package.hub_name == name and is_installed(package):
            return PACKAGED_PREFIX + package.key
    return name


def _missing(
    config: EvalConfig,
    saes: Sequence[EvaluatedSAE],
    model: str,
    loaded: LanguageModel | None,
    skip: bool,
) -> tuple[dict[str, str], dict[str, str]]:
    """Why evaluations cannot run, by evaluation, and why SAEs cannot be measured, by SAE."""
    if loaded is None:
        problems = preflight(config, saes, model_name=model)
    else:
        problems = preflight(config, saes, model_name=None, loader=loaded.loader)
    unfit = {p.sae: f"{p.what} - {p.how}" for p in problems if p.sae is not None}
    if not skip or len(unfit) == len(saes):
        refuse_missing(problems)
    found: dict[str, list[str]] = {}
    for p in problems:
        if p.sae is None:
            found.setdefault(p.evaluation, []).append(f"{p.what} - {p.how}")
    # What every evaluation needs, such as the model, is under the name "all".
    if common := found.pop("all", []):
        found = dict.fromkeys(config.evaluations, common)
    return {name: "; ".join(reasons) for name, reasons in found.items()}, unfit


def _check_output(output: Path, config: EvalConfig) -> None:
    names = held_in(output)
    strange = [name for name in names if name not in config.evaluations]
    if strange and JSON_FILE not in names:
        raise InputError(
            f"--output {output} holds {strange[0]!r} and no evaluation: give a new or empty folder"
        )


def _context(config: EvalConfig, language_model: LanguageModel, device: str) -> ModelContext:
    if language_model.loader == HOOKED_MODULES:
        raise InputError(
            "SAEBench needs TransformerLens' hooks: load the model with a hook such as "
            "blocks.9.hook_resid_post"
        )
    return ModelContext(
        language_model=language_model,
        weights_sha256=tensors_sha256(dict(language_model.model.named_parameters())),
        dtype=config.model.dtype,
        device=device,
        name=language_model.model_name,
        cache=Path(config.cache) if config.cache else default_cache(),
    )


def _run(run: EvaluationRun, saes: Sequence[EvaluatedSAE]) -> dict[str, ScoreResult]:
    """The results of one evaluation with one seed, of which earlier ones are taken up."""
    # Imported here: importing sae_bench takes seconds and needs the extra `eval`.
    from msae_plugin.evaluation.saebench.adapter import run_evaluation

    keys = {evaluated.name: _outcome_key(run, evaluated) for evaluated in saes}
    found = read_outcomes(run.output, keys)
    todo = [evaluated for evaluated in saes if evaluated.name not in found]
    if todo:
        fresh = run_evaluation(run, todo)
        write_outcomes(run.output, keys, fresh)
        found |= fresh
    return found


def definition_of(evaluation: str, metric: str) -> MetricDefinition:
    """The definition of a metric; where it is SAEBench's alone in its words, and what is known."""
    if evaluation in reliability():
        # pydantic keeps title and description in what dataclasses call the default.
        description: str = result_fields(evaluation)[metric].default.description
        return described(evaluation, metric, description)
    return definitions(evaluation, reported_counts(evaluation))[metric]


def _outcome_key(run: EvaluationRun, evaluated: EvaluatedSAE) -> str:
    return key_digest(
        {
            "evaluation": run.evaluation,
            "settings": dict(run.settings),
            "files": _local_contents(run.settings),
            "model": run.context.weights_sha256,
            "dtype": run.context.dtype,
            "sae": evaluated.weights_sha256,
            "hook": evaluated.hook_name,
            "seed": run.seed,
            "versions": versions(*_VERSIONS),
        }
    )


def _local_contents(value: Any) -> list[str]:
    """Hashes of the files and folders that settings name: the same path may hold other text."""
    if isinstance(value, Mapping):
        return [h for v in cast("Mapping[str, Any]", value).values() for h in _local_contents(v)]
    if isinstance(value, (list, tuple)):
        return [found for item in cast("list[Any]", value) for found in _local_contents(item)]
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).exists():
        return [files_sha256([Path(value)])]
    return []
