"""Malformed requests for a reward server, always the same ones for a seed, and what may come back."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from random import Random

from rewardserver import TOKEN, Response, form, post, send

Kind = Callable[[Random, bytes], bytes]
HEAD, EDGE = b"\r\n\r\n", b"--edge"
AUTHORISED = f"Authorization: Bearer {TOKEN}"


def noise(rng: Random, most: int = 300) -> bytes:
    return rng.randbytes(rng.randrange(most))


def cut(rng: Random, good: bytes) -> bytes:
    """The beginning of a good request."""
    return good[: rng.randrange(len(good))]


def flipped(rng: Random, data: bytes, first: int, last: int) -> bytes:
    """A few bytes changed between two places."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(first, min(last, len(data)))] = rng.randrange(256)
    return bytes(changed)


def bad_head(rng: Random, good: bytes) -> bytes:
    return flipped(rng, good, 0, good.index(HEAD))


def bad_body(rng: Random, good: bytes) -> bytes:
    start = good.index(HEAD) + 4
    return flipped(rng, good, start, start + 500)


def spliced(rng: Random, good: bytes) -> bytes:
    """Pieces of a good request in another order, with noise between them."""
    marks = sorted(rng.randrange(len(good)) for _ in range(4))
    pieces = [good[a:b] for a, b in zip([0, *marks], [*marks, len(good)], strict=True)]
    rng.shuffle(pieces)
    return noise(rng, 9).join(pieces)


