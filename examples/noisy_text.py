"""An exploration strategy: noise on the embedded prompt, after CADS (Sadat et al., ICLR 2024).

Run it as `--set exploration.strategy=examples/noisy_text.py:noisy_text`, alone or beside the paper's two.
"""

from diffexp.randomness import randn
from diffexp.rollout import Batch

STRENGTH = 0.1


def noisy_text(batch: Batch) -> Batch:
    """The batch with normal noise on every token, in units of the embedding's own spread."""
    hidden = batch.text.hidden
    # each sample's own random numbers: the same whatever the batch size, the number of processes, or a restart
    noise = randn(batch.generators("noisy text"), hidden.shape[1:], hidden.device)
    return batch._replace(text=batch.text._replace(hidden=hidden + STRENGTH * hidden.std() * noise))
