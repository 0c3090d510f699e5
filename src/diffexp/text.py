"""What conditions the denoising network: the embedded prompts, and where their words are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.devices import numbers, upload

Words = list[tuple[int, ...]]  # one prompt's words, each as the positions of its tokens


class TextEmbedding(NamedTuple):
    """A batch of embedded prompts.

    ``hidden`` is what the network attends to (for SDXL both encoders' states, side by side in D) and ``pooled`` SDXL's
    additional vector. ``words[b]`` lists the token positions of each word of prompt b, without BOS, EOS and padding.
    ``null_hidden`` embeds the empty text: c_null of Eq. 8. ``uncond_*`` condition the unconditional prediction of
    Eq. 4: the same as ``null_hidden``, but zeros for an SDXL that was trained so. ``weights`` are each token's w_prompt
    of Eq. 8, already applied; None where no word was weighted.
    """

    hidden: Float[Tensor, "B L D"]
    words: list[Words]
    null_hidden: Float[Tensor, "L D"]
    uncond_hidden: Float[Tensor, "L D"]
    pooled: Float[Tensor, "B P"] | None = None
    uncond_pooled: Float[Tensor, " P"] | None = None
    weights: Float[Tensor, "B L"] | None = None

    def select(self, rows: Sequence[int]) -> TextEmbedding:
        """The embedding of some of the prompts, in the order of ``rows`` (repetitions allowed)."""
        index = numbers(rows, torch.long, self.hidden.device)
        return self._replace(
            hidden=self.hidden[index],
            words=[self.words[row] for row in rows],
            pooled=None if self.pooled is None else self.pooled[index],
            weights=None if self.weights is None else self.weights[index],
        )

    def to(self, device: torch.device) -> TextEmbedding:
        """The embedding with its tensors on a device."""
        moved: dict[str, Any] = {
            key: upload(value, device) for key, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**moved)

    def unconditional(self) -> TextEmbedding:
        """What stands in for every prompt in the unconditional prediction."""
        pooled = self.uncond_pooled
        return self._replace(
            hidden=self.uncond_hidden.expand_as(self.hidden),
            pooled=None if pooled is None else pooled.expand(len(self.hidden), -1),
        )


def concatenate(texts: Sequence[TextEmbedding]) -> TextEmbedding:
    """One batch out of several that share their null embedding."""
    first = texts[0]
    return first._replace(
        hidden=torch.cat([text.hidden for text in texts]),
        words=[words for text in texts for words in text.words],
        pooled=None if first.pooled is None else torch.cat([text.pooled for text in texts if text.pooled is not None]),
        weights=None
        if first.weights is None
        else torch.cat([text.weights for text in texts if text.weights is not None]),
    )
