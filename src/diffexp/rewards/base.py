"""What a reward is, and the check that everything a reward returns goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffexp.errors import UserError
from diffexp.rewards import ahead


@runtime_checkable
class Reward(Protocol):
    """Maps images and their prompts to one number an image; higher is better.

    ``images`` is (B, 3, H, W), float, in [0, 1]; ``prompts`` has B strings; the result is (B,), float32, on the
    images' device. Where ``differentiable`` is true, gradients flow to ``images``; the reward's own weights are
    frozen and in evaluation mode.
    """

    name: str
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Call ``reward`` on images (B, 3, H, W) and return its checked scores, (B,) float32.

    Raises:
        UserError: if the scores are not B finite numbers, or carry no gradient although the reward says that it is
            differentiable and the images want one.
    """
    return checked(reward.name, score_or_nan(reward, images, prompts), prompts)


def score_or_nan(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same for who can do without some: not finite where the reward says so, and NaN where an image has a NaN.

    The reward is never shown such an image.

    Raises:
        UserError: if the scores are not B numbers, or carry no gradient although they should.
    """
    if len(images) != len(prompts):
        raise UserError(f"reward {reward.name!r}: {len(images)} images came with {len(prompts)} prompts")
    sound = images.detach().flatten(1).isfinite().all(1)
    if not sound.all():
        # with the images' graph, so that a loss of nothing but these goes backwards as any other
        scores = images.float().flatten(1).mean(1) * torch.nan
        rows = sound.nonzero().flatten()
        if len(rows):
            scores[rows] = score_or_nan(reward, images[rows], [prompts[row] for row in rows.tolist()])
        return scores
    # a decoder's images may lie in memory pixel by pixel: summed in that order, they would differ in the last bit from
    # the same images after a journey over http
    scores = shaped(reward.name, reward(images.contiguous(), prompts), prompts)
    wants_gradient = reward.differentiable and images.requires_grad and torch.is_grad_enabled()
    if wants_gradient and not scores.requires_grad:
        raise UserError(
            f"reward {reward.name!r} says differentiable = True but its scores carry no gradient to the images: "
            "compute them with torch operations on the images, without detach(), no_grad() or item()"
        )
    return scores


class Scoring:
    """A reward as an algorithm calls it: checked but for its values, for it drops samples without a finite one."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) for B prompts; see :func:`score_or_nan`."""
        return score_or_nan(self.reward, images, prompts)

    def begin(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Lets the reward begin, if it can: the next call begins with these images."""
        ahead.begin(self.reward, images, prompts)

    def forget(self) -> None:
        """There will be no such call."""
        ahead.forget(self.reward)


def checked(name: str, scores: Any, prompts: Sequence[str]) -> Tensor:
    """Turn what the reward ``name`` returned into a (B,) float32 tensor, or say what is wrong with it.

    Raises:
        UserError: naming the reward, what came back and, where one image is at fault, its prompt.
    """
    scores = shaped(name, scores, prompts)
    if not scores.isfinite().all():
        worst = int((~scores.isfinite()).nonzero()[0])
        found = f"{scores[worst].item()} for the prompt {prompts[worst]!r}"
        raise UserError(f"{_wanted(name, prompts)}: it returned {found}")
    return scores


def shaped(name: str, scores: Any, prompts: Sequence[str]) -> Tensor:
    """The same without a look at the values: a (B,) float32 tensor.

    Raises:
        UserError: naming the reward and what came back.
    """
    wanted = _wanted(name, prompts)
    if not isinstance(scores, Tensor):
        raise UserError(f"{wanted}: it returned {type(scores).__name__}")
    if scores.shape != (len(prompts),):
        raise UserError(f"{wanted}: it returned shape {tuple(scores.shape)} (first prompt: {_first(prompts)})")
    if scores.is_complex():
        raise UserError(f"{wanted}: it returned complex numbers ({scores.dtype})")
    return scores.float()


def in_chunks(
    function: Callable[[Tensor, Sequence[str]], Tensor], images: Tensor, prompts: Sequence[str], size: int
) -> Tensor:
    """Call ``function`` on ``size`` images and prompts at a time, and join its scores: bounds memory, changes nothing.

    Without gradients the memory is that of one chunk; with them, every chunk's graph is kept.
    """
    if not len(images):
        return images.new_zeros(0, dtype=torch.float32)
    starts = range(0, len(images), size)
    return torch.cat([function(images[start : start + size], prompts[start : start + size]) for start in starts])


def _wanted(name: str, prompts: Sequence[str]) -> str:
    return f"reward {name!r} must return {len(prompts)} finite numbers, one an image, as shape ({len(prompts)},)"


def _first(prompts: Sequence[str]) -> str:
    return repr(prompts[0]) if prompts else "none"
