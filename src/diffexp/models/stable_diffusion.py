"""Stable Diffusion 1.x and 2.x, and every pipeline of their class: the embedded emoji model too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexp.devices import numbers
from diffexp.models.base import Source, TextToImage, device_of
from diffexp.models.tokens import spell, tokenize
from diffexp.text import TextEmbedding, Words


class StableDiffusion(TextToImage):
    """One CLIP text encoder whose last hidden states condition the network."""

    kohya_text_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "lora_te"}

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: DDIMScheduler,
        source: Source,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
    ) -> None:
        super().__init__(unet, vae, scheduler, source)
        self.tokenizer, self.text_encoder = tokenizer, text_encoder.eval().requires_grad_(False)

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        ids, words = tokenize(self.tokenizer, ["", *prompts])
        ids = torch.tensor(ids, device=device_of(self.text_encoder))
        hidden = self.text_encoder(ids).last_hidden_state.float()
        return TextEmbedding(hidden[1:], words[1:], null_hidden=hidden[0], uncond_hidden=hidden[0])

    def spell(self, prompts: Sequence[str], units: Sequence[Words]) -> list[list[str]]:
        return spell(self.tokenizer, prompts, units)

    def network(self, x: Tensor, t: int | Sequence[int], hidden: Tensor, pooled: Tensor | None) -> Tensor:
        timestep = numbers([t] if isinstance(t, int) else t, torch.long, self.device)
        with self.computing():
            output = self.unet(x.to(self.dtype), timestep, hidden.to(self.dtype), return_dict=False)[0]
        return output.to(x.dtype)

    def text_encoders(self) -> Mapping[str, nn.Module]:
        return {"text_encoder": self.text_encoder}