def bad_line(rng: Random, good: bytes) -> bytes:
    """Methods, paths and versions that there are not."""
    method = rng.choice(["GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "", "\0", "__init__", "é"])
    path = rng.choice(["/", "/score/", "/../etc/passwd", "*", "http://evil/score", "/%00", "?", "/scorе"])
    version = rng.choice(["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/9.9", "HTTP/1.1.1", "HTTP/²", "ICY", "HTTP/1e1"])
    line = f"{method} {path} {version}".encode("latin-1", "replace")
    return line + good[good.index(b"\r\n") :]


def bad_length(rng: Random, good: bytes) -> bytes:
    """A length that is none, or not the body's."""
    body = good.index(HEAD) + 4
    true = len(good) - body
    lie = rng.choice(
        [-1, 0, 1, true - 1, true + 1, 2**31, 2**64, 10**30, "x", "", "0x10", "1_0", "+9", "9 9", "9,9", 3.5]
    )
    return re.sub(rb"Content-Length: \d+", f"Content-Length: {lie}".encode(), good)


def more_headers(rng: Random, good: bytes) -> bytes:
    """Headers that contradict, smuggle, flood or wind themselves over lines."""
    extra = rng.choice(
        [
            b"Transfer-Encoding: chunked",
            b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
            b"Content-Length: 7",
            b"Expect: 200-ok",
            b"Authorization: Bearer x",
            b"Origin: null",
            b"Connection: upgrade\r\nUpgrade: websocket",
            b" folded: line",
            b": nameless",
            b"no colon",
            b"x: " + noise(rng),
            b"x: y\r\n" * rng.randrange(200),
            b"x: " + b"z" * rng.randrange(100_000),
            b"Content-Type: multipart/form-data; boundary=" + noise(rng, 100),
            b"\r\nGET /health HTTP/1.1",
        ]
    )
    return good.replace(b"\r\nHost: x", b"\r\n" + extra, 1)


def bad_prompts(rng: Random, good: bytes) -> bytes:
    deep = rng.randrange(1, 60_000)
    text = rng.choice(
        [
            b"[" * deep,
            b"[" * deep + b"]" * deep,
            b'{"a":' * deep,
            b"[" + b"1," * rng.randrange(5000) + b"1]",
            b"1" * rng.randrange(1, 6000),
            b'["a"' + b',"a"' * rng.randrange(2, 200) + b"]",
            b'["' + b"a" * rng.randrange(10_001, 40_000) + b'", "b"]',
            b'["\\ud83d", "b"]',
            b'["a", null]',
            b'[NaN, "a"]',
            b'"ab"',
            b'["a" "b"]',
            noise(rng),
        ]
    )
    part = good[good.index(EDGE, good.index(EDGE) + 1) :]  # the images, as they were
    return post(form([("prompts", "application/json", text)])[: -len(b"--edge--\r\n")] + part, AUTHORISED)


def bad_tensor(rng: Random, good: bytes) -> bytes:
    size = rng.choice([0, 1, 3, 8, 2**31, 2**63, -1])
    entry = {
        "dtype": rng.choice(["F32", "F64", "I64", "BOOL", "F8_E4M3", "X", "", None, 3]),
        "shape": rng.choice(
            [[2, 3, 16, 16], [size, 3, 8, 8], [2, 3, size], [size] * 40, [], None, "4", [2, 3, 16, 16.5]]
        ),
        "data_offsets": rng.choice([[0, 6144], [0, size], [size, 0], [5, 6149], [], [0], None, [0, 10**40]]),
    }
    name = rng.choice(["images", "images", "images", "__metadata__", "", "a" * 999])
    header = json.dumps({name: entry} | rng.choice([{}, {"more": entry}, {"__metadata__": {"a": 1}}])).encode()
    header = rng.choice([header, header, noise(rng), b"{" * rng.randrange(1, 9000), b""])
    length = rng.choice([len(header), len(header), len(header), 0, 2**16 + 1, 2**40, 2**64 - 1])
    data = struct.pack("<Q", length) + header + bytes(rng.choice([0, 5, 6144]))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    return two(("images", "application/x-safetensors", data))


def bad_picture(rng: Random, good: bytes) -> bytes:
    """PNG files with wrong sizes, depths, checksums, palettes and texts."""
    side = rng.choice([0, 1, 8, 4097, 65_535, 2**31 - 1, 2**32 - 1])
    size = struct.pack(
        ">IIBBBBB", side, rng.choice([side, 8]), rng.choice([1, 8, 16, 77]), rng.randrange(8), 0, 0, rng.randrange(3)
    )
    chunks = [chunk(rng, b"IHDR", size)]
    kinds = [b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fdAT", b"IEND", b"????", b"IHDR"]
    chunks += [chunk(rng, rng.choice(kinds), noise(rng, 90)) for _ in range(rng.randrange(6))]
    data = rng.choice([b"\x89PNG\r\n\x1a\n"] * 9 + [b"GIF89a", b""]) + b"".join(chunks)
    return two(*[("images", "image/png", data)] * rng.choice([2, 2, 2, 1, 70]))


def chunk(rng: Random, kind: bytes, data: bytes) -> bytes:
    import zlib

    length = rng.choice([len(data)] * 9 + [0, 2**31])
    check = rng.choice([zlib.crc32(kind + data)] * 9 + [7])
    return struct.pack(">I", length) + kind + data + struct.pack(">I", check)


def two(*images: tuple[str, str, bytes]) -> bytes:
    return post(form([("prompts", "", b'["a", "b"]'), *images]), AUTHORISED)


def bad_form(rng: Random, good: bytes) -> bytes:
    """Forms that do not begin, end or hold together."""
    body = good[good.index(HEAD) + 4 :]
    body = rng.choice(
        [
            body.replace(EDGE, b"--other"),
            body.replace(EDGE, b"edge", 1),
            body + body,
            EDGE + b"\r\n" + body,
            body.replace(b"\r\n", b"\n"),
            EDGE * rng.randrange(3000),
            (EDGE + b"\r\n\r\n\r\n") * rng.randrange(3000),
            form([(noise(rng, 20).hex(), "", noise(rng))] * rng.randrange(80)),
            body.replace(b'"prompts"', b'"images"'),
            body.replace(b"application/x-safetensors", noise(rng, 20)),
            noise(rng, 5000),
            b"",
        ]
    )
    kind = rng.choice(["multipart/form-data; boundary=edge"] * 4 + ["multipart/form-data; boundary=", "text/plain", ""])
    return post(body, AUTHORISED, kind=kind)


def bad_token(rng: Random, good: bytes) -> bytes:
    token = TOKEN.encode()
    lie = rng.choice(
        [token[:-1], token + b"x", token[::-1], b"", noise(rng, 40), token + b"\0", b"\t" + token.swapcase()]
    )
    return good.replace(token, lie)


ALONE: tuple[Kind, ...] = (
    cut,
    bad_head,
    spliced,
    bad_line,
    bad_length,
    more_headers,
    bad_token,
    lambda rng, good: noise(rng),
    lambda rng, good: noise(rng) + HEAD + good,
)
"""After these the connection may be over."""
FRAMED: tuple[Kind, ...] = (bad_body, bad_prompts, bad_tensor, bad_picture, bad_form)
"""After these it must go on: the body is as long as the head says."""
HARMLESS = (bad_head, bad_body, spliced, more_headers, bad_length, bad_form)
"""What may, by luck, leave a request good: a changed pixel or letter, another good header, a form with an appendix."""
TOGETHER = 9


def storm(url: str, good: bytes, count: int, seed: int) -> dict[int, int]:
    """Sends at least so many malformed requests, half of them alone; returns how often each status came back.

    Raises:
        AssertionError: if an answer is neither a refusal in one line of JSON nor, where luck may do it, scores.
    """
    rng, seen, sent = random.Random(seed), dict[int, int](), 0  # noqa: S311
    while sent < count:
        kinds = [(kind, 1) for kind in ALONE] + [(FRAMED[sent // 18 % len(FRAMED)], TOGETHER)]
        for kind, times in kinds:
            requests = [kind(rng, good) for _ in range(times)]
            answers = send(url, b"".join(requests))
            assert times == 1 or len(answers) == times, (kind, requests, answers)
            for answer in answers:
                seen[answer.status] = seen.get(answer.status, 0) + 1
                assert acceptable(answer, kind in HARMLESS), (kind, requests, answer)
            sent += times
    return seen


def acceptable(answer: Response, lucky: bool) -> bool:
    if answer.status == 200:
        return lucky and answer.json.keys() >= {"name"}
    return 400 <= answer.status < 500 and answer.json.keys() == {"error"} and answer.body.count(b"\n") == 1
