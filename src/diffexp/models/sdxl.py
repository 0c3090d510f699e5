"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image size as a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffexp.devices import numbers
from diffexp.models.base import Source, TextToImage, device_of
from diffexp.models.tokens import spell, tokenize
from diffexp.text import TextEmbedding, Words


class StableDiffusionXL(TextToImage):
    """Podell et al. 2023. Eq. 8's word is weighted in both encoders' hidden states; the pooled embedding stays.

    ``zero_uncond`` is the pipeline's ``force_zeros_for_empty_prompt``: the unconditional prediction is conditioned on
    zeros instead of on the embedding of the empty text.
    """

    kohya_text_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: DDIMScheduler,
        source: Source,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        zero_uncond: bool = True,
    ) -> None:
        super().__init__(unet, vae, scheduler, source)
        self.tokenizers, self.zero_uncond = tokenizers, zero_uncond
        self.encoders = tuple(encoder.eval().requires_grad_(False) for encoder in text_encoders)

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        texts, states = ["", *prompts], []
        (first, words), (second, _) = (tokenize(tokenizer, texts) for tokenizer in self.tokenizers)
        for ids, encoder in zip((first, second), self.encoders, strict=True):
            encoded = encoder(torch.tensor(ids, device=device_of(encoder)), output_hidden_states=True)
            states.append(encoded.hidden_states[-2].float())
        hidden, pooled = torch.cat(states, dim=-1), encoded.text_embeds.float()
        uncond, uncond_pooled = hidden[0], pooled[0]
        if self.zero_uncond:
            uncond, uncond_pooled = torch.zeros_like(uncond), torch.zeros_like(uncond_pooled)
        return TextEmbedding(hidden[1:], words[1:], hidden[0], uncond, pooled[1:], uncond_pooled)

    def spell(self, prompts: Sequence[str], units: Sequence[Words]) -> list[list[str]]:
        return spell(self.tokenizers[0], prompts, units)

    def network(self, x: Tensor, t: int | Sequence[int], hidden: Tensor, pooled: Tensor | None) -> Tensor:
        if pooled is None:
            raise ValueError("SDXL needs the pooled text embedding")
        height, width = x.shape[-2] * self.pixels, x.shape[-1] * self.pixels
        # original size, crop corner, target size: an uncropped image of the size that is made
        time_ids = numbers([height, width, 0, 0, height, width], self.dtype, self.device)
        added = {"text_embeds": pooled.to(self.dtype), "time_ids": time_ids.expand(len(x), -1)}
        timestep = numbers([t] if isinstance(t, int) else t, torch.long, self.device)
        inputs = x.to(self.dtype), timestep, hidden.to(self.dtype)
        with self.computing():
            output = self.unet(*inputs, added_cond_kwargs=added, return_dict=False)[0]
        return output.to(x.dtype)

    def text_encoders(self) -> Mapping[str, nn.Module]:
        return dict(zip(self.kohya_text_encoders, self.encoders, strict=True))
