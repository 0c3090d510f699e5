"""The training loop, and what it leaves in a run folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffexp import assembly, control, prompts, report, rewards
from diffexp.config import Recipe
from diffexp.devices import slow
from diffexp.errors import UserError
from diffexp.evaluation import Score
from diffexp.exploration import ConstantGuidance
from diffexp.memory import agree
from diffexp.preview import Preview
from diffexp.processes.interruption import Interrupted, Interruption
from diffexp.processes.parallel import join
from diffexp.randomness import generator
from diffexp.rewards.base import Scoring
from diffexp.rewards.checksum import checksum
from diffexp.rewards.ensemble import Ensemble
from diffexp.rollout import Batch
from diffexp.runs import durable
from diffexp.runs.environment import base_commit, peak_memory
from diffexp.runs.environment import describe as describe_environment
from diffexp.runs.keeper import Keeper, State
from diffexp.runs.ledger import describe as describe_exploration
from diffexp.runs.names import BEST, CONFIG, ENVIRONMENT, EVALUATIONS, EXPLORATION, METRICS, SAMPLES
from diffexp.runs.provenance import changes, made_with
from diffexp.runs.runfolder import claimed
from diffexp.samples import describe as describe_dropped
from diffexp.samples import summary
from diffexp.sharing import card
from diffexp.sharing.run_header import made_by
from diffexp.stopping import EarlyStopping
from diffexp.terminal.reporter import Reporter
from diffexp.tracking import Trackers, trackers_of

KL_IMAGES = 8  # of each set, on which the KL divergence to the untouched model is measured
PREVIEWS = 8  # images of a preview that the recipe does not have, and someone asks for


class Training:
    """One run: a recipe, and the folder that it fills. ``run`` does all of it; ``step`` is one iteration."""

    def __init__(self, recipe: Recipe, folder: Path, reporter: Reporter | None = None) -> None:
        self.recipe, self.folder = recipe, folder
        self.ranks = join(assembly.device(recipe.device))
        self.reporter = reporter if reporter and self.ranks.main else Reporter()
        if recipe.samples < self.ranks.size:
            raise UserError(f"samples = {recipe.samples}: {self.ranks.size} processes need at least one each")
        trackers_of(recipe)  # says what is missing before anything is loaded
        self.prompts = prompts.load(recipe.prompts)
        self.model = assembly.model(recipe, base_commit(folder, recipe.model.path))
        self.texts = self.model.encode_set(self.prompts)
        self.sampler = assembly.sampler(recipe, self.model)
        self.exploration = assembly.exploration(recipe, self.sampler)
        self.reward = rewards.load(recipe.reward, self.model.device)
        if recipe.algorithm.name in ("alignprop", "refl") and not self.reward.differentiable:
            needs = f"which {recipe.algorithm.name} needs: take ddpo instead"
            raise UserError(f"reward = {recipe.reward!r} has no gradient, {needs}")
        self.rollouts = assembly.rollouts(recipe)
        known, settings = {recipe.reward: self.reward}, recipe.evaluation
        self.evaluate = assembly.evaluator(recipe, self.sampler, known, self.ranks, self.rollouts)
        if recipe.model.train == "lora" and self.sampler.random_steps:
            self.evaluate = self.evaluate._replace(kl_images=KL_IMAGES)
        self.stopping = EarlyStopping(settings.held_out, settings.patience)
        assembly.make_trainable(recipe, self.model)
        self.model.park_text_encoders()
        self.learner = assembly.learner(recipe, self.model, self.ranks)
        if isinstance(self.reward, Ensemble):
            self.learner.journals.append(self.reward.observed)
        self.batches = self.rollouts, self.learner.batch
        self.algorithm = assembly.algorithm(recipe, self.sampler, self.learner, Scoring(self.reward), self.rollouts)
        self.interruption = Interruption(self.reporter.warned, self.pause)
        inputs = {"reward": checksum(recipe.reward), "prompts": hashlib.sha256(repr(self.prompts).encode()).hexdigest()}
        self.made_with = made_with(self.model.device) | self.model.source.record() | inputs
        self.iteration = self.queries = 0
        self.observed = False
        self.published: int | None = None  # the iteration of the files in the folder of what is trained
        self.keeper = Keeper(folder, recipe.checkpoint.keep_last, self.reporter, self.ranks.main)

    def run(self) -> Path:
        """Trains to the end, from the newest checkpoint if there is one; returns the run folder."""
        with ExitStack() as held, self.ranks.together(self.keeper.rescue):
            if self.ranks.main:
                held.enter_context(claimed(self.folder, self.recipe))
            self.open_folder()
            self.reporter.started(self.recipe, self.folder, self.iteration)
            if slowness := slow(self.recipe.model.precision, self.model.device):
                self.reporter.warned(slowness)
            try:
                trackers = Trackers(self.recipe, self.folder, self.ranks.main, self.reporter.warned)
                with trackers as self.trackers, self.interruption:
                    self.loop()
                self.finish()
                self.reporter.finished(self.folder)
            finally:
                self.reporter.closed()
        return self.folder

    def loop(self) -> None:
        """All iterations that are left, each with what is due after it."""
        if self.iteration == 0:
            self.calibrate()
            self.observe()
        elif not self.observed:
            self.complete()
        while not self.over:
            self.step()
            self.keeper.state = self.capture()
            self.complete()
        if self.stopping.over:
            self.reporter.warned(f"{self.so_far()}: {self.stopping.verdict()}")

    @property
    def over(self) -> bool:
        """Whether there is no further iteration."""
        return self.stopping.over or self.iteration >= self.recipe.iterations

    def complete(self) -> None:
        """What is due after an iteration."""
        self.observe()
        self.observed = True
        for change in agree(self.batches, self.ranks):
            self.reporter.warned(change)
        asked = self.asked()
        if "sample" in asked:
            self.preview()
        self.keeper.state = self.capture(self.keeper.state)
        if self.due(self.recipe.checkpoint.every) or "save" in asked or self.over:
            self.publish()
            self.keeper.save()
        if self.ranks.any(self.interruption.requested or "stop" in asked) and not self.over:
            self.publish()
            raise Interrupted(self.so_far())

    def pause(self) -> None:
        """Between two steps of a rollout or an update, once a signal has asked the run to end: it ends here.

        Several processes can only end together, after the iteration. The one before is saved at once all the same.
        """
        self.keeper.save()
        if self.ranks.size > 1:
            return
        if state := self.keeper.state:
            self.model.set_state(state.section("lora"))  # an update may have begun
            self.publish()
        raise Interrupted(self.so_far())

    def so_far(self) -> str:
        return f"stopped after iteration {self.iteration} of {self.recipe.iterations}"

    def finish(self) -> None:
        """What was trained, the report, and the card. The card is the last: where it is, the run is finished."""
        self.publish()
        if self.ranks.main:
            xl = "text_encoder_2" in self.model.text_encoders()
            self.attempt("report", partial(report.write, [self.folder]))
            self.attempt("model card", partial(card.write, self.folder, self.recipe, self.model.source, xl))

    def step(self) -> None:
        """One iteration: sample with exploration, score, update, and a line in ``metrics.jsonl``."""
        start, iteration = time.perf_counter(), self.iteration + 1
        batch = self.batch(iteration)
        ensemble = self.reward if isinstance(self.reward, Ensemble) else None
        try:
            with ensemble.observing(self.ranks.concatenate) if ensemble else nullcontext():
                metrics, rewards, dropped = self.algorithm.step(batch)
        except UserError as error:
            raise UserError(f"iteration {iteration}: {error}") from error
        self.iteration, self.observed = iteration, False
        self.queries += int(metrics.pop("queries"))
        record: dict[str, Any] = {"iteration": iteration, "queries": self.queries, **metrics, "dropped": len(dropped)}
        record["seconds"] = round(time.perf_counter() - start, 3)
        if (memory := peak_memory(self.model.device)) is not None:
            record["memory_gib"] = round(memory, 3)
        self.trackers.log({f"train/{key}": value for key, value in record.items() if key != "iteration"}, iteration)
        if dropped:
            record["bad"] = describe_dropped(dropped, batch.prompts)
            self.reporter.warned(f"iteration {iteration}: {summary(record['bad'])}")
        self.write(METRICS, record)
        if self.exploration.active(iteration, self.recipe.iterations):
            explored = describe_exploration(batch, self.sampler, self.exploration.words, rewards.cpu())
            self.write(EXPLORATION, {"iteration": iteration, **explored})
        self.reporter.stepped(record)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Appends a line to one of the run's records; one process does it for all."""
        if self.ranks.main:
            self.keeper.records.append(name, record)

    def batch(self, iteration: int) -> Batch:
        """What an iteration samples: random prompts, explored while exploration is active."""
        batch = self.plain_batch(iteration)
        explores = self.exploration.active(iteration, self.recipe.iterations)
        return batch.explored(self.exploration) if explores else batch

    def plain_batch(self, iteration: int) -> Batch:
        """An iteration's random prompts, without exploration."""
        seed, group = self.recipe.seed, self.recipe.rollout.images_per_prompt
        rows = [
            int(torch.randint(len(self.prompts), (), generator=generator(seed, iteration, k // group, "prompt")))
            for k in range(self.recipe.samples)
        ]
        keys = [(seed, iteration, k) for k in range(self.recipe.samples)]
        plain = ConstantGuidance(self.recipe.sampler.guidance)
        texts = self.texts.select(rows).to(self.model.device)
        return Batch([self.prompts[row] for row in rows], texts, plain, keys)

    def calibrate(self) -> None:
        """Gives an ensemble's z-scores their first statistics, from the untouched model's images."""
        if isinstance(self.reward, Ensemble):
            batch = self.plain_batch(0)
            images = self.rollouts.fit(partial(self.sampler.rollout, batch)).images
            self.reward.calibrate(images, batch.prompts)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many iterations, and at both ends, happens now."""
        return self.iteration % every == 0 or self.iteration == self.recipe.iterations

    def observe(self) -> None:
        """Evaluates and paints previews where they are due."""
        if self.due(self.recipe.evaluation.every):
            self.reporter.evaluating(self.iteration)
            try:
                results = self.evaluate()
            except UserError as error:
                raise UserError(f"evaluation after iteration {self.iteration}: {error}") from error
            for result in results:
                self.record(result)
            if self.stopping.observe(self.iteration, results):
                self.save_trained(self.folder / BEST)
        if self.recipe.preview.images and self.due(self.recipe.preview.every):
            self.preview()

    def record(self, result: Score) -> None:
        """One prompt set's score: a line in ``evaluations.jsonl``, and what trackers and the user are told."""
        record = {"iteration": self.iteration, "queries": self.queries, **result._asdict()}
        self.write(EVALUATIONS, record)
        figures = {f"evaluation/{result.prompts}/{result.reward}": result.mean, "train/queries": self.queries}
        if result.kl_to_base is not None:
            figures[f"evaluation/{result.prompts}/kl_to_base"] = result.kl_to_base
        self.trackers.log(figures, self.iteration)
        self.reporter.evaluated(record)
        if result.n < (due := len(self.evaluate.prompts[result.prompts]) * self.evaluate.images):
            self.reporter.warned(f"{due - result.n} of {due} images had no {result.reward}, and do not count")

    def asked(self) -> set[str]:
        """What a second shell asks for (``diffexp ctl``); the same on every rank."""
        taken = control.take(self.folder) if self.ranks.main else frozenset()
        counts = self.ranks.total({request: float(request in taken) for request in control.REQUESTS})
        return {request for request, count in counts.items() if count}

    def preview(self) -> None:
        """Paints the same prompts from the same noise as ever: seen and, where it evaluates others, unseen ones.

        :data:`PREVIEWS` of each where the recipe wants none.
        """
        sets = {self.recipe.prompts: self.prompts, **self.evaluate.prompts}
        texts = {self.recipe.prompts: self.texts, **self.evaluate.texts}
        count, scale = self.recipe.preview.images or PREVIEWS, self.recipe.sampler.guidance
        preview = Preview.spread(self.sampler, scale, sets, texts, count)
        images = preview.paint(self.rollouts, self.ranks)
        if self.ranks.main:
            self.attempt("preview", partial(preview.write, images, self.folder / SAMPLES, self.iteration))

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Does what no run should fail for: what goes wrong with it is only told."""
        try:
            action()
        except Exception as error:
            self.reporter.warned(f"no {what} after iteration {self.iteration}: {type(error).__name__}: {error}")

    def open_folder(self) -> None:
        """Takes up the run in the folder where it was left.

        Raises:
            UserError: if no checkpoint is whole, or the folder is not the same for all processes.
        """
        if self.ranks.main:
            control.take(self.folder)  # what was asked of an earlier process is not asked of this one
            environment = describe_environment(self.model.device, self.ranks.size) | self.model.source.record()
            durable.replace(self.folder / ENVIRONMENT, json.dumps(environment, indent=1).encode())
        self.ranks.wait()
        shared = f"--out {self.folder} must be one folder, on a file system that all machines of the run share"
        if self.ranks.any(not (self.folder / CONFIG).is_file()):
            raise UserError(f"{shared}: some processes don't see it")
        if state := self.keeper.open():
            self.restore(state)
        if self.ranks.any(self.iteration != self.ranks.greatest(self.iteration)):
            raise UserError(f"{shared}: some processes find another checkpoint in it than others")

    def capture(self, known: State | None = None) -> State:
        """Everything that the next iteration depends on, copied: whatever happens in it, this can still be saved.

        The tensors of a ``known`` state of the same iteration are not copied again.
        """
        tensors = known.tensors if known else self.tensors()
        numbers = {
            "iteration": self.iteration,
            "queries": self.queries,
            "algorithm": self.algorithm.state(),
            "reward": self.reward.state_dict() if isinstance(self.reward, Ensemble) else {},
            "stopping": self.stopping.state(),
            "batches": [batch.size for batch in self.batches],
            "loss_scale": self.learner.loss_scale,
            "observed": self.observed,
            "records": self.keeper.records.sizes(),
            "made_with": self.made_with,
        }
        return State(tensors, numbers)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what is trained, and of the optimiser's moments."""
        return {
            **{f"lora.{key}": value for key, value in self.model.state().items()},
            **{f"optimizer.{key}": value for key, value in self.learner.state().items()},
        }

    def publish(self) -> None:
        """The newest of what is trained, in the run folder."""
        if self.published != self.iteration:
            self.save_trained(self.folder)
            self.published = self.iteration

    def save_trained(self, folder: Path) -> None:
        """The LoRA files, or the network, with what made them in their headers."""
        if self.ranks.main:
            metadata = made_by(self.recipe, self.prompts, self.model.source.commit, self.iteration, self.queries)
            assembly.save_trained(self.recipe, self.model, folder, metadata)

    def restore(self, state: State) -> None:
        """Goes back to the state of a checkpoint."""
        numbers = state.numbers
        self.model.set_state(state.section("lora"))
        self.learner.load_state(state.section("optimizer"))
        self.algorithm.load_state(numbers["algorithm"])
        if isinstance(self.reward, Ensemble):
            self.reward.load_state_dict(numbers["reward"])
        if "stopping" in numbers:
            self.stopping.load_state(numbers["stopping"])
            for batch, size in zip(self.batches, numbers["batches"], strict=True):
                batch.size = batch.told = size
        self.learner.loss_scale = numbers.get("loss_scale", self.learner.loss_scale)
        self.iteration, self.queries = numbers["iteration"], numbers["queries"]
        self.observed = numbers.get("observed", True)
        if changed := changes(numbers.get("made_with", {}), self.made_with):
            self.reporter.warned(f"{changed} since the checkpoint: the run may differ from one without a break")


def train(recipe: Recipe, out: Path | str, reporter: Reporter | None = None) -> Path:
    """Fine-tunes a model as the recipe says; returns the folder with metrics, evaluations, samples and LoRA.

    A folder that holds an unfinished run of the same recipe is continued from its newest checkpoint, exactly.

    Raises:
        UserError: for whatever the user can mend. Nothing already computed is lost.
    """
    return Training(recipe, Path(out), reporter).run()
