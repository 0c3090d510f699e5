"""The client half of rewards over http: the same scores and runs as in one process, and patience with a dead server."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from brightness import brightness
from rewardserver import BRIGHTNESS, TOKEN, place, process, serving
from test_training import contents, recipe

from diffexp import cli, rewards, train
from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.processes.interruption import Interrupted
from diffexp.rewards import address, ahead, base, client, spec
from diffexp.rewards.custom import CustomReward
from diffexp.rewards.ensemble import Ensemble
from diffexp.rewards.remote import RemoteReward
from diffexp.rewards.service import Limits
from diffexp.rollout import Batch
from diffexp.runs import checkpoint
from diffexp.terminal.reporter import Reporter
from diffexp.training import Training

BRIGHT = CustomReward("bright", brightness)
PROMPTS = ["a cat", "a dog", "a dolphin riding a bike", "an ant", "ein Käfer 🐞"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits unless it says so."""
    monkeypatch.setenv(address.PATIENCE, "0")


# Scores


def test_emoji_alignment_is_the_same_over_http() -> None:
    pictures = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    local = rewards.load("emoji-alignment")
    with serving(local) as server:
        remote = rewards.load(server.url)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid = pictures.contiguous(memory_format=layout)
            assert torch.equal(base.score(remote, laid, PROMPTS), base.score(local, laid, PROMPTS))
        both = Ensemble([remote, rewards.load("jpeg-compressibility")], [2, 1])
        alone = Ensemble([local, rewards.load("jpeg-compressibility")], [2, 1])
        assert torch.equal(both(pictures, PROMPTS), alone(pictures, PROMPTS))


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_order_and_values_survive_chunks(most: int, dtype: torch.dtype, images: torch.Tensor) -> None:
    seen: list[str] = []

    def first_pixel(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert len(prompts) <= most
        seen.extend(prompts)
        return images[:, 0, 0, 0]

    pictures = images.to(dtype)
    with serving(CustomReward("first", first_pixel), limits=Limits(images=most)) as server:
        scores = rewards.load(server.url)(pictures, PROMPTS)
    assert seen == PROMPTS
    assert scores.dtype == torch.float32
    assert torch.equal(scores, pictures[:, 0, 0, 0].float())


def test_chunks_fit_the_servers_bytes(images: torch.Tensor) -> None:
    one = 4 * images[0].numel()
    with serving(BRIGHT, limits=Limits(bytes=2 * one + 5000)) as server:
        assert torch.equal(rewards.load(server.url)(images, PROMPTS), brightness(images, PROMPTS))
    with serving(BRIGHT, limits=Limits(bytes=one)) as server:
        remote = rewards.load(server.url)
        with pytest.raises(UserError, match="less than one image of 16×24"):
            remote(images, PROMPTS)


def test_nothing_to_score(images: torch.Tensor) -> None:
    with serving(BRIGHT) as server:
        assert rewards.load(server.url)(images[:0], []).shape == (0,)


def test_a_server_that_knows_only_png(images: torch.Tensor) -> None:
    with serving(BRIGHT) as server:
        server.service = server.service._replace(images=("image/png",))
        scores = rewards.load(server.url)(images, PROMPTS)
    assert torch.allclose(scores, (images * 255).round().mean((1, 2, 3)) / 255, atol=1e-6)


def test_what_is_no_number_comes_back_as_nan_and_is_named(images: torch.Tensor) -> None:
    odd = CustomReward("odd", lambda images, prompts: [0.5, math.nan, 1.0, math.inf, 2.0])
    with serving(odd) as server:
        remote = rewards.load(server.url)
        scores = remote(images, PROMPTS)
        assert scores.isnan().tolist() == [False, True, False, True, False]
        assert scores[[0, 2, 4]].tolist() == [0.5, 1.0, 2.0]
        with pytest.raises(UserError, match="nan for the prompt 'a dog'"):
            base.score(remote, images, PROMPTS)


def test_the_example_in_the_documentation_speaks_the_protocol(images: torch.Tensor, example: Path) -> None:
    with process(str(example), "0") as (_, url):
        scores = rewards.load(url)(images, PROMPTS)
    assert torch.allclose(scores, brightness(images, PROMPTS), atol=1e-6)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- the test suite runs this block -->\n```python\n(.*?)```", page, re.DOTALL)
    file = tmp_path_factory.mktemp("docs") / "server.py"
    file.write_text(code)
    return file


def test_check_asks_the_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(BRIGHT, limits=Limits(images=7)) as server:
        monkeypatch.setattr(sys, "argv", ["diffexp", "rewards", "check", f"2*{server.url}+emoji-alignment"])
        with pytest.raises(SystemExit):
            cli.main()
    assert "serves   bright, by diffexp" in (out := capsys.readouterr().out)
    assert "takes 7 images at once, exactly; no gradient" in out


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("http://127.0.0.1:8420", (False, "127.0.0.1", 8420, "")),
        ("http://gpu7", (False, "gpu7", 80, "")),
        ("https://rewards.example.org/hpsv2/", (True, "rewards.example.org", 443, "/hpsv2")),
        ("http://[::1]:8420", (False, "::1", 8420, "")),
    ],
)
def test_addresses(name: str, expected: tuple[object, ...]) -> None:
    assert address.read_address(name) == expected
    spec.check_name(f"2*{name}+aesthetic")
    assert spec.is_differentiable(name) is False
    assert spec.is_differentiable(f"{name}+mine.py:f") is False


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://", "is no address"),
        ("http://:80", "is no address"),
        ("http://gpu:0", "is no address"),
        ("http://gpu:99999", "is no address"),
        ("http://gpu:port", "is no address"),
        ("http://[::1", "is no address"),
        ("http://" + "a" * 70 + ".org", "is no address"),
        ("http://gpu 7", "letter that no address has"),
        ("http://gpü", "letter that no address has"),
        ("http://gpu\n7", "letter that no address has"),
        ("http://user:hunter2@gpu", "no user or password"),
        ("http://user:hun+ter2@gpu", "no user or password"),
        ("2*aesthetic+https://hunter2@gpu", "no user or password"),
        ("http://gpu/?token=hunter2", "has no [?] or # part"),
        ("http://gpu/#hunter2", "has no [?] or # part"),
        ("ftp://gpu:8420", "no module"),
    ],
)
def test_bad_addresses_are_refused_and_secrets_not_repeated(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rewards.load(name)
    assert "hunter2" not in str(error.value)
    assert "hun" not in str(error.value)
    assert "\n" not in str(error.value)


def test_alignprop_refuses_a_reward_without_a_gradient(sd_folder: Path) -> None:
    with pytest.raises(UserError, match=r"reward = 'http://127.0.0.1:1' has no gradient, which alignprop needs"):
        recipe(sd_folder, "alignprop", reward="http://127.0.0.1:1")


@pytest.mark.parametrize("patience", ["", "soon", "-1", "nan"])
def test_a_patience_that_is_none(patience: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.PATIENCE, patience)
    with pytest.raises(UserError, match=r"DIFFEXP_REWARD_PATIENCE = .*: give seconds"):
        rewards.load("http://127.0.0.1:1")


# Servers that are none, or mean harm


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers each connection with the next bytes, whatever it is asked; and what it was asked."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    heard.append(whole_request(connection))
                    with contextlib.suppress(OSError):
                        connection.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        finally:
            for _ in answers:  # those that were not asked for
                with contextlib.suppress(OSError):
                    socket.create_connection(listener.getsockname()).close()
            thread.join()


def whole_request(connection: socket.socket) -> bytes:
    data = b""
    while block := connection.recv(1 << 20):
        data += block
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            break
    return data


def http(body: object, status: str = "200 OK", *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        "\r\n".join(
            [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", "Connection: close", *headers, "", ""]
        ).encode()
        + data
    )


HEALTH = http({"name": "x"})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "gave no answer for 0 s"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "gave no answer for 0 s"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "gave no answer for 0 s"),
        (b"HTTP/1.1 200 OK\r\n", "gave no answer for 0 s"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200, "gave no answer for 0 s"),
        (http({"error": "busy"}, "503 Busy"), "gave no answer for 0 s .503 busy."),
        (http({"error": "full"}, "429 Many"), "gave no answer for 0 s"),
        (http(b"<html>"), "no JSON object"),
        (http(b"[" * 60_000), "no JSON object"),
        (http([1]), "no JSON object"),
        (http({}), "it has no name"),
        (http({"name": 3}), "it has no name"),
        (http({"name": "x", "images": []}), "takes images neither"),
        (http({"name": "x", "images": [{}]}), "takes images neither"),
        (http({"name": "x", "limits": 3}), "limits are no table"),
        (http({"name": "x", "limits": {"images": 0}}), "no positive whole numbers"),
        (http({"name": "x", "limits": {"bytes": True}}), "no positive whole numbers"),
        (http({"name": "x", "limits": {"images": 1e9}}), "no positive whole numbers"),
        (http(b" " * 70_000), "longer than 65536 bytes"),
        (http(b"<html>", "404 Not Found"), "answered GET /health with 404"),
        (http({"error": f"a\x1b[2J{TOKEN}" * 99}, "500 Oh"), "500 a "),
        (http({}, "302 Found", "Location: http://evil.example/"), "points elsewhere .302., which is not followed"),
        (http({}, "401 No"), "did not take the token .401 .*DIFFEXP_REWARD_TOKEN"),
    ],
)
def test_what_is_no_reward_server_is_said_in_one_line(
    answer: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(address.TOKEN, TOKEN)
    with answering(answer) as (url, _), pytest.raises(UserError, match=message) as error:
        rewards.load(url)
    assert str(error.value).startswith(f"reward server {url} ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1.0] * 4}, "answered 5 images with 4 scores"),
        ({"scores": [1.0] * 6}, "answered 5 images with 6 scores"),
        ({"scores": 1.0}, "with no scores"),
        ({}, "with no scores"),
        ({"scores": [1.0, 2.0, 3.0, 4.0, "5"]}, "a score that is no number"),
        ({"scores": [1.0, 2.0, 3.0, 4.0, True]}, "a score that is no number"),
        ({"scores": [[1.0]] * 5}, "a score that is no number"),
        ({"scores": [10**400, 1, 1, 1, 1]}, "a score beyond all floats"),
        ({"name": "y", "scores": [1.0] * 5}, "serves y now, and served x"),
    ],
)
def test_scores_that_are_none(answer: object, message: str, images: torch.Tensor) -> None:
    with answering(HEALTH, http(answer)) as (url, _):
        remote = rewards.load(url)
        with pytest.raises(UserError, match=message):
            remote(images, PROMPTS)


