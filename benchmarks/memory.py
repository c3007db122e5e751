"""Peak memory of the orthogonality penalty and the co-activation statistics, by dictionary width.

    python benchmarks/memory.py                     # d_sae 4k, 16k, 65k, 131k at d_in 512
    python benchmarks/memory.py --search-rows 0     # a whole search for neighbours: minutes at 131k

Each width runs in a fresh process. The peak is that of the whole process while the penalty and the
statistics of one step run, less what it held before (weights, latents), so it counts everything
that they allocate. Growth must be linear: a d_sae x d_sae matrix at 131k would be 69 GB.

The search for neighbours works block by block and needs the same memory for one block as for all.
Hence it runs here for some latents against the whole dictionary, and its time is printed for those
and, multiplied, for all: 18 TFLOP at 131k. The penalty over neighbours is taken at its worst, with
a positive weight for every pair.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import torch

from msae_plugin import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.config import mechanisms_off
from msae_plugin.architecture.mechanisms import Mechanisms
from msae_plugin.architecture.mechanisms.base import Latents, Step
from msae_plugin.architecture.mechanisms.orthogonality import nearest_neighbours, pair_penalty
from msae_plugin.architecture.ranks import ALONE
from msae_plugin.architecture.step_schedule import StepSchedule

VARIANTS = {
    "neighbours, co-activation": {
        "orthogonality_pairs": "neighbours",
        "orthogonality_weighting": "coactivation",
    },
    "chunks of 512, OrtSAE": {
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "none",
    },
    "chunks of 512, weights from the rank-32 sketch": {
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "coactivation",
        "sketch_rank": 32,
    },
}


def peak_mebibytes() -> float:
    """Peak resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_step(variant: str, d_sae: int, d_in: int, n_tokens: int, k: int, search_rows: int) -> None:
    """Run the penalty and the statistics of one step; print the extra peak in MiB.

    With neighbours the line goes on with the seconds of a search and how many latents it covered.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = MultiScaleTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        **{**mechanisms_off(), "orthogonality_coefficient": 1.0, **VARIANTS[variant]},
    )
    W_dec = torch.randn(d_sae, d_in).requires_grad_()
    tokens = torch.arange(n_tokens).repeat_interleave(k)
    latents = torch.randint(d_sae, (n_tokens * k,))
    feature_acts = torch.zeros(n_tokens, d_sae)
    feature_acts[tokens, latents] = 1.0
    fired = torch.bincount(latents, minlength=d_sae)
    sae_in = torch.randn(n_tokens, d_in)
    W_dec.grad = torch.zeros_like(W_dec)  # any training step has it
    before = peak_mebibytes()
    mechanisms = Mechanisms(cfg, torch.device("cpu"))
    sae = SimpleNamespace(
        cfg=cfg, W_dec=W_dec, firing_rate=fired, ranks=ALONE, decode_kernel=lambda: "embedding_bag"
    )
    # Not step 0, at which neighbours are searched for the whole dictionary.
    step = Step(cast(Any, sae), sae_in, StepSchedule.at(cfg, 1, n_tokens), list(mechanisms))
    acts = Latents(feature_acts, tokens, latents, fired, torch.ones(()))
    with torch.no_grad():
        for mechanism in mechanisms:
            mechanism.on_latents(acts, step)
    searched = ""
    if mechanisms.neighbours is None:
        assert mechanisms.orthogonality is not None
        penalty = mechanisms.orthogonality.loss(step)["orthogonality_loss"]
    else:
        n_rows = min(search_rows or d_sae, d_sae)
        start = time.perf_counter()
        nearest_neighbours(
            W_dec, cfg.neighbour_count, cfg.orthogonality_chunk_size, torch.arange(n_rows)
        )
        searched = f" {time.perf_counter() - start:.2f} {n_rows}"
        first = torch.arange(d_sae).repeat_interleave(cfg.neighbour_count)
        second = mechanisms.neighbours.neighbours.flatten()
        penalty = pair_penalty(W_dec, first, second, torch.ones(first.numel()))
    penalty.backward()
    print(f"{peak_mebibytes() - before:.0f}{searched}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--search-rows", type=int, default=1024, help="0: every latent")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="variants by name")
    parser.add_argument("--one", help="internal: run this variant in this process")
    args = parser.parse_args()
    if args.one:
        one_step(args.one, args.d_sae[0], args.d_in, args.tokens, args.k, args.search_rows)
        return
    widths = " | ".join(f"{width:,}" for width in args.d_sae)
    print(f"Extra peak memory in MiB, d_in {args.d_in}, {args.tokens} tokens\n")
    print(f"| penalty and statistics | {widths} |\n|---|" + "---|" * len(args.d_sae))
    searches: list[str] = []
    for variant in args.only:
        cells: list[str] = []
        for width in args.d_sae:
            command = [sys.executable, __file__, "--one", variant, "--d-sae", str(width)]
            command += ["--d-in", str(args.d_in), "--tokens", str(args.tokens), "--k", str(args.k)]
            command += ["--search-rows", str(args.search_rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, *search = done.stdout.split()
            cells.append(peak)
            if search:
                seconds, n_rows = float(search[0]), int(search[1])
                searches.append(
                    f"| {width:,} | {n_rows:,} | {seconds:.1f} | {seconds * width / n_rows:.0f} |"
                )
        print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)
    gram = " | ".join(f"{4 * width**2 / 2**20:,.0f}" for width in args.d_sae)
    print(f"| a d_sae x d_sae matrix, never made | {gram} |")
    if searches:
        print("\n| d_sae | latents searched for | seconds | for all latents, multiplied |")
        print("|---|---|---|---|\n" + "\n".join(searches))


if __name__ == "__main__":
    main()
