"""Reward servers for tests: in this process or in one of their own, and raw bytes for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from diffexp.rewards.server import RewardServer

TOKEN = "correct-horse-battery-staple"  # noqa: S105
BRIGHTNESS = f"{Path(__file__).parent / 'brightness.py'}:brightness"


class Response(NamedTuple):
    status: int
    head: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def serving(reward: Any, **options: Any) -> Iterator[RewardServer]:
    """A server in a thread of this process, at a free port unless told otherwise."""
    with RewardServer(reward, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server as a process of its own, and its address: the first line it prints names that."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert "http://" in line, server.stderr.read()
            yield server, "http://" + line.split("http://")[1].split()[0].rstrip(",;")
        finally:
            server.kill()


def place(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def send(url: str, data: bytes) -> list[Response]:
    """What a server answers to raw bytes, after which nothing more comes."""
    with socket.create_connection(place(url), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has hung up already; what it said is still there
        received = []
        try:
            while block := connection.recv(1 << 16):
                received.append(block)
        except ConnectionResetError:
            pass
    return responses(b"".join(received))


def responses(data: bytes) -> list[Response]:
    """All answers in a stream."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        text = head.decode("latin-1")
        assert text.startswith("HTTP/1.1 "), data
        length = next((int(line[16:]) for line in text.split("\r\n") if line.lower().startswith("content-length: ")), 0)
        assert len(rest) >= length, data
        found.append(Response(int(text[9:12]), text, rest[:length]))
        data = rest[length:]
    return found


def form(parts: Sequence[tuple[str, str, bytes]]) -> bytes:
    """A form of (name, content type, data), with the boundary "edge"."""
    body = b""
    for name, kind, data in parts:
        body += f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: {kind}\r\n\r\n'.encode()
        body += data + b"\r\n"
    return body + b"--edge--\r\n"


def post(body: bytes, *headers: str, path: str = "/score", kind: str = "multipart/form-data; boundary=edge") -> bytes:
    """A request to score."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body
