"""``diffexp serve-reward``: one reward, scored for runs on other devices and machines.

Anyone may knock. So everything is bounded: connections, seconds, bytes, images, pixels, letters; the token is asked for
before a body is read; what is wrong with a request is one line of JSON, and never the end of the server.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import math
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffexp import rewards
from diffexp.devices import device
from diffexp.errors import UserError
from diffexp.rewards.address import HOW_TO_TELL, is_loopback, is_remote, read_token
from diffexp.rewards.base import Reward, shaped
from diffexp.rewards.protocol import Refused, decode
from diffexp.rewards.service import Limits, Service
from diffexp.rewards.spec import parse
from diffexp.version import __version__

CONNECTIONS = 128
BODIES = 4  # requests in memory at once; more of them wait for their turn
HEAD_SECONDS, HEAD_BYTES = 20.0, 1 << 16
BODY_SECONDS, BODY_RATE = 30.0, 1e5  # a body may take so long, and longer by a second for so many bytes
TURN_SECONDS = 240.0
SEND_SECONDS = 20.0
DRAIN_SECONDS, DRAIN_BYTES = 2.0, 1 << 20


class RewardServer(socketserver.ThreadingTCPServer):
    """Listens at ``address``, a host and a port (0: any free one), and scores with ``reward`` on ``device``."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(
        self,
        reward: Reward,
        address: tuple[str, int] = ("127.0.0.1", 0),
        token: str | None = None,
        limits: Limits = Limits(),  # noqa: B008
        device: torch.device | str = "cpu",
    ) -> None:
        self.reward, self.token, self.device = reward, token, device
        self.service = Service(reward.name, f"diffexp {__version__}", limits=limits)
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        self.bodies = threading.BoundedSemaphore(BODIES)
        # One thread scores, always the same: torch keeps a pool of its own for every thread that calls it.
        self.scorer = ThreadPoolExecutor(1, "reward")
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """Where it listens, as a recipe's ``reward`` names it."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float | None]:
        """The reward of images (B, 3, H, W) and B prompts; None, JSON's null, where it is no finite number."""
        return self.scorer.submit(self._scores, images, prompts).result()

    @torch.no_grad()
    def _scores(self, images: Tensor, prompts: Sequence[str]) -> list[float | None]:
        scores = shaped(self.reward.name, self.reward(images.to(self.device), prompts), prompts)
        return [score if math.isfinite(score) else None for score in scores.tolist()]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hands a new connection to a thread, unless there are too many."""
        if not self.connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.sendall(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A connection's whole life."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's business; anything else is ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def server_close(self) -> None:
        """Stops listening and scoring."""
        super().server_close()
        self.scorer.shutdown(wait=False, cancel_futures=True)


class Incoming(io.RawIOBase):
    """What a client sends, within so many seconds and bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.deadline, self.left = connection, 0.0, 0

    def allow(self, seconds: float, count: int) -> None:
        """Starts a new part of the conversation."""
        self.deadline, self.left = time.monotonic() + seconds, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if self.left <= 0:
            raise Refused(431, f"the head is longer than {HEAD_BYTES} bytes")
        self.connection.settimeout(seconds)
        count = self.connection.recv_into(memoryview(buffer)[: self.left])
        self.left -= count
        return count


