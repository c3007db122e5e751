"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

import os

from rich.console import Console
from rich.text import Text

errors = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def other_rank() -> str | None:
    """Number of this process when torchrun started several and it is not the first one."""
    rank = os.environ.get("RANK", "0")
    return None if rank == "0" or "TORCHELASTIC_RUN_ID" not in os.environ else rank


def say(message: str) -> None:
    """Print one line on standard error, whatever characters are in it."""
    rank = other_rank()
    line = " ".join(message.splitlines())
    errors.print(Text(f"rank {rank}: {line}" if rank else line), soft_wrap=True)
