"""The files of a run folder that grow or are looked at while it trains."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffexp.runs import durable
from diffexp.runs.names import RECORDS


class JsonLines:
    """A file of one JSON object a line. Lines are appended whole; ``restore`` takes back what no checkpoint knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def append(self, record: Mapping[str, Any]) -> None:
        size = self.size()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(record)) + "\n")
        except OSError:
            os.truncate(self.path, size)  # no torn line where the disk was full
            raise

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size

    def head(self, size: int) -> bytes:
        """The first ``size`` bytes."""
        with self.path.open("rb") as file:
            return file.read(size)

    def restore(self, content: bytes) -> bool:
        """Makes ``content`` all that the file holds. False if the file did not begin with it: then it was damaged."""
        if self.head(len(content)) != content:
            durable.replace(self.path, content)
            return False
        os.truncate(self.path, len(content))
        return True


class Records:
    """All files of JSON lines of a run; checkpoints hold copies of them."""

    def __init__(self, run: Path) -> None:
        self.files = {name: JsonLines(run / name) for name in RECORDS}

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        self.files[name].append(record)

    def sizes(self) -> dict[str, int]:
        """Bytes so far of each."""
        return {name: file.size() for name, file in self.files.items()}

    def heads(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """The first bytes of each: none of those that have no size."""
        return {name: file.head(sizes.get(name, 0)) for name, file in self.files.items()}

    def restore(self, contents: Mapping[str, bytes]) -> list[Path]:
        """Makes ``contents`` all that they hold; returns those that were damaged."""
        return [file.path for name, file in self.files.items() if not file.restore(contents.get(name, b""))]
