"""What a run or a comparison leaves behind, without what depends on the clock."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

# A run that was stopped has other checkpoints, and its claim may be younger than its end.
_NOT_RESULTS = ("checkpoints", "tensorboard", ".claim")
# A file's digest of itself covers its seconds too; the rows' own hashes beside it are compared.
_CLOCK = re.compile(r"created|step_ms|seconds|per_second|started|resumed_at_steps|time|^digest$")


def outcome(folder: Path) -> dict[str, Any]:
    """The files below a folder by name: JSON by its contents, everything else by its hash."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(_NOT_RESULTS):
            continue
        if path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not _CLOCK.search(k)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
