"""A small Hugging Face Hub on the loopback interface, for huggingface_hub's own client.

It speaks what the client uses to create a repository, commit, upload and download large files, and
read branches, tags and pull requests; as on the Hub, large files are served by another host
(`localhost` beside `127.0.0.1`) that must not see the token. Tests look into `repos` and break
things with `fail`.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import Literal

from hub_handler import HubHandler
from hub_repository import LARGE, Blob, Repo

Action = Literal["drop", "drop_after", "stall", "truncate", "corrupt"]


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    action: Action | int
    times: int


class HubServer:
    """The Hub. Use as a context manager; `endpoint` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.leaked_tokens: list[str] = []
        self.stalled = threading.Event()
        self._released = threading.Event()
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    def reset(self) -> None:
        """Forget repositories, requests and faults."""
        self._released.set()
        with self.lock:
            self.repos.clear()
            self.large_files.clear()
            self.requests.clear()
            self.leaked_tokens.clear()
            self._faults.clear()
        self.stalled = threading.Event()
        self._released = threading.Event()

    def fail(self, method: str, path: str, action: Action | int, times: int = 1) -> None:
        """Break the next requests whose path matches.

        drop: no answer, nothing done. drop_after: done, then no answer. stall: nothing done until
        `release`; `stalled` is set. truncate: half the body. corrupt: one byte changed. A number
        is the status of the answer.
        """
        self._faults.append(Fault(method, re.compile(path), action, times))

    def fault(self, method: str, path: str) -> Action | int | None:
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault.action
        return None

    def release(self) -> None:
        """Let stalled requests go on."""
        self._released.set()

    def stall(self) -> None:
        self.stalled.set()
        self._released.wait(300)

    def make(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository with a first commit."""
        blobs = {
            path: Blob(content, bool(LARGE.search(path)))
            for path, content in {".gitattributes": b"", **(files or {})}.items()
        }
        repo = self.repos[name] = Repo(private)
        repo.branches["main"] = repo.add(None, "initial commit", blobs)
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Everything in a repository."""
        head = self.repos[name].head(revision)
        return {path: blob.content for path, blob in head.files.items()}

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
