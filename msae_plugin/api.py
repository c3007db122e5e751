"""The commands as functions: what `msae train` does, `msae_plugin.train` does.

    import msae_plugin as msae

    trained = msae.train("smollm2", "runs/smollm2", changes={"training.tokens": 100_000})
    evaluated = msae.evaluate(trained, "offline", "runs/smollm2-eval")
    msae.report([trained, evaluated], "runs/report")
    sae = msae.load("runs/smollm2/multiscale")

Each returns a `Result`: its folder, a table, and everything that is known in `details`.
"""

# What a command needs is imported where it begins: SAELens and torch take eight seconds of
# processor time, SAEBench and matplotlib are extras.

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import yaml
from rich.console import Console

from msae_plugin.common.errors import InputError
from msae_plugin.common.progress import shown_steps, training_display
from msae_plugin.common.recipes import with_only, with_overrides

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

    from msae_plugin.comparison.compare import Comparison
    from msae_plugin.evaluation.evaluate import EvaluationResult
    from msae_plugin.hub.publish import PublishResult
    from msae_plugin.reporting.latent_browser import LatentBrowser
    from msae_plugin.reporting.look import Look
    from msae_plugin.reporting.report import Figures, ReportResult
    from msae_plugin.training.runner import RunResult

Reference: TypeAlias = "str | os.PathLike[str]"
"""A path, a `Result`, or another reference to an SAE: `user/repo:folder`, `release:sae_id`."""
Recipe: TypeAlias = "Reference | Mapping[str, Any]"
"""A YAML file, the name of a shipped recipe (`msae recipes`), or the same as dictionaries."""
Changes: TypeAlias = "Mapping[str, Any] | Sequence[str]"
"""`{"training.lr": 1e-3}`, or as `--set` takes it, `["training.lr=1e-3"]`."""

_YAML_END = "...\n"
Details = TypeVar("Details")


