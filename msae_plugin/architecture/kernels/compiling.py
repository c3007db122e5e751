"""Which versions of torch compile a training step to what it is.

Inductor of torch 2.11 and 2.12 lets the running means of a step be overwritten (an in-place `lerp_`
whose result is read by a later kernel, pytorch issue 183575): firing rates and gradients of the
decoder came out wrong without a word (`tests/architecture/test_compile.py` on these versions).
2.14 compiles the step right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch.torch_version import TorchVersion

COMPILES_RIGHT_FROM = TorchVersion("2.14.0")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled_from(
    version: TorchVersion, installed: TorchVersion = torch.__version__
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Keep torch.compile from a function where torch is older; it runs as it is instead.

    Args:
        version: First version of torch that may compile it.
        installed: The version that is there.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        kept_out = cast("Callable[_P, _R]", torch.compiler.disable(function))

        # torch.compile takes the function out of `disable`, where it is given that itself.
        @wraps(function)
        def run_as_it_is(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return kept_out(*args, **kwargs)

        return run_as_it_is

    return decorate if installed < version else lambda function: function
