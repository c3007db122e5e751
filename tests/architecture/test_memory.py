"""No step, log or revival makes a tensor of size d_sae x d_sae, and memory grows linearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import activations, make, plain, step_input
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

D_IN, N_TOKENS = 32, 16


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_flatten(result)[0]:
            # A view or an expansion owns no memory beyond its storage.
            if isinstance(item, torch.Tensor):
                size = item.untyped_storage().nbytes() // item.element_size()
                if size > self.numel:
                    self.numel, self.operation = size, str(func)
        return result


MECHANISMS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "neighbours": {"orthogonality_coefficient": 1.0, "neighbour_refresh_every": 1},
    "neighbours unweighted": {
        "orthogonality_coefficient": 1.0,
        "orthogonality_weighting": "none",
    },
    "chunks unweighted": {
        "orthogonality_coefficient": 1.0,
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "none",
    },
    "chunks weighted by the sketch": {
        "orthogonality_coefficient": 1.0,
        "orthogonality_pairs": "chunks",
        "sketch_rank": 32,
    },
    "revival": {"revival_every": 1, "revival_dead_steps": 1, "revival_max_fraction": 1.0},
    "default": {
        "sparsity_scales": [2.0],
        "prefix_fractions": [1 / 32, 1 / 4],
        "prefix_sort_every": 1,
        "importance_power": 0.5,
        "standardise": 0.5,
    },
}


def largest(d_sae: int, fields: dict[str, Any]) -> LargestTensor:
    sae = make(**plain(d_in=D_IN, d_sae=d_sae, k=8, orthogonality_chunk_size=256, **fields))
    sae.train()
    recorder = LargestTensor()
    with recorder:
        for step in (0, 1, 5):  # 0 and 5 are logging steps
            output = sae.training_forward_pass(step_input(activations(N_TOKENS, D_IN, step), step))
            output.loss.backward()
    return recorder


@pytest.mark.parametrize("name", MECHANISMS)
def test_nothing_of_size_d_sae_squared(name: str) -> None:
    d_sae = 4096
    found = largest(d_sae, MECHANISMS[name])
    assert found.numel >= d_sae * D_IN  # the recorder saw the weights at least
    assert found.numel < d_sae**2 / 4, found.operation


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_largest_tensor_grows_linearly(name: str) -> None:
    small, large = largest(2048, MECHANISMS[name]), largest(4096, MECHANISMS[name])
    assert large.numel <= 2.2 * small.numel, large.operation


def test_the_recorder_would_notice() -> None:
    recorder = LargestTensor()
    directions = torch.randn(512, 4)
    with recorder:
        (directions @ directions.T).sum()
    assert recorder.numel == 512**2
