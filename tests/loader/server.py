"""A web server for shards that stalls, cuts and errs as it is told."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files`. `faults` are used up, one a request: "500", "404", "stall", "cut", "trickle"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.released = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing: pytest shows what fails."""

    def do_GET(self) -> None:
        data, begin = self.server.files.get(self.path[1:], b""), 0
        fault = self.server.faults.pop(0) if self.server.faults else ""
        self.server.requests.append(f"{self.path[1:]} {self.headers.get('Range', '')} {fault}".strip())
        if fault.isdigit() or not data:
            self.send_error(int(fault or 404))
            return
        if range_ := self.headers.get("Range"):
            begin = int(range_.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self._send(data[begin:], fault)

    def _send(self, data: bytes, fault: str) -> None:
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == "cut":
            return
        if fault == "stall":
            self.server.released.wait(20)
            return
        for byte in data[half : half + 200] if fault == "trickle" else b"":
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)
        self.wfile.write(data[half:])
