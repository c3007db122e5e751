"""Dense against sparse decoding of an export, by L0: where `MAX_DENSITY` comes from.

    python benchmarks/decode_crossover.py

Smallest processor time of some repeats on one thread, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import time

import torch

from msae_plugin.architecture.inference_sae import decode_latents


def milliseconds(
    acts: torch.Tensor, W_dec: torch.Tensor, max_density: float, repeats: int
) -> float:
    """Smallest processor time."""
    found: list[float] = []
    for _ in range(repeats):
        start = time.process_time()
        decode_latents(acts, W_dec, max_density)
        found.append(time.process_time() - start)
    return 1000 * min(found)


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["576x4608x1024", "2304x16384x256"])
    parser.add_argument("--l0", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("Decoding, dense / sparse, ms of processor time\n")
    print("| d_in x d_sae x tokens | " + " | ".join(f"L0 {l0}" for l0 in args.l0) + " |")
    print("|---|" + "---|" * len(args.l0))
    for size in args.sizes:
        d_in, d_sae, n_tokens = (int(part) for part in size.split("x"))
        W_dec = torch.randn(d_sae, d_in)
        uniform = torch.rand(n_tokens, d_sae)
        cells: list[str] = []
        for l0 in args.l0:
            acts = uniform * (uniform > 1 - l0 / d_sae)
            dense, sparse = (milliseconds(acts, W_dec, most, args.repeats) for most in (0, 1))
            cells.append(f"{dense:.0f} / {sparse:.0f}")
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
