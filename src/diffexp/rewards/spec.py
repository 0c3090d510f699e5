"""What a reward can be called, and how such a name is read. Needs no torch, so that a config is checked at once."""

from __future__ import annotations

import math
from typing import NamedTuple

from diffexp import own
from diffexp.errors import UserError, unknown
from diffexp.rewards.address import is_remote, read_address, refuse_secrets


class Entry(NamedTuple):
    """A shipped reward: one line about it, its constructor (called with the device), whether it has a gradient."""

    description: str
    constructor: str
    differentiable: bool


SHIPPED = {
    "emoji-alignment": Entry(
        "how well image and prompt match, by a CLIP of the emoji world", "diffexp.rewards.emoji:alignment", True
    ),
    "emoji-aesthetic": Entry(
        "how pleasing the image is to the emoji world's rater", "diffexp.rewards.emoji:EmojiAesthetic", True
    ),
    "emoji-judge": Entry(
        "image and prompt judged by an independent model; for evaluation only", "diffexp.rewards.emoji:EmojiJudge", True
    ),
    "jpeg-compressibility": Entry(
        "minus the kilobytes of the image as a JPEG of quality 95", "diffexp.rewards.jpeg:compressibility", False
    ),
    "jpeg-incompressibility": Entry(
        "the kilobytes of the image as a JPEG of quality 95", "diffexp.rewards.jpeg:incompressibility", False
    ),
    "aesthetic": Entry(
        "LAION's aesthetic predictor on CLIP ViT-L/14, about 1 to 10", "diffexp.rewards.aesthetic:load", True
    ),
    "pickscore": Entry(
        "PickScore, human preference by CLIP ViT-H/14, about 20", "diffexp.rewards.pickscore:load", True
    ),
    "hpsv2": Entry("HPSv2.1, human preference by CLIP ViT-H/14, about 0.28", "diffexp.rewards.hpsv2:load", True),
    "hpsv2.0": Entry("HPSv2.0, as first published, about 0.28", "diffexp.rewards.hpsv2:load_v20", True),
    "imagereward": Entry(
        "ImageReward, human preference by BLIP, about -2 to 2", "diffexp.rewards.imagereward:load", True
    ),
    "clipscore": Entry(
        "100 x cosine of image and prompt by CLIP ViT-L/14, at least 0", "diffexp.rewards.clipscore:load", True
    ),
}


class Member(NamedTuple):
    """One reward of a spec and its weight."""

    name: str
    weight: float


def available() -> dict[str, str]:
    """The shipped rewards: name to one line about it."""
    return {name: entry.description for name, entry in SHIPPED.items()}


def parse(spec: str) -> tuple[Member, ...]:
    """Read a reward spec: a name, ``"file.py:function"``, ``"http://host:port"``, or a sum ``"2*hpsv2+aesthetic"``.

    Raises:
        UserError: for an empty part, a weight that is no finite number or zero, a reward named twice, or an address
            with a password.
    """
    refuse_secrets(spec)
    members = tuple(_member(part.strip(), spec) for part in spec.split("+"))
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward {spec!r} names {name!r} more than once: give it one weight, as in '2*{name}'")
    return members


def check_name(spec: str) -> None:
    """Check everything about a reward spec that needs neither torch nor the reward's code.

    Raises:
        UserError: for an unknown name (with the closest known one), a missing file or module, or a malformed spec.
    """
    for member in parse(spec):
        if is_remote(member.name):
            read_address(member.name)
        elif ":" in member.name:
            own.check("reward", member.name)
        elif member.name not in SHIPPED:
            remedy = "`diffexp rewards` lists them; one of your own is 'file.py:function', a server 'http://host:port'"
            raise unknown("reward", member.name, SHIPPED, remedy)


def check_one(name: str) -> None:
    """Check the name of a single reward: a sum is made of z-scores, which only training has the statistics for.

    Raises:
        UserError: for a sum, a weight, or what ``check_name`` refuses.
    """
    members = parse(name)
    if len(members) > 1 or members[0].weight != 1:
        single = " and ".join(repr(member.name) for member in members)
        raise UserError(f"{name!r} is a sum or has a weight, as only the training reward may: take {single} by itself")
    check_name(name)


def is_differentiable(spec: str) -> bool | None:
    """Whether the reward has a gradient; None where only loading can tell (a custom function)."""
    answers = [_is_differentiable(name) for name, _ in parse(spec)]
    if False in answers:
        return False
    return None if None in answers else True


def _is_differentiable(name: str) -> bool | None:
    if is_remote(name):
        return False
    return None if ":" in name else SHIPPED[name].differentiable


def _member(part: str, spec: str) -> Member:
    weight, star, name = part.rpartition("*")
    name = name.strip()
    if not name:
        raise UserError(f"reward {spec!r} has an empty part: write rewards as 'name' or 'name+2*other'")
    if not star:
        return Member(name, 1.0)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise UserError(f"reward {spec!r} has the weight {weight.strip()!r}: a weight is a finite number other than 0")
    return Member(name, value)
