"""What the benches compute from their measurements, on made-up ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_ddpo import ddpo
from test_rollout import explored

from diffexp.rollout import Sampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def snr(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gradient_snr

    return gradient_snr


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead

    return overhead


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import exploration_alone

    return exploration_alone


@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
@pytest.mark.parametrize(("arch", "precision"), [("emoji", "fp32"), ("emoji", "bf16"), ("xl", "bf16")])
def test_the_bare_calls_are_those_of_an_iteration(
    overhead: ModuleType, request: pytest.FixtureRequest, arch: str, precision: str, algorithm: str
) -> None:
    """As many images in as many calls of the network, with and without a graph, and the same further conditions."""
    folder = str(request.getfixturevalue("xl_folder")) if arch == "xl" else arch
    changes = {"samples": 4, "sampler.steps": 3, "reward": "emoji-alignment", "device": "cpu"}
    changes |= {"model.precision": precision, "update.batch": 3}
    case, calls = overhead.Case(algorithm, folder, changes), []

    def record(_: object, inputs: tuple[torch.Tensor, ...], named: dict[str, object]) -> None:
        added = named.get("added_cond_kwargs") or {}
        conditions = {key: (value.dtype, tuple(value.shape)) for key, value in added.items()}
        calls.append((len(inputs[0]), torch.is_grad_enabled(), tuple(added.get("time_ids", [()])[0]), str(conditions)))

    case.model.unet.register_forward_pre_hook(record, with_kwargs=True)
    case.iteration()
    seen = sorted(calls)
    calls.clear()
    assert case.operations() > 0
    assert sorted(calls) == seen
    assert seen


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_step_gradients_add_up_to_the_updates(
    snr: ModuleType, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snr, "MICRO", 3)
    batch, algorithm = explored(sampler.model, 1.0), ddpo(sampler)
    trajectory, advantages = sampler.rollout(batch, 4), torch.tensor([1.0, -2.0, 0.5, 3.0])
    found = snr.step_gradients(algorithm, trajectory, advantages)
    for share in algorithm.losses(trajectory, advantages, [0, 1, 2, 3], 4):
        share.loss.backward()
    # the last step's gradient is still there
    whole = torch.cat([p.grad.flatten() for p in algorithm.learner.parameters.values()]).numpy() - found[-1]
    np.testing.assert_allclose(found.mean(0), whole, rtol=1e-3, atol=1e-5)


def test_signal_and_noise_by_brute_force(snr: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gradients = (rng.normal(size=(5, 3, 7)) + rng.normal(size=(3, 7))).astype(np.float32)
    for number, gradient in enumerate(gradients):
        save_file({"gradients": gradient}, tmp_path / f"{number}.safetensors")
    own, cross = snr.products(sorted(tmp_path.iterdir()))
    weights = np.array([1.0, 0.0, 2.0])
    for without in (None, 0, 3):
        sums = [weights @ one for k, one in enumerate(gradients) if k != without]
        pairs = [a @ b for i, a in enumerate(sums) for j, b in enumerate(sums) if i != j]
        signal, power = np.mean(pairs), np.mean([one @ one for one in sums])
        assert snr.snr(own, cross, weights, without) == pytest.approx(signal / (power - signal), rel=1e-4)


def test_snr_of_a_known_distribution(snr: ModuleType) -> None:
    """Means of 2 in nine of one step's directions, none in the other's, noise of 3 everywhere: 4 / 9 and 0."""
    rng, batches = np.random.default_rng(0), 4000
    gradients = rng.normal(0, 3, size=(batches, 2, 9))
    gradients[:, 0] += 2
    own = np.einsum("bid,bjd->bij", gradients, gradients)
    total = gradients.sum(0)
    cross = np.stack([(g @ total.T + total @ g.T) / 2 - one for g, one in zip(gradients, own, strict=True)])
    assert snr.snr(own, cross, np.array([1.0, 0.0])) == pytest.approx(4 / 9, abs=0.02)
    assert snr.snr(own, cross, np.array([0.0, 1.0])) == pytest.approx(0, abs=0.02)
    assert snr.snr(own, cross, np.array([1.0, 1.0])) == pytest.approx(2 / 9, abs=0.02)


def test_the_jackknife_of_a_mean_is_its_standard_error(snr: ModuleType) -> None:
    values = np.array([1.0, 4.0, 2.0, 7.0])
    value, low, high = snr.jackknife(lambda b: float(np.delete(values, [] if b is None else b).mean()), 4)
    error = values.std(ddof=1) / 2
    assert (value, low, high) == pytest.approx((3.5, 3.5 - 1.96 * error, 3.5 + 1.96 * error))


def group(mean: float, diversity: float) -> dict[str, object]:
    return {"emoji-alignment": [mean - 1, mean, mean, mean + 1], "emoji-judge": [mean] * 4, "diversity": diversity}


def test_differences_are_paired_by_prompt(alone: ModuleType) -> None:
    """Prompts differ by much, exploration by 0.5: the interval is of the 0.5."""
    records = [{"prompt": str(k), "ways": {"plain": group(k, 0.1), "low": group(k + 0.5, 0.3)}} for k in range(6)]
    head, _, plain, low = alone.table(records).splitlines()
    assert head == "| 6 prompts | mean | best of 4 | spread | diversity | judge | judge, best of 4 |"
    assert plain.startswith("| plain | 2.500 | 3.500 | 0.816 | 0.100 | 2.500 | 2.500 |")
    assert low.startswith(
        "| low | **+0.500** [+0.500, +0.500] | **+0.500** [+0.500, +0.500] | +0.000 [+0.000, +0.000] |"
    )
