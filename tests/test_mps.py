"""Apple's MPS has no float64 and lacks operations; here a CPU tensor stands in for it that refuses the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffexp import Recipe, rollout, train
from diffexp.algorithms import alignprop, rwr

TO_HOST = (Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.numpy)


class Mps(Tensor):
    """What is computed from it is one too, until it is moved to the CPU by name."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is interpolate and kwargs.get("antialias") and args[0].requires_grad:
            raise NotImplementedError("aten::_upsample_bicubic2d_aa_backward is not implemented for the MPS device")
        if func in TO_HOST or (func is Tensor.to and "cpu" in args):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All noise lies on MPS, and so does everything that is painted from it."""
    draw = rollout.randn
    for module in (rollout, alignprop, rwr):
        monkeypatch.setattr(module, "randn", lambda *key: draw(*key).as_subclass(Mps))


def test_the_stand_in_refuses_what_mps_refuses() -> None:
    there = torch.ones(1, 1, 4, 4).as_subclass(Mps)
    with pytest.raises(TypeError, match="float64"):
        (there * 2).double()
    assert there.cpu().double().dtype == torch.float64
    with pytest.raises(NotImplementedError):
        interpolate(there.clone().requires_grad_(), (2, 2), mode="bicubic", antialias=True)


@pytest.mark.usefixtures("mps")
@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop", "refl", "rwr"])
def test_a_run_needs_nothing_that_mps_lacks(algorithm: str, sd_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "iterations": 2,
        "samples": 4,
        "prompts": "text:a cat riding a bike",
        "reward": f"{Path(__file__).parent / 'resized.py'}:resized",
        "device": "cpu",
        "trackers": [],
        "model": {"path": str(sd_folder)},
        "sampler": {"steps": 3},
        "algorithm": {"name": algorithm, **({"last_steps": 2} if algorithm in ("alignprop", "refl") else {})},
        "exploration": {"guidance": {"fraction": 0.4}, "words": {}},
        "evaluation": {"every": 1, "images": 2},
        "preview": {"every": 1, "images": 2},
    }
    if algorithm == "ddpo":
        settings["algorithm"] |= {"min_count": 2, "kl": 0.1}
    if algorithm == "rwr":
        settings["reward"] = f"{settings['reward']}+jpeg-compressibility"
    folder = train(Recipe.parse(settings, "test"), tmp_path / "run")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
