"""Rewrites a LoRA of ddpo-pytorch, AlignProp or early TRL, a pickle, as a safetensors file that `lora.start` reads.

python examples/from_ddpo_pytorch.py checkpoint_20/pytorch_lora_weights.bin old.safetensors
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def convert(old: str, new: str) -> None:
    """Tensors are kept; their names begin with the network that they belong to, which those tools left out."""
    pickled = not old.endswith(".safetensors")
    # weights_only: tensors are read, and nothing is run
    tensors = torch.load(old, map_location="cpu", weights_only=True) if pickled else load_file(old)
    names = {name: name if name.startswith("unet.") else f"unet.{name}" for name in tensors}
    save_file({names[name]: tensor.contiguous() for name, tensor in tensors.items()}, new)


if __name__ == "__main__":
    convert(*sys.argv[1:])