def test_a_redirect_and_a_proxy_lead_nowhere(monkeypatch: pytest.MonkeyPatch, images: torch.Tensor) -> None:
    monkeypatch.setenv(address.TOKEN, TOKEN)
    with answering(HEALTH) as (elsewhere, stolen), serving(BRIGHT, token=TOKEN) as server:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, elsewhere)
        assert torch.equal(rewards.load(server.url)(images, PROMPTS), brightness(images, PROMPTS))
        redirect = http({}, "307 Temporary Redirect", f"Location: {elsewhere}/health")
        with answering(redirect) as (url, _), pytest.raises(UserError, match="not followed"):
            rewards.load(url)
        assert stolen == []


def test_the_token_opens_and_comes_from_a_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(BRIGHT, token=TOKEN) as server:
        with pytest.raises(UserError, match=r"wants a token .401 no access .*DIFFEXP_REWARD_TOKEN"):
            rewards.load(server.url)
        monkeypatch.setenv(address.TOKEN, TOKEN[::-1])
        with pytest.raises(UserError, match="did not take the token") as error:
            rewards.load(server.url)
        assert TOKEN[::-1] not in str(error.value)
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        monkeypatch.setenv(address.TOKEN_FILE, str(tmp_path / "token"))
        assert rewards.load(server.url).serves == "bright"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_https_checks_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor) -> None:
    files = [str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")]
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *options.split(), *name, "-out", files[0], "-keyout", files[1]]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    with serving(BRIGHT) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http:", "https:")
        with pytest.raises(UserError, match="has a certificate that was refused: self-signed"):
            rewards.load(url)
        monkeypatch.setenv("SSL_CERT_FILE", files[0])
        assert torch.equal(rewards.load(url)(images, PROMPTS), brightness(images, PROMPTS))


