"""A reward that another process scores, on another device or machine: ``http://host:port`` (``docs/rewards.md``)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from diffexp.rewards.ahead import Ahead
from diffexp.rewards.client import LONGEST_ANSWER, LONGEST_SCORE, Client, Request, Unreachable
from diffexp.rewards.protocol import encode
from diffexp.rewards.service import Service

EXACT = (torch.float32, torch.float16, torch.bfloat16)
FORM = 4096  # bytes of a request that are neither images nor prompts: more than enough


class RemoteReward:
    """Scores from ``diffexp serve-reward`` or whatever else speaks its protocol; without a gradient.

    Images travel exactly, in chunks that the server takes, and where a rollout has several batches each while the next
    is painted (``begin``). While the server can't be reached the call waits, for ``patience`` seconds at most (default:
    the environment's); what is scored already is kept.

    Raises:
        UserError: if the address is none, the server refuses the token or is no reward server, or patience ends.
    """

    differentiable = False

    def __init__(self, name: str, patience: float | None = None) -> None:
        self.name, self.client = name, Client(name, patience)
        with closing(self.client):
            service = self.client.persist(self.client.health)
        self.serves = service.name
        self.service: Service | None = service
        self.ahead, self.one_at_a_time = Ahead(self.score), Lock()
        self.begin, self.forget = self.ahead.begin, self.ahead.forget

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), float32, of images (B, 3, H, W) in [0, 1] for B prompts; NaN where the server has no number.

        Raises:
            UserError: as above, or if the server has begun to serve another reward.
        """
        known = self.ahead.take(images, prompts)
        scores = known + self.score(images[len(known) :], prompts[len(known) :])
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """The scores of all images, chunk by chunk."""
        scores: list[float] = []
        # between calls a run may compute for longer than a server keeps a connection
        with self.one_at_a_time, closing(self.client):
            while len(scores) < len(prompts):
                start = len(scores)
                scores += self.client.persist(partial(self.chunk, images[start:], prompts[start:]))
        return scores

    @torch.no_grad()
    def chunk(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """The scores of the first few images, as many as the server takes at once."""
        service = self.service = self.service or self.client.health()
        self.check(service.name)
        count = self.largest(images, prompts, service)
        exact = images[:count] if images.dtype in EXACT else images[:count].float()
        content_type, body = encode(exact, prompts[:count], service.images[0])
        longest = LONGEST_ANSWER + LONGEST_SCORE * count
        try:
            answer = self.client.ask(Request("POST", "/score", content_type, body, longest))
        except Unreachable:
            self.service = None  # it may come back with other limits, or another reward
            raise
        return self.verified(answer, count)

    def check(self, name: object) -> None:
        """Refuses another reward than the one that the run began with."""
        if name != self.serves:
            was, now = (self.client.clean(str(known)) for known in (self.serves, name))
            raise self.client.mistake(f"serves {now} now, and served {was}: start it with {was} again")

    def largest(self, images: Tensor, prompts: Sequence[str], service: Service) -> int:
        """How many images fit in one request."""
        room = service.limits.bytes - FORM - len(json.dumps(list(prompts[: service.limits.images])))
        fitting = min(len(prompts), service.limits.images, room // (4 * images[0].numel()))
        if fitting < 1:
            size = "×".join(str(side) for side in images.shape[-2:])
            raise self.client.mistake(f"takes at most {service.limits.bytes} bytes, less than one image of {size}")
        return fitting

    def verified(self, answer: dict[str, Any], count: int) -> list[float]:
        """The scores in an answer, if they are as many numbers and nulls (here NaN) as there were images."""
        self.check(answer.get("name", self.serves))
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} scores" if isinstance(scores, list) else "no scores"
            raise self.client.mistake(f"answered {count} images with {found}")
        if not all(score is None or type(score) in (int, float) for score in scores):
            raise self.client.mistake("answered with a score that is no number")
        try:
            return [math.nan if score is None else float(score) for score in scores]
        except OverflowError:  # JSON's whole numbers have no end
            raise self.client.mistake("answered with a score beyond all floats") from None
