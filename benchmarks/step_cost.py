"""Cost of a training step and of inference, as ratios measured in one run.

    python benchmarks/step_cost.py                       # (576, 4608) and (2304, 16384)
    python benchmarks/step_cost.py --sizes 576x4608 --repeats 9

Every method trains on the same batches, the methods take turns within each repeat, and each ratio
is taken within a repeat before medians and quartiles are formed, so that a busy machine slows all
alike. Shares of mechanisms are the default recipe's step with one mechanism removed or added.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput

from msae_plugin import MultiScaleSAE, MultiScaleSAEConfig, MultiScaleTrainingSAE, preset

ADDED: dict[str, dict[str, Any]] = {
    "without [S] prefixes": {"prefix_fractions": []},
    "without [S] further budgets": {"sparsity_scales": []},
    "with [O] neighbours, co-activation": {
        "orthogonality_coefficient": 1.0,
        "orthogonality_pairs": "neighbours",
        "orthogonality_weighting": "coactivation",
    },
    "with [O] chunks, OrtSAE": {
        "orthogonality_coefficient": 1.0,
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "none",
    },
    "with [C] sketch of rank 32": {"sketch_rank": 32},
    "with [Z] standardised ranking": {"standardise": 0.5},
    "with [N] four scales": {"norm_scales": [0.1, 0.5, 1.0, 2.0]},
    "with [N] [A] attention": {"norm_scales": [0.1, 0.5, 1.0, 2.0], "norm_attention": True},
    "with [G] importance": {"importance_power": 0.5},
    "with [R] revival every 100 steps": {"revival_every": 100},
}


def training_saes(d_in: int, d_sae: int, k: int) -> dict[str, TrainingSAE[Any]]:
    """The methods compared; k is at its final value, as for most of a run."""
    widths = [d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]

    def ours(name: str, **overrides: Any) -> MultiScaleTrainingSAE:
        cfg = preset(name, d_in=d_in, d_sae=d_sae, k=k, training_steps=1000, k_anneal_steps=0)
        for key, value in overrides.items():
            setattr(cfg, key, value)
        return MultiScaleTrainingSAE(cfg)

    return {
        "batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k)),
        "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                d_in=d_in, d_sae=d_sae, k=k, matryoshka_widths=widths
            )
        ),
        "multiscale reconstruction": ours("reconstruction"),
        "multiscale default": ours("default"),
        **{f"default {name}": ours("default", **change) for name, change in ADDED.items()},
    }


def trainer_of(sae: TrainingSAE[Any], batches: list[torch.Tensor]) -> Callable[[int], None]:
    """A function that takes one optimiser step, as SAELens' trainer does."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    sae.train()

    def step(index: int) -> None:
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=batches[index % len(batches)],
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=index,
                is_logging_step=False,
            )
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(functions: dict[str, Callable[[int], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function per repeat, in turns, after two unmeasured rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function(repeat)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], against: str) -> None:
    """Print milliseconds and the ratio within each repeat: median [quartiles]."""
    print(f"\n{title}\n\n| | ms, median | ratio to {against}, median [quartiles] |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values, seconds[against], strict=True))
        low, middle, high = (
            statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        )
        milliseconds = 1000 * statistics.median(values)
        print(f"| {name} | {milliseconds:.1f} | {middle:.3f} [{low:.3f}, {high:.3f}] |")


def structured_batches(n_tokens: int, d_in: int, count: int) -> list[torch.Tensor]:
    """Sparse mixtures of random directions, so that selection works on realistic activations."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    batches: list[torch.Tensor] = []
    for _ in range(count):
        strength = torch.rand(n_tokens, 4 * d_in, generator=generator)
        batches.append((strength * (strength > 0.98)) @ directions)
    return batches


def inference_functions(
    d_in: int, d_sae: int, batch: torch.Tensor
) -> dict[str, Callable[[int], None]]:
    """Encode and decode of the export, beside SAELens' JumpReLU with the same weights."""
    torch.manual_seed(0)
    plain = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
    plain.threshold.data.fill_(2.0)

    def copy_of(**fields: Any) -> MultiScaleSAE:
        sae = MultiScaleSAE(MultiScaleSAEConfig(d_in=d_in, d_sae=d_sae, **fields))
        sae.load_state_dict(plain.state_dict(), strict=False)
        return sae

    saes: dict[str, SAE[Any]] = {
        "jumprelu": plain,
        "multiscale": copy_of(),
        "multiscale, folded normalisation": copy_of(norm_scales=[1.0], norm_affine=False),
    }

    def run(sae: SAE[Any]) -> Callable[[int], None]:
        def encode_decode(_: int) -> None:
            with torch.no_grad():
                sae.decode(sae.encode(batch))

        return encode_decode

    return {name: run(sae) for name, sae in saes.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["576x4608", "2304x16384"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="methods by name; batchtopk is always there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        d_in, d_sae = (int(part) for part in size.split("x"))
        batches = structured_batches(args.tokens, d_in, 4)
        saes = training_saes(d_in, d_sae, args.k)
        if args.only:
            saes = {name: sae for name, sae in saes.items() if name in {"batchtopk", *args.only}}
        steps = {name: trainer_of(sae, batches) for name, sae in saes.items()}
        title = f"Training step, d_in {d_in}, d_sae {d_sae}, {args.tokens} tokens, k {args.k}"
        report(title, timed(steps, args.repeats), "batchtopk")
        del saes, steps
        functions = inference_functions(d_in, d_sae, batches[0])
        report(f"Inference, {size}", timed(functions, 3 * args.repeats), "jumprelu")


if __name__ == "__main__":
    main()
