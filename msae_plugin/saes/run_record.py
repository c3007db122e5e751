"""`run.json`: what a run was, what it became, and with which software."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

import torch

from msae_plugin.common.claims import is_held
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import versions, write_json_atomic
from msae_plugin.common.stored import StoredRow, StoredRun, checked, parsed, read_json_object

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"

Status = Literal["running", "interrupted", "failed", "complete"]

_PACKAGES = (
    "msae-plugin", "sae-lens", "torch", "transformer-lens", "transformers", "datasets", "numpy",
    "safetensors",
)  # fmt: skip


def software_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None for one not installed."""
    found = {name: None if v == "not installed" else v for name, v in versions(*_PACKAGES).items()}
    return {"python": platform.python_version(), **found}


def describe_device(device: str) -> dict[str, Any]:
    """The machine that the run runs on."""
    described: dict[str, Any] = {"device": device, "machine": platform.machine()}
    if torch.device(device).type == "cuda":
        described["name"] = torch.cuda.get_device_name(torch.device(device))
    described["torch_threads"] = torch.get_num_threads()
    return described


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run folder, None when there is none or it cannot be read.

    A run whose process has died without a word (killed, out of memory) is `interrupted`.
    """
    try:
        record = read_json_object(folder / RUN_FILE, StoredRun)
    except InputError:
        return None
    if record.get("status") == "running" and not is_held(folder):
        record["status"] = "interrupted"
    return record


def sae_roots(run: Path, record: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of a run's SAEs by name, exported or not, as its record lists them."""
    saes = cast("Mapping[str, Mapping[str, Any]]", record.get("saes") or {})
    roots = {name: run / str(sae.get("folder", name)) for name, sae in saes.items()}
    for name, root in roots.items():
        try:
            place = root.resolve(strict=False)
            root.is_dir()
        # Too long, with a zero in it, or a link to itself.
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{str(run / RUN_FILE)!r}: the folder of {name!r} can be none"
            ) from error
        if not place.is_relative_to(run.resolve()):
            raise InputError(
                f"{str(run / RUN_FILE)!r}: the folder of {name!r} leads out of it, to {place}"
            )
    return roots


class RunRecord:
    """Writes `run.json`, whole, at every change."""

    def __init__(
        self,
        folder: Path,
        content: dict[str, Any],
        earlier_seconds: float = 0.0,
        *,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._path = folder / RUN_FILE
        self.content = content
        self._started = datetime.now(timezone.utc)
        self._earlier_seconds = earlier_seconds

    @property
    def wall_seconds(self) -> float:
        """Time spent so far in all sessions of the run, in seconds."""
        now = datetime.now(timezone.utc)
        return self._earlier_seconds + (now - self._started).total_seconds()

    def write(self, status: Status, **updates: Any) -> None:
        """Replace the file."""
        self.content.update(updates)
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(
            self._path,
            {
                "status": status,
                "started": self._started.isoformat(timespec="seconds"),
                "wall_seconds": round(self.wall_seconds, 3),
                **self.content,
            },
        )


def read_rows(path: Path, shape: Any = StoredRow) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; none when there is no file.

    A last line that a kill cut short is left out, as a resumed run does.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        where = f"{str(path)!r}, line {number},"
        try:
            row = parsed(line, where)
        except InputError:
            if number == len(lines):
                break
            raise
        found.append(checked(row, where, shape))
    return found
