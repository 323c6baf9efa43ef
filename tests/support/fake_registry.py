"""A small registry with faults: what a real one never does on demand. It records what it was asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.oci import INDEX, MANIFEST, Json, Layout, sha256

__all__ = ["DATA", "Asked", "FakeRegistry", "Handler", "running"]

DATA = os.urandom(700_000)
"""Content for a layer that takes several reads."""

_PATH = re.compile(r"/v2/(?P<repository>[a-z0-9/._-]+)/(?P<kind>manifests|blobs)/(?P<selector>[^/?]+)")


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    """Answers from the registry's documents, after its ``fault`` had a look."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer; an underscore in a header's name stands for a dash."""
        self.send_head(status, len(body), **headers)
        self.wfile.write(body)

    def send_head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(length)} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def serve(self) -> None:
        """The right answer, with ranges."""
        registry = self.server.registry
        place = _PATH.match(self.path)
        if place is None:
            self.send(404)
            return
        if place["kind"] == "manifests":
            found = registry.manifests.get(place["selector"])
            if found is None:
                self.send(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}')
                return
            data, media_type = found
            self.send(200, data, Content_Type=media_type, Docker_Content_Digest=sha256(data))
            return
        blob = registry.blobs.get(place["selector"])
        if blob is None:
            self.send(404, b'{"errors": [{"code": "BLOB_UNKNOWN"}]}')
            return
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None or registry.ignores_ranges:
            self.send(200, blob)
        elif int(start[1]) >= len(blob):
            self.send(416, Content_Range=f"bytes */{len(blob)}")
        else:
            first = int(start[1])
            self.send(206, blob[first:], Content_Range=f"bytes {first}-{len(blob) - 1}/{len(blob)}")

    def _answer(self) -> None:
        registry = self.server.registry
        registry.asked.append(Asked(self.command, self.path, dict(self.headers)))
        try:
            if registry.fault is None or not registry.fault(self):
                self.serve()
        except (BrokenPipeError, ConnectionResetError):
            pass  # The client has gone, which some tests are about.
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    # A request under test may hang: the end of the server must not wait for it for ever.
    daemon_threads = False
    registry: FakeRegistry

    def handle_error(self, request: object, client_address: object) -> None:
        self.registry.broken.append(str(client_address))


@dataclass
class FakeRegistry:
    """Documents by selector, blobs by digest, and what goes wrong."""

    address: str = ""
    scheme: str = "http"
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    ignores_ranges: bool = False
    fault: Callable[[Handler], bool] | None = None
    """Told of each request first; true when it has answered."""
    asked: list[Asked] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set before the server ends, for a fault that hangs."""

    def add(self, layout: Layout, descriptor: Json, tag: str) -> None:
        """Serve an image of ``layout`` under ``tag`` and its digest."""
        for name, data in layout.blobs.items():
            self.blobs[f"sha256:{name}"] = data
        digest = str(descriptor["digest"])
        data = self.blobs[digest]
        for selector in (tag, digest):
            self.manifests[selector] = (data, str(descriptor.get("mediaType", MANIFEST)))

    def add_index(self, descriptors: list[Json], tag: str) -> str:
        """Serve an index of manifests that are there already; its digest comes back."""
        data = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": descriptors}).encode()
        for selector in (tag, sha256(data)):
            self.manifests[selector] = (data, INDEX)
        return sha256(data)

    def paths(self) -> list[str]:
        """What was asked for, the repository left out."""
        return [asked.path.partition("/v2/")[2].partition("/")[2] for asked in self.asked]


@contextlib.contextmanager
def running(*, tls: ssl.SSLContext | None = None) -> Iterator[FakeRegistry]:
    """A registry on a loopback port for the block."""
    server = _Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    registry = FakeRegistry(
        address=f"127.0.0.1:{server.server_address[1]}", scheme="http" if tls is None else "https"
    )
    server.registry = registry
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        registry.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
