"""The header of a safetensors file, in a fixed order: the library shuffles metadata anew in every process."""

from __future__ import annotations

import json
from io import BufferedRandom, BytesIO

LENGTH = 8  # bytes, little endian, before the header: how long it is


def put_in_order(file: BytesIO | BufferedRandom) -> None:
    """Sorts the metadata in a file's header, in place; its tensors stay where they are, at a multiple of 8 bytes."""
    file.seek(0)
    size = int.from_bytes(file.read(LENGTH), "little")
    header = json.loads(file.read(size))
    metadata = dict(sorted(header.pop("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": metadata, **header}, ensure_ascii=False, separators=(",", ":")).encode()
    file.seek(LENGTH)
    file.write(text.ljust(size))
