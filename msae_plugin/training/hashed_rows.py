"""Rows of numbers in a file, hashed in blocks as they are written and checked as they are read.

A block is checked when one of its rows is first asked for: the disk reads it then in any case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from msae_plugin.common.errors import InputError

ROWS_PER_HASH = 4096


def mapped(
    path: Path, rows: int, width: int, dtype: torch.dtype, *, writable: bool
) -> torch.Tensor:
    """(rows, width) tensor over a file, which is made when missing and writable."""
    flat = torch.from_file(str(path), shared=writable, size=rows * width, dtype=dtype)
    return flat.view(rows, width)


def row_hashes(rows: torch.Tensor, known: Sequence[str] = ()) -> list[str]:
    """The hash of each block of rows, the last of which may be shorter.

    Args:
        rows: (n, width) rows from the first one on.
        known: Hashes of the first blocks, which are not read again.
    """
    further = rows[len(known) * ROWS_PER_HASH :]
    blocks = further.split(ROWS_PER_HASH) if len(further) else ()
    return [*known, *(_sha256(block) for block in blocks)]


def _sha256(block: torch.Tensor) -> str:
    # numpy has no bfloat16: hash the bytes.
    return hashlib.sha256(block.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class HashedRows:
    """Rows mapped from a file.

    Args:
        path: The file.
        rows: Number of rows.
        width: Numbers in each.
        dtype: Their precision.
        hashes: What `row_hashes` gave when they were written; None for a file of version 0.1,
            which cannot be checked.
        damaged: What to say about a damaged file.

    Raises:
        InputError: The file is missing or has another size, or there is not a hash for each block.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        width: int,
        dtype: torch.dtype,
        hashes: Sequence[str] | None,
        damaged: str,
    ) -> None:
        size = path.stat().st_size if path.is_file() else 0
        blocks = -(-rows // ROWS_PER_HASH)
        if size != rows * width * dtype.itemsize or len(hashes or range(blocks)) != blocks:
            raise InputError(damaged)
        self._rows = mapped(path, rows, width, dtype, writable=False)
        self._unread = {} if hashes is None else dict(enumerate(hashes))
        self._damaged = damaged

    @property
    def shape(self) -> torch.Size:
        """(rows, width)."""
        return self._rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """Their precision."""
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        """Their size."""
        return self._rows.nbytes

    def __getitem__(self, chosen: slice | torch.Tensor) -> torch.Tensor:
        """Rows by a slice or by their numbers, (n, width).

        Raises:
            InputError: They are not what was written.
        """
        if self._unread:
            self._check(chosen)
        return self._rows[chosen]

    def _check(self, chosen: slice | torch.Tensor) -> None:
        if isinstance(chosen, slice):
            start, stop, _ = chosen.indices(len(self._rows))
            wanted = list(range(start // ROWS_PER_HASH, -(-stop // ROWS_PER_HASH)))
        else:
            wanted = (chosen // ROWS_PER_HASH).unique().tolist()
        for block in filter(self._unread.__contains__, wanted):
            start = block * ROWS_PER_HASH
            if _sha256(self._rows[start : start + ROWS_PER_HASH]) != self._unread[block]:
                raise InputError(self._damaged)
            del self._unread[block]
