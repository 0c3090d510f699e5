"""How much better than expected a sample's reward was."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6


def batch_advantages(rewards: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(r − mean) / std over the samples of one iteration."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + EPS)


@dataclass
class PromptAdvantages:
    """(r − mean) / std over the last ``buffer`` rewards of the same prompt, kept across iterations.

    Black et al. 2024, section 4.3. While a prompt has fewer than ``min_count`` rewards, the iteration's own mean and
    standard deviation stand in. Statistics belong to the prompt as the user wrote it.

    Raises:
        ValueError: if ``min_count`` is above ``buffer``, and no prompt could ever have enough.
    """

    buffer: int = 32
    min_count: int = 16
    history: dict[str, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.min_count > self.buffer:
            raise ValueError(f"min_count = {self.min_count} is above buffer = {self.buffer}")

    def __call__(self, prompts: Sequence[str], rewards: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Remembers the rewards of B samples, then compares each with what its prompt has had, itself included."""
        values, advantages = rewards.tolist(), batch_advantages(rewards).tolist()
        for prompt, reward in zip(prompts, values, strict=True):
            self.history.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        for row, prompt in enumerate(prompts):
            past = torch.tensor(list(self.history[prompt]), dtype=torch.float64)
            if len(past) >= self.min_count:
                advantages[row] = float((values[row] - past.mean()) / (past.std(correction=0) + EPS))
        return rewards.new_tensor(advantages)

    def state(self) -> dict[str, list[float]]:
        """The rewards remembered of each prompt, as plain numbers."""
        return {prompt: list(rewards) for prompt, rewards in self.history.items()}

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Restores what ``state`` returned."""
        self.history = {prompt: deque(rewards, maxlen=self.buffer) for prompt, rewards in state.items()}
