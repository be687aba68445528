"""A small Hub on 127.0.0.1, for the real client: repositories, commits, large files, faults.

In: repositories made by `LocalHub.commit` or pushed by the client. Out: the endpoints of the Hub
(model info, file tree, resolve with ETag, commit and redirect of large files to another origin,
ranges, 401/403/404 with the Hub's error codes; writing is in `server_write`, Xet in `server_xet`),
as `huggingface_hub` asks for them through HF_ENDPOINT.

    hub = LocalHub()                               # environment: hub.environment(home)
    first = hub.commit("org/name", {"config.json": b"{}", "model.safetensors": data})
    hub.fault(r"/blobs/", flip=True, times=2)      # also status=, cut=, drop=, lost=, headers=
    hub.weather = lambda method, path: None        # a fault for any request, or None
    hub.requests                                   # (method, path, status, token) of every request

Run as a script it serves until stopped, for a look by hand: `python tests/hub/server.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from server_write import RefusedError, Writing
from server_xet import XetStore

LARGE = (".safetensors", ".bin", ".pth")


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    messages: dict[str, str] = field(default_factory=dict)
    requests: list[dict] = field(default_factory=list)  # pull requests


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests whose path matches."""

    pattern: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # send so many bytes of the body, then drop the connection
    flip: bool = False  # one bit of the body changes, its size does not
    drop: bool = False  # the connection ends before anything is done
    lost: bool = False  # it is done, but the connection ends before the answer
    whole: bool = False  # a wanted range is ignored and everything sent
    call: Callable[[], None] | None = None  # run before answering (a push by somebody else)


