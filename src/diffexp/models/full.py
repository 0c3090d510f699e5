"""Fine-tuning of the whole denoising network, in place of an adapter.

Memory on the device, for each parameter: 4 bytes of weights, 4 of gradients and 8 of AdamW's moments, all float32,
whatever the precision of the computation. That is 14 GB for Stable Diffusion 1.5 and 41 GB for XL, before activations.
Each checkpoint holds weights and moments: 10 GB and 31 GB, and as much memory of the computer while it is saved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffexp.errors import UserError
from diffexp.models.base import TextToImage
from diffexp.models.header import put_in_order
from diffexp.runs import durable
from diffexp.sharing.lora_header import UNET_FILE
from diffexp.version import __version__
from diffexp.weights import misfits


def unfreeze(model: TextToImage) -> None:
    """Lets every parameter of the denoising network train."""
    model.unet.requires_grad_(True)


def save(model: TextToImage, folder: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes the denoising network as diffusers does, for ``UNet2DConditionModel.from_pretrained(folder)``."""
    folder.mkdir(parents=True, exist_ok=True)
    model.unet.save_config(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.unet.state_dict().items()}
    with durable.replacing(folder / UNET_FILE) as unfinished:
        save_file(tensors, unfinished, {"format": "pt", "diffexp.version": __version__, **(metadata or {})})
        with unfinished.open("r+b") as file:
            put_in_order(file)
            file.flush()
            os.fsync(file.fileno())
    return folder / UNET_FILE


def load(model: TextToImage, folder: Path) -> None:
    """Takes the weights of the denoising network from where ``save`` wrote them.

    Raises:
        UserError: if there are none, or those of another network.
    """
    file = folder / UNET_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read the network {file}: {error}") from error
    own = model.unet.state_dict()
    if wrong := misfits(own, tensors):
        raise UserError(f"the network {file} does not fit this model: {len(wrong)} tensors differ, {wrong[0]} for one")
    model.unet.load_state_dict(tensors)
