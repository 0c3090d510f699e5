"""Memory that runs out halves what goes through at once, and changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import contents, recipe
from torch import nn

from diffexp.config import Recipe
from diffexp.errors import UserError
from diffexp.learner import Learner, Share
from diffexp.memory import MicroBatch, agree
from diffexp.processes.parallel import ALONE
from diffexp.terminal.reporter import Reporter
from diffexp.training import Training

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_the_batch_halves_until_it_fits_and_stays_so(error: Exception) -> None:
    batch, tried = MicroBatch(9, "rollout.batch"), []

    def work(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise error
        return "done"

    assert batch.fit(work) == batch.fit(work) == "done"
    assert tried == [9, 4, 2, 2]
    (told,) = agree([batch], ALONE)
    assert told == "out of memory: rollout.batch = 9 is now 2; the result is the same, but for rounding"
    assert list(agree([batch], ALONE)) == []


def test_one_image_that_does_not_fit_is_the_end() -> None:
    def work(size: int) -> None:
        raise NO_MEMORY[0]

    with pytest.raises(UserError, match=r"out of memory with update\.batch = 1 \(CUDA out of memory"):
        MicroBatch(4, "update.batch").fit(work)


def test_other_errors_are_no_matter_of_memory() -> None:
    def work(size: int) -> None:
        raise RuntimeError("shapes differ")

    batch = MicroBatch(4)
    with pytest.raises(RuntimeError, match="shapes differ"):
        batch.fit(work)
    assert batch.size == 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
        # what is left to say where every way that cuDNN knows ran out of memory
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    ],
)
def test_every_way_to_say_so(error: Exception) -> None:
    def work(size: int) -> int:
        if size > 1:
            raise error
        return size

    assert MicroBatch(4).fit(work) == 1
    with pytest.raises(UserError, match="out of memory with batch = 1"):
        MicroBatch(1).fit(lambda size: work(2))


def test_a_gradient_that_ran_out_of_memory_half_way_starts_over() -> None:
    p, data, journal = nn.Parameter(torch.ones(())), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), ["before"]
    learner = Learner([("p", p)], 0.1, batch=MicroBatch(4))
    learner.journals.append(journal)

    def losses(rows: list[int], count: int) -> Iterator[Share]:
        for row in rows:
            journal.append(row)
            if len(rows) == 4 and row == 2:
                raise NO_MEMORY[0]
            yield Share(p * data[row])

    figures = learner.update(learner.samples(["a cat"] * 5), losses)
    assert figures["grad_norm"] == 31
    assert figures["loss"] == 31
    assert journal == ["before", 0, 1, 2, 3, 4]


class Warned(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def test_a_run_that_rounds_may_lack_memory_as_well(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There rollout and update call the network with one number of samples, filled up: both settings lower it."""
    settings = recipe(sd_folder, **{"iterations": 1, "samples": 4, "rollout.batch": 4, "update.batch": 4})
    changes = {"model.precision": "bf16", "algorithm.minibatches": 1}
    training = Training(Recipe.parse(settings.model_dump(), "", changes), tmp_path)
    network = training.model.network

    def limited(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 4:  # both halves of the guidance
            raise NO_MEMORY[0]
        return network(x, *rest)

    monkeypatch.setattr(training.model, "network", limited)
    training.run()
    assert training.capture().numbers["batches"][0] == 2


def test_a_run_that_lacked_memory_is_the_run_of_smaller_batches(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"iterations": 2, "rollout.batch": 2, "update.batch": 1}
    expected = contents(Training(recipe(sd_folder, **small), tmp_path / "small").run())
    training = Training(recipe(sd_folder, **{**small, "update.batch": 3, "rollout.batch": 4}), tmp_path / "large")
    network, most = training.model.network, {False: 2, True: 1}

    def limited(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 2 * most[torch.is_grad_enabled()]:  # both halves of the guidance
            raise NO_MEMORY[0]
        return network(x, *rest)

    monkeypatch.setattr(training.model, "network", limited)
    training.reporter = Warned()
    assert contents(training.run()) == expected
    assert training.reporter.warnings == [
        "out of memory: rollout.batch = 4 is now 2; the result is the same, but for rounding",
        "out of memory: update.batch = 3 is now 1; the result is the same, but for rounding",
    ]
    assert training.capture().numbers["batches"] == [2, 1]
