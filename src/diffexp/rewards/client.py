"""Asking a reward server: one request after another on one connection, and patience while there is no answer.

``http.client`` follows no redirect and asks no proxy, so that images and token go where the recipe says and nowhere
else. Needs no torch.
"""

from __future__ import annotations

import http.client
import io
import json
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from diffexp.errors import UserError
from diffexp.processes.interruption import pause
from diffexp.rewards.address import HOW_TO_TELL, PATIENCE, read_address, read_patience, read_token
from diffexp.rewards.service import Service

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 300.0
LONGEST_PAUSE = 30.0
LONGEST_ANSWER = 1 << 16  # bytes, and so many more for each image:
LONGEST_SCORE = 64
BUSY = (408, 429, 502, 503, 504)

Result = TypeVar("Result")


class Unreachable(Exception):
    """No answer, or "not now": another try may do."""


class Request(NamedTuple):
    """What is asked for, and how long the answer may be."""

    method: str
    path: str
    content_type: str = ""
    body: bytes = b""
    longest: int = LONGEST_ANSWER


class Client:
    """The reward server at the address ``name``. ``patience`` is in seconds; default: the environment's.

    Raises:
        UserError: if the address, the token or the patience can't be read.
    """

    def __init__(self, name: str, patience: float | None = None) -> None:
        self.name, self.address, self.token = name, read_address(name), read_token()
        self.patience = read_patience() if patience is None else patience
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        self.connection: Any = kind(self.address.host, self.address.port, timeout=CONNECT_SECONDS, blocksize=1 << 20)

    def close(self) -> None:
        """Ends the connection; the next request makes a new one."""
        self.connection.close()

    def health(self) -> Service:
        """What the server says about itself. Raises as ``ask`` does."""
        answer = self.ask(Request("GET", "/health"))
        try:
            return Service.from_json(answer)
        except ValueError as error:
            raise self.mistake(f"is none: {error}") from None

    def ask(self, request: Request) -> dict[str, Any]:
        """One request, and the JSON object that answers it.

        Raises:
            Unreachable: if there is no answer.
            UserError: if the server refuses, or is no reward server.
        """
        try:
            status, data = self.exchange(request)
        except ssl.SSLCertVerificationError as error:
            raise self.mistake(f"has a certificate that was refused: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            told = error.strerror if isinstance(error, OSError) else None
            raise Unreachable(self.clean(told or str(error) or type(error).__name__)) from error
        if len(data) > request.longest:
            raise self.mistake(f"is none: its answer is longer than {request.longest} bytes")
        answer = json_object(data)
        if status != 200:
            self.close()
            raise self.refusal(request, status, self.clean(str((answer or {}).get("error", ""))))
        if answer is None:
            raise self.mistake("is none: its answer is no JSON object")
        return answer

    def exchange(self, request: Request) -> tuple[int, bytes]:
        """A request as it goes over the wire; the answer's status and body, which is cut off where it is too long."""
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if request.body:
            headers |= {"Content-Type": request.content_type, "Content-Length": str(len(request.body))}
        if self.connection.sock is None:
            self.connect()
        # a file is sent in blocks, so that a slow line has the time for each of them
        body = io.BytesIO(request.body) if request.body else None
        self.connection.request(request.method, self.address.path + request.path, body, headers)
        answer = self.connection.getresponse()
        data = answer.read(request.longest + 1)
        if not data or (answer.length and len(data) <= request.longest):
            raise http.client.IncompleteRead(data)
        return answer.status, data

    def connect(self) -> None:
        """A new connection, with more time for answers than for itself."""
        self.connection.connect()
        self.connection.sock.settimeout(ANSWER_SECONDS)

    def refusal(self, request: Request, status: int, reason: str) -> Exception:
        """What a status other than 200 means for the run: to wait, or to end."""
        if status in BUSY:
            return Unreachable(f"{status} {reason}".strip())
        if status in (401, 403):
            state = "did not take the token" if self.token else "wants a token"
            return self.mistake(f"{state} ({status} {reason}): {HOW_TO_TELL}")
        if 300 <= status < 400:
            return self.mistake(f"points elsewhere ({status}), which is not followed: name the final address")
        return self.mistake(f"answered {request.method} {request.path} with {status} {reason}".strip())

    def persist(self, attempt: Callable[[], Result]) -> Result:
        """Tries until it works, after 1, 2, 4 … 30, 30 … s, and says so. A signal ends the wait (``interruption``).

        Raises:
            UserError: when patience is over.
            Interrupted: when the run is asked to end.
        """
        start = time.monotonic()
        for tries, delay in enumerate(delays()):
            try:
                result = attempt()
            except Unreachable as error:
                left = self.patience - (time.monotonic() - start)
                if left <= 0:
                    remedy = f"start it, and the same command goes on; {PATIENCE} is how many seconds to wait"
                    raise self.mistake(f"gave no answer for {self.patience:g} s ({error}): {remedy}") from error
                say(f"waiting for the reward server {self.name}: {error}; {plan(min(delay, left), left)}")
                pause(min(delay, left))
            else:
                if tries:
                    say(f"the reward server {self.name} answers, after {time.monotonic() - start:.0f} s")
                return result
        raise AssertionError("delays never end")

    def mistake(self, text: str) -> UserError:
        """An error of the user's about this server."""
        return UserError(f"reward server {self.name} {text}")

    def clean(self, text: str) -> str:
        """A stranger's words, short, and without the token and what steers a terminal."""
        text = text.replace(self.token, "…") if self.token else text
        return "".join(letter if letter.isprintable() else " " for letter in text[:300])


def say(text: str) -> None:
    """A line for whoever watches; on standard error, so that --quiet and --json change nothing about it."""
    print(text, file=sys.stderr, flush=True)


def plan(delay: float, left: float) -> str:
    """What happens next, in words."""
    return f"next try in {delay:.3g} s, giving up in {left:.0f} s; Ctrl-C saves and ends"


def delays() -> Iterator[float]:
    """Seconds before each next try."""
    delay = 1.0
    while True:
        yield delay
        delay = min(2 * delay, LONGEST_PAUSE)


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in ``data``; None if there is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
