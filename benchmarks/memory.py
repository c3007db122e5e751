"""Peak memory of the orthogonality penalty and the co-activation statistics, by dictionary width.

    python benchmarks/memory.py            # d_sae 4k, 16k, 65k, 131k at d_in 512

Each width runs in a fresh process. The peak is that of the whole process while the penalty and the
statistics of one step run, less what it held before (weights, latents), so it counts everything
that they allocate. Growth must be linear: a d_sae x d_sae matrix at 131k would be 69 GB. The search
for neighbours takes minutes at 131k on a CPU core (18 TFLOP).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch

from msae_plugin import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.config import mechanisms_off
from msae_plugin.architecture.mechanisms import Mechanisms

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


def one_step(variant: str, d_sae: int, d_in: int, n_tokens: int, k: int) -> None:
    """Run the penalty and the statistics of one step; print the extra peak in MiB."""
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
    mechanisms = Mechanisms(cfg, torch.float32, torch.device("cpu"))
    mechanisms.observe_latents(W_dec, feature_acts, tokens, latents, fired, 0, k)
    penalty = mechanisms.orthogonality(W_dec, sae_in, 0)
    assert penalty is not None
    penalty.backward()
    print(f"{peak_mebibytes() - before:.0f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="variants by name")
    parser.add_argument("--one", help="internal: run this variant in this process")
    args = parser.parse_args()
    if args.one:
        one_step(args.one, args.d_sae[0], args.d_in, args.tokens, args.k)
        return
    widths = " | ".join(f"{width:,}" for width in args.d_sae)
    print(f"Extra peak memory in MiB, d_in {args.d_in}, {args.tokens} tokens\n")
    print(f"| penalty and statistics | {widths} |\n|---|" + "---|" * len(args.d_sae))
    for variant in args.only:
        cells: list[str] = []
        for width in args.d_sae:
            command = [sys.executable, __file__, "--one", variant, "--d-sae", str(width)]
            command += ["--d-in", str(args.d_in), "--tokens", str(args.tokens), "--k", str(args.k)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cells.append(done.stdout.strip().splitlines()[-1])
        print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)
    gram = " | ".join(f"{4 * width**2 / 2**20:,.0f}" for width in args.d_sae)
    print(f"| a d_sae x d_sae matrix, never made | {gram} |")


if __name__ == "__main__":
    main()
