"""What a reward server and its clients send each other (``docs/rewards.md``): never a pickle, nothing that runs.

A request is a form, multipart/form-data as browsers and curl send it: ``prompts``, a JSON array of strings, and
``images``, one safetensors file with the tensor "images" (exact), or one PNG for each prompt (8 bits a channel).
"""

from __future__ import annotations

import io
import json
import re
import secrets
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from diffexp.images import to_images
from diffexp.rewards.service import PNG, SAFETENSORS, Limits

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
PART_HEAD = 1024  # bytes
LARGEST_HEADER = 1 << 16  # bytes, of a safetensors file
BOUNDARY = re.compile(r'multipart/form-data\s*;(?:.*;)?\s*boundary="?([^";,\s]{1,70})"?\s*(?:;.*)?', re.IGNORECASE)


class Refused(Exception):
    """A request that is not answered with scores: the HTTP status, and the reason in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Part(NamedTuple):
    """One field of a form."""

    name: str
    type: str
    data: bytes


def encode(images: Tensor, prompts: Sequence[str], form: str) -> tuple[str, bytes]:
    """Content type and body of a request to score images (B, 3, H, W) in [0, 1], float; ``form`` is how they travel."""
    if form == SAFETENSORS:
        files = [to_safetensors({"images": images.detach().cpu().contiguous()})]
    else:
        files = [_png(picture) for picture in to_images(images)]
    fields = [("prompts", "", "application/json", json.dumps(list(prompts)).encode())]
    fields += [("images", f'; filename="{k}.{form[-3:]}"', form, data) for k, data in enumerate(files)]
    boundary = secrets.token_hex(16)
    body = []
    for name, file, kind, data in fields:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: {kind}\r\n\r\n'
        body += [head.encode(), data, b"\r\n"]
    return f"multipart/form-data; boundary={boundary}", b"".join([*body, f"--{boundary}--\r\n".encode()])


def decode(content_type: str, body: bytes, limits: Limits) -> tuple[Tensor, list[str]]:
    """Images (B, 3, H, W) in [0, 1] and B prompts, from a request; nothing in it is trusted.

    Raises:
        Refused: if it is not what ``encode`` makes, or exceeds the limits.
    """
    boundary = BOUNDARY.fullmatch(content_type)
    if not boundary:
        raise Refused(415, "the content type must be multipart/form-data with a boundary")
    parts = split(body, boundary[1].encode("latin-1"), limits.images + 1)
    texts = [part for part in parts if part.name == "prompts"]
    files = [part for part in parts if part.name == "images"]
    if len(texts) != 1 or not files or len(texts) + len(files) != len(parts):
        raise Refused(400, "the form must have one field prompts, and images, and nothing else")
    prompts = _prompts(texts[0].data, limits)
    if {part.type for part in files} == {PNG}:
        images = _pictures([part.data for part in files], limits)
    elif [part.type for part in files] == [SAFETENSORS]:
        images = _tensor(files[0].data, limits)
    else:
        raise Refused(415, f"images must be one {SAFETENSORS}, or {PNG} all of them")
    if len(images) != len(prompts):
        raise Refused(400, f"{len(images)} images came with {len(prompts)} prompts")
    return images, prompts


def split(body: bytes, boundary: bytes, most: int) -> list[Part]:
    """The fields of a form, at most ``most``.

    Raises:
        Refused: if it is none.
    """
    mark, parts = b"--" + boundary, []
    start = len(mark) + 2
    if body[:start] != mark + b"\r\n":
        raise Refused(400, "the form does not begin with its boundary")
    while True:
        end = body.find(b"\r\n" + mark, start)
        if end < 0:
            raise Refused(400, "the form does not end with its boundary")
        if len(parts) == most:
            raise Refused(413, f"the form has more than {most} fields")
        parts.append(_part(body, start, end))
        start = end + 2 + len(mark) + 2
        if body[start - 2 : start] == b"--":
            return parts
        if body[start - 2 : start] != b"\r\n":
            raise Refused(400, "a field of the form does not begin with its boundary")


def _part(body: bytes, start: int, end: int) -> Part:
    data = body.find(b"\r\n\r\n", start, min(end, start + PART_HEAD)) + 4
    if data < 4:
        raise Refused(400, "a field of the form has no head")
    head = body[start:data].decode("latin-1")
    name = re.search(r'^content-disposition: *form-data;.*\bname="([^"]*)"', head, re.IGNORECASE | re.MULTILINE)
    kind = re.search(r"^content-type: *([^;\s]*)", head, re.IGNORECASE | re.MULTILINE)
    if not name:
        raise Refused(400, "a field of the form has no name")
    return Part(name[1], kind[1].lower() if kind else "", body[data:end])


def _prompts(data: bytes, limits: Limits) -> list[str]:
    if len(data) > 8 * limits.images * limits.prompt:
        raise Refused(413, "the prompts are too long")
    try:
        prompts: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(400, "prompts must be JSON") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(400, "prompts must be an array of strings")
    if len(prompts) > limits.images:
        raise Refused(413, f"more than {limits.images} prompts")
    if any(len(prompt) > limits.prompt for prompt in prompts):
        raise Refused(413, f"a prompt has more than {limits.prompt} characters")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
        raise Refused(400, "a prompt is no Unicode text") from None
    return prompts


def _tensor(data: bytes, limits: Limits) -> Tensor:
    if len(data) < 8 or struct.unpack("<Q", data[:8])[0] > LARGEST_HEADER:
        raise Refused(400, "images are no safetensors file")
    tensors = _attempt(lambda: read_safetensors(data), "images are no safetensors file")
    if tensors.keys() != {"images"}:
        raise Refused(400, 'the safetensors file must hold one tensor, "images"')
    images = tensors["images"]
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in DTYPES:
        raise Refused(400, f"images must be (B, 3, H, W) in float or uint8: they are {images.dtype}, {images.ndim}-d")
    _check_size(images.shape, limits)
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not (images.min() >= 0 and images.max() <= 1):  # nor NaN
        raise Refused(400, "images must lie in [0, 1]")
    return images.clone()  # into memory that is aligned as torch's own is: the same bits as on the client


def _pictures(files: list[bytes], limits: Limits) -> Tensor:
    sizes = {_png_size(data) for data in files}
    if len(sizes) > 1:
        raise Refused(400, "images must all be of one size")
    width, height = sizes.pop()
    _check_size((len(files), 3, height, width), limits)
    return torch.stack(
        [_attempt(lambda data=data: _pixels(data, (width, height)), "an image is no PNG") for data in files]
    )


def _check_size(shape: Sequence[int], limits: Limits) -> None:
    count, channels, height, width = shape
    short, long = sorted((height, width))
    if not 1 <= count <= limits.images:
        raise Refused(413 if count else 400, f"{count} images: one request takes 1 to {limits.images}")
    # A model's preprocessing would blow up a thin strip to the square of its length.
    if long > limits.side or short < 1 or long > 8 * short:
        raise Refused(413, f"images are {height}×{width}: at most {limits.side} a side, and 8 times as long as wide")
    if count * channels * height * width * 4 > limits.bytes:
        raise Refused(413, f"{count} images of {height}×{width} are more than {limits.bytes} bytes in float32")


def _png_size(data: bytes) -> tuple[int, int]:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        raise Refused(400, "an image is no PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _pixels(data: bytes, size: tuple[int, int]) -> Tensor:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        if picture.size != size:  # a later header than the first, which was checked
            raise ValueError(picture.size)
        if picture.mode not in ("RGB", "RGBA", "L", "P"):
            raise ValueError(picture.mode)
        rgb = picture.convert("RGB")
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).float() / 255


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _attempt(read: Callable[[], Any], complaint: str) -> Any:
    try:
        return read()
    except Exception:
        # What a file of a stranger makes a reader raise has no common type.
        raise Refused(400, complaint) from None