class Handler(BaseHTTPRequestHandler):
    """One connection: ``GET /health`` and ``POST /score``, as often as the client likes."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffexp", ""
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of an answer leave together
    requestline = ""  # which a head that is too long never becomes

    @property
    def host(self) -> RewardServer:
        return cast("RewardServer", self.server)

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self) -> None:
        self.incoming.allow(HEAD_SECONDS, HEAD_BYTES)
        try:
            super().handle_one_request()
        except Refused as refusal:
            # the rest of a head that is too long would be read as another one
            self.close_connection = self.close_connection or refusal.status == 431
            self.refuse(refusal.status, refusal.reason)

    def do_GET(self) -> None:
        """What this server is."""
        self.admit("/health")
        if self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
        self.answer(200, self.host.service.to_json())

    def do_POST(self) -> None:
        """Scores images."""
        # Until the body is read, no further request can be: a refusal ends the connection.
        last, self.close_connection = self.close_connection, True
        self.admit("/score")
        length = self.body_length()
        if not self.host.bodies.acquire(timeout=TURN_SECONDS):
            raise Refused(503, "too many requests at once")
        try:
            body = self.body(length)
            self.close_connection = last
            images, prompts = decode(self.headers.get("Content-Type", ""), body, self.host.service.limits)
            del body
            self.answer(200, {"name": self.host.service.name, "scores": self.scores(images, prompts)})
        finally:
            self.host.bodies.release()

    def admit(self, path: str) -> None:
        """Refuses whoever has not the token, comes from a web page, or wants something else."""
        token = self.host.token
        if token is not None:
            given = self.headers.get_all("Authorization", [""])
            kind, _, secret = given[0].partition(" ")
            same = hmac.compare_digest(secret.strip().encode("latin-1", "replace"), token.encode())
            if not same or kind.lower() != "bearer" or len(given) != 1:
                self.close_connection = True
                raise Refused(401, "no access without this server's token")
        if self.headers.get("Origin"):
            raise Refused(403, "web pages get no scores")
        if self.path != path:
            raise Refused(404, f"there is only GET /health and POST /score, not {self.command} here")

    def body_length(self) -> int:
        """What the head says, if it can be."""
        given = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") or not given:
            raise Refused(411, "a request says its Content-Length, and is sent in one piece")
        if len(given) > 1 or not (given[0].isascii() and given[0].isdigit()) or len(given[0]) > 18:
            raise Refused(400, "the Content-Length is no number")
        if int(given[0]) > self.host.service.limits.bytes:
            raise Refused(413, f"a request has at most {self.host.service.limits.bytes} bytes")
        return int(given[0])

    def body(self, length: int) -> bytes:
        """The whole body."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.connection.settimeout(SEND_SECONDS)
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        self.incoming.allow(BODY_SECONDS + length / BODY_RATE, length)
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refused(408, "the body came too slowly") from None
        if len(body) < length:
            raise Refused(400, "the body is shorter than its Content-Length")
        return body

    def handle_expect_100(self) -> bool:
        """The body is asked for once the token has been seen."""
        return True

    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float | None]:
        """The scores; a reward that fails says so here and to the client."""
        try:
            return self.host.scores(images, prompts)
        except (torch.OutOfMemoryError, MemoryError):
            raise Refused(503, "the reward ran out of memory; a smaller --batch needs less") from None
        except Exception as error:
            # A reward may be anyone's code. The server lives on; whoever runs it sees the whole story.
            traceback.print_exc()
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise Refused(500, f"the reward failed: {' '.join(told.split())}") from None

    def answer(self, status: int, message: dict[str, Any]) -> None:
        """One line of JSON."""
        data = json.dumps(message).encode() + b"\n"
        self.request_version = self.protocol_version  # to HTTP/0.9, or no version at all, the base would send no head
        self.connection.settimeout(SEND_SECONDS)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def refuse(self, status: int, reason: str) -> None:
        """Says no, in such a way that it is heard."""
        self.answer(status, {"error": reason})
        if self.close_connection:
            self.drain()

    def drain(self) -> None:
        """Takes in what is still being sent: closing on it would wipe out the answer on its way."""
        self.incoming.allow(DRAIN_SECONDS, DRAIN_BYTES)
        with contextlib.suppress(OSError, Refused):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1():
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a head: one line, and none of it repeated."""
        self.close_connection = True
        self.refuse(405 if code == 501 else code if code < 500 else 400, "this is no HTTP request that is served here")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a stranger's request writes no log, and no header gets into one."""


def serve(spec: str, host: str, port: int, token_file: Path | None, device_name: str, batch: int) -> None:
    """Serves the reward ``spec`` until Ctrl-C or SIGTERM, ``batch`` images at a time.

    Raises:
        UserError: if there is no such reward or device, the port can't be had, or the host lets strangers in.
    """
    token, members = read_token(token_file), parse(spec)
    if len(members) > 1 or members[0].weight != 1 or is_remote(spec):
        raise UserError(f"serve-reward {spec}: a server has one reward; sums are made in the recipe, as http://…+hpsv2")
    if token is None and not is_loopback(host):
        raise UserError(f"--host {host} lets other machines in, which needs a token: {HOW_TO_TELL}, or --token-file")
    where = device(device_name)
    reward = rewards.load(spec, where)
    try:
        server = RewardServer(reward, (host, port), token, Limits(images=batch), where)
    except OSError as error:
        remedy = "give an address of this machine; --port 0 takes a free port"
        raise UserError(f"--host {host} --port {port}: can't listen there ({error.strerror}); {remedy}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    guard = "with a token" if token else "without a token, for this machine only"
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"{spec} on {where} at {server.url}, {guard}, {batch} images a request; Ctrl-C ends it", flush=True)
        server.serve_forever()
