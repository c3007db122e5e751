"""Runs the test suite under every setting of a machine that changes rounding or order.

    python tests/matrix.py [--only NAME]... [arguments of pytest]

A setting is a kind of kernels (ATEN_CPU_CAPABILITY for torch's own, and its like for the libraries
that multiply its matrices; "best" is unset: what each chooses by itself), a number of threads
(OMP_NUM_THREADS) and an order of the tests. Exits with 1 when any
setting failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CAPABILITIES = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "best": {},
}
THREADS = (1, 2, 4)
SHUFFLES = (1, 2)
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Setting:
    """One run of the suite: kernels, threads, and the seed of a shuffled order or None."""

    capability: str
    threads: int
    shuffle: int | None = None

    @property
    def name(self) -> str:
        order = "" if self.shuffle is None else f"-shuffle{self.shuffle}"
        return f"{self.capability}-{self.threads}{order}"

    def environment(self) -> dict[str, str]:
        """The variables of this process, with those of the setting."""
        unset = {"MKL_NUM_THREADS", *CAPABILITIES["default"]}
        variables = {name: value for name, value in os.environ.items() if name not in unset}
        return variables | CAPABILITIES[self.capability] | {"OMP_NUM_THREADS": str(self.threads)}


def settings() -> list[Setting]:
    """Every kind of kernel with every number of threads, and shuffled orders of the first."""
    every = [Setting(capability, n) for capability in CAPABILITIES for n in THREADS]
    return [*every, *(Setting("best", 1, seed) for seed in SHUFFLES)]


def run(setting: Setting, arguments: list[str]) -> tuple[int, str]:
    """Pytest's exit status, negative where a signal ended it, and its last line."""
    command = [sys.executable, "-m", "pytest", *arguments]
    if setting.shuffle is not None:
        command.append(f"--shuffle={setting.shuffle}")
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=setting.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    return process.returncode, next((line for line in reversed(lines) if line), "")


def main() -> int:
    every = {setting.name: setting for setting in settings()}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=every, help="a setting; repeatable")
    given, arguments = parser.parse_known_args()
    chosen = [every[name] for name in given.only or every]
    print("settings:", ", ".join(setting.name for setting in chosen), flush=True)
    rows: list[tuple[Setting, int, str, float]] = []
    for setting in chosen:
        print(f"== {setting.name}", flush=True)
        start = time.monotonic()
        rows.append((setting, *run(setting, arguments), time.monotonic() - start))
    print("\nkernels  threads  order      result      seconds  pytest")
    for setting, status, line, seconds in rows:
        order = "as written" if setting.shuffle is None else f"seed {setting.shuffle}"
        result = "passed" if status == 0 else f"FAILED ({status})"
        print(
            f"{setting.capability:<8} {setting.threads:>7}  {order:<10} {result:<11}"
            f" {seconds:>8.0f}  {line}"
        )
    return int(any(status for _, status, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
