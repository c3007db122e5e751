"""Changes to SAEBench while an evaluation runs, and a check of the latents it probes.

SAEBench loads models by name, data sets by name and prompt formats by model name. Where an
evaluation must be given another, the name in SAEBench's module is replaced inside a `with` block
and put back at its end, whatever happens. `tests/evaluation/saebench/test_canary_*.py` fail when
upstream renames or changes what is touched here.

SAEBench's probes turn latents that are NaN, or all zero, into an accuracy like any other (.5 on
balanced classes, and the probe on all latents even hides a NaN).
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from sae_lens import SAE

from msae_plugin.common.errors import RunFailure
from msae_plugin.common.progress import bars_of_libraries_told, warnings_alone
from msae_plugin.common.seeding import RandomStream
from msae_plugin.saes.export import dense


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    """Replace an attribute of an upstream module or class for the time of the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


Change = tuple[Any, str, Any]
"""An attribute to replace: owner, name and value."""


@contextmanager
def all_replaced(*changes: Change) -> Generator[None, None, None]:
    """Replace several attributes."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(replaced(*change))
        yield


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Seed random, numpy and torch; afterwards their states and torch's grad mode are as before.

    SAEBench's unlearning leaves `torch.set_grad_enabled(False)` behind, its probing `True`.
    """
    grad = torch.is_grad_enabled()
    with torch.random.fork_rng(), RandomStream(seed).active():
        torch.manual_seed(seed)  # of every device
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)


@contextmanager
def without_jaxtyping() -> Generator[None, None, None]:
    """Turn jaxtyping's checks off.

    With beartype 0.23 and jaxtyping 0.3 SAEBench's sparse probing stops at its own annotations:
    one name stands for the sizes of two data sets ("train_dataset_size is 400 which does not equal
    the existing value of 200").
    """
    with replaced(jaxtyping.config, "jaxtyping_disable", True):
        yield


def quiet() -> redirect_stdout[io.StringIO]:
    """Keep SAEBench's prints off standard output, which belongs to the command's own result."""
    return redirect_stdout(io.StringIO())


@contextmanager
def without_noise() -> Generator[None, None, None]:
    """Leave out the progress bars of SAEBench and sae-probes, and scikit-learn's deprecations.

    sae-probes alone draws a bar and warns a dozen times per SAE and data set; progress is shown by
    the evaluation's own reporter.
    """
    with bars_of_libraries_told(warnings_alone), warnings.catch_warnings():
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
    """Run SAEBench seeded, quietly and without jaxtyping's checks."""
    with seeded(seed), without_jaxtyping(), quiet(), without_noise():
        yield


class CheckedLatents:
    """Replaces the `encode` of one SAE object by itself with a look at the result."""

    def __init__(self, sae: SAE[Any], name: str) -> None:
        self._encode = sae.encode
        self._name = name
        self._active = False
        # On the object, not its class: nothing else sees it.
        vars(sae)["encode"] = self.encode

    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        """(..., d_in) to (..., d_sae), dense."""
        latents = dense(self._encode(activations))
        if latents.numel() == 0:
            return latents
        # One pass without a copy; NaN is passed on.
        low, high = torch.aminmax(latents)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise RunFailure(
                f"SAE {self._name!r}: encode gives NaN or infinite latents in {latents.dtype}"
            )
        if not self._active and bool((low != 0) | (high != 0)):
            # Zero activations are padding: what fires there is the bias alone.
            real = (activations != 0).any(-1)
            self._active = bool((latents[real] != 0).any())
        return latents

    def require_active(self) -> None:
        """Refuse an SAE that said nothing."""
        if not self._active:
            raise RunFailure(
                f"SAE {self._name!r}: no latent is active on any token (L0 is 0): is it trained, "
                "and is the hook the one it was trained on?"
            )
