"""Cost of a training step and of inference, as ratios measured in one run.

    python benchmarks/step_cost.py                    # (576, 4608) and (2304, 16384), main methods
    python benchmarks/step_cost.py --shares           # each mechanism's share of the step
    python benchmarks/step_cost.py --sizes 2304x16384 --tokens 1024 --repeats 9
    python benchmarks/step_cost.py --device cuda --bf16 --repeats 30   # both decode kernels

Every method trains on the same batches, the methods take turns within each repeat, and each ratio
is taken within a repeat before medians and quartiles are formed, so that a busy machine slows all
alike. Shares of mechanisms are the default recipe's step with one mechanism removed or added.
`matryoshka_batchtopk` has the prefixes of the default recipe. Inference is encode and decode under
no_grad of half the tokens, at an L0 of 32 and 64, for the export and for SAELens' JumpReLU with
equal weights: "dense" decodes by the full product, "as it is" over active latents where that is
faster. On a GPU every measurement waits for the device, ours replays recorded steps and also runs
without, with each decode kernel, and the peak of a step's memory is printed, beside what weights
and optimiser hold; a recording holds as much all the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from profiling.inference import pair_of_saes
from profiling.machine import synchronise
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput

from msae_plugin import MultiScaleSAE, MultiScaleSAEConfig, MultiScaleTrainingSAE, preset
from msae_plugin.architecture.kernels.decoding import DecodeKernel, MachineSettings

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
    "without [Z] firing floor": {"firing_floor": 0.0},
    "with [Z] standardised ranking": {"standardise": 0.5, "firing_floor": 0.0},
    "with [N] four scales": {"norm_scales": [0.1, 0.5, 1.0, 2.0]},
    "with [N] [A] attention": {"norm_scales": [0.1, 0.5, 1.0, 2.0], "norm_attention": True},
    "with [G] importance": {"importance_power": 0.5},
    "with [R] revival every 100 steps": {"revival_every": 100},
}


def training_saes(
    d_in: int, d_sae: int, k: int, shares: bool, device: torch.device
) -> dict[str, TrainingSAE[Any]]:
    """The methods compared; k is at its final value, as for most of a run."""
    widths = preset("nested", d_in=d_in, d_sae=d_sae, k=k, training_steps=1000).prefix_widths

    def ours(
        name: str, machine: MachineSettings | None = None, **overrides: Any
    ) -> MultiScaleTrainingSAE:
        cfg = preset(
            name, d_in=d_in, d_sae=d_sae, k=k, training_steps=1000, k_anneal_steps=0,
            device=str(device),
        )  # fmt: skip
        for key, value in overrides.items():
            setattr(cfg, key, value)
        sae = MultiScaleTrainingSAE(cfg)
        sae.attach_machine(machine or MachineSettings())
        return sae

    found: dict[str, TrainingSAE[Any]] = {
        "batchtopk": BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=str(device))
        ),
        "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                d_in=d_in, d_sae=d_sae, k=k, matryoshka_widths=widths, device=str(device)
            )
        ),
        "multiscale nested": ours("nested"),
        "multiscale default": ours("default"),
    }
    if device.type == "cuda":
        for name in ("default", "nested"):
            found[f"multiscale {name}, not recorded"] = ours(
                name, MachineSettings(cuda_graphs=False)
            )
            kernels: tuple[DecodeKernel, ...] = ("embedding_bag", "triton")
            for kernel in kernels:
                found[f"multiscale {name}, {kernel}"] = ours(name, MachineSettings(kernel))
    if shares:
        found |= {f"nested {name}": ours("nested", **change) for name, change in ADDED.items()}
    return found


def trainer_of(
    sae: TrainingSAE[Any], batches: list[torch.Tensor], autocast: bool
) -> Callable[[int], None]:
    """A function that takes one optimiser step, as SAELens' trainer does."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    sae.train()

    def step(index: int) -> None:
        with torch.autocast(sae.device.type, torch.bfloat16, enabled=autocast):
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


