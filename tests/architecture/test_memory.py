"""No step, log or revival makes a tensor of size d_sae x d_sae, and memory grows linearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import activations, make, plain, step_input
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from msae_plugin.architecture.mechanisms import orthogonality
from msae_plugin.architecture.mechanisms.orthogonality import nearest_in_chunks_penalty

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
def test_nothing_is_of_size_d_sae_squared_and_the_largest_grows_linearly(name: str) -> None:
    d_sae = 4096
    small, found = largest(d_sae // 2, MECHANISMS[name]), largest(d_sae, MECHANISMS[name])
    assert found.numel >= d_sae * D_IN  # the recorder saw the weights at least
    assert found.numel < d_sae**2 / 4, found.operation
    assert found.numel <= 2.2 * small.numel, found.operation


class DecoderSized(TorchDispatchMode):
    """Storages of at least a number of elements that operations return, and which returned them."""

    def __init__(self, numel: int, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._numel = numel
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._kept: list[torch.Tensor] = []  # so that no address is used twice
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_flatten(result)[0]:
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                new = storage.data_ptr() not in self._known
                if new and storage.nbytes() >= self._numel * item.element_size():
                    self._known.add(storage.data_ptr())
                    self._kept.append(item)
                    self.operations.append(func.overloadpacket.__name__)
        return result


def test_a_penalty_makes_one_gradient_of_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonality, "_BLOCK_SIZE", 2**12)
    monkeypatch.setattr(orthogonality, "_SEARCH_BLOCK_SIZE", 2**14)
    d_sae = 2048
    W_dec = torch.randn(d_sae, D_IN).requires_grad_()
    first = torch.arange(d_sae).repeat_interleave(3)
    second = (first + torch.arange(first.numel()) % 3 + 1) % d_sae
    chunks = orthogonality.random_chunks(d_sae, 64, torch.device("cpu"))
    penalties = {
        # The sum of rows that is the gradient.
        "OrtSAE": (lambda: nearest_in_chunks_penalty(W_dec, chunks), ["_embedding_bag"]),
        # The gradient, and its product with the factor of the loss.
        "pairs": (
            lambda: orthogonality.pair_penalty(W_dec, first, second, torch.ones(len(first))),
            ["zeros_like", "mul"],
        ),
        "chunks": (
            lambda: orthogonality.chunk_penalty(
                W_dec, chunks, lambda chunk: torch.ones(len(chunk), len(chunk))
            ),
            ["zeros_like", "mul"],
        ),
    }
    for name, (penalty, expected) in penalties.items():
        W_dec.grad = torch.zeros_like(W_dec)
        with DecoderSized(W_dec.numel(), [W_dec, W_dec.grad]) as recorder:
            (2.0 * penalty()).backward()
        assert recorder.operations == expected, name
        assert W_dec.grad.abs().sum() > 0
    with DecoderSized(W_dec.numel(), [W_dec]) as recorder:
        orthogonality.nearest_neighbours(W_dec, 3, 512)
    assert recorder.operations == []


def test_the_recorder_would_notice() -> None:
    recorder = LargestTensor()
    directions = torch.randn(512, 4)
    with recorder:
        (directions @ directions.T).sum()
    assert recorder.numel == 512**2
