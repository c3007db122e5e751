"""The table of docs/results.md: ours, SAELens' SAEs and controls through `msae eval`'s machinery.

    python benchmarks/language_model.py report --output runs/language_model
    python benchmarks/peers.py tune            --output runs/language_model
    python benchmarks/peers.py train           --output runs/language_model
    python benchmarks/evaluation_table.py      --output runs/language_model

SAEs of k = 48 and three training seeds, the residual stream itself, and batchtopk with its decoder
permuted, by `eval_configs/offline.yaml`. Means and standard deviations are over training seeds; the
evaluation's own seed is fixed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from msae_plugin.comparison.methods import ResidualStreamSAE, with_permuted_decoder
from msae_plugin.evaluation.evaluate import evaluate
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.saes.load import EvaluatedSAE, load_subjects

ROWS = [
    "multiscale default",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "standard",
    "frozen random decoder",
    "permuted decoder",
    "residual stream",
]
COLUMNS = [
    ("core", "l0", "L0"),
    ("core", "explained_variance_streaming", "expl. var."),
    ("core", "ce_loss_score", "loss recovered"),
    ("core", "kl_div_with_sae_float32", "KL"),
    ("core", "frac_alive", "alive"),
    ("core", "average_max_decoder_cosine_sim", "decoder cosine"),
    ("sparse_probing", "sae_top_1_test_accuracy", "probing top-1"),
    ("sparse_probing", "sae_top_2_test_accuracy", "top-2"),
    ("sparse_probing", "sae_top_5_test_accuracy", "top-5"),
    ("sparse_probing_sae_probes", "sae_top_1_test_accuracy", "sae-probes top-1"),
    ("sparse_probing_sae_probes", "sae_top_5_test_accuracy", "top-5"),
]


def trained(folder: Path) -> list[tuple[str, EvaluatedSAE]]:
    """The trained SAEs of k = 48, with their row."""
    found: list[tuple[str, EvaluatedSAE]] = []
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)_k48_lr[\d.e-]+_seed(\d+)", path.name)
        if match and match.group(1) in ROWS:
            subject = load_subjects([str(path)])[0]
            name = f"{match.group(1).replace(' ', '-')}-seed{match.group(2)}"
            found.append((match.group(1), replace(subject, name=name)))
    return found


def controls(subjects: list[tuple[str, EvaluatedSAE]]) -> list[tuple[str, EvaluatedSAE]]:
    """The residual stream, and batchtopk with permuted decoders."""
    found: list[tuple[str, EvaluatedSAE]] = []
    for row, subject in subjects:
        if row == "batchtopk":
            seed = len(found)
            permuted = with_permuted_decoder(subject.sae, seed)
            digest = f"{subject.weights_sha256}-permuted-{seed}"
            name = subject.name.replace("batchtopk", "permuted-decoder")
            found.append(
                (
                    "permuted decoder",
                    replace(subject, name=name, sae=permuted, weights_sha256=digest),
                )
            )
    first = subjects[0][1]
    identity = ResidualStreamSAE(first.sae.cfg.d_in, first.sae.cfg.metadata)
    residual = replace(
        first, name="residual-stream", reference="residual stream", sae=identity.eval(),
        weights_sha256="residual-stream", folder=None,
    )  # fmt: skip
    return [*found, ("residual stream", residual)]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, mean and standard deviation over training seeds."""
    lines = [
        "| SAE | seeds | " + " | ".join(heading for *_, heading in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in ROWS:
        if row not in rows:
            continue
        cells: list[str] = []
        for evaluation, metric, _ in COLUMNS:
            values = [
                sae[evaluation][metric]["mean"]
                for sae in rows[row]
                if metric in sae.get(evaluation, {})
            ]
            if not values:
                cells.append("-")
                continue
            digits = 1 if metric == "l0" else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        lines.append(f"| {row} | {len(rows[row])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default="offline")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    subjects = trained(args.output / "saes" / "results")
    subjects += controls(subjects)
    row_of = {subject.name: row for row, subject in subjects}
    result = evaluate(
        EvalConfig.load(args.config, args.set),
        [subject for _, subject in subjects],
        args.output / "evaluation",
        report=lambda *what: print(*what, file=sys.stderr, flush=True),
    )
    by_sae: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in result.summary["results"]:
        if entry["status"] == "measured":
            by_sae[entry["sae"]][entry["evaluation"]] = entry["metrics"]
        else:
            print(entry["sae"], entry["evaluation"], entry["status"], entry["reason"])
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, metrics in by_sae.items():
        rows[row_of[name]].append(metrics)
    print(table(rows))


if __name__ == "__main__":
    main()
