"""What the local Hub of hub_server.py answers to each request, as the Hub would."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import HubServer, Repo

HTML_PAGE = (
    b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Welcome to the hotel network</body></html>\n"
)
LARGE_FILE_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".onnx", ".msgpack", ".h5")
LFS_JSON = "application/vnd.git-lfs+json"


@dataclass
class Request:
    """One request as it arrived; `status` is what was answered, None while unanswered. Header names are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    status: int | None = None


@dataclass
class Fault:
    """What goes wrong with requests of `method` (None: any) whose path contains `match`; `times` None: always."""

    match: str
    method: str | None
    times: int | None
    delay_s: float = 0.0
    status: int | None = None
    cut_after: int | None = None
    reset: bool = False
    page: bytes | None = None
    edit: Callable[[bytes], bytes] | None = None


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}
    ranged: bool = False


def is_large(name: str) -> bool:
    return name.endswith(LARGE_FILE_SUFFIXES)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def as_json(value: object, status: int = 200, content_type: str = "application/json") -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": content_type})


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    codes = {"X-Error-Code": code} if code else {}
    headers = {"X-Error-Message": message, "Content-Type": "application/json", **codes, **headers}
    return Reply(status, json.dumps({"error": message}).encode(), headers)


class RefusedError(Exception):
    """A request ends here with this reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_args: object) -> None:
        return

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers)
        self.hub.requests.append(request)
        content = self.rfile.read(int(headers.get("content-length", 0)))
        fault = self.hub.take_fault(self.command, self.path)
        if fault.delay_s:
            self.hub.stopping.wait(fault.delay_s)
        if fault.status is not None:
            reply = refusal(fault.status, "the server was told to fail")
        elif fault.page is not None:
            reply = Reply(200, fault.page, {"Content-Type": "text/html; charset=utf-8"})
        else:
            reply = self._route(content)
        if fault.edit is not None and reply.ranged:
            reply = reply._replace(body=fault.edit(reply.body))
        self._send(reply, fault, request)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names the base class looks for

    def _send(self, reply: Reply, fault: Fault, request: Request) -> None:
        status, body, headers, ranged = reply
        headers = dict(headers)
        if ranged:
            status, body, more = self._cut_range(status, body)
            headers |= more
        request.status = status  # before the client can see the answer and go on
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if fault.cut_after is None else body[: fault.cut_after])
        if fault.cut_after is not None:
            self.close_connection = True
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _cut_range(self, status: int, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return status, body, {"Accept-Ranges": "bytes"}
        start, end = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
        if start > end:
            return 416, b"", {"Content-Range": f"bytes */{len(body)}"}
        return 206, body[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(body)}"}

    # Routes: the first pattern that fits; groups become arguments, the request's body the last

    def _route(self, content: bytes) -> Reply:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path) if verb == method else None
            if found:
                try:
                    return answer(self, *map(unquote, found.groups(default="")), content)
                except RefusedError as refused:
                    return refused.reply
        return refusal(404, f"no such address: {self.command} {path}")

    def _bearer(self, *, required: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        known = {self.hub.token, *(repo.private_token for repo in self.hub.repos.values())}
        if token is not None and token not in known:
            raise RefusedError(refusal(401, "Invalid credentials in Authorization header"))
        if token is None and required:
            raise RefusedError(refusal(401, "Invalid username or password."))
        return token

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        token = self._bearer(required=write)
        repo = self.hub.repos.get(repo_id)
        if repo is not None and repo.private_token in (None, token):
            return repo
        if token is None:
            raise RefusedError(refusal(401, "Invalid username or password.", "RepoNotFound"))
        raise RefusedError(refusal(404, "Repository not found", "RepoNotFound"))

    def _commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            raise RefusedError(refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
        return sha, repo.commits[sha]

    def resolve(self, repo_id: str, revision: str, name: str, _content: bytes) -> Reply:
        sha, files = self._commit_of(repo_id, revision)
        if name not in files:
            return refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        data, headers = files[name], {"X-Repo-Commit": sha}
        if not is_large(name):
            headers |= {"ETag": f'"{git_sha(data)}"', "Content-Type": "text/plain; charset=utf-8"}
            return Reply(200, data, headers, ranged=True)
        headers |= {"X-Linked-ETag": f'"{self.hub.oid(data)}"', "X-Linked-Size": str(len(data))}
        return Reply(302, b"", {**headers, "Location": f"{self.hub.storage_url}/cdn/{self.hub.oid(data)}/{name}"})

    def stored_file(self, oid: str, _name: str, _content: bytes) -> Reply:
        if oid not in self.hub.large_files:
            return refusal(404, "no such object")
        return Reply(200, self.hub.large_files[oid], {"ETag": f'"{oid[:32]}"'}, ranged=True)

    def plain_file(self, name: str, _content: bytes) -> Reply:
        if name not in self.hub.plain_files:
            return Reply(404, HTML_PAGE, {"Content-Type": "text/html"})
        return Reply(200, self.hub.plain_files[name], {"Content-Type": "application/octet-stream"}, ranged=True)

    def whoami(self, _content: bytes) -> Reply:
        self._bearer(required=True)
        access = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        return as_json({"type": "user", "id": "0", "name": "tester", "orgs": [], "auth": access})

    def create_repo(self, content: bytes) -> Reply:
        token, asked = self._bearer(required=True), json.loads(content)
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        where = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return as_json({"error": "You already created this model repo", **where}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add_repo(repo_id, {".gitattributes": b""}, private_token=token if private else None)
        return as_json(where)

    def model_info(self, repo_id: str, revision: str, _content: bytes) -> Reply:
        sha, files = self._commit_of(repo_id, revision)
        private = self.hub.repos[repo_id].private_token is not None
        info = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": private, "gated": False, "tags": []}
        return as_json({**info, "siblings": [{"rfilename": name} for name in sorted(files)]})

    def tree(self, repo_id: str, revision: str, _content: bytes) -> Reply:
        entries = []
        for name, data in sorted(self._commit_of(repo_id, revision)[1].items()):
            lfs = {"lfs": {"oid": self.hub.oid(data), "size": len(data), "pointerSize": 134}} if is_large(name) else {}
            entries.append({"type": "file", "path": name, "size": len(data), "oid": git_sha(data), **lfs})
        return as_json(entries)

    def preupload(self, repo_id: str, _revision: str, content: bytes) -> Reply:
        self._repo(repo_id, write=True)
        names = [file["path"] for file in json.loads(content)["files"]]
        modes = [(name, "lfs" if is_large(name) else "regular") for name in names]
        return as_json({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]})

    def lfs_batch(self, repo_id: str, content: bytes) -> Reply:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(content)["objects"]:
            stored = {"oid": asked["oid"], "size": asked["size"]}
            upload = {"href": f"{self.hub.storage_url}/upload/{asked['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(stored if asked["oid"] in self.hub.large_files else {**stored, "actions": actions})
        return as_json({"transfer": "basic", "objects": objects}, content_type=LFS_JSON)

    def lfs_upload(self, oid: str, content: bytes) -> Reply:
        if sha256(content) != oid:
            return refusal(400, "the content does not have the announced SHA-256")
        self.hub.large_files[oid] = content
        return Reply(200)

    def lfs_verify(self, content: bytes) -> Reply:
        self._bearer(required=True)
        asked = json.loads(content)
        held = len(self.hub.large_files.get(asked["oid"], b""))
        return as_json({}) if held == asked["size"] else refusal(422, "size mismatch")

    def create_commit(self, repo_id: str, revision: str, content: bytes) -> Reply:
        self._repo(repo_id, write=True)
        files, deleted = {}, []
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif line["key"].startswith("deleted"):
                deleted.append(value["path"])
        sha = self.hub.commit(repo_id, files, branch=revision, delete=tuple(deleted))
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        return as_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


REPO = r"([\w.-]+(?:/[\w.-]+)?)"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [
    ("GET", r"/cdn/([0-9a-f]{64})/(.+)", HubHandler.stored_file),
    ("GET", r"/files/(.+)", HubHandler.plain_file),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", HubHandler.resolve),
    ("GET", r"/api/whoami-v2", HubHandler.whoami),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)", HubHandler.tree),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", HubHandler.model_info),
    ("GET", rf"/api/models/{REPO}()", HubHandler.model_info),
    ("GET", r"/api/agent-harnesses", lambda _self, _content: as_json({"standardEnvVars": [], "harnesses": {}})),
    ("POST", r"/api/validate-yaml", lambda _self, _content: as_json({"errors": [], "warnings": []})),
    ("POST", r"/api/repos/create", HubHandler.create_repo),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", HubHandler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", HubHandler.create_commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", r"/upload/([0-9a-f]{64})", HubHandler.lfs_upload),
    ("POST", r"/lfs/verify", HubHandler.lfs_verify),
]
