"""Small hand-made inputs of a report: a comparison, an evaluation, a run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import save_file

METHODS = ("batchtopk", "multiscale default", "topk <b>&")
SEEDS = (1, 2, 3)
TARGETS = (8.0, 16.0)
# Better than batchtopk by .05 in every pair, level, and worse; in explained variance.
SHIFTS = {"batchtopk": 0.0, "multiscale default": 0.05, "topk <b>&": -0.03}
D_IN, D_SAE = 6, 16


def definition(unit: str, higher: bool | None) -> dict[str, Any]:
    return {
        "definition": f"a thing in {unit} & <more>",
        "unit": unit,
        "tokens": "held-out tokens",
        "source": "msae",
        "higher_is_better": higher,
    }


DEFINITIONS = {
    "heldout/explained_variance": definition("share", True),
    "heldout/l0": definition("latents per token", None),
    "heldout/dead_latents": definition("latents", False),
    "training/final_loss": definition("squared activation", None),
}


def row(method: str, l0: float, seed: int, **changes: Any) -> dict[str, Any]:
    noise = random.Random(f"{method}{l0}{seed}").uniform(-0.001, 0.001)
    values: dict[str, Any] = {
        "name": f"{method}_l0-{l0:g}_seed{seed}",
        "method": method,
        "architecture": "multiscale" if "multiscale" in method else method.split(maxsplit=1)[0],
        "preset": "default" if method.endswith("default") else None,
        "hook": "blocks.1.hook_resid_post",
        "l0_target": l0,
        "seed": seed,
        "lr": 0.004,
        "folder": None,
        "training_steps": 200,
        "training_tokens": 102400,
        "search_tokens": 0,
        "seconds": 10.0 + seed,
        "control": None,
        "metrics": {
            "heldout/explained_variance": 0.7
            + 0.01 * l0
            + 0.002 * seed
            + SHIFTS.get(method, 0.0)
            + noise,
            "heldout/l0": l0 * 1.01,
            "heldout/dead_latents": 10.0 + seed,
            "training/final_loss": 31.5 + seed,
        },
    }
    return values | changes


def comparison(**changes: Any) -> dict[str, Any]:
    rows = [row(method, l0, seed) for l0 in TARGETS for method in METHODS for seed in SEEDS]
    rows.append(
        row(
            "frozen decoder", 8.0, 1, control="frozen random decoder",
            metrics={"heldout/explained_variance": 0.1, "heldout/l0": 8.2},
        )
    )  # fmt: skip
    return {
        "format": 1,
        "kind": "language_model",
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.9.0"},
        "model": {"name": "tiny-model"},
        "reference": "batchtopk",
        "protocol": {"training tokens per SAE": 102400},
        "rows": rows,
        "definitions": DEFINITIONS,
        "not_measured": [
            {"what": "sparse_probing of all", "status": "skipped", "reason": "no labels & data"}
        ],
    } | changes


def ladder_rows() -> list[dict[str, Any]]:
    """Two rungs above the baseline: the first helps, the second is measured at another L0."""
    rows: list[dict[str, Any]] = []
    shifts = {"baseline": 0.0, "source-run-1": 0.02, "source-run-2": 0.0}
    for place, (method, shift) in enumerate(shifts.items()):
        for seed in SEEDS:
            made = row(method, 8.0, seed, seconds=10.0 * (place + 1))
            made["metrics"]["heldout/explained_variance"] = 0.8 + shift + 0.001 * seed * (place + 1)
            made["metrics"]["heldout/dead_latents"] = 10.0 + (seed * (place + 1)) % 3
            if method == "source-run-2":
                made["metrics"]["heldout/l0"] = 16.0
            rows.append(made)
    return rows


def ground_truth() -> dict[str, Any]:
    """One seed, one L0: nothing may be called a win."""
    definitions = {
        "ground_truth/f1": definition("share", True),
        "ground_truth/l0": definition("latents per sample", None),
    }
    rows = [
        row(m, 5.0, 1, hook=None, metrics={"ground_truth/f1": f1, "ground_truth/l0": 5.0})
        for m, f1 in (("batchtopk", 0.5), ("multiscale default", 0.8))
    ]
    return comparison(
        kind="ground_truth", rows=rows, definitions=definitions, not_measured=[], reference=None
    )


def write_comparison(folder: Path, contents: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(contents), encoding="utf-8")
    return folder


def events() -> list[dict[str, Any]]:
    """Latent 1 lives, 2 is found dead, 3 is revived again before it is judged, and then waits."""
    revival = {"event": "revival", "old_neighbour": 0, "source": "error_samples"}
    return [
        {**revival, "step": 50, "latent": 1, "old_cosine": 0.4, "distance_travelled": 0.9},
        {**revival, "step": 50, "latent": 2, "old_cosine": 0.3, "distance_travelled": 0.7},
        {**revival, "step": 50, "latent": 3, "old_cosine": 0.2, "distance_travelled": 1.1},
        {"event": "outcome", "step": 100, "latent": 1, "revived_at": 50, "firing_rate": 0.02,
         "survived": True},
        {"event": "outcome", "step": 100, "latent": 2, "revived_at": 50, "firing_rate": 0.0,
         "survived": False},
        {**revival, "step": 150, "latent": 3, "old_cosine": 0.5, "distance_travelled": 1.0},
    ]  # fmt: skip


def write_sae(
    folder: Path,
    *,
    seed: int = 1,
    training: dict[str, Any] | None = None,
    revived: list[dict[str, Any]] | None = None,
) -> None:
    """The folder of an SAE: export, logs, activations, contexts."""
    generator = torch.Generator().manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    directions = torch.randn(D_SAE, D_IN, generator=generator)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.cfg.metadata.training_architecture_details = {
        "revival_every": 0,
        "aux_loss_coefficient": 1.0,
        "prefix_fractions": [0.25, 0.5],
        **(training or {}),
    }
    sae.cfg.metadata.training_steps = 200
    (folder / "sae").mkdir(parents=True)
    sae.save_model(folder / "sae")
    frequencies = torch.logspace(-4, -1, D_SAE)
    frequencies[-1] = 0
    save_file({"sparsity": torch.log10(frequencies + 1e-10)}, folder / "sae/sparsity.safetensors")
    save_file(
        {"activations": torch.randn(32, D_IN, generator=generator)},
        folder / "check_activations.safetensors",
    )
    lines = [
        {"step": s, "tokens": 512 * s, "explained_variance": 0.5 + s / 1000, "dead_latents": 3}
        for s in (50, 100, 200)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "revivals.jsonl", revived or [])
    (folder / "export.json").write_text(json.dumps({"l0_target": 8.0, "l0_exported": 8.1}))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


CONTEXTS = [
    {
        "latent": 7,
        "frequency": 0.01,
        "mean_activation": 2.5,
        "strength": 2.5,
        "contexts": [
            {"before": "a <script>alert(1)</script> ", "token": " cat", "after": "\nsat",
             "activation": 3.25, "document": 0}
        ],
    }
]  # fmt: skip


def write_run(folder: Path, *, status: str = "complete") -> Path:
    """A run of two SAEs."""
    names = ("multiscale", "batchtopk")
    for place, name in enumerate(names):
        write_sae(folder / name, seed=place)
    final = {"step": 200, "tokens": 102400, "loss": 12.5, "explained_variance": 0.7,
             "dead_latents": 3}  # fmt: skip
    record = {
        "status": status,
        "seed": 42,
        "steps": 200,
        "tokens": 102400,
        "wall_seconds": 61.5,
        "versions": {"torch": "2.9.0"},
        "saes": {
            name: {
                "hook": "blocks.1.hook_resid_post",
                "architecture": name,
                "folder": name,
                "final": final,
                "tokens_per_second": 1234.5,
                "export": {"l0_target": 8.0, "l0_exported": 8.1},
            }
            for name in names
        },
        "config": {"saes": {name: {"k": 8.0} for name in names}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def write_evaluation(folder: Path, hashes: dict[str, str] | None = None) -> Path:
    """Two SAEs: core of both with two seeds, sparse probing of one failed."""
    names = list(hashes or {"alpha": "a", "beta": "b"})
    results: list[dict[str, Any]] = []
    for place, name in enumerate(names):
        per_seed = {"0": 0.9 + 0.01 * place, "1": 0.92 + 0.01 * place}
        results.append(
            {
                "sae": name, "evaluation": "core", "status": "measured", "reason": None,
                "seeds": [0, 1], "files": [],
                "metrics": {
                    "ce_loss_score": {"mean": 0.91 + 0.01 * place, "std": 0.014,
                                      "per_seed": per_seed},
                    "l0": {"mean": 30.0, "std": 0.0, "per_seed": {"0": 30.0, "1": 30.0}},
                },
            }
        )  # fmt: skip
    results.append(
        {"sae": names[0], "evaluation": "sparse_probing", "status": "failed",
         "reason": "the probe <diverged>", "seeds": [0, 1], "files": [], "metrics": {}}
    )  # fmt: skip
    summary = {
        "format": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"sae-bench": "0.6.0"},
        "model": {"name": "tiny-model", "dtype": "float32", "device": "cpu"},
        "seeds": [0, 1],
        "config": {"evaluations": {"core": {"batch_size_prompts": 4}}},
        "saes": {
            name: {"architecture": "jumprelu", "weights_sha256": digest, "reference": name}
            for name, digest in (hashes or {"alpha": "a", "beta": "b"}).items()
        },
        "results": results,
        "metrics": {
            "core/ce_loss_score": definition("share", True),
            "core/l0": definition("latents per token", None),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
