import math
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from diffexp import rewards
from diffexp.errors import UserError
from diffexp.rewards import base, spec
from diffexp.rewards.custom import CustomReward
from diffexp.rewards.ensemble import Ensemble


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a cat", "a dog", "a dolphin riding a bike", "an ant"]


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


brightness.differentiable = True


def length(images, prompts):
    return [len(prompt) for prompt in prompts]


def red(images, prompts):
    return images[:, 0].mean(dim=(1, 2)).numpy()


# Names


def test_available_and_check_name_need_no_torch():
    code = (
        "import sys; from diffexp import rewards; rewards.check_name('2*hpsv2+aesthetic'); "
        "assert 'aesthetic' in rewards.available(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aestetic", "did you mean 'aesthetic'"),
        ("", "empty part"),
        ("hpsv2+", "empty part"),
        ("0*hpsv2", "weight '0'"),
        ("nan*hpsv2", "weight 'nan'"),
        ("two*hpsv2", "weight 'two'"),
        ("hpsv2+aesthetic+hpsv2", "more than once"),
        ("missing.py:reward", "no file 'missing.py'"),
        ("no_such_package:reward", "no module 'no_such_package'"),
        (":reward", "no custom reward"),
    ],
)
def test_bad_names_are_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        rewards.load(name)
    assert "\n" not in str(error.value)


def test_spec_reads_names_and_weights():
    assert spec.parse("hpsv2") == (("hpsv2", 1.0),)
    assert spec.parse("2*hpsv2 + 0.5 * aesthetic+pickscore") == (("hpsv2", 2), ("aesthetic", 0.5), ("pickscore", 1))
    assert spec.parse("-1*jpeg-compressibility") == (("jpeg-compressibility", -1.0),)


def test_differentiability_is_known_from_the_name():
    assert rewards.is_differentiable("aesthetic") is True
    assert rewards.is_differentiable("aesthetic+jpeg-compressibility") is False
    assert rewards.is_differentiable("aesthetic+json:dumps") is None


# What a reward returns


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(4, 1), r"shape \(4, 1\)"),
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.tensor([0, 0, math.nan, 0]), "nan for the prompt 'a dolphin riding a bike'"),
        (torch.tensor([0, -math.inf, 0, 0]), "-inf for the prompt 'a dog'"),
        (torch.zeros(4, dtype=torch.complex64), "complex"),
        (None, "NoneType"),
        ([0, 0, 0, 0], "list"),
    ],
)
def test_bad_scores_name_the_reward_and_the_prompt(scores, message):
    with pytest.raises(UserError, match=message) as error:
        base.checked("mine", scores, PROMPTS)
    assert "reward 'mine'" in str(error.value)


def test_good_scores_become_float32():
    scores = base.checked("mine", torch.tensor([1, 2, 3, 4]), PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1, 2, 3, 4]


def test_a_reward_that_loses_its_gradient_is_refused(images):
    detached = CustomReward("mine", lambda images, prompts: images.detach().mean(dim=(1, 2, 3)))
    detached.differentiable = True
    with pytest.raises(UserError, match="no gradient"):
        base.score(detached, images.requires_grad_(), PROMPTS)
    with pytest.raises(UserError, match="4 images came with 3 prompts"):
        base.score(detached, images, PROMPTS[:3])


# JPEG


def test_jpeg_is_the_size_in_kilobytes(images):
    expected = []
    for image in images:
        buffer = BytesIO()
        pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    plus = rewards.load("jpeg-incompressibility")
    minus = rewards.load("jpeg-compressibility")
    assert base.score(plus, images, PROMPTS).tolist() == pytest.approx(expected)
    assert base.score(minus, images, PROMPTS).tolist() == pytest.approx([-size for size in expected])
    assert not plus.differentiable


def test_jpeg_prefers_what_it_should(images):
    images[1] = 0.5
    scores = rewards.load("jpeg-compressibility")(images, PROMPTS)
    assert scores.argmax() == 1


# Custom rewards


def test_a_custom_reward_from_a_file(tmp_path, images):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n\n"
        "@dataclasses.dataclass\n"
        "class Options:\n"
        "    scale: float = 2.0\n\n"
        "def bright(images, prompts):\n"
        "    return Options().scale * images.mean(dim=(1, 2, 3))\n\n"
        "bright.differentiable = True\n"
    )
    reward = rewards.load(f"{file}:bright")
    assert reward.name == f"{file}:bright"
    images.requires_grad_()
    base.score(reward, images, PROMPTS).sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 2 / images[0].numel()))


def test_a_custom_reward_from_a_module(monkeypatch, tmp_path, images):
    (tmp_path / "my_reward_module.py").write_text(
        "def length(images, prompts):\n    return [len(p) for p in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.load("my_reward_module:length")(images, PROMPTS).tolist() == [5, 5, 23, 6]
    with pytest.raises(UserError, match="did you mean 'my_reward_module:length'"):
        rewards.load("my_reward_module:lenght")


def test_a_custom_reward_may_return_an_array(images):
    reward = CustomReward("red", red)
    assert not reward.differentiable
    scores = reward(images.requires_grad_(), PROMPTS)
    assert torch.allclose(scores, images[:, 0].mean(dim=(1, 2)).detach())
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("returned", "message"),
    [("abcd", "returned str"), (None, "returned NoneType"), ([[1.0]], r"shape \(1, 1\)"), ([1, 2, 3], r"shape \(3,\)")],
)
def test_a_custom_reward_with_a_bad_result(returned, message, images):
    with pytest.raises(UserError, match=message):
        CustomReward("mine", lambda images, prompts: returned)(images, PROMPTS)


