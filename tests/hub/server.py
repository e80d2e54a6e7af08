"""A Hub on this machine: what the real client says to it is what it says to the real one.

Repositories live in memory: commits with a tree each, large files by their SHA-256. The xet
protocol is not offered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

#: The token that may write, of the user "org".
TOKEN = "hf_standinTokenThatMustNeverShow"
#: What goes to large file storage, as on the Hub; and files above so many bytes.
LARGE, LIMIT = (".safetensors", ".bin", ".gguf"), 1 << 20


@dataclass
class Repo:
    """One repository."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pulls: int = 0

    def commit(self, ref: str, tree: dict[str, bytes], message: str) -> str:
        text = repr((sorted(tree.items()), message, len(self.commits)))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(tree)
        self.refs[ref] = sha
        self.messages.append(message)
        return sha


@dataclass
class Fault:
    """An answer given instead of the right one: to requests whose line matches, so many times."""

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    #: Do what was asked, and then give the wrong answer all the same.
    after: bool = False


class Hub:
    """The state of the server."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        #: ``METHOD path`` of every request, and what came with it.
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.chunk: int | None = None
        self.cut: dict[str, int] = {}
        self.corrupt: set[str] = set()
        #: Whether refusals quote the token, as careless servers do.
        self.quote = False
        #: A commit of somebody else, made just before the next one.
        self.race: tuple[str, dict[str, bytes]] | None = None
        #: Whether ranges are ignored.
        self.whole = False
        self.url = ""
        self.lock = threading.Lock()

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> str:
        """A repository with one commit."""
        repo = self.repos[name] = Repo(**options)
        return repo.commit("main", files, "first")

    def seen(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [each for each in self.requests if re.search(pattern, each)]

    def tree(self, name: str, ref: str = "main") -> dict[str, bytes]:
        """Files of a repository."""
        repo = self.repos[name]
        return repo.commits[repo.refs.get(ref, ref)]


def is_large(name: str, content: bytes) -> bool:
    """Whether a file goes to large file storage."""
    return bool(content) and (name.endswith(LARGE) or len(content) > LIMIT)


def git_oid(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", repo: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.repo = status, code, message, repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        split = urlsplit(self.path)
        line = f"{self.command} {unquote(split.path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            self.hub.headers.append({key.lower(): value for key, value in self.headers.items()})
            self.hub.bodies.append(body)
            fault = next(
                (f for f in self.hub.faults if f.times and re.search(f.pattern, line)), None
            )
            if fault is not None:
                fault.times -= 1
            try:
                if fault is None or fault.after:
                    status, headers, data = self._answer(split.path, parse_qs(split.query), body)
                if fault is not None:
                    raise _RefusedError(fault.status, message="as asked for")  # noqa: TRY301
            except _RefusedError as refused:
                status = refused.status
                if self.hub.quote:
                    refused.message += f" ({self.headers.get('Authorization')})"
                headers = {"X-Error-Message": refused.message} if refused.message else {}
                headers |= {"X-Error-Code": refused.code} if refused.code else {}
                headers |= {} if fault is None else fault.headers
                url = f"{self.hub.url}/{refused.repo}"
                data = json.dumps({"error": refused.message, "url": url}).encode()
                headers["Content-Type"] = "application/json"
        self._send(status, headers, data)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return b""
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        cut = self.hub.cut.get(self.path)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None and self.command == "GET":
            del self.hub.cut[self.path]
            self.wfile.write(data[:cut])
            self.close_connection = True
            return
        self.wfile.write(data)

    @property
    def _writer(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, *, write: bool = False, content: bool = True) -> Repo:
        given = self.headers.get("Authorization")
        if given is not None and not self._writer:
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._writer):
            raise _RefusedError(
                404 if self._writer else 401, "RepoNotFound", "Repository not found"
            )
        if repo.gated and content and not self._writer:
            raise _RefusedError(
                401 if given is None else 403, "GatedRepo", f"Access to {name} is gated"
            )
        if write and not self._writer:
            raise _RefusedError(403, message="You don't have the rights")
        return repo

    def _answer(
        self, path: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        for pattern, method, act in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                made = act(self, *map(unquote, found.groups()), query=query, body=body)
                if isinstance(made, tuple):
                    return made
                return 200, {"Content-Type": "application/json"}, json.dumps(made).encode()
        raise _RefusedError(404, message=f"no such route: {self.command} {path}")

    def _commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self, **_: Any) -> Any:
        if not self._writer:
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        return {"type": "user", "name": "org", "orgs": []}

    def validate(self, **_: Any) -> Any:
        return {"errors": [], "warnings": []}

    def create(self, *, body: bytes, **_: Any) -> Any:
        if not self._writer:
            raise _RefusedError(401, message="Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        if name in self.hub.repos:
            raise _RefusedError(409, message="You already created this model repo", repo=name)
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.hub.url}/{name}"}

    def branch(self, name: str, branch: str, *, body: bytes, **_: Any) -> Any:
        repo = self._repo(name, write=True)
        if branch in repo.refs:
            raise _RefusedError(409, message="Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.refs[branch] = self._commit_of(repo, start)
        return {}

    def info(self, name: str, revision: str = "main", **_: Any) -> Any:
        repo = self._repo(name, content=False)
        sha = self._commit_of(repo, revision)
        names = [{"rfilename": each} for each in repo.commits[sha]]
        return {
            "id": name, "modelId": name, "sha": sha, "private": repo.private,
            "gated": "auto" if repo.gated else False, "siblings": names, "tags": [],
        }  # fmt: skip

    def tree(self, name: str, revision: str, **_: Any) -> Any:
        repo = self._repo(name)
        sha = self._commit_of(repo, revision)
        found: list[dict[str, Any]] = []
        for each, content in repo.commits[sha].items():
            entry: dict[str, Any] = {"type": "file", "path": each, "size": len(content)}
            entry["oid"] = git_oid(content)
            if is_large(each, content):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            found.append(entry)
        folders = {each.rsplit("/", 1)[0] for each in repo.commits[sha] if "/" in each}
        found += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        return found

    def preupload(self, name: str, revision: str, *, body: bytes, **_: Any) -> Any:
        repo = self._repo(name, write=True)
        tree = repo.commits[self._commit_of(repo, revision)]
        files = []
        for asked in json.loads(body)["files"]:
            path, size = asked["path"], asked["size"]
            large = path.endswith(LARGE) or size > LIMIT
            there = tree.get(path)
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if large else git_oid(there)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, name: str, *, body: bytes, **_: Any) -> Any:
        self._repo(name, write=True)
        found = []
        for each in json.loads(body)["objects"]:
            oid, size = each["oid"], each["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                entry["actions"] = self._actions(oid, size)
            found.append(entry)
        return {"transfer": "basic", "objects": found}

    def _actions(self, oid: str, size: int) -> dict[str, Any]:
        place = f"{self.hub.url}/storage/{oid}"
        verify = {"href": f"{self.hub.url}/verify"}
        if self.hub.chunk is None:
            return {"upload": {"href": place}, "verify": verify}
        count = -(-size // self.hub.chunk)
        header = {str(part + 1): f"{place}/{part}" for part in range(count)}
        header["chunk_size"] = str(self.hub.chunk)
        return {"upload": {"href": f"{place}/done", "header": header}, "verify": verify}

    def store(self, oid: str, *, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, message="another digest")
        self.hub.stored[oid] = body
        return 200, {"ETag": '"1"'}, b""

    def part(self, oid: str, part: str, *, body: bytes, **_: Any) -> Any:
        self.hub.stored[f"{oid}/{part}"] = body
        return 200, {"ETag": f'"{part}"'}, b""

    def joined(self, oid: str, *, body: bytes, **_: Any) -> Any:
        parts = json.loads(body)["parts"]
        whole = b"".join(self.hub.stored.pop(f"{oid}/{n}") for n in range(len(parts)))
        return self.store(oid, body=whole)

    def verify(self, *, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            raise _RefusedError(404, message="not there")
        return {}

    def commit(
        self, name: str, revision: str, *, query: dict[str, list[str]], body: bytes, **_: Any
    ) -> Any:
        repo = self._repo(name, write=True)
        if self.hub.race is not None:
            other, files = self.hub.race
            self.hub.race = None
            self.hub.repos[other].commit("main", files, "theirs")
        parent = self._commit_of(repo, revision)
        tree, message = dict(repo.commits[parent]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise _RefusedError(412, message="A commit has happened since")
            elif item["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise _RefusedError(
                        400, message="LFS pointer pointed to a file that does not exist"
                    )
                tree[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        pull = None
        if query.get("create_pr"):
            repo.pulls += 1
            revision = f"refs/pr/{repo.pulls}"
            pull = f"{self.hub.url}/{name}/discussions/{repo.pulls}"
        sha = repo.commit(revision, tree, message)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": pull}

    def resolve(self, name: str, revision: str, path: str, **_: Any) -> Any:
        repo = self._repo(name)
        sha = self._commit_of(repo, revision)
        content = repo.commits[sha].get(path)
        if content is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if is_large(path, content):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            # Another host, as on the Hub: the client must not send its token there.
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            headers |= {"Location": f"{elsewhere}/storage-of/{name}/{sha}/{path}"}
            return 302, headers, b""
        return self._part_of(content, headers | {"ETag": f'"{git_oid(content)}"'}, path)

    def download(self, name: str, sha: str, path: str, **_: Any) -> Any:
        if self.headers.get("Authorization") is not None:
            raise _RefusedError(400, message="a token was sent to the storage")
        return self._part_of(self.hub.repos[name].commits[sha][path], {}, path)

    def _part_of(self, content: bytes, headers: dict[str, str], path: str) -> Any:
        if path in self.hub.corrupt:
            content = bytes(byte ^ 1 for byte in content)
        headers = {**headers, "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.hub.whole:
            return 200, {**headers, "Content-Length": str(len(content))}, content
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        if start >= len(content):
            return 416, headers, b""
        stop = min(stop, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, headers, content[start:stop]


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("/api/whoami-v2", "GET", _Handler.whoami),
    ("/api/validate-yaml", "POST", _Handler.validate),
    ("/api/repos/create", "POST", _Handler.create),
    (rf"/api/models/{_NAME}", "GET", _Handler.info),
    (rf"/api/models/{_NAME}/revision/([^/]+)", "GET", _Handler.info),
    (rf"/api/models/{_NAME}/tree/([^/]+)/?", "GET", _Handler.tree),
    (rf"/api/models/{_NAME}/branch/([^/]+)", "POST", _Handler.branch),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", "POST", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/([^/]+)", "POST", _Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (r"/storage/([0-9a-f]{64})", "PUT", _Handler.store),
    (r"/storage/([0-9a-f]{64})/(\d+)", "PUT", _Handler.part),
    (r"/storage/([0-9a-f]{64})/done", "POST", _Handler.joined),
    (r"/verify", "POST", _Handler.verify),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", "GET HEAD", _Handler.resolve),
    (rf"/storage-of/{_NAME}/([^/]+)/(.+)", "GET HEAD", _Handler.download),
]


@contextmanager
def running() -> Iterator[Hub]:
    """A server in threads of this process, until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
