"""What the machine can do at most, measured: products, memory traffic, room."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeat each."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """Seconds, lower and upper."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    function: Callable[[], object],
    device: torch.device,
    repeats: int,
    before: Callable[[], object] | None = None,
) -> Timing:
    """Time a function, after one unmeasured call; `before` runs unmeasured ahead of each."""
    seconds: list[float] = []
    for repeat in range(repeats + 1):
        if before is not None:
            before()
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if repeat:
            seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


@dataclass(frozen=True)
class Peak:
    """What was measured on large, friendly problems.

    Attributes:
        flops: Floating-point operations per second of a square matrix product.
        bytes: Bytes per second of a copy that no cache holds, reads and writes together.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, n_bytes: float) -> float:
        """The roofline: no faster than the products or the memory traffic alone."""
        return max(flops / self.flops, n_bytes / self.bytes)


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Best of five products of 2048 (8192 on CUDA) and of five copies of 256 MiB (1 GiB)."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = min(timed(lambda: a @ b, device, 5).seconds)
    source = torch.ones((2**28 if on_gpu else 2**26), device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device, 5).seconds)
    return Peak(2 * n**3 / product, 2 * source.numel() * source.element_size() / copy)


def free_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
