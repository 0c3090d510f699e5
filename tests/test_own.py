"""Parts of the user's own: the examples that the documentation shows, and what is said when one is wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffexp import Recipe, models, own, prompts, train
from diffexp.algorithms import DDPO
from diffexp.errors import UserError
from diffexp.exploration import ConstantGuidance, Exploration
from diffexp.learner import Learner
from diffexp.models import lora
from diffexp.rollout import Batch, Sampler
from diffexp.runs.reading import Run
from diffexp.sharing.lora_header import RECIPE, like
from diffexp.training import Training

EXAMPLES = Path(__file__).parent.parent / "examples"
NOISY, REINFORCE = f"{EXAMPLES / 'noisy_text.py'}:noisy_text", f"{EXAMPLES / 'reinforce.py'}:Reinforce"
REDNESS = f"{EXAMPLES / 'redness.py'}:redness"


def recipe(folder: Path, **changes: Any) -> Recipe:
    settings = {
        "iterations": 2,
        "samples": 4,
        "prompts": str(EXAMPLES / "night.txt"),
        "reward": REDNESS,
        "device": "cpu",
        "trackers": [],
        "model": {"path": str(folder)},
        "sampler": {"steps": 3},
        "evaluation": {"every": 2, "images": 1, "prompts": ["text:a cat"]},
        "preview": {"images": 0},
    }
    return Recipe.parse(settings, "test", changes)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(example: Path) -> None:
    assert len([line for line in example.read_text().splitlines() if line.strip()]) <= 20


def test_a_run_of_parts_of_ones_own(sd_folder: Path, tmp_path: Path) -> None:
    changes = {"exploration.strategy": NOISY, "algorithm": {"name": REINFORCE, "batch": 3}}
    first = train(recipe(sd_folder, **changes), tmp_path / "first")
    metrics = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [(line["queries"], line["loss"] != 0) for line in metrics] == [(4, True), (8, True)]
    assert Run.read(first).label == "Reinforce + noisy_text"
    # read back, the folder's config is the same recipe: the run can be continued, and is known to be finished
    again = Recipe.load(first / "config.toml")
    assert again == recipe(sd_folder, **changes)
    with pytest.raises(UserError, match="finished"):
        train(again, first)
    with pytest.raises(UserError, match="another recipe"):
        train(recipe(sd_folder, **{**changes, "algorithm": {"name": "ddpo"}}), first)


def test_the_strategy_explores_only_while_exploration_is_on(sd_folder: Path, tmp_path: Path) -> None:
    training = Training(recipe(sd_folder, **{"exploration.strategy": NOISY, "exploration.until": 0.5}), tmp_path)
    plain = Training(recipe(sd_folder), tmp_path)
    explored, same = training.batch(1).text.hidden - plain.batch(1).text.hidden, training.batch(2).text.hidden
    assert torch.equal(same, plain.batch(2).text.hidden)
    # noise of a tenth of the embedding's spread, another one for each sample
    assert 0.08 < float(explored.std() / plain.batch(1).text.hidden.std()) < 0.12
    assert not torch.allclose(explored[0], explored[1])
    assert torch.equal(training.batch(1).text.hidden, training.batch(1).text.hidden)


def test_reinforce_is_ddpo_before_the_first_update(sampler: Sampler, tmp_path: Path) -> None:
    """There every ratio is 1, where the gradients of the two losses are the same, but for DDPO's mean over steps."""
    texts, before = ["a cat", "a bike", "a cat", "a dog"], sampler.model.state()
    batch = Batch(texts, sampler.model.encode(texts), ConstantGuidance(5.0), [(0, k) for k in range(4)])
    gradients = []
    for make in (partial(DDPO, minibatches=1, clip=0.9), own.find("algorithm", REINFORCE)):
        learner = Learner(sampler.model.trainable(), learning_rate=1e-3, max_grad_norm=1e9)
        make(sampler, learner, lambda images, prompts: images.mean((1, 2, 3))).step(batch)
        gradients.append({key: tensor for key, tensor in learner.state().items() if key.endswith("exp_avg")})
        sampler.model.set_state(before)
    for key, ddpo in gradients[0].items():
        assert torch.allclose(gradients[1][key], sampler.steps * ddpo, rtol=1e-3, atol=1e-7), key
    assert max(float(tensor.abs().max()) for tensor in gradients[0].values()) > 1e-4


