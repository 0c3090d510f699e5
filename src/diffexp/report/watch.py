"""A report that follows its runs: served on this machine only, made anew when something was written."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from diffexp.errors import UserError
from diffexp.report.page import render
from diffexp.report.sources import Material, stamp
from diffexp.version import __version__

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What a browser on this machine calls it. A page elsewhere that points its own name here is turned away."""

HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Newest:
    """The newest report of some runs, and the tag that tells it from older ones."""

    def __init__(self, runs: Sequence[str | Path]) -> None:
        self.runs, self.lock = list(runs), threading.Lock()
        self.tag = self.text = ""
        self.update()

    def update(self) -> tuple[str, str]:
        """Tag and page; made anew if the runs have gone on. A run that is just writing keeps the page before."""
        with self.lock:
            tag = '"' + hashlib.sha256(f"{__version__}|{stamp(self.runs)}".encode()).hexdigest()[:20] + '"'
            if tag != self.tag:
                try:
                    self.text, self.tag = render(Material.read(self.runs), tag), tag
                except (OSError, ValueError):
                    if not self.text:
                        raise
            return self.tag, self.text


class Server(ThreadingHTTPServer):
    """Answers GET / with the newest report, and nothing else."""

    daemon_threads = True

    def __init__(self, newest: Newest, port: int) -> None:
        self.newest = newest
        super().__init__((HOST, port), Handler)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        return f"http://{HOST}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server_version, sys_version = "diffexp", ""
    timeout = 30

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in NAMES:
            return self.send_error(403)
        if self.path.partition("?")[0] != "/":
            return self.send_error(404)
        newest: Newest = self.server.newest  # pyrefly: ignore[missing-attribute]
        tag, text = newest.update()
        if self.headers.get("If-None-Match") == tag:
            return self.answer(304, tag, b"")
        return self.answer(200, tag, text.encode("utf-8"))

    def answer(self, status: int, tag: str, body: bytes) -> None:
        """Sends the page, or word that it is still the same."""
        self.send_response(status)
        for name, value in {**HEADERS, "ETag": tag, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is the user's."""


def serve(runs: Sequence[str | Path], port: int) -> Server:
    """A server of the report, bound to this machine; ``serve_forever`` runs it. Port 0 takes any that is free.

    Raises:
        UserError: if a folder is no run, or the port is taken.
    """
    newest = Newest(runs)
    try:
        return Server(newest, port)
    except OSError as error:
        raise UserError(f"--port {port}: can't listen there ({error.strerror}); --port 0 takes a free one") from error
