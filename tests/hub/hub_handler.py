"""The requests that the loopback Hub answers, as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repository import LARGE, Blob, Commit, Repo, git_sha1

if TYPE_CHECKING:
    from hub_server import HubServer

TOKENS = {
    "hf_ada": ("ada", True),
    "hf_ben_reads": ("ben", False),
}
"""Token -> (user, may write to the user's own repositories)."""


class Answered(Exception):
    """The request was answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Dropped(Exception):
    """The connection is to be closed without an answer."""


Route = tuple[str, str, Callable[..., None]]


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Small answers otherwise wait 40 ms each for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server wants

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self._read_body()
        method, path = self.command, url.path
        with self.hub.lock:
            self.hub.requests.append((method, unquote(path)))
        action = self.hub.fault(method, unquote(path))
        # One handler answers many requests of a connection that is kept alive.
        self.damage = action if action in ("truncate", "corrupt") else None
        self.mute = action == "drop_after"
        try:
            if action == "drop":
                raise Dropped
            if action == "stall":
                self.hub.stall()
            if isinstance(action, int):
                raise Answered(action, "injected by the test")
            self._route(method, path, body)
        except Answered as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.mute = False
            self._json({"error": error.message}, error.status, headers)
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, method: str, path: str, body: bytes) -> None:
        if path.startswith("/large/"):
            return self._large_file(method, path.removeprefix("/large/"), body)
        for verb, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == ("GET" if method == "HEAD" else method):
                with self.hub.lock:
                    function(self, *(unquote(part) for part in match.groups()), body=body)
                return None
        raise Answered(404, f"no route {method} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # answers

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        if self.mute:
            raise Dropped
        sent = content
        if self.command != "HEAD" and self.damage == "corrupt":
            sent = bytes([content[0] ^ 1]) + content[1:]
        if self.command != "HEAD" and self.damage == "truncate":
            sent = content[: len(content) // 2]
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._answer(json.dumps(value).encode(), status, headers)

    # who is asking

    def _user(self) -> tuple[str, bool] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Answered(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repo(self, name: str, write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(name)
        owner = name.split("/", maxsplit=1)[0]
        if repo is None or (repo.private and (user is None or user[0] != owner)):
            # The Hub does not say whether a private repository exists.
            raise Answered(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._require_writer(owner)
        return repo

    def _require_writer(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Answered(401, "Unauthorized")
        if user[0] != owner or not user[1]:
            raise Answered(403, f"You don't have the rights to write under {owner}")

    def _commit(self, name: str, revision: str, write: bool = False) -> tuple[Repo, Commit]:
        repo = self._repo(name, write)
        oid = repo.resolve(revision)
        if oid is None:
            raise Answered(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, repo.commits[oid]

    # the Hub's interface

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            raise Answered(401, "Invalid username or password.")
        role = "write" if user[1] else "read"
        self._json({"name": user[0], "auth": {"accessToken": {"role": role}}, "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        user = self._user()
        owner = asked.get("organization") or (user[0] if user else "")
        self._require_writer(owner)
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.make(name, private=private)
        self._json({"url": url, "name": name})

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors: list[str] = []
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            data, errors = {}, [str(error)]
        for key in ("tags", "datasets"):
            if key in data and not isinstance(data[key], list):
                errors.append(f'"{key}" must be an array')
        licence = data.get("license")
        if licence is not None and not re.fullmatch(r"[a-z0-9.-]+", str(licence)):
            errors.append('"license" must be a licence identifier')
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not result["task"].get("type") or not result["dataset"].get("type"):
                    errors.append("model-index: a result needs a task and a dataset")
                if any("value" not in metric for metric in result["metrics"]):
                    errors.append("model-index: a metric needs a value")
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._json(answer, 400 if errors else 200)

    def info(self, name: str, revision: str = "main", *, body: bytes) -> None:
        repo, commit = self._commit(name, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self._json(
            {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private,
             "author": name.split("/", maxsplit=1)[0], "siblings": siblings, "tags": []}
        )  # fmt: skip

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content)}
        entry["oid"] = git_sha1(blob.content)
        if blob.large:
            entry["lfs"] = {"oid": blob.etag, "size": len(blob.content), "pointerSize": 134}
        return entry

    def tree(self, name: str, revision: str, folder: str = "", *, body: bytes) -> None:
        _, commit = self._commit(name, revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        self._json(
            [self._entry(path, blob) for path, blob in sorted(commit.files.items())
             if path.startswith(prefix)]
        )  # fmt: skip

    def paths_info(self, name: str, revision: str, *, body: bytes) -> None:
        _, commit = self._commit(name, revision)
        content_type = self.headers.get("Content-Type", "")
        asked = json.loads(body) if "json" in content_type else parse_qs(body.decode())
        paths = asked["paths"]
        self._json(
            [self._entry(path, commit.files[path]) for path in paths if path in commit.files]
        )

    def refs(self, name: str, *, body: bytes) -> None:
        repo = self._repo(name)
        answer: dict[str, Any] = {"converts": []}
        answer["branches"] = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in repo.branches.items()
        ]
        answer["tags"] = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid}
            for tag, oid in repo.tags.items()
        ]
        self._json(answer)

    def branch(self, name: str, branch: str, *, body: bytes) -> None:
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise Answered(409, "Reference already exists")
        if branch.startswith("refs/"):
            raise Answered(400, "Invalid reference for a branch")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = repo.head(start).oid
        self._json({})

    def tag(self, name: str, revision: str, *, body: bytes) -> None:
        repo, commit = self._commit(name, revision, write=True)
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise Answered(409, "Tag reference exists already")
        repo.tags[tag] = commit.oid
        self._json({})

    def preupload(self, name: str, revision: str, *, body: bytes) -> None:
        self._commit(name, revision, write="create_pr" not in self.query)
        files = json.loads(body)["files"]
        modes = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if LARGE.search(file["path"]) else "regular"}
            for file in files
        ]  # fmt: skip
        self._json({"files": modes})

    def large_batch(self, name: str, *, body: bytes) -> None:
        self._repo(name)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                # Signed for this object: the storage host wants no token.
                entry["actions"] = {"upload": {"href": f"{self.hub.cdn}/large/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _large_file(self, method: str, oid: str, body: bytes) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked_tokens.append(self.path)
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise Answered(400, "content does not match its hash")
            self.hub.large_files[oid] = body
            self._answer(b"")
            return
        content = self.hub.large_files.get(oid)
        if content is None:
            raise Answered(404, "no such object")
        self._answer(content, headers={"ETag": f'"{oid}"'})

    def commit(self, name: str, revision: str, *, body: bytes) -> None:
        as_request = "create_pr" in self.query
        repo, parent = self._commit(name, revision, write=not as_request)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        expected = header.get("parentCommit")
        if expected is not None and expected != parent.oid and not as_request:
            raise Answered(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            self._apply(line["key"], line["value"], files)
        oid = repo.add(parent.oid, header["summary"], files)
        answer = {"success": True, "commitOid": oid}
        answer["commitUrl"] = f"{self.hub.endpoint}/{name}/commit/{oid}"
        if as_request:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[number] = oid
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        elif revision.startswith("refs/pr/"):
            repo.pull_requests[int(revision.rsplit("/", 1)[1])] = oid
        elif revision in repo.branches:
            repo.branches[revision] = oid
        else:
            raise Answered(400, f"{revision} is no branch")
        self._json(answer)

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            content = self.hub.large_files.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise Answered(400, f"{value['path']} was never uploaded")
            files[value["path"]] = Blob(content, True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Answered(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key != "header":
            raise Answered(400, f"unknown operation {key}")

    def resolve(self, name: str, revision: str, path: str, *, body: bytes) -> None:
        _, commit = self._commit(name, revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            self._json(
                {"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"}
            )
            return
        if not blob.large:
            self._answer(blob.content, headers={**headers, "ETag": f'"{blob.etag}"'})
            return
        self.hub.large_files.setdefault(blob.etag, blob.content)
        headers["X-Linked-ETag"] = f'"{blob.etag}"'
        headers["X-Linked-Size"] = str(len(blob.content))
        headers["Location"] = f"{self.hub.cdn}/large/{blob.etag}"
        self._answer(b"", 302, headers)


NAME = r"([^/]+/[^/]+)"
ROUTES: list[Route] = [
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("GET", rf"/api/models/{NAME}", HubHandler.info),
    ("GET", rf"/api/models/{NAME}/revision/([^/]+)", HubHandler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", HubHandler.tree),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)/(.*)", HubHandler.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/([^/]+)", HubHandler.paths_info),
    ("GET", rf"/api/models/{NAME}/refs", HubHandler.refs),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", HubHandler.branch),
    ("POST", rf"/api/models/{NAME}/tag/([^/]+)", HubHandler.tag),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", HubHandler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", HubHandler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubHandler.large_batch),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", HubHandler.resolve),
]
