"""An S3 server that misbehaves: a proxy on loopback in front of moto's, which answers some requests badly.

503        "slow down", in S3's words
reset      the connection is closed without an answer
hang       no answer until the client gives up
truncate   the answer's head and the first half of its body, then the connection is closed
slow       the whole answer, but in pieces with pauses
drip       a byte a moment, for ever
flip       the whole answer with one bit of its body changed
html       a page with code 200 in place of the answer, as a proxy or a portal gives
xhtml      the same, as well-formed XML
lost       the request is done, and the connection is closed without an answer
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("503", "reset", "hang", "truncate", "slow", "drip", "flip", "html", "xhtml", "lost")
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_PAGES = {
    "html": b"<!DOCTYPE html><html><body><p>Please sign in<br></body></html>",
    "xhtml": b"<html xmlns='http://www.w3.org/1999/xhtml'><body><p>Please sign in</p></body></html>",
}
_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}


class Proxy:
    """A context manager; `endpoint` is its address. `break_next` says what goes wrong, `requests` counts what came."""

    def __init__(self, host: str, port: int) -> None:
        self.requests = self.broken = 0
        self.released = threading.Event()
        self._fault, self._left, self._word = "", 0, ""
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self, "upstream": (host, port)})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def break_next(self, fault: str, times: int, word: str) -> None:
        """Answer the next so many requests whose method and path hold `word` badly."""
        with self._lock:
            self._fault, self._left, self._word = fault, times, word
            self.requests = self.broken = 0

    def fault_of(self, line: str) -> str:
        """What is to go wrong with a request, "" for nothing."""
        with self._lock:
            if self._word not in line:
                return ""
            self.requests += 1
            if self._left <= 0:
                return ""
            self._left -= 1
            self.broken += 1
            return self._fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: tuple[str, int]

    def log_message(self, *_words: Any) -> None:
        """Say nothing."""

    def answer(self) -> None:
        body = self._body()
        fault = self.proxy.fault_of(f"{self.command} {self.path}")
        if fault == "503":
            self._send(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        if fault in ("reset", "hang"):
            if fault == "hang":
                self.proxy.released.wait(30)
            self.close_connection = True
            return
        if fault in _PAGES:
            self._send(200, [("Content-Type", "text/html")], _PAGES[fault])
            return
        connection = http.client.HTTPConnection(*self.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        headers = [(key, value) for key, value in answer.getheaders() if key.lower() not in _HOP]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._send(answer.status, headers, data, fault, length)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        del self.headers["Transfer-Encoding"]
        return b"".join(parts)

    def _send(
        self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str = "", length: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif fault == "flip":
            at = len(data) // 2
            self.wfile.write(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        elif fault == "drip":
            self.close_connection = True
            for at in range(len(data)):
                if self.proxy.released.wait(0.2):
                    return
                try:
                    self.wfile.write(data[at : at + 1])
                    self.wfile.flush()
                except OSError:
                    return
        elif fault == "slow":
            for at in range(0, len(data), max(1, len(data) // 4)):
                self.wfile.write(data[at : at + max(1, len(data) // 4)])
                self.wfile.flush()
                self.proxy.released.wait(0.2)
        else:
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer
