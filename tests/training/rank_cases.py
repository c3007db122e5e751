"""What is trained on one process and on two: every mechanism, and SAELens' architectures.

Two processes are forked once for all cases; each case trains on the same eight batches, whole on
one process and in halves on two.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from torch import distributed

from msae_plugin import preset
from msae_plugin.architecture.calibration import calibrate, needs_calibration
from msae_plugin.architecture.config import mechanisms_off
from msae_plugin.architecture.ranks import ALONE, ProcessRanks, Ranks
from msae_plugin.training.data_parallel import gathered
from msae_plugin.training.step_trainer import StepOptions
from msae_plugin.training.trainer import LockstepTrainer

D_IN, D_SAE, BATCH, STEPS, HOOK = 8, 40, 64, 8, "h"
LR = 2e-2
WEIGHTED = {"orthogonality_coefficient": 0.5, "orthogonality_weighting": "coactivation"}
REVIVAL = {"revival_every": 3, "revival_dead_steps": 2, "revival_survival_steps": 3, "k": 2}

# Fields of the SAE, and options of the step under "options".
MULTISCALE: dict[str, dict[str, Any]] = {
    "default preset": {"preset": "nested", "prefix_sort_every": 3},
    "reconstruction preset": {"preset": "default"},
    "batchtopk alone": {},
    "auxk": {"aux_loss_coefficient": 1.0, "k": 1},
    "ortsae penalty in random chunks": {
        "orthogonality_coefficient": 0.5,
        "orthogonality_chunk_size": 10,
    },
    "neighbours and co-activation": {
        **WEIGHTED,
        "orthogonality_pairs": "neighbours",
        "neighbour_refresh_every": 3,
    },
    "sketch": {**WEIGHTED, "orthogonality_pairs": "chunks", "sketch_rank": 4},
    "revival from error samples": REVIVAL,
    "z-score": {"selection": "zscore", "zscore_z": 1.0},
    "z-score that corrects itself": {
        "selection": "zscore",
        "zscore_z": 0.5,
        "zscore_z_lr": 0.2,
        "l1_coefficient": 0.1,
        "l1_warm_up_steps": 4,
    },
    "firing floor": {"firing_floor": 0.7, "firing_floor_rate": 0.3},
    "standardised": {"standardise": 0.5, "sparsity_scales": [0.5, 2.0]},
    "importance": {"importance_power": 0.5, "l1_coefficient": 0.1},
    "normalisation": {
        "norm_scales": [0.1, 1.0],
        "norm_eps": 0.1,
        "norm_eps_mode": "relative",
        "norm_gate": True,
        "norm_attention": True,
    },
    "mean as initial bias, unit decoder": {
        "input_normalization": "first_batch",
        "unit_norm_decoder": True,
    },
    "scaled activations": {"normalize_activations": "expected_average_only_in"},
    "whitened activations": {"normalize_activations": "covariance_whitening"},
    "source's plan": {
        "preset": "source-plan",
        "revival_every": 3,
        "revival_dead_steps": 2,
        # Of the preset's rank the sketch is exact here, and its error nothing but rounding.
        "sketch_rank": 4,
    },
    "accumulation": {"preset": "nested", "options": {"accumulation_steps": 2}},
    "weight decay and a bound on the gradient": {
        "options": {"weight_decay": 0.1, "clip_grad_norm": 0.01}
    },
}
SAELENS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.3},
    "topk": {"k": 3},
    "batchtopk": {"k": 3.0, "topk_threshold_lr": 0.1},
    "matryoshka_batchtopk": {"k": 3.0, "matryoshka_widths": [10, 40]},
    "jumprelu": {"l0_coefficient": 0.01},
    "gated": {"l1_coefficient": 0.1},
}
CASES = [*MULTISCALE, *SAELENS]


@dataclass
class Outcome:
    """What training left on one rank."""

    state: dict[str, torch.Tensor]
    dead: torch.Tensor  # steps since each latent fired, as SAELens' trainer counts
    rows: list[dict[str, float]]
    events: list[dict[str, Any]]
    calibration: dict[str, float]


def activations(n_batches: int) -> list[torch.Tensor]:
    """Whole batches: sparse sums of directions, off-centre, with norms that vary."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(30, D_IN, generator=generator, dtype=torch.float64)
    codes = torch.rand(n_batches * BATCH, 30, generator=generator, dtype=torch.float64)
    chosen = torch.rand(n_batches * BATCH, 30, generator=generator) < 0.1
    norms = torch.exp(0.3 * torch.randn(n_batches * BATCH, 1, generator=generator))
    tokens = (codes * chosen) @ directions * norms + 0.3
    return list(tokens.split(BATCH))


def build(case: str) -> tuple[TrainingSAE[Any], StepOptions]:
    fields = dict(MULTISCALE.get(case, SAELENS.get(case, {})))
    options = StepOptions(**fields.pop("options", {}))
    torch.manual_seed(0)
    if case in SAELENS:
        sae_class, config_class = get_sae_training_class(case)
        return sae_class(config_class(d_in=D_IN, d_sae=D_SAE, dtype="float64", **fields)), options
    name = fields.pop("preset", None)
    sae_class, _ = get_sae_training_class("multiscale")
    values = {"dtype": "float64", **({} if name else mechanisms_off()), **fields}
    k = values.pop("k", 3)
    config = preset(name or "default", d_in=D_IN, d_sae=D_SAE, k=k, training_steps=STEPS, **values)
    return sae_class(config), options


def own_share(ranks: Ranks, batches: list[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's consecutive part of each batch."""
    return iter([{HOOK: batch.chunk(ranks.count)[ranks.rank]} for batch in batches])


def train(case: str, ranks: Ranks) -> Outcome:
    sae, options = build(case)
    rows: list[dict[str, float]] = []
    events: list[dict[str, Any]] = []
    steps = STEPS // options.accumulation_steps
    batches = activations(STEPS + 6)
    trainer = LockstepTrainer(
        SAETrainerConfig(
            total_training_samples=steps * options.accumulation_steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=LR,
            lr_end=2e-3,
            dead_feature_window=2,
            feature_sampling_window=5,
            n_batches_for_norm_estimate=3,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        {"a": sae},
        {"a": HOOK},
        own_share(ranks, batches),
        options=options,
        log_every=4,
        on_log=lambda _, row: rows.append(row),
        ranks=ranks,
    )
    trainer.fit()
    if case in MULTISCALE:
        events = sae.pop_events()  # type: ignore[operator]
    calibration: dict[str, float] = {}
    if needs_calibration(sae):
        fresh = list(gathered(own_share(ranks, batches[-2:]), ranks))
        calibration = calibrate(sae, [trainer.scaled("a", batch[HOOK]) for batch in fresh])
    return Outcome(
        {name: value.detach().clone() for name, value in sae.state_dict().items()},
        trainer.step_trainers["a"].n_forward_passes_since_fired,
        rows,
        events,
        calibration,
    )


def run_rank(rank: int, count: int, folder: Path) -> None:
    """All cases in one of several processes; outcomes and errors go to a file of its own."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    outcomes: dict[str, Outcome | str] = {}
    for case in CASES:
        try:
            outcomes[case] = train(case, ProcessRanks())
        except Exception as error:  # noqa: BLE001  each case is a test of its own
            outcomes[case] = f"{type(error).__name__}: {error}"
            break
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(outcomes))
    distributed.destroy_process_group()


def run_ranks(count: int, folder: Path) -> list[dict[str, Outcome | str]]:
    """The outcomes of every rank, by case."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_rank, args=(rank, count, folder)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(count)]


def run_alone(case: str) -> Outcome:
    return train(case, ALONE)
