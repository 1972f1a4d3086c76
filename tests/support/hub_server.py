"""A hub on this machine, with one repository, that counts what it sends and can fail."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

REPO = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf", ".bin")
"""What the hub keeps apart, and names by its SHA-256."""


@dataclass
class Hub:
    """The files of ``folder``, and what becomes of requests for them."""

    folder: Path
    address: str = ""
    detailed: bool = True  # sizes and hashes come with the list of files, unlike from a mirror
    fails: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Status and headers of answers to what has this in its path."""
    cut: dict[str, int] = field(default_factory=dict)
    """The connection is cut after so many bytes of a file, once for each time it is listed here."""
    stalls: dict[str, int] = field(default_factory=dict)
    """After so many bytes of a file nothing more comes, until ``go_on``."""
    instead: dict[str, bytes] = field(default_factory=dict)  # content that is not the listed one
    listed: list[dict[str, Any]] | None = None  # instead of the files that are there
    redirects: bool = False  # large files lie on another host, as the hub's do
    tokens: set[tuple[str, str | None]] = field(default_factory=set)  # what each host was told
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file
    ranges: list[str] = field(default_factory=list)
    lists: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)

    def files(self) -> list[dict[str, Any]]:
        """The list of files, as the hub's tree has it."""
        if self.listed is not None:
            return self.listed
        found = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            told: dict[str, Any] = {
                "type": "file",
                "path": path.relative_to(self.folder).as_posix(),
                "size": len(content),
                "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if path.suffix in LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                told["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            found.append(told)
        return found

    def info(self) -> dict[str, Any]:
        """What the hub says of the repository."""
        siblings = []
        for told in self.files():
            sibling = {"rfilename": told["path"]}
            if self.detailed:
                sibling |= {"size": told["size"], "blobId": told["oid"]}
                if "lfs" in told:
                    lfs = told["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 130}
            siblings.append(sibling)
        about = {"id": REPO, "modelId": REPO, "sha": COMMIT, "private": False, "tags": []}
        return {**about, "downloads": 0, "siblings": siblings}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serves a folder within a ``with`` statement."""
    hub = Hub(folder)

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            for part, (status, headers) in hub.fails.items():
                if part in path:
                    return self.say(status, b"", headers)
            if path.startswith(f"/api/models/{REPO}"):
                hub.lists += 1
                told = hub.files() if "/tree/" in path else hub.info()
                return self.say(200, json.dumps(told).encode(), {})
            host = str(self.headers["Host"]).partition(":")[0]
            before = f"/{REPO}/resolve/{COMMIT}/"
            if path.startswith(before) and (hub.folder / path.removeprefix(before)).is_file():
                hub.tokens.add((host, self.headers.get("Authorization")))
                if hub.redirects and path.endswith(LARGE) and host != "localhost":
                    port = hub.address.rpartition(":")[2]
                    return self.say(302, b"", {"Location": f"http://localhost:{port}{path}"})
                return self.send(path.removeprefix(before))
            return self.say(404, b"", {"X-Error-Code": "RepoNotFound"})

        def say(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def send(self, name: str) -> None:
            body = hub.instead.get(name) or (hub.folder / name).read_bytes()
            status, asked = 200, self.headers.get("Range")
            if asked:
                hub.ranges.append(asked)
                status, body = 206, body[int(asked.removeprefix("bytes=").rstrip("-")) :]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            part = body
            if name in hub.cut:
                part = body[: hub.cut.pop(name)]
            elif name in hub.stalls:
                part = body[: hub.stalls[name]]
            self.wfile.write(part)
            self.wfile.flush()
            hub.sent[name] = hub.sent.get(name, 0) + len(part)
            if len(part) < len(body):
                if name in hub.stalls:
                    hub.go_on.wait(60)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
