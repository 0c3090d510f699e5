from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from diffexp.errors import UserError
from diffexp.sharing.push import push


class Hub:
    """A hub that remembers what it was asked, and refuses when told to."""

    def __init__(self, public: bool = False, refusal: Exception | None = None) -> None:
        self.public, self.refusal = public, refusal
        self.repositories: list[tuple[str, bool | None]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        if self.refusal:
            raise self.refusal
        assert exist_ok
        self.repositories.append((repo_id, private))

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> Any:
        self.files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lora = tmp_path / "run" / "lora"
    (lora / "images").mkdir(parents=True)
    for name in ("pytorch_lora_weights.safetensors", "run.kohya.safetensors", "README.md", "notes.txt", ".env"):
        (lora / name).write_text(name)
    (lora / ".tmp-run.kohya.safetensors").write_text("left by a process that was killed")
    for name in ("after-0.png", "curve.svg", "secret.pem"):
        (lora / "images" / name).write_text(name)
    (tmp_path / "run" / "config.toml").write_text("")
    return tmp_path / "run"


def test_lora_card_and_images_and_nothing_else(run: Path, hub: Hub) -> None:
    assert push(run, "me/pretty") == "https://hub/me/pretty"
    assert hub.repositories == [("me/pretty", None)]
    assert hub.files == {
        name: Path(name).name.encode()
        for name in (
            *("README.md", "images/after-0.png", "images/curve.svg"),
            *("pytorch_lora_weights.safetensors", "run.kohya.safetensors"),
        )
    }


def test_private_stays_private(run: Path, hub: Hub) -> None:
    push(run, "me/pretty", private=True)
    assert hub.repositories == [("me/pretty", True)]
    hub.files, hub.public = {}, True
    with pytest.raises(UserError, match="exists and is public"):
        push(run, "me/pretty", private=True)
    assert hub.files == {}


@pytest.mark.parametrize(
    ("missing", "part"), [("pytorch_lora_weights.safetensors", "finished"), ("README.md", "README.md")]
)
def test_an_unfinished_run_is_refused(missing: str, part: str, run: Path, hub: Hub) -> None:
    (run / "lora" / missing).unlink()
    with pytest.raises(UserError, match=part):
        push(run, "me/pretty")
    assert hub.repositories == []


@pytest.mark.parametrize("link", ["lora/pytorch_lora_weights.safetensors", "lora/images", "lora"])
def test_links_are_refused(link: str, run: Path, hub: Hub, tmp_path: Path) -> None:
    (run / link).rename(tmp_path / "elsewhere")
    (run / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        push(run, "me/pretty")
    assert hub.repositories == []


@pytest.mark.parametrize("name", ["pretty", "me/pretty/two", "me/pre tty", "../x", ""])
def test_names_are_checked(name: str, run: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match="--to"):
        push(run, name)
    assert hub.repositories == []


def refused(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, "no\nsecond line")
    error.response = response
    return error


@pytest.mark.parametrize(
    ("refusal", "part"),
    [
        (LocalTokenNotFoundError("no token"), "log in with `hf auth login`"),
        (refused(401), "log in with `hf auth login`"),
        (refused(403), "may not write there"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("down\nfor good"), r"could not be reached or refused \(ConnectionError: down"),
    ],
)
def test_a_refusal_is_one_line(refusal: Exception, part: str, run: Path, hub: Hub) -> None:
    hub.refusal = refusal
    with pytest.raises(UserError, match=part) as caught:
        push(run, "me/pretty")
    assert len(str(caught.value).splitlines()) == 1
