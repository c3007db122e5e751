"""Another process, whose huggingface_hub is pointed at the loopback Hub (see hub_worker.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_server import HubServer

ADA = "hf_ada"
REPO = "ada/tiny-saes"


def hub_environment(hub: HubServer, home: Path) -> dict[str, str]:
    """What a user's process would have, with HF_ENDPOINT pointing here and a home of its own."""
    unset = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    return environment | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        # The storage protocol of hf_xet is the Hub's alone; without it the client uses Git LFS'.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        # Longer than the client's own ten seconds: a loaded machine is no failing Hub.
        "HF_HUB_ETAG_TIMEOUT": "60",
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "TOKENIZERS_PARALLELISM": "false",
    }


@dataclass
class Outcome:
    """What a job in the other process gave."""

    value: Any = None
    error: str | None = None
    message: str = ""
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


class Job:
    """A running job."""

    def __init__(self, worker: Worker, result: Path, pid: int) -> None:
        self._worker, self._result, self.pid = worker, result, pid

    def wait(self) -> Outcome | None:
        """The outcome; None if the process was killed."""
        assert self._worker.read() == "ended"
        if not self._result.exists():
            return None
        return Outcome(**json.loads(self._result.read_text()))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() is None, "it was done before it was killed"


class Worker:
    """The process of hub_worker.py."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hub_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=hub_environment(hub, folder / "home"),
        )

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(
        self,
        call: str,
        *,
        token: str | None = ADA,
        answer: bool | None = None,
        file_size_limit: int | None = None,
        **arguments: Any,
    ) -> Job:
        if self._count == 0:
            assert self.read() == "ready"
        self._count += 1
        result = self._folder / f"{self._count}.json"
        job = {
            "call": call,
            "arguments": arguments,
            "token": token,
            "answer": answer,
            "file_size_limit": file_size_limit,
            "result": str(result),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        return Job(self, result, int(self.read()))

    def run(self, call: str, **options: Any) -> Outcome:
        outcome = self.start(call, **options).wait()
        assert outcome is not None, "the process died; its traceback is above"
        return outcome

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # it holds nothing, and torch takes seconds to leave by itself
        self._process.wait(20)


def done(outcome: Outcome) -> Any:
    """What a job gave that must have worked."""
    assert outcome.error is None, outcome.message
    return outcome.value


def refused(outcome: Outcome | None, error: str, *words: str) -> None:
    """Require an error of one line with these words in it."""
    assert outcome is not None
    assert outcome.error == error, outcome
    assert "\n" not in outcome.message
    for word in words:
        assert word in outcome.message, outcome.message