class LocalHub:
    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.other_origin = f"http://localhost:{self.port}"
        self.repos: dict[str, Repo] = {}
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.rights = {"alice": {"alice", "me"}, "bob": {"bob"}}  # who may write to which names
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        self.repos.clear()
        git_id.cache_clear()
        sha256_of.cache_clear()
        self.requests: list[tuple[str, str, int, str]] = []
        self.faults: list[Fault] = []
        self.weather: Callable[[str, str], Fault | None] = lambda method, path: None
        self.blobs: dict[str, bytes] = {}  # uploaded, perhaps in no commit yet
        self.multipart_over = 10_000_000
        self.xet: XetStore | None = None  # a store makes the client use Xet, if it may

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str) -> dict[str, str]:
        """What the client must find in the environment before it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit that changes `files`, and move the branch to it."""
        repo = self.repos.setdefault(repo_id, Repo())
        tree = {**repo.commits.get(repo.refs.get(branch, ""), {}), **files}
        return self.add_commit(repo_id, branch, tree)

    def add_commit(self, repo_id: str, branch: str, tree: dict[str, bytes], title: str = "") -> str:
        repo = self.repos.setdefault(repo_id, Repo())
        oid = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[oid], repo.refs[branch], repo.messages[oid] = tree, oid, title
        return oid

    def tree(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch; empty where there is none."""
        repo = self.repos.get(repo_id, Repo())
        return repo.commits.get(repo.refs.get(branch, ""), {})

    def fault(self, pattern: str, times: int = 1, **what) -> None:
        self.faults.append(Fault(pattern, times, **what))

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
            return self.weather(method, path) or Fault("", 0)

    def blob(self, sha256: str) -> bytes | None:
        if sha256 in self.blobs:
            return self.blobs[sha256]
        trees = (tree for repo in self.repos.values() for tree in repo.commits.values())
        contents = (data for tree in trees for data in tree.values())
        there = next((d for d in contents if sha256_of(d) == sha256), None)
        return self.xet.read(sha256) if there is None and self.xet else there


@cache
def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@cache  # until the next reset; content is hashed for every listing
def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(Writing, BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer of two writes waits for an acknowledgement

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.asked = path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.sent = self._read_body()
        self.broken = self.hub.take_fault(self.command, path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                if self.broken.call:
                    self.broken.call()
                if self.broken.drop:
                    self._record(0)
                    self._hang_up()
                elif self.broken.status:
                    raise RefusedError(self.broken.status)
                else:
                    self._route(path)
            except RefusedError as refusal:
                headers = {"X-Error-Message": refusal.message, **self.broken.headers}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._send(refusal.status, b"{}", headers)

    def _record(self, status: int) -> None:
        """Before the answer: who has it may look at once at what was asked."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, self.asked, status, token))

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str) -> None:
        if self.command not in ("GET", "HEAD"):
            with self.hub.lock:
                return self.write(path)
        if path == "/api/whoami-v2":
            return self._whoami()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/discussions", path):
            return self._discussions(match[1])
        if match := re.fullmatch(r"/blobs/([0-9a-f]{64})", path):
            return self._blob(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-(read|write)-token/.+", path):
            return self._xet_token(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self._tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        raise RefusedError(404, message=f"no endpoint {path}")

    # ---------------------------------------------------------------- who may read

    def _repo(self, repo_id: str, *, content: bool) -> Repo:
        header = self.headers.get("Authorization", "")
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if header and user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user not in repo.readers):
            raise RefusedError(404 if user else 401, "RepoNotFound")
        if content and repo.gated and user not in repo.readers:
            raise RefusedError(403 if user else 401, "GatedRepo")
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise RefusedError(404, "RevisionNotFound")
        return oid, repo.commits[oid]

    # ---------------------------------------------------------------- answers

    def _info(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, content=False)
        oid, tree = self._commit(repo, revision)
        siblings = []
        for name, data in sorted(tree.items()):
            entry = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
            if name.endswith(LARGE):
                sha256 = sha256_of(data)
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        facts = {"_id": repo_id, "id": repo_id, "sha": oid, "siblings": siblings, "tags": []}
        facts |= {"private": repo.private, "gated": repo.gated, "downloads": 0, "likes": 0}
        facts["xetEnabled"] = self.hub.xet is not None  # clients before 0.35 look here
        self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _tree(self, repo_id: str, revision: str) -> None:
        _, tree = self._commit(self._repo(repo_id, content=False), revision)
        items = [
            {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
            for name, data in sorted(tree.items())
        ]
        self._send(200, json.dumps(items).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id, content=True)
        oid, tree = self._commit(repo, revision)
        commit = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if name not in tree:
            return self._send(404, b"{}", {**commit, "X-Error-Code": "EntryNotFound"})
        data = tree[name]
        if not name.endswith(LARGE):
            return self._body(data, {**commit, "ETag": f'"{git_id(data)}"'})
        sha256 = sha256_of(data)
        link = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        place = {"Location": f"{self.hub.other_origin}/blobs/{sha256}"}
        if stored := self.hub.xet and self.hub.xet.find(sha256):
            token = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{oid}"
            place |= {"X-Xet-Hash": stored[0], "Link": f'<{token}>; rel="xet-auth"'}
        return self._send(302, b"", {**commit, **link, **place})

    def _xet_token(self, repo_id: str, kind: str) -> None:
        if self.hub.xet is None:
            raise RefusedError(404)
        self._repo(repo_id, content=kind == "read")
        if kind == "write":
            self.may_write(repo_id)
        body, headers = self.hub.xet.token()
        self._json(body, headers=headers)

    def _blob(self, sha256: str) -> None:
        if self.headers.get("Authorization"):
            raise RefusedError(400, message="a token must not be sent to another origin")
        data = self.hub.blob(sha256)
        if data is None:
            raise RefusedError(404)
        self._body(data, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _body(self, data: bytes, headers: dict[str, str]) -> None:
        if self.broken.flip and data:
            at = len(data) // 2
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        status, total = 200, len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not self.broken.whole:
            start, stop = int(wanted[1]), int(wanted[2] or total - 1)
            if start >= total:
                return self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            status, data = 206, data[start : stop + 1]
            headers = {**headers, "Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}"}
        self._send(status, data, headers)

    def _json(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._record(status)
        if self.broken.lost:
            return self._hang_up()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.broken.cut if status in (200, 206) else None
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.close_connection = True


if __name__ == "__main__":
    served = LocalHub()
    for name, value in {**served.environment("/nonexistent"), "HF_TOKEN": "hf_alice"}.items():
        print(f"export {name}={value}")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