def test_a_prompt_set_of_ones_own() -> None:
    assert prompts.load(EXAMPLES / "night.txt")[0] == "an owl at night"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exploration.strategy": "nowhere.py:f"}, "no file 'nowhere.py'"),
        ({"exploration.strategy": "noisy"}, "write it as 'module:name'"),
        ({"exploration.strategy": NOISY, "lora.text_encoders": True}, "leave one of them out"),
        ({"algorithm.name": "nowhere.py:Class"}, "algorithm.name: .* no file 'nowhere.py'"),
        ({"algorithm.name": "no_such_package:Class"}, "no module 'no_such_package'"),
        ({"algorithm.name": "reinforce"}, "'ddpo', .*, or 'file.py:Class'"),
        ({"algorithm": "ddpo"}, "algorithm = \"ddpo\": give a table with a name: 'ddpo'"),
    ],
)
def test_a_name_that_leads_nowhere(changes: dict[str, Any], message: str, sd_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        recipe(sd_folder, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exploration.strategy": NOISY + "y"}, "did you mean .*noisy_text'"),
        ({"algorithm.name": REINFORCE, "algorithm.speed": 3}, "made with \\['speed'\\]: got an unexpected keyword"),
    ],
)
def test_a_part_that_can_not_be_used(changes: dict[str, Any], message: str, sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe(sd_folder, **changes), tmp_path / "run")


@pytest.mark.parametrize("returned", [None, 3, "fewer"])
def test_a_strategy_must_return_a_batch_of_as_many(returned: Any, sampler: Sampler) -> None:
    texts = ["a cat", "a bike"]
    batch = Batch(texts, sampler.model.encode(texts), ConstantGuidance(5.0), [(0,), (1,)])
    wrong = batch.select([0]) if returned == "fewer" else returned
    with pytest.raises(UserError, match=r"must return a Batch of 2 samples.*batch\._replace"):
        batch.explored(Exploration(strategy=lambda batch: wrong))


def test_code_named_in_a_header_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    data = {"reward": "clipscore", "algorithm": {"name": "evil.py:C"}, "exploration": {"strategy": "evil.py:f"}}
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, path, {RECIPE: json.dumps(data)})
    with pytest.raises(UserError, match=r"'evil.py:C' is code and was left out; .*--set algorithm.name="):
        like(path, {})
    chosen, notes = like(path, {"algorithm.name": "rwr"})
    assert (chosen.algorithm.name, chosen.exploration.strategy) == ("rwr", None)
    assert any("exploration.strategy 'evil.py:f'" in note for note in notes)


def test_a_lora_of_ddpo_pytorch_goes_on(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files hold, for each attention, W x + up(down(x)) for q, k, v and out, named by diffusers' old processors."""
    noise, old = torch.Generator().manual_seed(3), {}
    plain, merged = models.load(str(sd_folder)), models.load(str(sd_folder))
    layers = dict(merged.unet.named_modules())
    for path in [path for path in layers if path.endswith(("attn1", "attn2"))]:
        for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
            weight = layers[f"{path}.{ours}"].weight
            down = torch.randn(4, weight.shape[1], generator=noise)
            up = 0.1 * torch.randn(weight.shape[0], 4, generator=noise)
            old |= {f"{path}.processor.{theirs}_lora.{side}.weight": t for side, t in (("down", down), ("up", up))}
            weight.data += up @ down
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    monkeypatch.syspath_prepend(EXAMPLES)
    from from_ddpo_pytorch import convert

    convert(str(tmp_path / "pytorch_lora_weights.bin"), str(tmp_path / "old.safetensors"))
    lora.start(plain, tmp_path / "old.safetensors")
    x, text = torch.randn(1, 4, 8, 8, generator=noise), plain.encode(["a cat"])
    torch.testing.assert_close(
        plain.predict(x, 500, text, 5.0), merged.predict(x, 500, text, 5.0), rtol=1e-5, atol=1e-4
    )
    assert not torch.allclose(plain.predict(x, 500, text, 5.0), models.load(str(sd_folder)).predict(x, 500, text, 5.0))
