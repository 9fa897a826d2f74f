"""A Hub for tests: an HTTP server in this process that the real `huggingface_hub` client talks to.

Whatever host the client asks for, its requests arrive here: `hub` replaces the transport of the client's session, by
`set_client_factory`'s own means, so that addresses, redirects, retries and errors stay those of the real Hub.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http as client
from huggingface_hub.utils import close_session

from hub.hub_repositories import Repositories
from hub.hub_routes import Answer, Request, answer, error


TOKENS = {"hf_me": "me", "hf_you": "you"}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches.

    With a `status` that is the answer; without, the connection ends after `after` bytes of the content, or of the
    upload.
    """

    pattern: str
    status: int | None = None
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The server's state and what was asked of it."""

    def __init__(self) -> None:
        self.repositories = Repositories(TOKENS)
        self.requests: list[str] = []  # "METHOD /path", with commits and hashes shortened to <oid>
        self.ranges: list[str] = []  # of the requests that had one
        self.slept: list[float] = []  # what the client waited before it tried again
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fail(self, pattern: str, status: int | None = None, **options: object) -> None:
        """Let requests fail, see `Fault`."""
        self.faults.append(Fault(pattern, status, **options))

    def files(self, name: str) -> dict[str, bytes]:
        """What is on `main` of a repository."""
        return self.repositories.named[name].files

    def text(self, name: str, path: str) -> str:
        return self.files(name)[path].decode()

    def fault_of(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and content in one packet: the second would wait 40 ms for the first's receipt
    hub: HubServer

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""

    def _respond(self) -> None:
        parts = urlsplit(self.path)
        line = f"{self.command} {unquote(parts.path)}"
        self.hub.requests.append(re.sub("[0-9a-f]{40,64}", "<oid>", line))
        fault = self.hub.fault_of(line)
        if fault is not None and fault.status is None and self.command in ("PUT", "POST"):
            self.rfile.read(min(fault.after, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            return
        body = self._body()
        if fault is not None and fault.status is not None:
            told = error(fault.status, f"told to answer {fault.status}")
            self._send(Answer(told.status, told.content, fault.headers))
            return
        try:
            user = self.hub.repositories.user(self.headers.get("Authorization"))
        except PermissionError as problem:
            self._send(error(401, str(problem)))
            return
        request = Request(self.command, unquote(parts.path), parse_qs(parts.query), body, user)
        self._send(answer(self.hub.repositories, request), None if fault is None else fault.after)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, told: Answer, stop_after: int | None = None) -> None:
        raw = isinstance(told.content, bytes)
        content = told.content if raw else b"" if told.content is None else json.dumps(told.content).encode()
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json", **told.headers}
        status, wanted = told.status, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, whole = int(wanted[1]), len(content)
            content = content[first : int(wanted[2]) + 1 if wanted[2] else None]
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{whole}"
            self.hub.ranges.append(self.headers["Range"])
            status = 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:stop_after])
        if stop_after is not None:
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub without repositories; this process is logged in as `me`, with an empty cache."""
    server = HubServer()
    values = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    values |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
    values |= {"DOWNLOAD_CHUNK_SIZE": 500}  # a broken download is resumed after its last whole chunk
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr(time, "sleep", server.slept.append)
    monkeypatch.setattr(client, "_GLOBAL_CLIENT_FACTORY", lambda: _session(server))
    close_session()
    yield server
    close_session()
    server.close()


def _session(server: HubServer) -> object:
    """A session of the client's own HTTP library (httpx or httpx2) that brings every request to `server`."""
    library = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]

    class ToServer(library.HTTPTransport):
        def handle_request(self, request):
            place = request.url.copy_with(scheme="http", host="127.0.0.1", port=server.http.server_port)
            moved = library.Request(request.method, place, headers=request.headers, stream=request.stream)
            moved.extensions = request.extensions
            return super().handle_request(moved)

    return library.Client(transport=ToServer(verify=False), verify=False, follow_redirects=True, timeout=20)