# Patience


class Pauses:
    """Stands in for the clock and for sleep, and does something at each pause."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], None], patience: str = "inf") -> None:
        self.taken: list[float] = []
        self.actions = list(actions)
        monkeypatch.setattr(client, "pause", self.pause)
        monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: sum(self.taken)))
        monkeypatch.setenv(address.PATIENCE, patience)

    def pause(self, seconds: float) -> None:
        self.taken.append(seconds)
        if self.actions:
            self.actions.pop(0)()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_it_waits_longer_and_longer_then_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses = Pauses(monkeypatch, patience="100")
    name = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(
        UserError, match=f"reward server {name} gave no answer for 100 s .Connection refused.: start it"
    ):
        rewards.load(name)
    assert pauses.taken == [1, 2, 4, 8, 16, 30, 30, 9]
    lines = capsys.readouterr().err.splitlines()
    start = f"waiting for the reward server {name}: Connection refused; next try in"
    assert lines[0] == f"{start} 1 s, giving up in 100 s; Ctrl-C saves and ends"
    assert lines[3] == f"{start} 8 s, giving up in 93 s; Ctrl-C saves and ends"
    assert len(lines) == 8


def test_a_server_that_comes_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], images: torch.Tensor
) -> None:
    with contextlib.ExitStack() as stack:
        port = closed_port()
        start = lambda: stack.enter_context(serving(BRIGHT, address=("127.0.0.1", port)))  # noqa: E731
        Pauses(monkeypatch, lambda: None, start)
        remote = rewards.load(f"http://127.0.0.1:{port}")
        assert torch.equal(remote(images, PROMPTS), brightness(images, PROMPTS))
    assert "answers, after 3 s" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", http({"error": "out of memory"}, "503 Busy")])
def test_what_was_scored_is_not_scored_again(
    answer: bytes, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    health, first = http({"name": "x", "limits": {"images": 3}}), http({"scores": [1, 2, 3]})
    with answering(health, first, answer, health, http({"scores": [4, 5]})) as (url, heard):
        pauses = Pauses(monkeypatch)
        remote = RemoteReward(url)
        assert remote(images, PROMPTS).tolist() == [1, 2, 3, 4, 5]
    assert pauses.taken == [1]
    assert [request.split()[1] for request in heard] == [b"/health", b"/score", b"/score", b"/health", b"/score"]


def test_a_server_that_comes_back_with_another_reward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dark = CustomReward("dark", lambda images, prompts: -images.mean((1, 2, 3)))
    with contextlib.ExitStack() as stack:
        Pauses(monkeypatch, lambda: stack.enter_context(serving(dark, address=server.server_address)) and None)
        with serving(BRIGHT) as server:
            remote = rewards.load(server.url)
        with pytest.raises(UserError, match="serves dark now, and served bright: start it with bright again"):
            remote(torch.zeros(1, 3, 8, 8), ["a"])


# Runs


def remote_contents(run: Path, name: str) -> tuple[Any, ...]:
    """What a run left, the reward called ``name`` in it."""
    metrics, evaluations, *rest = contents(run)
    return metrics, [json.loads(line) | {"reward": name} for line in evaluations.splitlines()], *rest


def test_a_run_with_a_server_equals_the_run_without_and_never_tells_the_token(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(sd_folder, iterations=2)
    whole = train(settings, tmp_path / "local")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv(address.TOKEN, TOKEN)
    arguments = ("serve-reward", BRIGHTNESS, "--port", "0", "--token-file", str(tmp_path / "token"), "--device", "cpu")
    with process("-m", "diffexp", *arguments) as (server, url):
        file = tmp_path / "remote.toml"
        file.write_text(settings.to_toml().replace(json.dumps(BRIGHTNESS), json.dumps(url)))
        monkeypatch.setattr(sys, "argv", ["diffexp", "train", str(file), "--out", str(tmp_path / "remote")])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        server.terminate()
        told = server.communicate()
        assert server.returncode == 0
    assert remote_contents(tmp_path / "remote", "x") == remote_contents(whole, "x")
    assert url in (tmp_path / "remote" / "config.toml").read_text()
    written = [path.read_bytes() for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    out, err = capfd.readouterr()
    assert "iteration" in out or url in out
    for text in (*written, *(part.encode() for part in (out, err, *told))):
        assert TOKEN.encode() not in text


class Kill(Reporter):
    """Ends a server for good, without a word, after an iteration."""

    def __init__(self, server: subprocess.Popen[str], after: int) -> None:
        self.server, self.after = server, after

    def stepped(self, record: Any) -> None:
        if record["iteration"] == self.after:
            self.server.kill()
            self.server.wait()


def served(folder: Path, url: str, **changes: Any) -> Recipe:
    return recipe(folder, reward=url, **{"checkpoint.every": 4, **changes})


def test_a_server_killed_and_started_again_changes_nothing(
    sd_folder: Path, tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack:
        server, url = stack.enter_context(process(str(example), "0"))
        whole = contents(train(served(sd_folder, url), tmp_path / "whole"))
        again = lambda: stack.enter_context(process(str(example), str(place(url)[1]))) and None  # noqa: E731
        pauses = Pauses(monkeypatch, lambda: None, again)
        killed = contents(train(served(sd_folder, url), tmp_path / "killed", Kill(server, after=2)))
    assert pauses.taken[:2] == [1, 2]
    assert killed == whole
    assert f"waiting for the reward server {url}" in capsys.readouterr().err


def test_when_patience_ends_the_run_is_saved_and_goes_on_later(
    sd_folder: Path, tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with process(str(example), "0") as (server, url):
        settings = served(sd_folder, url)
        whole = contents(train(settings, tmp_path / "whole"))
        (tmp_path / "r.toml").write_text(settings.to_toml())
        monkeypatch.setattr(sys, "argv", ["diffexp", "train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")])
        monkeypatch.setattr("diffexp.terminal.console.reporter", lambda *_: Kill(server, after=3))
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: iteration 4: reward server {url} gave no answer for 0 s")
    assert "start it, and the same command goes on" in line
    assert checkpoint.read_newest(tmp_path / "run" / "checkpoints").numbers["iteration"] == 3
    with process(str(example), str(place(url)[1])):
        assert contents(train(settings, tmp_path / "run")) == whole


def test_a_signal_ends_the_wait_and_saves(
    sd_folder: Path, tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(address.PATIENCE, "inf")
    monkeypatch.setattr(client, "say", lambda text: signal.raise_signal(signal.SIGINT))
    with process(str(example), "0") as (server, url):
        settings = served(sd_folder, url)
        with pytest.raises(Interrupted, match="stopped while waiting"):
            train(settings, tmp_path / "run", Kill(server, after=1))
    assert checkpoint.read_newest(tmp_path / "run" / "checkpoints").numbers["iteration"] == 1


class Gate:
    """A reward that scores the images it is shown only after its gate has been opened."""

    def __init__(self) -> None:
        self.open, self.shown = threading.Event(), []

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        self.shown.append(len(images))
        assert self.open.wait(30)
        return brightness(images, prompts)


def test_images_are_scored_while_the_next_are_painted(sd_folder: Path, tmp_path: Path) -> None:
    """The rollout goes on while the first piece waits; scores and order are those of a single call."""
    gate = Gate()
    with serving(CustomReward("gate", gate)) as server:
        training = Training(served(sd_folder, server.url, **{"rollout.batch": 1}), tmp_path / "run")
        batch, painted = training.batch(1), []
        scoring = base.Scoring(training.reward)

        def piece(images: torch.Tensor, prompts: Sequence[str]) -> None:
            scoring.begin(images, prompts)
            painted.append(prompts)

        images = training.sampler.rollout(batch, 1, piece).images.contiguous()
        assert len(painted) == 4  # all are painted, and none has a score yet
        assert gate.shown in ([], [1])
        gate.open.set()
        assert torch.equal(scoring(images, batch.prompts), brightness(images, batch.prompts))
        assert gate.shown == [1] * 4
        assert torch.equal(scoring(images, batch.prompts), brightness(images, batch.prompts))
        assert gate.shown == [1] * 4 + [4]  # what is begun serves one call


def test_a_training_scores_ahead_and_asks_for_no_image_twice(sd_folder: Path, tmp_path: Path) -> None:
    gate = Gate()
    gate.open.set()
    settings = {"iterations": 1, "rollout.batch": 3, "evaluation.every": 1000, "preview.images": 0}
    with serving(CustomReward("gate", gate)) as server:
        remote = train(served(sd_folder, server.url, **settings), tmp_path / "ahead")
    # evaluations of two images before and after, and between them a rollout of four in pieces of three
    assert gate.shown == [2, 3, 1, 2]
    local = train(served(sd_folder, BRIGHTNESS, **settings), tmp_path / "local")
    assert remote_contents(remote, "x") == remote_contents(local, "x")


def test_an_evaluation_scores_a_piece_while_the_next_is_painted(sd_folder: Path, tmp_path: Path) -> None:
    gate = Gate()

    def watch(pieces: list[Batch]) -> Iterator[Batch]:
        yield pieces[0]
        gate.open.set()  # only now, with the first painted, can it be scored
        yield from pieces[1:]

    changes = {"rollout.batch": 1, "evaluation.images": 3}
    with serving(CustomReward("gate", gate)) as server:
        remote = Training(served(sd_folder, server.url, **changes), tmp_path / "remote").evaluate
        (found,) = remote._replace(watch=watch)()
    (expected,) = Training(served(sd_folder, BRIGHTNESS, **changes), tmp_path / "local").evaluate()
    assert gate.shown == [1, 1, 1]
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("change", ["image", "prompt", "forgotten"])
def test_what_was_begun_of_other_images_is_forgotten(change: str, images: torch.Tensor) -> None:
    asked = []

    def wordy(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        asked.append(len(prompts))
        return brightness(images, prompts) + torch.tensor([float(len(prompt)) for prompt in prompts])

    with serving(CustomReward("wordy", wordy)) as server:
        remote = rewards.load(server.url)
        ahead.begin(remote, images[:2], PROMPTS[:2])
        others = images[2:] * 0.5 if change == "image" else images[2:]
        ahead.begin(remote, others, [*PROMPTS[2:4], "another"] if change == "prompt" else PROMPTS[2:])
        if change == "forgotten":
            ahead.forget(remote)
        assert torch.equal(remote(images, PROMPTS), wordy(images, PROMPTS))
    assert asked[-2] == (5 if change == "forgotten" else 3)


def test_an_image_with_a_nan_is_never_shown(images: torch.Tensor) -> None:
    shown, bad = [], images.clone()
    bad[1] = math.nan
    with serving(BRIGHT) as server:
        remote = rewards.load(server.url)
        scoring, chunk = base.Scoring(remote), remote.chunk
        remote.chunk = lambda images, prompts: shown.append(images) or chunk(images, prompts)
        for start in (0, 2):
            scoring.begin(bad[start : start + 2], PROMPTS[start : start + 2])
        scores = scoring(bad, PROMPTS)
    assert scores.isnan().tolist() == [False, True, False, False, False]
    assert scores[2:].equal(brightness(images, PROMPTS)[2:])
    assert all(seen.isfinite().all() for seen in shown)


def test_members_of_an_ensemble_score_ahead(images: torch.Tensor) -> None:
    gate = Gate()
    gate.open.set()
    with serving(CustomReward("gate", gate)) as server:
        both = Ensemble([rewards.load(server.url), BRIGHT], [1.0, 2.0])
        ahead.begin(both, images[:3], PROMPTS[:3])
        assert torch.equal(both.scores(images, PROMPTS)[:, 0], brightness(images, PROMPTS))
    assert gate.shown == [3, 2]


def test_a_refusal_ahead_is_told_when_the_scores_are_asked_for(images: torch.Tensor) -> None:
    with serving(BRIGHT) as server:
        remote = rewards.load(server.url)
    ahead.begin(remote, images, PROMPTS)
    with pytest.raises(UserError, match="gave no answer for 0 s"):
        remote(images, PROMPTS)


def test_what_is_no_number_is_for_the_run_to_judge(sd_folder: Path, tmp_path: Path) -> None:
    odd = CustomReward("odd", lambda images, prompts: [math.nan, 1.0])
    with serving(odd) as server:
        training = Training(served(sd_folder, server.url), tmp_path / "run")
        scores = base.Scoring(training.reward)(torch.zeros(2, 3, 8, 8), ["a cat", "a dog"])
    assert scores.isnan().tolist() == [True, False]
