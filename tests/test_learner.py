from __future__ import annotations

import pytest
import torch
from torch import nn

from diffexp.errors import UserError
from diffexp.learner import Learner


def learner(parameter: nn.Parameter, **settings: float) -> Learner:
    return Learner([("p", parameter)], **{"learning_rate": 0.1, "weight_decay": 0.0, **settings})


def test_the_norm_is_reported_before_and_bounded_after_clipping() -> None:
    p = nn.Parameter(torch.zeros(2))
    one = learner(p, max_grad_norm=1.0)
    seen: list[torch.Tensor] = []
    one.optimizer.register_step_pre_hook(lambda *_: seen.append(p.grad.clone()))
    one.backward((p * torch.tensor([3.0, 4.0])).sum())
    assert one.step() == pytest.approx(5.0)
    torch.testing.assert_close(seen[0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(bad: float) -> None:
    p = nn.Parameter(torch.ones(2))
    one = learner(p)
    one.backward((p * bad).sum())
    with pytest.raises(UserError, match="not finite"):
        one.step()
    assert torch.equal(p.detach(), torch.ones(2))
    one.backward(p.sum())
    assert one.step() == pytest.approx(2**0.5), "the bad gradient must not linger"


def test_state_makes_the_next_step_the_same() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first, second = learner(a), learner(b)
    for _ in range(3):
        first.backward((a**3).sum())
        first.step()
    with torch.no_grad():
        b.copy_(a)
    second.load_state(first.state())
    for one, p in ((first, a), (second, b)):
        one.backward((p**2).sum())
        one.step()
    assert torch.equal(a, b)
