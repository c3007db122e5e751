"""f @ W_dec of an exported SAE: over the active latents where that is faster, dense elsewhere.

Linear and stateless either way, on edited and on negative latents too; the two differ by float32
rounding. `benchmarks/decode_crossover.py`, one core, dense / sparse in ms: (d_in 576, d_sae 4608,
1024 tokens) L0 16: 78 / 13, 64: 75 / 20, 256: 75 / 44, 512: 80 / 73; (2304, 16384, 256 tokens) L0
16: 259 / 12, 64: 250 / 21, 256: 254 / 59, 512: 243 / 99.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.nn.functional import embedding_bag

# The two are level at about 11 % in the smaller of these sizes; here sparse still takes half.
MAX_DENSITY = 1 / 32
# Below this many latents the search for the active ones is not worth its overhead.
_MIN_LATENTS = 2**18


def decode_latents(
    feature_acts: torch.Tensor, W_dec: torch.Tensor, max_density: float = MAX_DENSITY
) -> torch.Tensor:
    """The product feature_acts @ W_dec.

    Sparse only on a CPU, in float32 or float64, where no gradient is asked for (under
    `torch.no_grad`, as in every evaluation), and when at most a share `max_density` of the latents
    is not zero. On a GPU the number of active latents would have to be waited for.

    Args:
        feature_acts: (..., d_sae) latents, of any sign.
        W_dec: (d_sae, d_in) decoder.
        max_density: 0 is always dense, 1 sparse wherever that is possible.

    Returns:
        (..., d_in).
    """
    if not _sparse_is_possible(feature_acts, W_dec):
        return feature_acts @ W_dec
    flat = feature_acts.reshape(-1, feature_acts.shape[-1])
    try:
        n_active = int(torch.count_nonzero(flat))
    except RuntimeError:  # inside torch.func.vmap no value is known
        return feature_acts @ W_dec
    if n_active == 0 or n_active > max_density * flat.numel():
        return feature_acts @ W_dec
    tokens, latents = flat.nonzero(as_tuple=True)  # in the order of the tokens
    starts = torch.searchsorted(tokens, torch.arange(flat.shape[0]))
    decoded = embedding_bag(
        latents, W_dec, starts, mode="sum", per_sample_weights=flat[tokens, latents]
    )
    return decoded.reshape(*feature_acts.shape[:-1], W_dec.shape[1])


def _sparse_is_possible(feature_acts: torch.Tensor, W_dec: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and feature_acts.device.type == "cpu"
        and feature_acts.layout == torch.strided
        and feature_acts.dtype == W_dec.dtype
        and W_dec.dtype in (torch.float32, torch.float64)
        and feature_acts.numel() >= _MIN_LATENTS
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (feature_acts.requires_grad or W_dec.requires_grad))
        and forward_ad.unpack_dual(feature_acts).tangent is None
    )
