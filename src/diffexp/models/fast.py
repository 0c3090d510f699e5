"""The networks' layers, computed faster. Nothing here changes what they compute by more than rounding.

What each of them gains is in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft.tuners.lora import layer
from torch import Tensor, nn
from torch.nn import functional

ADAPTER = "default"  # how peft calls an adapter that was given no name
SHORT = 256
"""Tokens up to which attention on a CPU writes its scores out in bf16: at most 128 KiB a head, which caches hold."""


class AdaptedLinear(layer.Linear):
    """y = W x + b + B (s A x), its last term added in place by the product itself.

    peft computes the term in float32, scales it, and adds it, each in a pass of its own over what is as large as y: at
    rank 4 that costs more than the arithmetic. Gradients of A and B are float32 all the same.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        usual = self.active_adapters == [ADAPTER] and not (self.disable_adapters or self.merged or args or kwargs)
        # in fp16 the adapter's own gradient would underflow
        same = x.dtype == self.base_layer.weight.dtype and x.dtype != torch.float16
        if not (usual and same) or autocasts(x):
            return super().forward(x, *args, **kwargs)
        sides: list[Any] = [side[ADAPTER].weight.to(x.dtype) for side in (self.lora_A, self.lora_B)]
        down, up = sides
        rows = x.reshape(-1, x.shape[-1])
        y = self.base_layer(rows)
        y.addmm_(functional.linear(rows, down * self.scaling[ADAPTER]), up.t())
        return y.view(*x.shape[:-1], -1)


class ShortAttention(AttnProcessor2_0):
    """Attention over few tokens, without the fused kernel: on a CPU its backward pass is slow in bf16."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # diffusers passes on only what is named here
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rounds = hidden_states.dtype == torch.bfloat16 or autocasts(hidden_states)
        short = hidden_states.ndim == 3 and max(hidden_states.shape[1], keys.shape[1]) <= SHORT
        compute = AttnProcessor().__call__ if rounds and short else super().__call__
        return compute(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


class FloatGroupNorm(nn.GroupNorm):
    """Group normalisation in float32, whatever the precision around it: on a CPU that is faster than in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if value is None else value.float() for value in (self.weight, self.bias))
        return functional.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


def autocasts(x: Tensor) -> bool:
    """Whether products with ``x`` are computed in another precision than its own; "meta" knows no autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def quicken(network: nn.Module) -> None:
    """Replaces the layers of a denoising network or a VAE by the above, where its device and precision gain by it."""
    weight = next(network.parameters())
    if weight.device.type != "cpu":
        return
    short: Any = ShortAttention()
    for module in network.modules():
        if isinstance(module, Attention) and isinstance(module.processor, AttnProcessor2_0):
            module.set_processor(short)
        if weight.dtype == torch.bfloat16 and type(module) is nn.GroupNorm:
            module.__class__ = FloatGroupNorm


def quicken_adapter(network: nn.Module) -> None:
    """Lets the adapted layers of a network add their adapter in place."""
    for module in network.modules():
        if type(module) is layer.Linear:
            module.__class__ = AdaptedLinear