def timed(
    functions: dict[str, Callable[[int], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each function per repeat, in turns, after two unmeasured rounds (a GPU: six)."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    unmeasured = 6 if device.type == "cuda" else 2
    for repeat in range(repeats + unmeasured):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function(repeat)
            synchronise(device)
            if repeat >= unmeasured:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], against: list[str]) -> None:
    """Print milliseconds and ratios within each repeat: median [quartiles]."""
    print(f"\n{title}\n")
    print("| | ms | " + " | ".join(f"ratio to {name}" for name in against) + " |")
    print("|---|---|" + "---|" * len(against))
    for name, values in seconds.items():
        cells = [spread([1000 * value for value in values], 1)]
        for other in against:
            ratios = [a / b for a, b in zip(values, seconds[other], strict=True)]
            cells.append(spread(ratios, 3))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def spread(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    parts = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    low, middle, high = (f"{value:.{digits}f}" for value in parts)
    return f"{middle} [{low}, {high}]"


def report_memory(
    saes: dict[str, TrainingSAE[Any]],
    steps: dict[str, Callable[[int], None]],
    device: torch.device,
) -> None:
    """Print what a step that is not recorded allocates at most beyond what lies there before it."""
    print("\n| | peak of a step beyond weights and moments, MiB |\n|---|---|")
    for name, step in steps.items():
        sae = saes[name]
        if isinstance(sae, MultiScaleTrainingSAE):
            sae.attach_machine(MachineSettings(cuda_graphs=False))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(1)
        extra = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        print(f"| {name} | {extra:,.0f} |", flush=True)


def structured_batches(
    n_tokens: int, d_in: int, count: int, device: torch.device
) -> list[torch.Tensor]:
    """Sparse mixtures of random directions, so that selection works on realistic activations."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    batches: list[torch.Tensor] = []
    for _ in range(count):
        strength = torch.rand(n_tokens, 4 * d_in, generator=generator)
        batches.append(((strength * (strength > 0.98)) @ directions).to(device))
    return batches


def inference_functions(
    d_in: int, d_sae: int, batch: torch.Tensor, l0: float, autocast: bool
) -> dict[str, Callable[[int], None]]:
    """Encode and decode of the export, beside SAELens' JumpReLU with the same weights."""
    plain, ours = pair_of_saes(d_in, d_sae, batch, l0)
    folded = MultiScaleSAE(
        MultiScaleSAEConfig(
            d_in=d_in, d_sae=d_sae, norm_scales=[1.0], norm_affine=False, device=str(batch.device)
        )
    )
    folded.load_state_dict(plain.state_dict(), strict=False)
    mixed = torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast)

    def run(sae: SAE[Any]) -> Callable[[int], None]:
        def encode_decode(_: int) -> None:
            with torch.no_grad(), mixed:
                sae.decode(sae.encode(batch))

        return encode_decode

    def dense(_: int) -> None:
        with torch.no_grad(), mixed:
            ours.encode(batch) @ ours.W_dec + ours.b_dec

    return {
        "jumprelu": run(plain),
        "multiscale, dense": dense,
        "multiscale, as it is": run(ours),
        "multiscale, folded normalisation": run(folded),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["576x4608", "2304x16384"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shares", action="store_true", help="one mechanism removed or added")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    parser.add_argument("--inference", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="+", help="methods by name; batchtopk is always there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setting = f"{'bf16 autocast' if args.bf16 else 'float32'}, {where}"
    for size in args.sizes:
        d_in, d_sae = (int(part) for part in size.split("x"))
        batches = structured_batches(args.tokens, d_in, 4, device)
        saes = training_saes(d_in, d_sae, args.k, args.shares, device)
        if args.only:
            saes = {name: sae for name, sae in saes.items() if name in {"batchtopk", *args.only}}
        steps = {name: trainer_of(sae, batches, args.bf16) for name, sae in saes.items()}
        against = [name for name in ("batchtopk", "matryoshka_batchtopk") if name in saes]
        title = f"Training step, d_in {d_in}, d_sae {d_sae}, {args.tokens} tokens, k {args.k}"
        report(f"{title}, {setting}", timed(steps, args.repeats, device), against)
        if device.type == "cuda":
            report_memory(saes, steps, device)
        del saes, steps
        for l0 in (32, 64) if args.inference else ():
            batch = batches[0][: max(1, args.tokens // 2)]
            functions = inference_functions(d_in, d_sae, batch, l0, args.bf16)
            title = f"Inference, d_in {d_in}, d_sae {d_sae}, {len(batch)} tokens, L0 {l0}"
            report(f"{title}, {setting}", timed(functions, args.repeats, device), ["jumprelu"])


if __name__ == "__main__":
    main()
