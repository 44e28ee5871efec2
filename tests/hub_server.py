"""A Hugging Face Hub on 127.0.0.1 for tests: the parts of its protocol that the real client uses, and faults on demand.

    with HubServer() as hub:
        sha = hub.add_repo("me/model", {"config.json": b"{}", "model.safetensors": weights})
        hub.cut("/cdn/", after=1000)                      # the next body from the storage host stops there
        hf_hub_download("me/model", "model.safetensors", endpoint=hub.url)
        assert hub.count("GET", "/cdn/") == 2

As on the Hub: weight files live on a second host (`localhost`, so the client does not send it the token), other files
come directly; an anonymous request for a private or a missing repository gets the same 401, a token without access 404;
an unknown token gets 401 everywhere. No xet headers are sent. `hub.token` is the token that may create and write.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_protocol import HTML_PAGE, Fault, HubHandler, Request, is_large, sha256

Files = Mapping[str, "bytes | Path"]


@dataclass
class Repo:
    private_token: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The server and what it holds; a context manager that stops it."""

    def __init__(self, token: str = "hf_local") -> None:
        self.token = token
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.plain_files: dict[str, bytes] = {}
        self.large_files: dict[str, bytes] = {}
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()
        self._oids: dict[bytes, str] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._httpd = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)
        self.port = int(self._httpd.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stopping.set()
        self._httpd.shutdown()
        self._httpd.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other side was faster
                continue

    # What the server holds

    def add_repo(self, repo_id: str, files: Files | None = None, *, private_token: str | None = None) -> str:
        """Create a repository with one commit on main; `private_token` is then the only token that may read it."""
        self.repos[repo_id] = Repo(private_token)
        return self.commit(repo_id, files or {})

    def commit(self, repo_id: str, files: Files, *, branch: str = "main", delete: tuple[str, ...] = ()) -> str:
        """Add files to a branch (made from main if new) and give the new commit's 40 hex digits."""
        repo = self.repos[repo_id]
        with self._lock:
            content = dict(repo.commits.get(repo.branches.get(branch, repo.branches.get("main", "")), {}))
            content.update({name: read(data) for name, data in files.items()})
            folders = tuple(name for name in delete if name.endswith("/")) or ("//",)
            content = {k: data for k, data in content.items() if k not in delete and not k.startswith(folders)}
            self.large_files.update({self.oid(data): data for name, data in content.items() if is_large(name)})
            sha = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
            repo.commits[sha] = content
            repo.branches[branch] = sha
        return sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Give the content of a repository at a branch or commit."""
        repo = self.repos[repo_id]
        return dict(repo.commits[repo.branches.get(revision, revision)])

    def add_file(self, name: str, data: bytes | Path) -> str:
        """Serve a file at a plain address, outside any repository, and give the address."""
        self.plain_files[name] = read(data)
        return f"{self.url}/files/{name}"

    def oid(self, data: bytes) -> str:
        """Give the SHA-256 of a content, computed once."""
        if data not in self._oids:
            self._oids[data] = sha256(data)
        return self._oids[data]

    # What was asked

    def count(self, method: str | None = None, match: str = "") -> int:
        """Count requests so far of this method (None: any) whose path contains `match`."""
        return sum(method in (None, request.method) and match in request.path for request in self.requests)

    # What goes wrong; the newest fault that matches wins

    def fail(self, match: str = "", *, times: int | None = 1, status: int = 503, method: str | None = None) -> None:
        """Answer with an error status."""
        self._faults.insert(0, Fault(match, method, times, status=status))

    def cut(self, match: str = "", *, after: int, times: int | None = 1, reset: bool = False) -> None:
        """Close the connection after `after` bytes of the body of a GET; `reset`: by a TCP reset, not in order."""
        self._faults.insert(0, Fault(match, "GET", times, cut_after=after, reset=reset))

    def replace(
        self, match: str = "", body: bytes = HTML_PAGE, *, times: int | None = None, method: str | None = "GET"
    ) -> None:
        """Answer 200 text/html with this body and no Hub headers; `method=None` also for HEAD, as a captive portal."""
        self._faults.insert(0, Fault(match, method, times, page=body))

    def corrupt(
        self, match: str = "", edit: Callable[[bytes], bytes] | None = None, *, times: int | None = None
    ) -> None:
        """Serve other bytes under the right headers; without `edit` the same number, one bit of the middle flipped."""
        self._faults.insert(0, Fault(match, "GET", times, edit=edit or flip_middle_bit))

    def delay(self, match: str = "", *, seconds: float, times: int | None = None, method: str | None = None) -> None:
        """Wait before answering."""
        self._faults.insert(0, Fault(match, method, times, delay_s=seconds))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def take_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            for fault in self._faults:
                if fault.match in path and fault.method in (None, method) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return Fault("", None, None)


def read(data: bytes | Path) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()


def flip_middle_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - a client that hung up
        return
