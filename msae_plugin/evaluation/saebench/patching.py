"""What of SAEBench is adapted, and only while an evaluation runs.

SAEBench loads models by name, data sets by name and prompt formats by model name. Where an
evaluation must be given another, the name in SAEBench's module is replaced inside a `with` block
and put back at its end, whatever happens. `tests/evaluation/saebench/test_canary_*.py` fail when
upstream renames or changes what is touched here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import torch
import tqdm.std


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    """Replace an attribute of an upstream module or class for the time of the block.

    Raises:
        AttributeError: Upstream has no such name any more.
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Seed random, numpy and torch; afterwards their states and torch's grad mode are as before.

    SAEBench's unlearning leaves `torch.set_grad_enabled(False)` behind, its probing `True`.
    """
    grad = torch.is_grad_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_grad_enabled(grad)


@contextmanager
def without_jaxtyping() -> Generator[None, None, None]:
    """Turn jaxtyping's checks off.

    With beartype 0.23 and jaxtyping 0.3 SAEBench's sparse probing stops at its own annotations:
    one name stands for the sizes of two data sets ("train_dataset_size is 400 which does not equal
    the existing value of 200").
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextmanager
def quiet() -> Generator[io.StringIO, None, None]:
    """Keep SAEBench's prints off standard output, which belongs to the command's own result."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        yield printed


@contextmanager
def without_noise() -> Generator[None, None, None]:
    """Leave out the progress bars of SAEBench and sae-probes, and scikit-learn's deprecations.

    sae-probes alone draws a bar and warns a dozen times per SAE and data set; progress is shown by
    the evaluation's own reporter.
    """
    start = tqdm.std.tqdm.__init__

    @functools.wraps(start)
    def silent(bar: Any, *arguments: Any, **options: Any) -> None:
        start(bar, *arguments, **{**options, "disable": True})

    with replaced(tqdm.std.tqdm, "__init__", silent), warnings.catch_warnings():
        for category in (FutureWarning, UserWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def scratch_working_directory() -> Generator[Path, None, None]:
    """Run in an empty temporary working directory, for upstream code that reads `./...`."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="msae-evaluation-") as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@contextmanager
def evaluation_environment(seed: int) -> Generator[None, None, None]:
    """What every call of SAEBench here runs under: seeded, quiet, without jaxtyping's checks."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(without_jaxtyping())
        stack.enter_context(quiet())
        stack.enter_context(without_noise())
        yield
