"""The server half of rewards over http: exact, in bounds, and closed to whoever has no token."""

from __future__ import annotations

import io
import json
import math
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from brightness import brightness
from PIL import Image
from rewardserver import BRIGHTNESS, TOKEN, form, place, post, process, responses, send, serving
from safetensors.torch import save

from diffexp.errors import UserError
from diffexp.rewards import server as module
from diffexp.rewards.custom import CustomReward
from diffexp.rewards.server import serve
from diffexp.rewards.service import Limits

BRIGHT = CustomReward("bright", brightness)
AUTHORISED = f"Authorization: Bearer {TOKEN}"


def noise(count: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def png(array: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def tensor_form(images: torch.Tensor, prompts: object) -> bytes:
    tensor = ("images", "application/x-safetensors", save({"images": images}))
    return form([("prompts", "application/json", json.dumps(prompts).encode()), tensor])


TWO = tensor_form(noise(), ["a cat", "a dog"])


# Scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_of_a_tensor_are_the_rewards_own(dtype: torch.dtype) -> None:
    images = noise().to(dtype)
    with serving(BRIGHT) as server:
        (answer,) = send(server.url, post(tensor_form(images, ["a cat", "a dog"])))
    assert answer.status == 200
    assert answer.json == {"name": "bright", "scores": brightness(images, []).float().tolist()}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_scores_of_pngs(mode: str) -> None:
    pictures = np.array([[[[255, 0, 0]] * 16] * 8, [[[0, 0, 102]] * 16] * 8], dtype=np.uint8)
    grey = np.array([76, 12]) / 255  # ITU-R 601: 0.299 · 255 and 0.114 · 102
    files = [("images", "image/png", png(picture, mode)) for picture in pictures]
    with serving(BRIGHT) as server:
        (answer,) = send(server.url, post(form([*files, ("prompts", "", b'["red", "blue"]')])))
    assert answer.json["scores"] == pytest.approx(grey if mode == "L" else [1 / 3, 0.4 / 3], abs=1e-6)


def test_a_second_png_header_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that the limits let pass in the first header, a larger one in the next: Pillow goes by the last."""
    small, large = (png(np.zeros((side, side, 3), dtype=np.uint8), "RGB") for side in (8, 64))
    forged = small[:33] + large[8:]  # the signature and IHDR take 33 bytes
    with serving(BRIGHT) as server:
        (answer,) = send(server.url, post(form([("images", "image/png", forged), ("prompts", "", b'["x"]')])))
    assert answer.status == 400
    assert b"an image is no PNG" in answer.body


def test_images_of_8_bits_in_a_tensor() -> None:
    images = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)
    with serving(BRIGHT) as server:
        assert send(server.url, post(tensor_form(images, ["grey"])))[0].json["scores"] == pytest.approx([0.2])


def test_what_is_no_finite_number_is_null() -> None:
    odd = CustomReward("odd", lambda images, prompts: [math.nan, 1.5, math.inf, -math.inf])
    with serving(odd) as server:
        (answer,) = send(server.url, post(tensor_form(noise(4), ["a"] * 4)))
    assert answer.body == b'{"name": "odd", "scores": [null, 1.5, null, null]}\n'


def test_health_says_what_is_served() -> None:
    with serving(BRIGHT, limits=Limits(images=7)) as server:
        (answer,) = send(server.url, b"GET /health HTTP/1.1\r\n\r\n")
    assert answer.json["name"] == "bright"
    assert answer.json["differentiable"] is False
    assert answer.json["limits"]["images"] == 7
    assert answer.json["software"].startswith("diffexp ")


def test_one_reward_at_a_time_whoever_asks() -> None:
    seen, overlaps = threading.Lock(), []

    def careful(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        overlaps.append(not seen.acquire(blocking=False))
        scores = images.mean((1, 2, 3))
        seen.release()
        return scores

    with serving(CustomReward("careful", careful)) as server:
        clients = [threading.Thread(target=send, args=(server.url, post(TWO))) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert overlaps == [False] * 8


def test_a_reward_that_fails_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Moody:
        name, differentiable = "moody", False
        failures = [RuntimeError("no\nway"), torch.OutOfMemoryError("full"), UserError("wrong shape"), None]  # noqa: RUF012

        def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            if failure := self.failures.pop(0):
                raise failure
            return images.mean((1, 2, 3))

    with serving(Moody()) as server:
        # all on one connection: what was read whole leaves it usable
        answers = send(server.url, post(TWO) * 4)
    assert [answer.status for answer in answers] == [500, 503, 500, 200]
    assert answers[0].json == {"error": "the reward failed: RuntimeError: no way"}
    assert answers[2].json == {"error": "the reward failed: wrong shape"}
    assert "Traceback" in capfd.readouterr().err


# The token


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization:"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        [f"Authorization: {TOKEN}"],
        [f"Authorization: Basic {TOKEN}"],
        [f"Authorization: Bearer {TOKEN[:-1]}"],
        [f"Authorization: Bearer {TOKEN}x"],
        [f"Authorization: Bearer {TOKEN.upper()}"],
        [f"Authorization: Bearer {TOKEN} {TOKEN}"],
        [f"Authorization: Bearer {TOKEN}\xff"],
        ["Authorization: Bearer x", AUTHORISED],
        [AUTHORISED, AUTHORISED],
        [f"Proxy-Authorization: Bearer {TOKEN}"],
        [f"Cookie: Authorization=Bearer {TOKEN}"],
        [f"X-Forwarded-For: 127.0.0.1\r\nToken: {TOKEN}"],
    ],
)
@pytest.mark.parametrize("what", ["GET /health", "POST /score", f"POST /score?token={TOKEN}", "POST //score", "GET /x"])
def test_no_entry_without_the_token(what: str, headers: list[str], private: str) -> None:
    # The head alone is sent, and a body announced: whoever answers has not waited for it.
    head = "\r\n".join([f"{what} HTTP/1.1", "Content-Length: 1000000", *headers, "", ""])
    with socket.create_connection(place(private), timeout=60) as connection:
        connection.sendall(head.encode("latin-1"))
        received = b""
        while block := connection.recv(1 << 16):
            received += block
    (answer,) = responses(received)
    assert answer.status == 401
    assert answer.json == {"error": "no access without this server's token"}
    assert "Connection: close" in answer.head


@pytest.fixture(scope="module")
def private() -> str:
    with serving(BRIGHT, token=TOKEN) as server:
        yield server.url


def test_the_token_opens(private: str) -> None:
    health = f"GET /health HTTP/1.1\r\n{AUTHORISED}\r\n\r\n".encode()
    assert [answer.status for answer in send(private, health + post(TWO, AUTHORISED.replace("Bearer", "bearer")))] == [
        200,
        200,
    ]


def test_a_body_is_asked_for_only_with_the_token(private: str) -> None:
    head = f"POST /score HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {len(TWO)}\r\n"
    kind = "Content-Type: multipart/form-data; boundary=edge\r\n"
    assert [answer.status for answer in send(private, f"{head}{kind}\r\n".encode())] == [401]
    answers = send(private, f"{head}{kind}{AUTHORISED}\r\n\r\n".encode() + TWO)
    assert [answer.status for answer in answers] == [100, 200]


# What is refused


def lying(header: object, data: bytes = bytes(4 * 3 * 8 * 8), size: int = 0) -> bytes:
    """A safetensors file whose header says so, and has at least so many bytes."""
    text = json.dumps(header).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + data


def tensor(data: bytes) -> bytes:
    return post(form([("prompts", "", b'["a"]'), ("images", "application/x-safetensors", data)]))


def prompts(text: bytes) -> bytes:
    images = ("images", "application/x-safetensors", save({"images": noise(1)}))
    return post(form([("prompts", "", text), images]))


def picture(data: bytes) -> bytes:
    return post(form([("prompts", "", b'["a"]'), ("images", "image/png", data)]))


GREY = png(np.full((8, 8, 3), 128, np.uint8))
HUGE = GREY[:16] + (30000).to_bytes(4, "big") * 2 + GREY[24:]
ONE = {"dtype": "F32", "shape": [1, 3, 8, 8], "data_offsets": [0, 768]}


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (post(TWO, path="/"), 404, "there is only GET /health and POST /score"),
        (b"GET /score HTTP/1.1\r\n\r\n", 404, "there is only"),
        (b"DELETE /score HTTP/1.1\r\n\r\n", 405, "no HTTP request that is served"),
        (post(TWO, "Origin: https://evil.example"), 403, "web pages"),
        (b"POST /score HTTP/1.1\r\n\r\n", 411, "Content-Length"),
        (b"POST /score HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", 411, "in one piece"),
        (b"POST /score HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "no number"),
        (b"POST /score HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400, "no number"),
        (b"POST /score HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400, "no number"),
        (b"POST /score HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400, "no number"),
        (b"POST /score HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n", 413, "bytes"),
        (b"POST /score HTTP/1.1\r\nContent-Length: 50\r\n\r\nshort", 400, "shorter"),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n", 431, ""),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431, ""),
        (b"GET /" + b"y" * 70_000, 431, "head is longer"),
        (b"GET /health HTTP/2.0\r\n\r\n", 400, ""),
        (b"hello\r\n\r\n", 400, ""),
        (post(TWO, kind="application/json"), 415, "multipart/form-data"),
        (post(TWO, kind="multipart/form-data"), 415, "boundary"),
        (post(TWO, kind="multipart/form-data; boundary=other"), 400, "does not begin"),
        (post(TWO[:-9]), 400, "does not end"),
        (post(b""), 400, "does not begin"),
        (post(form([])), 400, "does not begin"),
        (post(form([("x", "", b"")] * 99)), 413, "more than 65 fields"),
        (post(form([("prompts", "", b"[]")])), 400, "one field prompts"),
        (post(form([("prompts", "", b'["a"]'), ("images", "text/plain", b"x")])), 415, "image/png"),
        (post(form([("prompts", "", b'["a"]'), ("images", "application/x-safetensors", b"")] * 2)), 400, "one field"),
        (post(b"--edge\r\n\r\n\r\n--edge--"), 400, "no head"),
        (post(b"--edge\r\nx: y\r\n\r\n\r\n--edge--"), 400, "no name"),
        (prompts(b"{"), 400, "must be JSON"),
        (prompts(b"[" * 100_000), 400, "must be JSON"),
        (prompts(b"[" + b"9" * 5000 + b"]"), 400, "prompts must be"),
        (prompts(b"\xff\xfe"), 400, "must be JSON"),
        (prompts(b'{"a": "b"}'), 400, "array of strings"),
        (prompts(b"[1]"), 400, "array of strings"),
        (prompts(b'["\\ud800"]'), 400, "no Unicode"),
        (prompts(b"[]"), 400, "1 images came with 0 prompts"),
        (prompts(json.dumps(["a"] * 65).encode()), 413, "more than 64 prompts"),
        (prompts(json.dumps(["a" * 10_001]).encode()), 413, "10000 characters"),
        (tensor(b""), 400, "no safetensors file"),
        (tensor(b"\xff" * 8), 400, "no safetensors file"),
        (tensor(lying({"images": {**ONE, "data_offsets": [0, 10**15]}})), 400, "no safetensors file"),
        (tensor(lying({"images": {**ONE, "shape": [2**62, 3, 8, 8]}})), 400, "no safetensors file"),
        (tensor(lying({"images": {**ONE, "dtype": "U4"}})), 400, "no safetensors file"),
        (tensor(lying({"images": ONE}, size=70_000)), 400, "no safetensors file"),
        (tensor(lying({"other": ONE})), 400, "one tensor"),
        (tensor(save({"images": noise(1), "more": noise(1)})), 400, "one tensor"),
        (tensor(save({"images": noise(1)[0]})), 400, "3-d"),
        (tensor(save({"images": noise(1).double()})), 400, "float64"),
        (tensor(save({"images": noise(1)[:, :1].contiguous()})), 400, "must be (B, 3, H, W)"),
        (tensor(save({"images": noise(1) * 255})), 400, r"in [0, 1]"),
        (tensor(save({"images": noise(1) * torch.nan})), 400, r"in [0, 1]"),
        (tensor(save({"images": noise(0)})), 400, "0 images"),
        (tensor(save({"images": noise(65)})), 413, "1 to 64"),
        (tensor(save({"images": noise(1, 0, 8)})), 413, "0×8"),
        (tensor(save({"images": noise(1, 8, 65)})), 413, "8 times as long as wide"),
        (tensor(save({"images": noise(1, 513, 4097).to(torch.uint8)})), 413, "at most 4096"),
        (tensor(save({"images": noise(3)})), 400, "3 images came with 1 prompts"),
        (picture(b"GIF89a"), 400, "no PNG"),
        (picture(GREY[:40]), 400, "no PNG"),
        (picture(GREY[:60] + b"\0" * 20), 400, "no PNG"),
        (picture(HUGE), 413, "30000×30000"),
        (picture(png(np.full((8, 8), 3, np.uint16), "I;16")), 400, "no PNG"),
    ],
)
def test_a_bad_request_is_one_line_of_json(request_: bytes, status: int, reason: str, public: str) -> None:
    (answer,) = send(public, request_)
    assert answer.status == status
    assert reason in answer.json["error"]
    assert answer.json.keys() == {"error"}
    assert answer.body.count(b"\n") == 1
    assert answer.body.endswith(b"\n")


@pytest.fixture(scope="module")
def public() -> str:
    with serving(BRIGHT) as server:
        yield server.url


def test_images_of_different_sizes_and_more_pixels_than_bytes() -> None:
    small = ("images", "image/png", png(np.full((8, 8, 3), 0, np.uint8)))
    large = ("images", "image/png", png(np.full((16, 16, 3), 0, np.uint8)))
    with serving(BRIGHT, limits=Limits(bytes=2000)) as server:
        (different,) = send(server.url, post(form([("prompts", "", b'["a", "b"]'), small, large])))
        # compressed it is small; unpacked it would not be
        (bomb,) = send(server.url, post(form([("prompts", "", b'["a"]'), large])))
    assert "one size" in different.json["error"]
    assert "2000 bytes in float32" in bomb.json["error"]


# Those who come in numbers, or never finish


def test_connections_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTIONS", 2)
    with serving(BRIGHT) as server:
        idle = [socket.create_connection(place(server.url)) for _ in range(2)]
        for connection in idle:  # an answer on each tells that both are in
            connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert connection.recv(1 << 16)
        with socket.create_connection(place(server.url), timeout=60) as third:
            assert third.recv(1 << 16).startswith(b"HTTP/1.1 503")
        for connection in idle:
            connection.close()
        # each of their threads gives its place back as soon as it notices
        for _ in range(2):
            assert server.connections.acquire(timeout=60)
            server.connections.release()
        assert send(server.url, post(TWO))[0].status == 200


def test_a_head_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_SECONDS", 0.05)
    with serving(BRIGHT) as server, socket.create_connection(place(server.url), timeout=60) as slow:
        slow.sendall(b"GET /hea")
        assert slow.recv(1 << 16) == b""


def test_the_time_for_a_head_is_one_not_one_for_each_letter() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"abc")
        incoming = module.Incoming(ours)
        incoming.allow(60, 2)
        assert incoming.read(1) == b"a"
        incoming.deadline = 0.0  # it has passed, whatever has come meanwhile
        with pytest.raises(TimeoutError):
            incoming.read(1)


def test_a_body_that_never_comes_is_said_to_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_SECONDS", 0.05)
    with serving(BRIGHT) as server, socket.create_connection(place(server.url), timeout=60) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
        received = b""
        while block := slow.recv(1 << 16):
            received += block
    assert responses(received)[0].status == 408


def test_too_many_bodies_wait_then_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(module, "BODIES", 1)
    with serving(BRIGHT) as server:
        with server.bodies:
            (answer,) = send(server.url, post(TWO))
        assert answer.status == 503
        assert send(server.url, post(TWO))[0].status == 200


# The command


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("hpsv3", {}, "unknown reward 'hpsv3'"),
        ("hpsv2+aesthetic", {}, "a server has one reward"),
        ("2*hpsv2", {}, "a server has one reward"),
        ("http://127.0.0.1:1", {}, "a server has one reward"),
        (BRIGHTNESS, {"host": "0.0.0.0"}, "lets other machines in, which needs a token"),  # noqa: S104
        (BRIGHTNESS, {"host": ""}, "lets other machines in"),
        (BRIGHTNESS, {"host": "::"}, "lets other machines in"),
        (BRIGHTNESS, {"host": "example.org"}, "lets other machines in"),
        (BRIGHTNESS, {"token_file": Path("nowhere")}, "can't read the token file nowhere"),
        (BRIGHTNESS, {"device": "tpu9"}, "not on this machine"),
    ],
)
def test_serve_reward_refuses_in_one_line(spec: str, options: dict[str, object], message: str) -> None:
    given = {"host": "127.0.0.1", "port": 0, "token_file": None, "device": "cpu", "batch": 8, **options}
    with pytest.raises(UserError, match=message) as error:
        serve(spec, *given.values())
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_named() -> None:
    with serving(BRIGHT) as server, pytest.raises(UserError, match=f"--port {server.server_address[1]}: can't listen"):
        serve(BRIGHTNESS, *server.server_address, None, "cpu", 8)


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "é" * 20, "x" * 513, "x" * 20 + "\ny"])
def test_a_weak_token_is_refused_and_not_repeated(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("DIFFEXP_REWARD_TOKEN", token)
    for file in (tmp_path / "token", None):
        with pytest.raises(UserError, match="token") as error:
            serve(BRIGHTNESS, "127.0.0.1", 0, file, "cpu", 8)
        assert not token or token not in str(error.value)


@pytest.mark.timeout(1800)
def test_it_lives_through_ten_thousand_malformed_requests() -> None:
    # In fuzz.py's words: what it sends, and what may come back.
    from fuzz import storm

    environment = {"DIFFEXP_REWARD_TOKEN": TOKEN}
    command = ("-m", "diffexp", "serve-reward", BRIGHTNESS, "--port", "0", "--device", "cpu")
    with process(*command, **environment) as (server, url):
        good = post(TWO, AUTHORISED)
        expected = brightness(noise(), []).tolist()
        storm(url, good, 1000, seed=0)
        before = footprint(server)
        storm(url, good, 9000, seed=1)
        (answer,) = send(url, good)
        assert answer.json["scores"] == expected
        after = footprint(server)
        assert server.poll() is None
        assert after[0] - before[0] < 16_000, "kilobytes of memory"
        assert after[1] - before[1] <= 2, "open files"
        server.terminate()
        assert server.wait(60) == 0
        assert "Traceback" not in server.stderr.read()


def footprint(server: subprocess.Popen[str]) -> tuple[int, int]:
    """Kilobytes and open files of a process, where the system tells."""
    status = Path(f"/proc/{server.pid}/status")
    if not status.is_file():
        return 0, 0
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]), len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
