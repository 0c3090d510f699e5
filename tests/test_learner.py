from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import caught_gradient
from torch import Tensor, nn

from diffexp.errors import UserError
from diffexp.learner import Learner, Losses, Share
from diffexp.memory import MicroBatch
from diffexp.samples import Fault, Samples


def learner(parameter: nn.Parameter, **settings: object) -> Learner:
    return Learner([("p", parameter)], **{"learning_rate": 0.1, "weight_decay": 0.0, **settings})


def each(loss: Callable[[int], Tensor]) -> Losses:
    """The mean of ``loss(row)`` over the rows."""

    def losses(rows: list[int], count: int) -> Iterator[Share]:
        yield Share(sum(loss(row) for row in rows) / count)

    return losses


def step(one: Learner, loss: Tensor | Callable[[int], Tensor], samples: int = 1) -> float:
    function = loss if callable(loss) else lambda row: loss
    return one.update(one.samples(["a cat"] * samples), each(function))["grad_norm"]


def test_the_norm_is_reported_before_and_bounded_after_clipping() -> None:
    p = nn.Parameter(torch.zeros(2))
    one = learner(p, max_grad_norm=1.0)
    seen = caught_gradient(one)
    assert step(one, (p * torch.tensor([3.0, 4.0])).sum()) == pytest.approx(5.0)
    torch.testing.assert_close(seen["p"], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_where_everything_is_bad_nothing_is_touched(bad: float) -> None:
    p = nn.Parameter(torch.ones(2))
    one = learner(p)
    with pytest.raises(UserError, match="1 of 1 samples went bad"):
        step(one, lambda row: (p * bad).sum())
    assert torch.equal(p.detach(), torch.ones(2))
    assert step(one, lambda row: p.sum()) == pytest.approx(2**0.5), "the bad gradient must not linger"


def test_state_makes_the_next_step_the_same() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first, second = learner(a), learner(b)
    for _ in range(3):
        step(first, lambda row: (a**3).sum())
    with torch.no_grad():
        b.copy_(a)
    second.load_state(first.state())
    step(first, lambda row: (a**2).sum())
    step(second, lambda row: (b**2).sum())
    assert torch.equal(a, b)


def test_a_bad_sample_is_found_dropped_and_counts_for_nothing() -> None:
    p = nn.Parameter(torch.zeros(4))
    one = learner(p, max_grad_norm=1e9, max_dropped=0.5, batch=MicroBatch(3))
    rows = torch.eye(4)
    bad = {1: torch.tensor([0.0, torch.nan, 0.0, 0.0]), 3: torch.tensor([0.0, 0.0, 0.0, torch.inf])}
    samples, seen = one.samples(["a", "b", "c", "d"]), caught_gradient(one)
    one.update(samples, each(lambda row: (p * bad.get(row, rows[row])).sum()))
    assert {sample: fault.stage for sample, fault in samples.dropped.items()} == {1: "loss", 3: "loss"}
    torch.testing.assert_close(seen["p"], torch.tensor([0.5, 0.0, 0.5, 0.0]))
    # it stays out of the next part of the same iteration
    one.update(samples, each(lambda row: (p * rows[row]).sum()), [0, 1])
    torch.testing.assert_close(seen["p"], torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_a_gradient_can_be_bad_where_the_loss_is_not() -> None:
    p = nn.Parameter(torch.tensor([0.0, 1.0]))
    one, samples = learner(p, max_dropped=0.5), Samples(["a", "b"], max_dropped=0.5)
    one.update(samples, each(lambda row: p[row].sqrt()))  # √ has no derivative at 0
    assert samples.dropped == {0: Fault("gradient", torch.inf)}
    assert p[0] == 0
    assert p.isfinite().all()


def test_a_fault_that_does_not_come_again_costs_no_sample() -> None:
    p, calls = nn.Parameter(torch.ones(())), []
    one = learner(p)

    def once(row: int) -> Tensor:
        calls.append(row)
        return p * (torch.nan if len(calls) == 1 else 2.0)

    samples = one.samples(["a cat"])
    assert one.update(samples, each(once))["grad_norm"] == 2
    assert not samples.dropped


def test_where_a_whole_part_is_dropped_no_step_is_taken() -> None:
    p = nn.Parameter(torch.ones(()))
    one = learner(p, max_dropped=0.5, weight_decay=0.5)
    samples = one.samples(["a", "b"])
    figures = one.update(samples, each(lambda row: p * torch.nan), [1])
    assert figures == {"loss": 0.0, "grad_norm": 0.0}
    assert p == 1, "weight decay is a step as well"


def test_sums_that_overflow_though_no_sample_does_are_the_users_matter() -> None:
    p = nn.Parameter(torch.zeros(2))
    one = learner(p)
    with pytest.raises(UserError, match="though every sample's own is"):
        one.update(one.samples(["a", "b"]), each(lambda row: 3e19 * p[row]))
    assert torch.equal(p.detach(), torch.zeros(2))


@pytest.mark.parametrize(("weight", "scale"), [(2.0**-30, 2.0**14), (2.0**10, 2.0**2)])
def test_a_gradient_travels_scaled_through_fp16(weight: float, scale: float) -> None:
    """One too small for fp16 is lost without; one that overflows with it lowers the scale."""
    p = nn.Parameter(torch.tensor([1.0, 3.0]))

    def loss(row: int) -> Tensor:
        return (p.half() * 2).float().sum() * weight

    norms = {}
    for start in (1.0, 2.0**14):
        one = learner(p, loss_scale=start, learning_rate=0.0)
        norms[start] = step(one, loss)
    assert one.loss_scale == scale
    assert norms[2.0**14] == pytest.approx(2 * weight * 2**0.5, rel=1e-3)
    assert norms[1.0] == (0.0 if weight < 1 else norms[2.0**14])


def test_a_bad_sample_is_no_overflow() -> None:
    """The square root's derivative at 0 is infinite under any scale: with the sample, the lowered scale goes."""
    p = nn.Parameter(torch.tensor([1.0]))
    one = learner(p, loss_scale=2.0**14, max_dropped=0.5)
    samples = one.samples(["x"] * 4)

    def losses(rows: list[int], count: int) -> Iterator[Share]:
        yield Share(sum((p * (row != 2)).sum() if row != 2 else (p * 0).sqrt().sum() for row in rows) / count)

    figures = one.update(samples, losses)
    assert list(samples.dropped) == [2]
    assert one.loss_scale == 2.0**14
    assert figures["grad_norm"] == pytest.approx(1.0)


def test_scaling_changes_no_gradient_of_float32() -> None:
    data, seen = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), []
    for scale in (1.0, 2.0**14):
        p = nn.Parameter(torch.tensor([0.3, -1.7, 2.2]))
        one = learner(p, loss_scale=scale)
        caught = caught_gradient(one)
        step(one, lambda row, p=p: (p * data[row]).sin().sum(), samples=8)
        seen.append(caught["p"])
    assert torch.equal(*seen)
