"""The export's decoder: sparse and dense are the same linear map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from tolerance import rounding_tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from msae_plugin import MultiScaleSAE, MultiScaleSAEConfig
from msae_plugin.architecture.inference_sae import MAX_DENSITY, decode_latents

D_IN, D_SAE, N_TOKENS = 24, 2048, 200


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def latents(density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N_TOKENS, D_SAE, generator=generator, dtype=torch.float64)
    values *= torch.rand(N_TOKENS, D_SAE, generator=generator) < density
    values[3] = 0  # a token without latents
    return values.to(dtype)


def decoder(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(D_SAE, D_IN, generator=generator, dtype=torch.float64).to(dtype)


def ran(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The result, and whether it came from the sparse path."""
    with Operations() as operations:
        result = function()
    sparse = bool(operations.names & {"_embedding_bag", "_embedding_bag_forward_only"})
    assert sparse or "mm" in operations.names
    return result, sparse


def rounding(acts: torch.Tensor, W_dec: torch.Tensor) -> float:
    """How far two products of these may differ: zeros among the terms add no rounding."""
    n_terms = int((acts != 0).sum(-1).max())
    return rounding_tolerance(n_terms, acts.abs() @ W_dec.abs(), acts.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.2])
def test_equals_the_product_in_float64(dtype: torch.dtype, density: float) -> None:
    acts, W_dec = latents(density, dtype), decoder(dtype)
    assert (acts < 0).any()  # edited latents are of any sign
    result, sparse = ran(lambda: decode_latents(acts, W_dec))
    assert sparse == (density < MAX_DENSITY)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), acts.double() @ W_dec.double(), atol=rounding(acts, W_dec), rtol=0
    )


def test_leading_dimensions_and_memory_layout_do_not_matter() -> None:
    acts, W_dec = latents(0.01), decoder()
    expected, _ = ran(lambda: decode_latents(acts, W_dec))
    three, sparse = ran(lambda: decode_latents(acts.view(10, 20, D_SAE), W_dec))
    assert sparse
    torch.testing.assert_close(three.view(N_TOKENS, D_IN), expected, atol=0, rtol=0)
    transposed, sparse = ran(lambda: decode_latents(acts.T.contiguous().T, W_dec))
    assert sparse
    torch.testing.assert_close(transposed, expected, atol=0, rtol=0)


def test_not_a_number_is_not_hidden() -> None:
    acts = latents(0.01)
    acts[5, 7] = torch.nan
    result, sparse = ran(lambda: decode_latents(acts, decoder()))
    assert sparse
    assert result[5].isnan().all()
    assert result[6].isfinite().all()


def test_dense_where_sparse_would_be_wrong_or_slow() -> None:
    acts, W_dec = latents(0.01), decoder()
    assert not ran(lambda: decode_latents(torch.zeros_like(acts), W_dec))[1]
    assert not ran(lambda: decode_latents(acts[:10], W_dec))[1]
    assert not ran(lambda: decode_latents(acts.bfloat16(), W_dec.bfloat16()))[1]
    with torch.autocast("cpu", torch.bfloat16):
        result, sparse = ran(lambda: decode_latents(acts, W_dec))
    assert (result.dtype, sparse) == (torch.bfloat16, False)


def test_gradients_reach_every_latent_and_the_decoder() -> None:
    acts, W_dec = latents(0.01).requires_grad_(), decoder().requires_grad_()
    upstream = torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(4))
    decode_latents(acts, W_dec).backward(upstream)
    assert acts.grad is not None
    assert W_dec.grad is not None
    for found, left, right in (
        (acts.grad, upstream, W_dec.detach().T),
        (W_dec.grad, acts.detach().T, upstream),
    ):
        torch.testing.assert_close(found, left @ right, atol=rounding(left, right), rtol=0)


def test_under_vmap() -> None:
    acts, W_dec = latents(0.01).view(1, N_TOKENS, D_SAE).repeat(2, 1, 1), decoder()
    with torch.no_grad():
        mapped = torch.func.vmap(lambda part: decode_latents(part, W_dec))(acts)
    torch.testing.assert_close(mapped, acts @ W_dec, atol=rounding(acts[0], W_dec), rtol=0)


def test_the_export_decodes_as_jumprelu_does() -> None:
    torch.manual_seed(0)
    plain = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    ours = MultiScaleSAE(MultiScaleSAEConfig(d_in=D_IN, d_sae=D_SAE))
    ours.load_state_dict(plain.state_dict(), strict=False)
    acts = latents(0.01)
    seen: list[torch.Tensor] = []
    ours.hook_sae_recons.add_hook(lambda value, hook: seen.append(value))
    with torch.no_grad():
        mine, sparse = ran(lambda: ours.decode(acts))
        theirs, _ = ran(lambda: plain.decode(acts))
    assert sparse
    atol = rounding(acts, ours.W_dec.detach())
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)
    torch.testing.assert_close(seen[0], mine, atol=0, rtol=0)
