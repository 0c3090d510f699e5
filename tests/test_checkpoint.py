"""Whatever happens to a disk or to the process that writes to it: the old checkpoint or the new one can be read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from faultydisk import Camera, Disk, refusing

from diffexp.errors import UserError
from diffexp.runs import checkpoint, durable
from diffexp.runs.checkpoint import Checkpoint, NotSaved


def state(iteration: int) -> Checkpoint:
    """What a small run might save."""
    tensors = {"lora.q": torch.arange(6.0).view(2, 3) + iteration, "optimizer.q.step": torch.tensor(float(iteration))}
    metrics = "".join(f'{{"iteration": {k}}}\n' for k in range(iteration % 7)).encode()
    return Checkpoint(tensors, {"iteration": iteration}, {"metrics.jsonl": metrics, "evaluations.jsonl": b""})


def write(folder: Path, iteration: int, keep: int = 1) -> Path:
    saved = state(iteration)
    return checkpoint.write(folder, iteration, saved.tensors, saved.numbers, saved.records, keep)


def found(folder: Path) -> int | None:
    """The iteration of the newest whole checkpoint, all of which must be as it was saved."""
    newest = checkpoint.read_newest(folder)
    if newest is None:
        return None
    expected = state(newest.numbers["iteration"])
    assert newest.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(newest.tensors[key], value) for key, value in expected.tensors.items())
    assert newest.records == expected.records
    return newest.numbers["iteration"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder of checkpoints, with that of iteration 2."""
    write(tmp_path / "run" / "checkpoints", 2)
    return tmp_path / "run" / "checkpoints"


def test_a_checkpoint_reads_back_as_it_was_written(folder: Path) -> None:
    assert found(folder) == 2
    assert checkpoint.read_newest(folder).damaged == ()
    assert checkpoint.read_newest(folder.parent / "elsewhere") is None


def operations(folder: Path, keep: int) -> list[str]:
    """What a save does, in this order."""
    with Disk().watched() as disk:
        write(folder, 3, keep)
    return disk.log


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_at_every_operation_of_a_save(folder: Path, tmp_path: Path, keep: int, code: int) -> None:
    shutil.copytree(folder, tmp_path / "spare")
    log = operations(tmp_path / "spare", keep)
    assert log.count("fsync") == 7  # five files, their folder, its parent
    assert {"open", "write", "mkdir", "rename"} <= set(log)
    for number in range(len(log)):
        run = tmp_path / f"{number}" / "checkpoints"
        shutil.copytree(folder, run)
        try:
            with refusing(number, code).watched():
                write(run, 3, keep)
            expected = [3]
        except NotSaved as error:
            assert "iteration-000003: not saved (" in str(error)
            assert os.strerror(code) in str(error)
            expected = [2, 3]
        assert found(run) in expected, log[number]
        write(run, 3, keep)  # the disk is in order again
        assert found(run) == 3
        write(run, 4, keep)
        assert sorted(path.name for path in run.iterdir()) == ["iteration-000003", "iteration-000004"][-keep:]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("power", [True, False], ids=["the process dies", "the machine dies"])
def test_a_death_before_every_operation_of_a_save(folder: Path, tmp_path: Path, keep: int, power: bool) -> None:
    camera = Camera(folder, tmp_path / "album", power)
    with camera.watched():
        write(folder, 3, keep)
    assert len(camera.pictures) == len(camera.log) >= 20
    seen = [found(picture) for picture in [*camera.pictures, folder]]
    assert seen == sorted(seen)
    assert set(seen) == {2, 3}
    for picture in camera.pictures:
        write(picture, 4, keep)
        assert found(picture) == 4
        assert not [path for path in picture.iterdir() if path.name.startswith(durable.TEMPORARY)]


@pytest.mark.parametrize("power", [True, False], ids=["the process dies", "the machine dies"])
def test_a_death_before_every_operation_of_a_replacement(tmp_path: Path, power: bool) -> None:
    file = tmp_path / "folder" / "config.toml"
    file.parent.mkdir()
    durable.replace(file, b"old " * 100)
    camera = Camera(file.parent, tmp_path / "album", power)
    with camera.watched():
        durable.replace(file, b"new " * 200)
    for picture in camera.pictures:
        assert (picture / file.name).read_bytes() in (b"old " * 100, b"new " * 200)
    for number in range(len(camera.log)):
        with refusing(number).watched(), pytest.raises(OSError, match=os.strerror(errno.EIO)):
            durable.replace(file, b"newer")
        assert file.read_bytes() in (b"new " * 200, b"newer")


