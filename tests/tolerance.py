"""How far two computations of one sum may differ by rounding alone."""

from __future__ import annotations

import math

import torch

# The probabilistic bound holds for one sum but for a chance of 2 exp(-CONFIDENCE^2 / 2), 3e-8.
CONFIDENCE = 6.0


def rounding_tolerance(
    terms_summed: int, magnitude: float | torch.Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """The largest difference between two computations of one sum, whatever the kernel.

    A sum of n terms (or n products, fused or not), added in any order, in blocks or by several
    threads, is off by at most n u sum(|terms|) to first order, where u = eps / 2 is half the
    distance from 1 to the next number (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
    edition, sections 3.1 and 4.2). Rounding errors of both signs cancel: as good as always n may be
    replaced by c sqrt(n), which is less from n = c^2 on (Higham and Mary, A New Approach to
    Probabilistic Rounding Error Analysis, 2019, theorem 2.4). Two computations are apart by at most
    twice that. The lengths of sums of sums add up: a gradient that sums over 32 tokens what was
    decoded from 40 latents and encoded from 12 inputs has n = 32 + 40 + 12.

    Args:
        terms_summed: n, with the terms of each nested sum and each further rounded operation
            (a division, a root) counted once.
        magnitude: A bound of sum(|terms|), which is the sum itself computed from absolute values.
            Of a tensor the largest value is taken.
        dtype: The format in which the sums are made.

    Returns:
        The absolute tolerance; to be used with a relative tolerance of 0.
    """
    if isinstance(magnitude, torch.Tensor):
        magnitude = float(magnitude.abs().max()) if magnitude.numel() else 0.0
    n_roundings = min(terms_summed, CONFIDENCE * math.sqrt(terms_summed))
    unit_roundoff = torch.finfo(dtype).eps / 2
    return 2 * n_roundings * unit_roundoff * magnitude
