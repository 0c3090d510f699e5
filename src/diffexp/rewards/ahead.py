"""Scoring ahead: a reward that another process computes scores some images while the next ones are painted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextvars import Context, copy_context
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

Item = TypeVar("Item")

POLL = 0.1  # seconds between two looks at a piece at work: not everywhere does a signal end a longer wait


@runtime_checkable
class Eager(Protocol):
    """A reward that can begin before it is called."""

    def begin(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Starts to score images (B, 3, H, W) for B prompts; calls follow that ask for them in the order begun."""

    def forget(self) -> None:
        """There will be no such calls."""


def begin(reward: object, images: Tensor, prompts: Sequence[str]) -> None:
    """Lets a reward begin that can."""
    if isinstance(reward, Eager):
        reward.begin(images, prompts)


def forget(reward: object) -> None:
    """What a reward has begun is not wanted any more."""
    if isinstance(reward, Eager):
        reward.forget()


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each once the next is there."""
    waiting: list[Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


class Piece(NamedTuple):
    """Images (B, 3, H, W), on the CPU, their prompts, and what will be their scores."""

    images: Tensor
    prompts: list[str]
    scores: Future[list[float]]


class Ahead:
    """The pieces of a batch that ``score`` is at work on, one after the other, in a thread that dies with the process.

    ``score`` sees the context variables of whoever begins, and so ends its waiting when a signal ends the run.
    """

    def __init__(self, score: Callable[[Tensor, list[str]], list[float]]) -> None:
        self.score = score
        self.pieces: list[Piece] = []
        self.queue: SimpleQueue[tuple[Context, Piece]] | None = None

    def begin(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Adds a piece, unless an image has a NaN: no reward is ever shown one."""
        # on the CPU, where they have to go anyway: a batch on its way takes no memory of the device
        piece = Piece(images.detach().cpu(), list(prompts), Future())
        if not piece.images.isfinite().all():
            return
        if self.queue is None:
            self.queue = SimpleQueue()
            Thread(target=self.work, args=(self.queue,), name="scoring-ahead", daemon=True).start()
        self.pieces.append(piece)
        self.queue.put((copy_context(), piece))

    def work(self, queue: SimpleQueue[tuple[Context, Piece]]) -> None:
        """What the thread does."""
        while True:
            context, (images, prompts, scores) = queue.get()
            if scores.set_running_or_notify_cancel():
                try:
                    scores.set_result(context.run(self.score, images, prompts))
                except BaseException as error:  # also Interrupted: it is for whoever asks for the scores
                    scores.set_exception(error)

    def take(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """The scores of the first images, as many as were begun; once others were, all that was begun is forgotten.

        Raises:
            Exception: whatever ``score`` raised.
        """
        found: list[float] = []
        while self.pieces and len(found) < len(prompts):
            piece = self.pieces.pop(0)
            rows = slice(len(found), len(found) + len(piece.prompts))
            if piece.prompts != list(prompts[rows]) or not piece.images.equal(images[rows].cpu()):
                self.forget()
                break
            while not piece.scores.done():
                wait([piece.scores], POLL)
            found += piece.scores.result()
        return found

    def forget(self) -> None:
        """Begins no further piece; the one at work goes on for nothing."""
        for piece in self.pieces:
            piece.scores.cancel()
        self.pieces = []