def flips(data: bytes) -> Iterator[bytes]:
    """The data with one bit changed, 64 times."""
    draw = np.random.default_rng(0)
    for place in draw.integers(len(data), size=64 if data else 0):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.integers(8)
        yield bytes(flipped)


def test_every_damage_is_seen_and_the_older_checkpoint_taken(folder: Path) -> None:
    newest = write(folder, 3, keep=2)
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        lengths = sorted({len(data) * k // 16 for k in range(16)} - {len(data)})
        for damaged in [*(data[:length] for length in lengths), data + b"\0", b"\0" * len(data), *flips(data)]:
            if damaged == data:
                continue
            file.write_bytes(damaged)
            # a flipped bit in the manifest's format number may do no harm, but nothing else
            assert found(folder) == 2 or file.name == checkpoint.MANIFEST
        file.unlink()
        assert found(folder) == 2
        assert checkpoint.read_newest(folder).damaged[0].startswith("iteration-000003 (")
        file.write_bytes(data)
        assert found(folder) == 3


def test_when_every_checkpoint_is_damaged_nothing_begins_anew(folder: Path) -> None:
    write(folder, 3, keep=2)
    for file in folder.rglob(checkpoint.TENSORS):
        os.truncate(file, 10)
    with pytest.raises(UserError, match=r"no checkpoint is whole, not even iteration-000003 \(state.safe"):
        checkpoint.read_newest(folder)


def test_a_new_checkpoint_outlives_a_damaged_one_with_a_higher_number(folder: Path) -> None:
    damaged = write(folder, 9, keep=2) / checkpoint.MANIFEST
    damaged.write_bytes(b"{}")
    assert found(folder) == 2
    write(folder, 3, keep=1)
    assert [path.name for path in folder.iterdir()] == ["iteration-000003"]


def test_a_damaged_checkpoint_is_replaced_by_that_of_the_same_iteration(folder: Path) -> None:
    (folder / "iteration-000002" / checkpoint.NUMBERS).unlink()
    write(folder, 2)
    assert found(folder) == 2


def test_order_is_by_number_and_other_names_are_left_alone(folder: Path) -> None:
    write(folder, 999_999, keep=3)
    write(folder, 1_000_000, keep=3)
    (folder / "iteration-000003 (copy)").mkdir()
    assert found(folder) == 1_000_000
    write(folder, 1_000_001, keep=1)
    assert {path.name for path in folder.iterdir()} == {"iteration-1000001", "iteration-000003 (copy)"}


def test_a_format_of_a_newer_version_is_named(folder: Path) -> None:
    manifest = folder / "iteration-000002" / checkpoint.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(UserError, match="its format 99 is of a newer diffexp, this one knows 1: upgrade"):
        checkpoint.read_newest(folder)


def test_no_file_outside_the_checkpoint_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "secret").write_bytes(b"secret")
    manifest = folder / "iteration-000002" / checkpoint.MANIFEST
    files = json.loads(manifest.read_text())["files"]
    files["../../secret"] = checkpoint.fingerprint(b"secret")
    manifest.write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(UserError, match=r"manifest.json is not as it was written"):
        checkpoint.read_newest(folder)


def test_too_little_room_is_seen_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=24_575))
    with (
        Disk().watched() as disk,
        pytest.raises(NotSaved, match=r"it needs 24,576 bytes, and 24,575 are free\)"),
    ):
        write(folder, 3)
    assert "write" not in disk.log
    assert found(folder) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=24_576))
    write(folder, 3)
    assert found(folder) == 3


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small / "checkpoints"
    write(folder, 2)
    (small / "other").write_bytes(b"x" * (150 << 10))
    for checked in (True, False):
        if not checked:  # as where a quota, not the disk, is used up
            monkeypatch.setattr(checkpoint, "make_room", lambda *_: None)
        large = {"lora.q": torch.ones(20_000)}
        with pytest.raises(NotSaved, match="are free" if checked else "No space left on device"):
            checkpoint.write(folder, 3, large, {"iteration": 3}, {}, keep=1)
        assert [path.name for path in folder.iterdir()] == ["iteration-000002"]
        assert found(folder) == 2
    (small / "other").unlink()
    write(folder, 3)
    assert found(folder) == 3


def test_one_process_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another process is training this run")
    with durable.claimed(tmp_path), refused, durable.claimed(tmp_path):
        pytest.fail("claimed twice")
    with durable.claimed(tmp_path):
        pass
