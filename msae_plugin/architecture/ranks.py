"""Statistics over a batch that several processes share.

Data-parallel training gives each process ("rank") a share of every batch. What the SAE computes
over the tokens of a batch - a threshold, a mean, a variance, a count - goes through a `Ranks`, so
that all ranks know the same value: that of the whole batch. `ALONE`, for one process, hands
everything back as it is. All ranks hold equally many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from torch import distributed
from typing_extensions import override

from msae_plugin.common.errors import RunFailure, first_line

_T = TypeVar("_T")


class Ranks:
    """One process alone: number `rank`, from 0, of `count`."""

    rank: int = 0  # Number of this process, from 0
    count: int = 1  # Number of processes

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of a tensor of any shape."""
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks: of a mean over a rank's tokens, that of the whole batch."""
        return tensor

    def smallest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise minimum over the ranks."""
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over the ranks."""
        return tensor

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of rank 0, which has the same shape on all ranks."""
        return tensor

    def concatenated(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows (n, ...) of all ranks in their order, and where this rank's begin.

        n may differ between ranks, the rest may not.
        """
        return rows, 0

    def var_mean(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(width,) variance without Bessel's correction, and mean, over the whole batch."""
        return torch.var_mean(values, dim=0, correction=0)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over the ranks."""


ALONE = Ranks()
"""One process: nothing to combine, nothing computed."""


class ProcessRanks(Ranks):
    """The processes of torch.distributed's default group.

    Every method raises RunFailure once another rank is gone.
    """

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.count = distributed.get_world_size()

    @override
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    @override
    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.sum(tensor) / self.count

    @override
    def smallest(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._reduced(tensor, distributed.ReduceOp.MIN)

    @override
    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._reduced(tensor, distributed.ReduceOp.MAX)

    @override
    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        sent = tensor.detach().clone().contiguous()
        self._call(lambda: distributed.broadcast(sent, src=0))
        return sent

    @override
    def concatenated(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        own = torch.zeros(self.count, dtype=torch.int64)
        own[self.rank] = rows.shape[0]
        lengths = [int(n) for n in self.sum(own).tolist()]
        padded = rows.detach()
        if rows.shape[0] < max(lengths):
            missing = max(lengths) - rows.shape[0]
            padded = torch.cat([padded, padded.new_zeros(missing, *rows.shape[1:])])
        padded = padded.contiguous()
        received = [torch.empty_like(padded) for _ in lengths]
        self._call(lambda: distributed.all_gather(received, padded))
        parts = [part[:n] for part, n in zip(received, lengths, strict=True)]
        return torch.cat(parts), sum(lengths[: self.rank])

    @override
    def var_mean(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.stack(torch.var_mean(values, dim=0, correction=0))
        variances, means = self.concatenated(own[None])[0].unbind(dim=1)
        # Variance of the union: the mean variance within the ranks plus that between them.
        between, mean = torch.var_mean(means, dim=0, correction=0)
        return variances.mean(dim=0) + between, mean

    @override
    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        # All are under way before the first is waited for. Reduced in place: no second copy.
        under_way: list[tuple[distributed.Work, torch.Tensor]] = []
        for parameter in parameters:
            if parameter.grad is None:
                continue
            gradient = parameter.grad = parameter.grad.contiguous()
            work = self._call(partial(distributed.all_reduce, gradient, async_op=True))
            under_way.append((work, gradient))
        for work, gradient in under_way:
            self._call(work.wait)
            gradient.div_(self.count)

    def _reduced(self, tensor: torch.Tensor, how: distributed.ReduceOp.RedOpType) -> torch.Tensor:
        result = tensor.detach().clone().contiguous()
        self._call(lambda: distributed.all_reduce(result, op=how))
        return result

    def _call(self, collective: Callable[[], _T]) -> _T:
        try:
            return collective()
        # gloo and NCCL raise subclasses of it when a connection breaks or times out.
        except RuntimeError as error:
            raise RunFailure(
                f"rank {self.rank} of {self.count} has lost another rank, whose own message says "
                f"why ({first_line(error)[:200]})"
            ) from error
