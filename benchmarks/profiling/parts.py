"""A part of something that takes time, and the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from profiling.machine import Peak, Timing


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: What it is.
        timing: Measured.
        flops: Floating-point operations that it must do.
        n_bytes: Bytes that it must read and write, each operand once; of gathered rows, each row
            as often as it is used, as if no cache held it.
    """

    name: str
    timing: Timing
    flops: float = 0.0
    n_bytes: float = 0.0


def print_parts(
    title: str, parts: list[Part], whole: Timing, peak: Peak, beside: list[Part] | None = None
) -> None:
    """A Markdown table: each part beside its roofline, what they leave unexplained, the whole.

    Args:
        title: Above the table.
        parts: Of the whole.
        whole: Measured by itself.
        peak: Of the machine.
        beside: What is not in the whole, below it.
    """
    print(f"\n### {title}\n")
    print("| part | ms, median [quartiles] | share | GFLOP | MB | roofline ms | times roofline |")
    print("|---|---|---|---|---|---|---|")
    for part in parts:
        print(_row(part, whole, peak))
    rest = whole.median - sum(part.timing.median for part in parts)
    low, high = (1000 * value for value in whole.quartiles())
    print(f"| the whole less these parts | {1000 * rest:.2f} | {rest / whole.median:.0%} | | | | |")
    roof = sum(peak.seconds(part.flops, part.n_bytes) for part in parts)
    print(
        f"| **the whole** | {1000 * whole.median:.2f} [{low:.2f}, {high:.2f}] | 100% "
        f"| {sum(part.flops for part in parts) / 1e9:.2f} "
        f"| {sum(part.n_bytes for part in parts) / 1e6:.1f} | {1000 * roof:.2f} "
        f"| {whole.median / roof:.1f} |",
        flush=True,
    )
    for part in beside or []:
        print(_row(part, whole, peak), flush=True)


def _row(part: Part, whole: Timing, peak: Peak) -> str:
    low, high = (1000 * value for value in part.timing.quartiles())
    roof = peak.seconds(part.flops, part.n_bytes)
    against = f"{1000 * roof:.2f} | {part.timing.median / roof:.1f}" if roof else "- | -"
    return (
        f"| {part.name} | {1000 * part.timing.median:.2f} [{low:.2f}, {high:.2f}] "
        f"| {part.timing.median / whole.median:.0%} | {part.flops / 1e9:.2f} "
        f"| {part.n_bytes / 1e6:.1f} | {against} |"
    )
