from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import write_pipeline

from diffexp import models, rollout
from diffexp.algorithms import alignprop, rwr
from diffexp.learner import Learner
from diffexp.models import TextToImage, lora
from diffexp.rollout import Sampler

pytest_plugins = ["commandline"]

# no test may depend on how fast the machine is
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "xl", xl=True)


@pytest.fixture(params=["sd", "xl"])
def model(request: pytest.FixtureRequest) -> TextToImage:
    """A tiny random Stable Diffusion, or SDXL, without an adapter."""
    return models.load(str(request.getfixturevalue(f"{request.param}_folder")))


@pytest.fixture
def sampler(model: TextToImage) -> Sampler:
    """Four stochastic steps of that model, with a LoRA that already does something."""
    lora.add(model, rank=2, alpha=4, seed=1)
    disturb(model)
    return Sampler(model, model.schedule(4), model.latent_shape())


@pytest.fixture
def double(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """The same sampler in float64, where invariants hold to many digits."""
    sampler.model.unet.double()
    sampler.model.vae.double()
    draw = rollout.randn
    for module in (rollout, alignprop, rwr):
        monkeypatch.setattr(module, "randn", lambda *args: draw(*args).double())
    return sampler


def disturb(model: TextToImage, scale: float = 0.1) -> None:
    """Moves B away from zero, where A would have no gradient."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.trainable():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))


def caught_gradient(learner: Learner) -> dict[str, torch.Tensor]:
    """Fills up with each parameter's gradient when the learner steps: what the optimiser is given."""
    caught: dict[str, torch.Tensor] = {}
    named = learner.parameters.items()
    learner.optimizer.register_step_pre_hook(lambda *_: caught.update({n: p.grad.clone() for n, p in named}))
    return caught