def test_a_custom_file_that_fails_says_why(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_thing\n")
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named 'no_such_thing'"):
        rewards.load(f"{file}:reward")
    file.write_text("reward = 3\n")
    with pytest.raises(UserError, match="'reward' is a int"):
        rewards.load(f"{file}:reward")


# Ensembles


def test_ensemble_by_hand():
    # Scores 1, 3 (mean 2, std 1) and 10, 30 (mean 20, std 10), weights 3 and 1.
    def first(images, prompts):
        return images[:, 0, 0, 0]

    def second(images, prompts):
        return images[:, 1, 0, 0]

    reward = Ensemble([CustomReward("first", first), CustomReward("second", second)], [3, 1])
    images = torch.tensor([[1.0, 10.0, 0.0], [3.0, 30.0, 0.0]])[:, :, None, None]
    with reward.observing():
        assert reward(images, PROMPTS[:2]).tolist() == pytest.approx([-1, 1])
    # Now by the running statistics: ((5 - 2) / 1 * 3 + (0 - 20) / 10 * 1) / 4 = (9 - 2) / 4.
    new = torch.tensor([[5.0, 0.0, 0.0]])[:, :, None, None]
    assert reward(new, ["a cat"]).tolist() == pytest.approx([1.75])
    # Scores 1, 3, 5 have mean 3 and variance 8/3.
    with reward.observing():
        reward(new, ["a cat"])
    assert reward.statistics["first"].mean == pytest.approx(3)
    assert reward.statistics["first"].std == pytest.approx(math.sqrt(8 / 3))


@pytest.fixture
def ensemble():
    return Ensemble([CustomReward("bright", brightness), CustomReward("red", red)], [1, 2])


def test_only_observing_moves_the_statistics(ensemble, images):
    before = ensemble.state_dict()
    ensemble(images, PROMPTS)
    assert ensemble.state_dict() == before
    with ensemble.observing():
        first = ensemble(images, PROMPTS)
        assert torch.equal(ensemble(images, PROMPTS), first)  # not within the block
    assert ensemble.state_dict() != before


def test_calibration_starts_the_statistics_once(ensemble, images):
    ensemble.calibrate(images, PROMPTS)
    started = ensemble.state_dict()
    assert ensemble.statistics["bright"].mean == pytest.approx(images.mean().item())
    assert ensemble(images, PROMPTS).mean().item() == pytest.approx(0, abs=1e-5)
    ensemble.calibrate(images / 2, PROMPTS)
    assert ensemble.state_dict() == started
    assert torch.allclose(ensemble(images[:1], PROMPTS[:1]), ensemble(images, PROMPTS)[:1], atol=1e-5)


def test_a_process_without_samples_asks_the_others_all_the_same(ensemble):
    """They wait for it, and its statistics move as theirs do."""
    with ensemble.observing(lambda own: torch.cat([own, torch.tensor([[1.0, 2.0], [3.0, 4.0]])])):
        pass
    assert ensemble.statistics["bright"].mean == 2
    assert ensemble.statistics["red"].count == 2


def test_a_block_that_fails_moves_nothing(ensemble, images):
    before = ensemble.state_dict()
    with pytest.raises(KeyError), ensemble.observing():
        ensemble(images, PROMPTS)
        raise KeyError
    assert ensemble.state_dict() == before


def test_chunks_do_not_change_the_statistics(ensemble, images):
    other = Ensemble(ensemble.rewards, ensemble.weights)
    with ensemble.observing():
        ensemble(images, PROMPTS)
    with other.observing():
        other(images[:1], PROMPTS[:1])
        other(images[1:], PROMPTS[1:])
    assert other.state_dict() == pytest.approx(ensemble.state_dict(), rel=1e-12)


def test_ensemble_state_survives_a_checkpoint(ensemble, images):
    with ensemble.observing():
        ensemble(images, PROMPTS)
    restored = Ensemble(ensemble.rewards, ensemble.weights)
    restored.load_state_dict(ensemble.state_dict())
    assert torch.equal(restored(images / 2, PROMPTS), ensemble(images / 2, PROMPTS))
    with pytest.raises(UserError, match="not those of the reward"):
        restored.load_state_dict({"bright.count": 0.0})


def test_a_constant_member_scores_zero(images):
    reward = Ensemble([CustomReward("constant", lambda images, prompts: [7.0] * len(prompts))])
    with reward.observing():
        assert reward(images, PROMPTS).tolist() == [0, 0, 0, 0]
    assert reward(images, PROMPTS).tolist() == [0, 0, 0, 0]


def test_ensemble_differentiates_where_all_members_do(images, ensemble):
    assert not ensemble.differentiable
    reward = Ensemble([CustomReward("bright", brightness)])
    assert reward.differentiable
    with reward.observing():
        reward(images, PROMPTS)
    wanted = images.clone().requires_grad_()
    reward(wanted, PROMPTS).sum().backward()
    gradient = 1 / images[0].numel() / reward.statistics["bright"].std
    assert torch.allclose(wanted.grad, torch.full_like(images, gradient))


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, math.nan], [1, 2, 3]])
def test_bad_ensembles_are_refused(weights, ensemble):
    with pytest.raises(UserError, match="ensemble"):
        Ensemble(ensemble.rewards, weights)


def test_an_ensemble_from_a_string(images):
    reward = rewards.load("2*jpeg-compressibility+jpeg-incompressibility")
    assert isinstance(reward, Ensemble)
    assert reward.weights == (2, 1)
    assert reward(images, PROMPTS).shape == (4,)
