"""Faster layers compute what the libraries' own do, and so do their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature

import pytest
import torch
from conftest import disturb
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import layer
from torch import Tensor, nn

from diffexp import models
from diffexp.models import fast, lora


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(compute: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """What it computes, and how a weighted sum of that changes with its input and its parameters."""
    x = x.clone().requires_grad_()
    y = compute(x)
    found = torch.autograd.grad((y * numbers(*y.shape, seed=1)).sum(), [x, *parameters])
    return [tensor.detach().float() for tensor in (y, *found)]


def closeness(precision: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.05, "atol": 0.05}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapted_layers_compute_what_pefts_do(sd_folder: object, precision: str) -> None:
    model = models.load(str(sd_folder), precision)
    lora.add(model, rank=3, alpha=6, seed=1)
    disturb(model)
    adapted = [(name, module) for name, module in model.unet.named_modules() if isinstance(module, fast.AdaptedLinear)]
    assert len(adapted) == sum(hasattr(module, "lora_A") for module in model.unet.modules()) > 0
    for name, module in adapted[:6]:
        learned = [module.lora_A["default"].weight, module.lora_B["default"].weight]
        x = numbers(2, 5, module.in_features).to(model.dtype)
        ours = gradients(module.forward, x, learned)
        theirs = gradients(partial(layer.Linear.forward, module), x, learned)
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() <= (1e-5 if precision == "fp32" else 0.02) * other.norm(), name
        assert all(parameter.dtype == torch.float32 for parameter in learned)


def test_an_adapter_that_is_off_adds_nothing(sd_folder: object) -> None:
    model = models.load(str(sd_folder))
    x, text = numbers(1, *model.latent_shape()), model.encode(["a cat"])
    before = model.predict(x, 500, text, 3.0)
    lora.add(model, rank=3, seed=1)
    assert torch.allclose(model.predict(x, 500, text, 3.0), before, atol=1e-5), "a new adapter changes nothing"
    disturb(model)
    assert not torch.allclose(model.predict(x, 500, text, 3.0), before, atol=1e-5)
    with model.base():
        assert torch.allclose(model.predict(x, 500, text, 3.0), before, atol=1e-5)


@pytest.mark.parametrize("folder", ["sd_folder", "xl_folder"])
def test_a_pass_looks_through_no_list_of_layers(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(str(request.getfixturevalue(folder)))
    lora.add(model, rank=3, seed=1)
    x, text = numbers(1, *model.latent_shape()), model.encode(["a cat"])
    looked, look = [], nn.Module.modules

    def modules(self: nn.Module) -> Iterator[nn.Module]:
        looked.append(type(self))
        return look(self)

    monkeypatch.setattr(nn.Module, "modules", modules)
    assert model.unet.device.type == "cpu"
    assert looked, "diffusers' own answer does"
    looked.clear()
    model.predict(x, 500, text, 3.0)
    assert not looked


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [7, fast.SHORT + 1])
@pytest.mark.parametrize("cross", [False, True])
def test_attention(precision: torch.dtype, tokens: int, cross: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = Attention(16, cross_attention_dim=12 if cross else None, heads=2, dim_head=8, bias=True)
    theirs = theirs.to(precision)
    ours = copy.deepcopy(theirs)
    theirs.set_processor(AttnProcessor2_0())
    ours.set_processor(fast.ShortAttention())
    text = numbers(2, 5, 12, seed=2).to(precision) if cross else None
    x = numbers(2, tokens, 16).to(precision)
    results = [gradients(lambda x, net=net: net(x, text), x, list(net.parameters())) for net in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= (1e-5 if precision == torch.float32 else 0.03) * max(1.0, float(other.norm()))


def test_group_norm_in_bf16() -> None:
    theirs = nn.GroupNorm(2, 8).requires_grad_(False)
    theirs.weight.copy_(numbers(8, seed=1)), theirs.bias.copy_(numbers(8, seed=2))
    ours = copy.deepcopy(theirs).bfloat16()
    ours.__class__ = fast.FloatGroupNorm
    x = numbers(3, 8, 4, 4).bfloat16()
    for one, other in zip(gradients(ours, x, []), gradients(theirs, x.float(), []), strict=True):
        torch.testing.assert_close(one, other, **closeness(torch.bfloat16))
    assert ours(x).dtype == torch.bfloat16


def test_networks_in_bf16_are_quickened_on_a_cpu(sd_folder: object) -> None:
    model = models.load(str(sd_folder), "bf16")
    kinds = {type(module) for network in (model.unet, model.vae) for module in network.modules()}
    assert fast.FloatGroupNorm in kinds and nn.GroupNorm not in kinds
    assert {type(processor) for processor in model.unet.attn_processors.values()} == {fast.ShortAttention}
    assert model.dtype == torch.bfloat16


def test_attention_takes_all_that_diffusers_pass_on() -> None:
    """diffusers look at the signature, warn of what it lacks, and leave that out."""
    parameters = signature(AttnProcessor2_0.__call__).parameters
    assert parameters.keys() <= signature(fast.ShortAttention.__call__).parameters.keys()