@dataclass(frozen=True, repr=False)
class Result(Generic[Details]):
    """What a command leaves. It stands for its folder wherever a path is asked for.

    Attributes:
        command: Which one.
        folder: Where everything is.
        details: All that is known, in the command's own class.
        rows: The rows of `table`.
        notes: What needs attention, one line each.
    """

    command: str
    folder: Path
    details: Details
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=list[str])

    def table(self) -> pd.DataFrame:
        """The numbers: a row per SAE (train, compare), metric (evaluate) or file."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.rows])

    def plot(self, metric: str | None = None) -> Figures:
        """The figures that a report has of a run, an evaluation or a comparison.

        Args:
            metric: One of them alone: `explained_variance`, `f1`, or in full, `core/l0`.

        Raises:
            InputError: There is nothing to draw, or matplotlib is missing.
        """
        from msae_plugin.reporting.report import plot

        return plot(self.folder, metric)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        shown = self.table().to_string(index=False, max_rows=20, max_cols=8)
        return "\n".join([f"msae {self.command}: {self.folder}", shown, *self.notes])

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(escape, [f"msae {self.command}: {self.folder}", *self.notes]))
        return f"<p>{lines}</p>{self.table().to_html(index=False, max_rows=20, max_cols=12)}"


def train(
    recipe: Recipe,
    output: Reference,
    *,
    changes: Changes = (),
    only: Sequence[str] = (),
    resume: Reference | None = None,
    progress: bool | Console = True,
) -> Result[RunResult]:
    """Train the SAEs of a recipe on a language model's activations and export them.

    Args:
        recipe: What to train.
        output: The run's folder; new or empty unless resuming.
        changes: Of the recipe.
        only: Names of the recipe's SAEs that are trained; all by default.
        resume: A checkpoint, or "auto" for the newest one of `output`, if there is one.
        progress: Show it, on a console of your own where one is given.

    Raises:
        InputError: The recipe, the folder or the checkpoint cannot work.
        RunFailure: Training diverged, an export disagrees with what was trained, the disk is full.
        InterruptedBySignalError: On SIGINT or SIGTERM, once a checkpoint is written.
    """
    from msae_plugin.training.data_parallel import launched_ranks
    from msae_plugin.training.recipe import RunConfig
    from msae_plugin.training.runner import MultiScaleRunner

    if isinstance(recipe, Mapping):
        config = RunConfig.from_dict(with_only(with_overrides(recipe, _sets(changes)), only))
    else:
        config = RunConfig.load(os.fspath(recipe), _sets(changes), only)
    checkpoint = None if resume is None else os.fspath(resume)
    with training_display(progress) as display, launched_ranks(config.model.device) as ranks:
        run = MultiScaleRunner(
            config, Path(output), resume=checkpoint, progress=display, ranks=ranks
        ).run()
    rows: list[dict[str, Any]] = []
    for name, export in run.exports.items():
        final, agreement = run.final_rows[name], export.agreement
        worst = max(agreement.max_latent_difference, agreement.max_reconstruction_difference)
        rows.append(
            {
                "sae": name,
                "explained_variance": final["explained_variance"],
                "dead_latents": final["dead_latents"],
                "l0": export.l0_exported,
                "l0_target": export.l0_target,
                "export_difference": worst,
                "jumprelu_export": export.has_jumprelu,
            }
        )
    warnings = {name: export.warnings for name, export in run.exports.items()}
    notes = [f"warning: {name}: {line}" for name, lines in warnings.items() for line in lines]
    return Result("train", Path(output), run, rows, notes)


def evaluate(
    saes: Reference | Sequence[Reference],
    protocol: Recipe,
    output: Reference,
    *,
    changes: Changes = (),
    skip_missing: bool = False,
    progress: bool | Console = True,
) -> Result[EvaluationResult]:
    """Evaluate SAEs with SAEBench.

    Args:
        saes: Runs, exports, checkpoints of SAELens, or published SAEs; all of one language model.
        protocol: What is measured, and how.
        output: Folder for SAEBench's JSON and a summary.
        changes: Of the protocol.
        skip_missing: Leave out what lacks data, keys or packages.
        progress: As in `train`.

    Raises:
        InputError: Something is missing or cannot work.
        RunFailure: All SAEs are broken.
    """
    from msae_plugin.evaluation.evaluate import evaluate as evaluate_saes
    from msae_plugin.evaluation.recipe import EvalConfig
    from msae_plugin.saes.load import load_saes
    from msae_plugin.training.plans import default_device

    if isinstance(protocol, Mapping):
        config = EvalConfig.from_dict(protocol, _sets(changes))
    else:
        config = EvalConfig.load(os.fspath(protocol), _sets(changes))
    broken: dict[str, str] = {}
    loaded = load_saes(
        [os.fspath(sae) for sae in _listed(saes)],
        device=default_device(config.model.device),
        hook=config.hook,
        model_name=config.model.name,
        on_broken=broken.__setitem__,
    )
    with shown_steps(progress) as report:
        found = evaluate_saes(
            config, loaded, Path(output), skip_missing=skip_missing, broken=broken, report=report
        )
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for entry in found.summary["results"]:
        sae = {"sae": entry["sae"], "evaluation": entry["evaluation"]}
        for metric, value in entry["metrics"].items():
            defined = found.summary["metrics"][f"{entry['evaluation']}/{metric}"]
            seeds = len(value["per_seed"])
            number = {"mean": value["mean"], "std": value["std"], "seeds": seeds}
            rows.append(sae | {"metric": metric} | number | {"unit": defined["unit"]})
        if entry["status"] != "measured":
            notes.append(f"{' of '.join(reversed(sae.values()))}: {entry['reason']}")
    return Result("eval", Path(output), found, rows, notes)


def compare(
    recipe: Recipe,
    output: Reference,
    *,
    changes: Changes = (),
    only: Sequence[str] = (),
    quick: bool = False,
    part: str | None = None,
    skip_missing: bool = False,
    progress: bool | Console = True,
) -> Result[Comparison]:
    """Train many SAEs side by side and evaluate them at matched L0; goes on where it was killed.

    Args:
        recipe: What is compared.
        output: The comparison's folder. SAEs that are finished in it are kept.
        changes: Of the recipe.
        only: Names of the methods that are compared; all by default.
        quick: Take the recipe's own short variant.
        part: "1/2": a share of the training alone, for several processes on one folder.
        skip_missing: Leave out evaluations that lack data or packages.
        progress: As in `train`.

    Raises:
        InputError: The recipe or the folder cannot work.
        RunFailure: A number could not be measured, or nothing could be trained.
    """
    from msae_plugin.comparison.compare import compare as run_comparison
    from msae_plugin.comparison.recipe import CompareConfig
    from msae_plugin.comparison.training_schedule import Shard

    shard = None if part is None else Shard.parse(part)
    if isinstance(recipe, Mapping):
        config = CompareConfig.from_dict(recipe, _sets(changes), quick=quick, only=only)
    else:
        config = CompareConfig.load(os.fspath(recipe), _sets(changes), quick=quick, only=only)
    with shown_steps(progress) as report:
        found = run_comparison(
            config, Path(output), report=report, shard=shard, skip_missing=skip_missing
        )
    contents = found.contents or {"rows": [], "not_measured": []}
    keys = ("name", "method", "hook", "l0_target", "seed", "lr")
    rows = [{**{key: row[key] for key in keys}, **row["metrics"]} for row in contents["rows"]]
    notes = [f"{name}: {reason}" for name, reason in found.failures.items()]
    notes += [f"{m['status']}: {m['what']}: {m['reason']}" for m in contents["not_measured"]]
    return Result("compare", Path(output), found, rows, notes)


def report(
    folders: Reference | Sequence[Reference],
    output: Reference,
    *,
    progress: bool | Console = True,
) -> Result[ReportResult]:
    """Tables, figures and one self-contained page of what was trained and measured.

    Args:
        folders: Runs, evaluations and comparisons, in any mixture.
        output: New or empty, or an earlier report, which is replaced.
        progress: As in `train`.

    Raises:
        InputError: The folders cannot be read, or the output holds something else.
    """
    from msae_plugin.reporting.report import report as write_report
    from msae_plugin.saes.download import local_folder

    with shown_steps(progress) as steps:
        places = [local_folder(os.fspath(folder)) for folder in _listed(folders)]
        made = write_report(places, Path(output), steps)
    rows = [{"file": str(file)} for file in (made.page, *made.tables, *made.figures)]
    missing = made.not_measured
    notes = [f"{missing} things were not measured: the page names them"] if missing else []
    return Result("report", Path(output), made, rows, notes)


def latents(
    saes: Reference | Sequence[Reference],
    output: Reference,
    *,
    text: str | None = None,
    tokens: int = 100_000,
    only: Sequence[str] = (),
    model: str | None = None,
    loader: str = "auto",
    progress: bool | Console = True,
) -> Result[LatentBrowser]:
    """A folder in which every latent can be looked at, with `index.html` to open.

    Args:
        saes: Runs, comparisons, exports or published SAEs, all of one language model.
        output: New or empty, or an earlier one, which is replaced.
        text: Held-out text in place of the recipe's: a file, a data set, `packaged:NAME`.
        tokens: How much of it is read.
        only: Names of SAEs or methods that are shown; all by default.
        model: The language model, for SAEs that name none.
        loader: TransformerLens' class, as `model.loader` of a recipe.
        progress: As in `train`.

    Raises:
        InputError: An SAE, the text or the output cannot be used.
    """
    from msae_plugin.reporting.latent_browser import write_latents

    references = [os.fspath(sae) for sae in _listed(saes)]
    with shown_steps(progress) as steps:
        made = write_latents(
            references, Path(output), text=text, tokens=tokens, model=model, loader=loader,
            only=only, report=steps,
        )  # fmt: skip
    return Result("latents", Path(output), made, made.rows)


def look(
    sae: Reference,
    text: str,
    *,
    top: int = 5,
    browser: Reference | None = None,
    model: str | None = None,
    loader: str = "auto",
    progress: bool | Console = True,
) -> Result[Look]:
    """The most active latents of an SAE on each token of a text: a row per token and latent.

    Args:
        sae: One SAE, as in `load`.
        text: Any text.
        top: Latents per token.
        browser: An output of `latents` with this SAE: it knows what each latent fires on.
        model: The language model, for an SAE that names none.
        loader: TransformerLens' class, as `model.loader` of a recipe.
        progress: As in `train`.

    Raises:
        InputError: The SAE or its model cannot be used, or the text is empty or too long.
    """
    from msae_plugin.reporting.look import open_sae

    with shown_steps(progress) as steps:
        found = open_sae(
            os.fspath(sae), model=model, loader=loader, report=steps,
            browser=None if browser is None else Path(browser),
        ).look(text, top)  # fmt: skip
    rows = [vars(row) for row in found.rows]
    return Result("look", Path(sae), found, rows)


def publish(
    folder: Reference,
    /,  # so that the option of this name can be given
    repo: str,
    *,
    dry_run: bool = False,
    evaluation: Reference | None = None,
    confirm: Callable[[str], bool] | None = None,
    progress: bool | Callable[[str], None] = True,
    **options: Any,
) -> Result[PublishResult]:
    """Publish SAEs on the Hugging Face Hub in one commit, and check what others will get.

    Args:
        folder: A run, one SAE of it, or an export.
        repo: `user/name`; made when missing.
        dry_run: Render everything locally and upload nothing.
        evaluation: Output of `evaluate` on these SAEs.
        confirm: Answers a question, such as whether to replace a folder; None refuses.
        progress: Show each step, by a function of your own where one is given.
        **options: Other fields of `msae_plugin.hub.plan.PublishOptions`.

    Raises:
        InputError: Something must not be published. Nothing was.
        RunFailure: The network, the Hub or the disk failed; the message says what was published.
    """
    from msae_plugin.hub.publish import PublishOptions
    from msae_plugin.hub.publish import publish as publish_run

    evaluated = None if evaluation is None else Path(evaluation)
    settings = PublishOptions(dry_run=dry_run, evaluation=evaluated, **options)
    with training_display(progress is True) as display:
        say = progress if callable(progress) else display.message
        made = publish_run(Path(folder), repo, settings, confirm=confirm, say=say)
    rows = [{"file": name, "bytes": size} for name, size in made.files.items()]
    return Result("publish", made.output or Path(folder), made, rows, made.notes)


def load(sae: Reference, *, device: str = "cpu") -> SAE[Any]:
    """Load one trained SAE in float32.

    Args:
        sae: A run of one SAE, an export, a checkpoint of SAELens, or a published SAE.
        device: A torch device.

    Raises:
        InputError: There is none, there are several, or it was never trained.
    """
    from msae_plugin.saes.find import locate
    from msae_plugin.saes.load import load_sae

    found = locate(os.fspath(sae))
    if len(found) > 1:
        places = ", ".join(str(each.source) for each in found)
        raise InputError(f"{os.fspath(sae)!r} holds {len(found)} SAEs", f"give one of {places}")
    return load_sae(found[0], device)[0]


def _sets(changes: Changes) -> list[str]:
    if not isinstance(changes, Mapping):
        return list(changes)
    # One line of YAML each, without the mark behind a scalar's end, which an error would show.
    dumped = {
        key: yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
        for key, value in changes.items()
    }
    return [f"{key}={text.removesuffix(_YAML_END).strip()}" for key, text in dumped.items()]


def _listed(references: Reference | Sequence[Reference]) -> Sequence[Reference]:
    return [references] if isinstance(references, str | os.PathLike) else references
