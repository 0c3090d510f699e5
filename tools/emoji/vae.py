"""The autoencoder: 64×64 pictures to 16×16 latents with eight channels, and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from torch import Tensor

from tools.emoji import scenes
from tools.emoji.common import WORK, Budget, Training, save, trained
from tools.emoji.groupnorm import speed_up

BATCH = 6
PEAK = 1e-3
KL_WEIGHT = 1e-3


def build() -> AutoencoderKL:
    """An untrained autoencoder. Eight latent channels at a quarter of the edge: six numbers become one.

    It starts as a nearly linear codec with almost no noise on its latents; see :func:`_start_nearly_linear`.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,  # many small groups are nearly instance normalisation, which loses the colours
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
    )
    _start_nearly_linear(model)
    return model


@torch.no_grad()
def _start_nearly_linear(model: AutoencoderKL, constant: float = 3.0, log_variance: float = -6.0) -> None:
    """Initialise ``model`` so that colours reach the latents and come back from the first step on.

    With the default initialisation the group normalisations before the two output convolutions wipe out a picture's
    colours and the unit-variance noise hides the latents: training spends its first thousand steps on undoing that.
    Here residual branches start at zero, all other convolutions near the identity, and a pair of opposite constants in
    each normalisation group fixes its mean and variance, so that it only scales. Four dB better after 50 steps.
    """
    encoder, decoder, latent = model.encoder, model.decoder, model.config.latent_channels
    resnets = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    for resnet in resnets:
        resnet.conv2.weight.zero_()
        resnet.conv2.bias.zero_()
    for last in (encoder.down_blocks[-1].resnets[0], decoder.up_blocks[-1].resnets[0]):
        for group in last.conv_shortcut.bias.chunk(2):
            group[-2:] += torch.tensor([-constant, constant])
    scaling = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
    scaling += [block.upsamplers[0].conv for block in decoder.up_blocks if block.upsamplers]
    shortcuts = [resnet.conv_shortcut for resnet in resnets if resnet.conv_shortcut is not None]
    for conv in (encoder.conv_in, decoder.conv_in, *scaling, *shortcuts):
        _towards_identity(conv.weight, 1.0)
    for conv in (encoder.conv_out, decoder.conv_out):  # what the fixed normalisation and SiLU scaled down comes back
        _towards_identity(conv.weight, constant)
    _towards_identity(model.quant_conv.weight[:latent], 1.0)
    _towards_identity(model.post_quant_conv.weight, 1.0)
    model.quant_conv.weight[latent:] = 0
    model.quant_conv.bias[latent:] = log_variance


def _towards_identity(weight: Tensor, gain: float) -> None:
    """Shrink a convolution's random weight and add ``gain`` times the identity at its centre."""
    centre = weight.shape[-1] // 2
    weight.mul_(0.3)
    weight[:, :, centre, centre] += gain * torch.eye(*weight.shape[:2])


def edges(images: Tensor) -> Tensor:
    """Horizontal and vertical differences between neighbouring pixels, flattened to (B, N)."""
    return torch.cat([images.diff(dim=2).flatten(1), images.diff(dim=3).flatten(1)], dim=1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on edges: the second keeps outlines sharp, which the first alone blurs."""
    return F.l1_loss(output, target) + F.mse_loss(output, target) + F.l1_loss(edges(output), edges(target))


def to_tensor(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 (B, 64, 64, 3) → float (B, 3, 64, 64) in [-1, 1], channels last in memory."""
    return torch.tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB; both in [-1, 1]."""
    error = ((output.clamp(-1, 1) - target) / 2).square().flatten(1).mean(1)
    return -10 * error.log10()


def train(budget: Budget, device: str, *, decoder_only: bool = False) -> None:
    """Train the autoencoder; with ``decoder_only``, sharpen the decoder while the latents stay what they are."""
    torch.manual_seed(10 + decoder_only)
    model = build().to(device, memory_format=torch.channels_last)
    if decoder_only:
        trained(WORK / "vae.train.safetensors", model, average=True).requires_grad_(True)
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    speed_up(model)
    name = "vae-decoder" if decoder_only else "vae"
    training = Training(name, model, budget, PEAK / 2 if decoder_only else PEAK, average=0.995)
    pictures, _ = scenes.load("autoencoder")
    for step in training:
        rng = np.random.default_rng((10 + decoder_only, step))
        images = to_tensor(pictures[rng.integers(len(pictures), size=BATCH)], device)
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(images).latent_dist
            output = model.decode(posterior.mode() if decoder_only else posterior.sample()).sample
        loss = reconstruction_loss(output.float(), images)
        if not decoder_only:
            loss = loss + KL_WEIGHT * posterior.kl().mean() / images[0].numel()
        training.update(loss)
        if step % 100 == 99:
            print(f"{name}: batch PSNR {psnr(output.float(), images).mean():.2f} dB", flush=True)


def load(device: str = "cpu") -> AutoencoderKL:
    """The autoencoder as trained so far, with the sharpened decoder if there is one, and its scaling factor."""
    model = trained(WORK / "vae.train.safetensors", build(), average=True)
    sharpened = WORK / "vae-decoder.train.safetensors"
    if sharpened.exists():
        trained(sharpened, model, average=True)
    pictures, _ = scenes.load("autoencoder")
    latents = encode(model, pictures[:512])
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return model.to(device)


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """The mean latents (N, 8, 16, 16) of uint8 pictures, unscaled."""
    chunks = (to_tensor(pictures[i : i + batch], model.device.type) for i in range(0, len(pictures), batch))
    with torch.autocast(model.device.type, torch.bfloat16):
        return torch.cat([model.encode(chunk).latent_dist.mean.float().cpu() for chunk in chunks])


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """Pictures after the way through the latents, float (N, 3, 64, 64) in [-1, 1]."""
    latents = encode(model, pictures, batch).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        return torch.cat([model.decode(chunk).sample.float().clamp(-1, 1).cpu() for chunk in latents.split(batch)])


def reconstructions(split: str, count: int = 3072) -> Tensor:
    """The first pictures of a split after the way through the latents, uint8 (count, 3, 64, 64); computed once."""
    store = WORK / f"rebuilt-{split}.safetensors"
    if not store.exists():
        rebuilt = reconstruct(load(), scenes.load(split)[0][:count])
        save({"rebuilt": ((rebuilt + 1) * 127.5).round().byte()}, store)
    return load_file(store)["rebuilt"]


def report(device: str, count: int = 726) -> float:
    """Print and return the mean PSNR on held-out scenes."""
    pictures, _ = scenes.load("heldout")
    value = psnr(reconstruct(load(device), pictures[:count]), to_tensor(pictures[:count])).mean().item()
    print(f"vae: PSNR on {count} held-out scenes {value:.2f} dB", flush=True)
    return value
