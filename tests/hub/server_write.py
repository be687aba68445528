"""The writing half of the local Hub: repositories, branches, blobs, commits, pull requests.

In: the requests of a client that pushes. Out: the Hub's answers, as the client reads them. A commit
is one change of `LocalHub.repos`, checked as the Hub checks it: the rights of the token, the parent
commit, the hash of every blob, the metadata of a card.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re

REGULAR_LIMIT = 10 * 1024 * 1024
REPO = r"/api/models/(?P<id>[^/]+/[^/]+)"


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused"):
        self.status, self.code, self.message = status, code, message


class Writing:
    """Methods for the request handler, which brings `hub`, `sent`, `query`, `_repo` and `_send`."""

    def write(self, path: str) -> None:
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                return handler(self, **match.groupdict())
        raise RefusedError(404, message=f"no endpoint {self.command} {path}")

    def user(self) -> str:
        header = self.headers.get("Authorization", "")
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def may_write(self, repo_id: str) -> str:
        user = self.user()
        if repo_id.split("/")[0] not in self.hub.rights[user]:
            raise RefusedError(403, message=f"{user} may not write to {repo_id}")
        return user

    def branch_of(self, repo_id: str, revision: str):
        repo = self._repo(repo_id, content=False)
        if revision not in repo.refs:
            raise RefusedError(404, "RevisionNotFound")
        return repo, revision

    # ---------------------------------------------------------------- accounts and repositories

    def _whoami(self) -> None:
        name = self.user()
        self._json({"type": "user", "id": name, "name": name, "orgs": [], "auth": {}})

    def create_repo(self) -> None:
        data = json.loads(self.sent)
        repo_id = f"{data.get('organization') or self.user()}/{data['name']}"
        self.may_write(repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._json({"error": "exists", "url": url, "name": repo_id}, 409)
        self.hub.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        repo = self.hub.repos[repo_id]
        repo.private = data.get("visibility") == "private" or bool(data.get("private"))
        repo.readers = {user for user, names in self.hub.rights.items() if data and
                        repo_id.split("/")[0] in names}  # fmt: skip
        return self._json({"url": url, "name": repo_id, "id": "0"})

    def create_branch(self, id: str, name: str) -> None:
        self.may_write(id)
        repo = self._repo(id, content=False)
        if name in repo.refs:
            raise RefusedError(409, message=f"{name} exists")
        start = json.loads(self.sent or b"{}").get("startingPoint") or "main"
        repo.refs[name] = self._commit(repo, start)[0]
        self._json({})

    # ---------------------------------------------------------------- files on their way

    def validate_yaml(self) -> None:
        content = json.loads(self.sent)["content"]
        errors = []
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        try:
            import yaml

            meta = yaml.safe_load(match[1]) if match else {}
        except ImportError:
            meta = {}
        except yaml.YAMLError as error:
            meta, errors = {}, [{"message": f"YAML: {error}"}]
        if not isinstance(meta.get("license", ""), str) or meta.get("license") == "my-own":
            errors.append({"message": '"license" must be one of the known ones'})
        for entry in meta.get("model-index", []):
            if "name" not in entry or "results" not in entry:
                errors.append({"message": '"model-index" needs "name" and "results"'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, id: str, rev: str) -> None:
        self.user() if "create_pr" in self.query or rev.startswith("refs/") else self.may_write(id)
        repo, branch = self.branch_of(id, rev)
        tree = repo.commits[repo.refs[branch]]
        answers = []
        for item in json.loads(self.sent)["files"]:
            name = item["path"]
            large = name.endswith((".safetensors", ".bin", ".pth")) or item["size"] > REGULAR_LIMIT
            there = tree.get(name)
            oid = None
            if there is not None:
                blob = b"blob %d\0" % len(there) + there
                oid = hashlib.sha256(there) if large else hashlib.sha1(blob)
            answers.append({
                "path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                "oid": oid.hexdigest() if oid else None,
            })  # fmt: skip
        self._json({"files": answers})

    def lfs_batch(self, id: str) -> None:
        self.user()  # a reader may store blobs too: pull requests carry files that way
        self._repo(id, content=False)
        answers, data = [], json.loads(self.sent)
        # Clients before 1.0 ask here for Xet, newer ones use it without asking.
        xet = self.hub.xet is not None and "xet" in data.get("transfers", ())
        for item in data["objects"]:
            oid, size = item["oid"], item["size"]
            answer = {"oid": oid, "size": size, "authenticated": True}
            if not xet and self.hub.blob(oid) is None:
                href = f"{self.hub.other_origin}/lfs/put/{oid}"
                upload = {"href": href, "header": {}}
                if size > self.hub.multipart_over:
                    step = self.hub.multipart_over
                    count = -(-size // step)
                    parts = {f"{n:05d}": f"{href}/{n}" for n in range(1, count + 1)}
                    upload = {"href": f"{self.hub.url}/lfs/complete/{oid}",
                              "header": {"chunk_size": str(step), **parts}}  # fmt: skip
                verify = {"href": f"{self.hub.url}/lfs/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self._json({"transfer": "xet" if xet else "basic", "objects": answers},
                   headers={"Content-Type": "application/vnd.git-lfs+json"})  # fmt: skip

    def put(self, oid: str, part: str | None = None) -> None:
        if self.headers.get("Authorization"):
            raise RefusedError(400, message="a token must not be sent to another origin")
        if part:
            self.hub.blobs[f"{oid}.{part}"] = self.sent
        else:
            self._keep(oid, self.sent)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.sent).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.sent)["parts"]]
        self._keep(oid, b"".join(self.hub.blobs.pop(f"{oid}.{n}") for n in numbers))
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, message="the content does not match its hash")
        self.hub.blobs[oid] = data

    def verify(self) -> None:
        data = json.loads(self.sent)
        blob = self.hub.blob(data["oid"])
        if blob is None or len(blob) != data["size"]:
            raise RefusedError(404, message="object not found")
        self._json({})

    # ---------------------------------------------------------------- commits and pull requests

    def commit(self, id: str, rev: str) -> None:
        proposed = "create_pr" in self.query
        user = self.user() if proposed or rev.startswith("refs/pr/") else self.may_write(id)
        repo, branch = self.branch_of(id, rev)
        lines = [json.loads(line) for line in self.sent.splitlines() if line.strip()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs[branch]):
            raise RefusedError(412, message="A commit has happened since. Please refresh.")
        tree = dict(repo.commits[repo.refs[branch]])
        for line in lines[1:]:
            name = line["value"]["path"]
            if line["key"] == "file":
                tree[name] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                tree[name] = self.hub.blob(line["value"]["oid"])
                if tree[name] is None:
                    raise RefusedError(400, message=f"{name} was not uploaded")
            elif tree.pop(name, None) is None:
                raise RefusedError(404, "EntryNotFound")
        answer = {"success": True, "hookOutput": ""}
        if proposed:
            number = self.open_request(repo, header["summary"], user)
            branch = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{id}/discussions/{number}"
        oid = self.hub.add_commit(id, branch, tree, header["summary"])
        self._json({**answer, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}"})

    def open_request(self, repo, title: str, user: str) -> int:
        number = len(repo.requests) + 1
        repo.requests.append({
            "num": number, "title": title, "status": "open", "isPullRequest": True,
            "author": {"name": user}, "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": "", "type": "model"},
        })  # fmt: skip
        repo.refs[f"refs/pr/{number}"] = repo.refs["main"]
        return number

    def discuss(self, id: str) -> None:
        """The client opens the pull request first where it uploads through Xet."""
        data = json.loads(self.sent)
        number = self.open_request(self._repo(id, content=False), data["title"], self.user())
        self._json({"num": number, "pullRequest": True})

    def _discussions(self, id: str) -> None:
        found = self._repo(id, content=False).requests
        entries = [{**entry, "repo": {"name": id, "type": "model"}} for entry in found]
        self._json({"discussions": entries, "count": len(found), "start": 0})


ROUTES = (
    ("POST", "/api/repos/create", Writing.create_repo),
    ("POST", "/api/validate-yaml", Writing.validate_yaml),
    ("POST", REPO + "/branch/(?P<name>.+)", Writing.create_branch),
    ("POST", REPO + "/preupload/(?P<rev>.+)", Writing.preupload),
    ("POST", REPO + "/commit/(?P<rev>.+)", Writing.commit),
    ("POST", REPO + "/discussions", Writing.discuss),
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Writing.lfs_batch),
    ("PUT", r"/lfs/put/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", Writing.put),
    ("POST", r"/lfs/complete/(?P<oid>[0-9a-f]{64})", Writing.complete),
    ("POST", "/lfs/verify", Writing.verify),
)
