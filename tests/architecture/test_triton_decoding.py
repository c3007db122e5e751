"""The Triton kernels, run by Triton's interpreter on a CPU, against dense products in float64.

The interpreter must be chosen before Triton is imported: hence a process of its own, which runs
`triton_checks.py`. It shows that the kernels are right, not that they are fast. That they compile
for a GPU is checked without one, as far as machine code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import make, plain

from msae_plugin.architecture.kernels.decoding import MachineSettings, bag_sum
from msae_plugin.common.errors import InputError

CHECKS = Path(__file__).with_name("triton_checks.py")


def run(name: str, **environment: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"),
            f"{CHECKS}::{name}",
        ],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
        text=True,
    )
    # pytest's status is 5 when nothing was collected; a skip prints an "s".
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "s" not in done.stdout.split("[")[0], done.stdout


def test_equal_to_dense_products_in_the_interpreter() -> None:
    run("TestInterpreted", TRITON_INTERPRET="1")


def test_compiles_for_a_gpu() -> None:
    run("TestCompiled")


def test_refused_where_it_cannot_run() -> None:
    index = torch.zeros(1, dtype=torch.long)
    with pytest.raises(InputError, match="'triton' needs float32"):
        bag_sum(torch.ones(2, 3), index, torch.ones(1), index, 1, "triton")
    with pytest.raises(InputError, match="decode_kernel must be 'auto' on device 'cpu'"):
        make(**plain()).attach_machine(MachineSettings("triton"))
