"""Ground truth on two cores: a SynthSAEBench-shaped model, SAEs at matched L0, tuned rates.

Every SAE of a ground-truth seed sees the same batches in the same pass, through SAELens' own
`SAETrainer`, at the same budget. Learning rates are tuned per method at k = 11 on a ground truth of
another seed, which is not reported on. At the end the cut of every SAE, ours or not, is set to the
same mean L0 over fresh samples, it is exported, and SAELens' own `eval_sae_on_synthetic_data`
judges the export.

    python benchmarks/ground_truth.py tune   --output runs/ground_truth
    python benchmarks/ground_truth.py report --output runs/ground_truth

`tune` writes tuning.jsonl, `report` trains on fresh seeds at the best rates, writes results.jsonl
and prints the table of docs/method.md. Both skip what their file already holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training.sae_trainer import SAETrainer

from msae_plugin import MultiScaleTrainingSAE, preset
from msae_plugin.comparison.ground_truth import RecordedSamples

D_IN, D_SAE, N_FEATURES, BATCH = 192, 512, 2048, 512
EVAL_BATCH = 4096
PREFIX_WIDTHS = [D_SAE // 32, D_SAE // 16, D_SAE // 8, D_SAE // 4, D_SAE // 2, D_SAE]
TUNING_SEEDS, REPORT_SEEDS = [101], [1, 2, 3]
DEAD_WINDOW = 100
LEARNING_RATES = [2e-3, 4e-3, 8e-3, 1.6e-2]
TUNING_K = 11.0
METRICS = ["f1", "mcc", "explained_variance", "dead", "l0", "uniqueness", "precision", "recall"]


def ground_truth_model(seed: int) -> SyntheticModel:
    """SynthSAEBench-16k (arXiv 2602.14687) with an eighth of the features."""
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=N_FEATURES,
            hidden_dim=D_IN,
            firing_probability=ZipfianFiringProbabilityConfig(
                max_prob=0.4, min_prob=5e-4, exponent=0.5
            ),
            hierarchy=HierarchyConfig(
                total_root_nodes=16,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                mutually_exclusive_min_depth=0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            correlation=LowRankCorrelationConfig(correlation_scale=0.1, rank=25),
            orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
            bias=0.5,
            seed=seed,
        )
    )


@dataclass(frozen=True)
class Method:
    """A way to train an SAE: a name and a maker from (k, training steps)."""

    name: str
    make: Callable[[float, int], TrainingSAE[Any]]


def multiscale(preset_name: str, **overrides: Any) -> Callable[[float, int], TrainingSAE[Any]]:
    """Maker of a preset, with overrides."""

    def make(k: float, steps: int) -> TrainingSAE[Any]:
        cfg = preset(preset_name, d_in=D_IN, d_sae=D_SAE, k=k, training_steps=steps, **overrides)
        return MultiScaleTrainingSAE(cfg)

    return make


def _batchtopk(k: float, _steps: int) -> TrainingSAE[Any]:
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k))


def _topk(k: float, _steps: int) -> TrainingSAE[Any]:
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=int(k)))


def _matryoshka(k: float, _steps: int) -> TrainingSAE[Any]:
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, k=k, matryoshka_widths=list(PREFIX_WIDTHS)
        )
    )


METHODS = [
    Method("batchtopk", _batchtopk),
    Method("topk", _topk),
    Method("matryoshka_batchtopk", _matryoshka),
    Method("multiscale reconstruction", multiscale("reconstruction")),
    Method("multiscale default", multiscale("default")),
]


@torch.no_grad()
def match_l0(sae: TrainingSAE[Any], batches: list[torch.Tensor], k: float) -> None:
    """Set the cut of a BatchTopK-like SAE to mean L0 = k; TopK has it by construction."""
    if isinstance(sae, MultiScaleTrainingSAE):
        sae.calibrate_threshold(batches)
    elif isinstance(sae, BatchTopKTrainingSAE):
        pre = torch.cat([sae.encode_with_hidden_pre(batch)[1].flatten() for batch in batches])
        n_wanted = round(k * sum(batch.shape[0] for batch in batches))
        sae.topk_threshold.fill_(pre.topk(n_wanted).values[-1].item())


def train_together(
    runs: list[tuple[Method, float, float]],
    seed: int,
    n_samples: int,
    n_eval: int,
) -> list[dict[str, Any]]:
    """Train (method, k, learning rate) runs on one stream of samples and evaluate their exports."""
    model = ground_truth_model(seed)
    steps = n_samples // BATCH
    trainers: list[SAETrainer[Any, Any]] = []
    for method, k, lr in runs:
        torch.manual_seed(seed)
        trainers.append(_trainer(method.make(k, steps), n_samples, lr, steps))
    torch.manual_seed(seed + 10_000)
    spent = [0.0] * len(runs)
    for _ in range(steps):
        batch = model.sample(BATCH)
        for index, trainer in enumerate(trainers):
            start = time.perf_counter()
            trainer.step(batch)
            trainer.n_training_steps += 1
            spent[index] += time.perf_counter() - start
    calibration = [model.sample(BATCH) for _ in range(40)]
    torch.manual_seed(seed + 20_000)
    samples = RecordedSamples.record(model.activation_generator, n_eval, EVAL_BATCH)
    rows: list[dict[str, Any]] = []
    for (method, k, lr), trainer, seconds in zip(runs, trainers, spent, strict=True):
        match_l0(trainer.sae, calibration, k)
        with tempfile.TemporaryDirectory() as folder:
            trainer.sae.save_inference_model(folder)
            exported = SAE.load_from_disk(folder)
        found = eval_sae_on_synthetic_data(
            exported,
            model.feature_dict,
            samples.rewind(),
            num_samples=n_eval,
            batch_size=EVAL_BATCH,
        )
        rows.append(
            {
                "method": method.name,
                "k": k,
                "lr": lr,
                "seed": seed,
                "samples": n_samples,
                "true_l0": found.true_l0,
                "l0": found.sae_l0,
                "f1": found.classification.f1_score,
                "precision": found.classification.precision,
                "recall": found.classification.recall,
                "mcc": found.mcc,
                "explained_variance": found.explained_variance,
                "dead": found.dead_latents,
                "uniqueness": found.uniqueness,
                "seconds": seconds,
            }
        )
    return rows


def _trainer(sae: TrainingSAE[Any], n_samples: int, lr: float, steps: int) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(
        total_training_samples=n_samples,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=steps // 3,
        # AuxK acts on latents that were silent for this many steps; SAELens' default of 1000 would
        # leave most of the dictionary dead until the run is over.
        dead_feature_window=DEAD_WINDOW,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["k"], row["lr"], row["seed"], row["samples"]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_missing(
    path: Path,
    wanted: list[tuple[Method, float, float]],
    seeds: list[int],
    n_samples: int,
    n_eval: int,
) -> list[dict[str, Any]]:
    """Train what the file does not hold yet, append it, return all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        done = {_key(row) for row in _read(path)}
        runs = [run for run in wanted if (run[0].name, run[1], run[2], seed, n_samples) not in done]
        if not runs:
            continue
        rows = train_together(runs, seed, n_samples, n_eval)
        with path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                print(json.dumps({key: row[key] for key in ("method", "k", "lr", "f1", "mcc")}))
    return _read(path)


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Learning rate with the best mean of F1 and MCC per method."""
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["method"]][row["lr"]].append(row["f1"] + row["mcc"])
    return {
        name: max(by_lr, key=lambda lr: statistics.mean(by_lr[lr]))
        for name, by_lr in scores.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    grouped: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["k"], row["method"]].append(row)
    lines = [
        "| k | method | lr | " + " | ".join(METRICS) + " |",
        "|---|---|---|" + "---|" * len(METRICS),
    ]
    for (k, name), group in sorted(grouped.items(), key=lambda item: item[0][0]):
        cells: list[str] = []
        for metric in METRICS:
            values = [row[metric] for row in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 1 if metric in ("dead", "l0") else 3
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {k:g} | {name} | {group[0]['lr']:g} | " + " | ".join(cells) + " |")
    true_l0 = statistics.mean(row["true_l0"] for row in rows)
    seeds = sorted({row["seed"] for row in rows})
    lines.append(f"\nTrue L0 {true_l0:.1f}; seeds {seeds}; {rows[0]['samples']:,} samples each.")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["tune", "report"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--eval-samples", type=int, default=50_000)
    parser.add_argument("--k", type=float, nargs="+", default=[5, 11, 16])
    parser.add_argument("--methods", nargs="+", default=[method.name for method in METHODS])
    parser.add_argument("--seeds", type=int, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = [method for method in METHODS if method.name in args.methods]
    if args.stage == "tune":
        wanted = [(m, TUNING_K, lr) for m in methods for lr in LEARNING_RATES]
        rows = run_missing(
            args.output / "tuning.jsonl",
            wanted,
            args.seeds or TUNING_SEEDS,
            args.samples,
            args.eval_samples,
        )
        for name, lr in sorted(best_rates(rows).items()):
            print(f"{name:30s} best lr {lr:g}")
        return
    rates = best_rates(_read(args.output / "tuning.jsonl"))
    wanted = [(m, k, rates[m.name]) for m in methods for k in args.k]
    rows = run_missing(
        args.output / "results.jsonl",
        wanted,
        args.seeds or REPORT_SEEDS,
        args.samples,
        args.eval_samples,
    )
    print(table([row for row in rows if row["k"] in args.k and row["samples"] == args.samples]))


if __name__ == "__main__":
    main()
