"""Where the time of a training step, an inference pass and a core evaluation goes.

    python benchmarks/profile_parts.py              # two sizes, minutes on 2 cores
    python benchmarks/profile_parts.py --sizes 2304x16384 --tokens 2048 4096 --bf16
    python benchmarks/profile_parts.py --device cuda --all --kernels embedding_bag triton
    python benchmarks/profile_parts.py --sizes --core-saes SAE_FOLDER

Each part is timed alone, after an unmeasured call, and stands beside its roofline: the time that
the measured peak of the machine in matrix products or in memory traffic, whichever is longer,
needs for its operations and bytes. A part can be below its roofline when a cache holds rows that
are counted as often as they are used. Sizes that do not fit into free memory are named as skipped.
(Not called profile.py: Python's own module of that name is imported by torch.)
"""

from __future__ import annotations

import argparse
import itertools

import torch
from profiling.evaluation import profile_core
from profiling.inference import profile_inference
from profiling.machine import Peak, free_bytes, measured_peak
from profiling.training import Setting, profile_step

ALL_SIZES = ["576x4608", "768x16384", "2304x16384", "2304x65536"]


def print_peaks(peaks: dict[bool, Peak], device: torch.device) -> None:
    """What the machine can do."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"Measured peak of {name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| numbers | matrix product, GFLOP/s | memory traffic, GB/s |\n|---|---|---|")
    for autocast, peak in peaks.items():
        numbers = "bf16" if autocast else "float32"
        print(f"| {numbers} | {peak.flops / 1e9:,.1f} | {peak.bytes / 1e9:,.1f} |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="*", default=ALL_SIZES[:2], help="d_in x d_sae")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--all", action="store_true", help="all sizes, 2048 and 4096, both dtypes")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast beside float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's own choice without it")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--kernels", nargs="+", default=["embedding_bag"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core-saes", nargs="+", help="exports to evaluate with SAEBench's core")
    parser.add_argument("--core-prompts", type=int, default=8)
    parser.add_argument("--core-batches", type=int, default=2)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.all:
        args.sizes, args.tokens, args.bf16 = ALL_SIZES, [2048, 4096], True
    device = torch.device(args.device)
    modes = [False, True] if args.bf16 else [False]
    if args.sizes:
        dtypes = {False: torch.float32, True: torch.bfloat16}
        peaks = {mode: measured_peak(device, dtypes[mode]) for mode in modes}
        print_peaks(peaks, device)
    for size, tokens, mode in itertools.product(args.sizes, args.tokens, modes):
        d_in, d_sae = (int(part) for part in size.split("x"))
        for kernel in args.kernels:
            setting = Setting(
                d_in, d_sae, tokens, args.k, device, mode, args.repeats, args.preset, kernel
            )
            if setting.needed_bytes() > 0.9 * free_bytes(device):
                print(
                    f"\nSkipped: {setting.title} needs {setting.needed_bytes() / 2**30:.1f} GiB, "
                    f"{free_bytes(device) / 2**30:.1f} are free"
                )
                continue
            if len(args.kernels) > 1:
                print(f"\nDecoding by {kernel}:")
            profile_step(setting, peaks[mode])
        if setting.needed_bytes() <= 0.9 * free_bytes(device):
            profile_inference(setting, peaks[mode])
    if args.core_saes:
        profile_core(args.core_saes, args.core_prompts, args.core_batches)


if __name__ == "__main__":
    main()
