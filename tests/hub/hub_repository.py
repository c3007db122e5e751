"""What the loopback Hub keeps: repositories, commits, files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

# As the Hub's default .gitattributes: weights and images are large files, text is not.
LARGE = re.compile(r"\.(safetensors|png|bin|pt)$")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Blob:
    content: bytes
    large: bool

    @property
    def etag(self) -> str:
        content = self.content
        return hashlib.sha256(content).hexdigest() if self.large else git_sha1(content)


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)

    def add(self, parent: str | None, title: str, files: dict[str, Blob]) -> str:
        listing = "".join(f"{path}{blob.etag}" for path, blob in sorted(files.items()))
        number = f"{len(self.commits)}{parent}{title}{listing}"
        oid = hashlib.sha1(number.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        return oid

    def resolve(self, revision: str) -> str | None:
        pull_request = re.fullmatch(r"refs/pr/(\d+)", revision)
        if pull_request:
            return self.pull_requests.get(int(pull_request[1]))
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)

    def head(self, revision: str = "main") -> Commit:
        oid = self.resolve(revision)
        assert oid is not None, f"no revision {revision}"
        return self.commits[oid]
