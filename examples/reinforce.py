"""An algorithm: Eq. 6 as it stands. Run it as `--set algorithm.name=examples/reinforce.py:Reinforce`."""

from diffexp.algorithms import Algorithm, Outcome
from diffexp.algorithms.advantages import batch_advantages
from diffexp.algorithms.base import reward_metrics
from diffexp.learner import Share


class Reinforce(Algorithm):
    def __init__(self, sampler, learner, reward, batch=8):  # other keys of [algorithm] arrive here, such as batch
        self.sampler, self.learner, self.reward, self.batch = sampler, learner, reward, batch

    def step(self, batch):
        samples = self.learner.samples(batch.prompts)  # which of them are this process's, and which are good
        mine = batch.select(samples.own)
        path = self.sampler.rollout(mine, self.batch)
        rewards = samples.gather(self.reward(path.images, mine.prompts))
        advantages = batch_advantages(rewards)[samples.own]

        def losses(rows, count):
            for i, w in enumerate(path.scales):  # the scales and the text that the samples were painted with
                step = self.sampler.transition(path.latents[i, rows], i, path.text.select(rows), w)
                yield Share(-(advantages[rows] * step.log_prob(path.latents[i + 1, rows])).sum() / count)

        figures = self.learner.update(samples, losses)  # one optimiser step, the same on all processes
        return Outcome({**reward_metrics(rewards, queries=len(rewards)), **figures}, rewards, samples.dropped)
