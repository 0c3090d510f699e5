"""Files that want to do harm. Each that can run something would leave a file: the canary."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SAFE, UNSAFE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


class Bomb:
    """What makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (code(self.canary),)


def code(canary: Path) -> str:
    """Python that makes the canary."""
    return f"open({str(canary)!r}, 'w').close()\n"


def pickled(canary: Path) -> bytes:
    return pickle.dumps({"weight": Bomb(canary)})


def zipped(canary: Path) -> bytes:
    """What ``torch.save`` makes."""
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(canary)}, buffer)
    return buffer.getvalue()


def tensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with whatever header, which may lie about its ``length``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


LYING = {
    "a header longer than anything": tensors({}, length=2**63),
    "a header longer than the file": tensors({}, length=99_999_999),
    "overlapping tensors": tensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "a tensor past the end": tensors({"a": tensor(0, 800, (200,))}, bytes(8)),
    "a tensor before the beginning": tensors({"a": tensor(-8, 0)}, bytes(8)),
    "a tensor that ends before it begins": tensors({"a": tensor(8, 0)}, bytes(8)),
    "a shape of more than there is": tensors({"a": tensor(0, 8, (2**32, 2**32, 2**32))}, bytes(8)),
    "the same name twice": tensors(b'{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 8)).encode(),) * 2), bytes(8)),
    "a header that is no JSON": tensors(b"{'a': 1}"),
    "a header that is nested": tensors(b"[" * 100_000),
    "a name that leads out": tensors({"../../../canary": tensor(0, 8)}, bytes(8)),
}
"""Safetensors that are none, by what is wrong with them."""


def png(width: int, height: int) -> bytes:
    """A picture of one colour: any number of pixels, a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(min(height, 2000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def eps(canary: Path) -> bytes:
    """PostScript that makes the canary, for readers that hand it to an interpreter."""
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
        + f"({canary}) (w) file closefile showpage\n".encode()
    )


def change(file: Path, **values: Any) -> None:
    """Changes entries of a JSON file."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def instead(part: str, name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    """A model whose part has another file instead of its safetensors."""

    def spoil(model: Path, canary: Path) -> None:
        for weights in (model / part).glob("*.safetensors"):
            weights.unlink()
        (model / part / name).write_bytes(make(canary))

    return spoil


def asking(part: str, name: str = "config.json", **values: Any) -> Callable[[Path, Path], None]:
    """A model with further entries in a part's config, and code that makes the canary wherever they may lead."""

    def spoil(model: Path, canary: Path) -> None:
        change(model / part / name, **values)
        for folder in (model, model / part, canary.parent):
            for module in ("evil", "modeling", "pipeline", "tokenization", "None"):
                (folder / f"{module}.py").write_text(code(canary))

    return spoil


def sharded(part: str, stem: str, shard: str) -> Callable[[Path, Path], None]:
    """A model whose weights are in several files, as an index says, which names one that it must not."""

    def spoil(model: Path, canary: Path) -> None:
        weights = model / part / f"{stem}.safetensors"
        target = model / part / shard
        target.parent.mkdir(exist_ok=True)
        if shard.endswith(".safetensors"):
            shutil.copy(weights, target)
        else:
            target.write_bytes(zipped(canary))
        names = dict.fromkeys(["weight"], shard)
        (model / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        weights.unlink()

    return spoil


def as_zip(model: Path, canary: Path) -> None:
    """A model whose weights are an archive with a name that leads out."""
    weights = model / "unet" / SAFE
    with zipfile.ZipFile(weights, "w") as archive:
        archive.writestr("../../canary", "")


REDIRECT = {"base_model_name_or_path": "someone/else", "peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}
MODELS: dict[str, tuple[Callable[[Path, Path], None], str | None]] = {
    "a network as a pickle": (instead("unet", UNSAFE, pickled), "can't open unet"),
    "a network as torch.save makes it": (instead("unet", UNSAFE, zipped), "can't open unet"),
    "a VAE as a .ckpt": (instead("vae", "model.ckpt", pickled), "can't open vae"),
    "a text encoder as a .pt": (instead("text_encoder", "model.pt", zipped), "can't open text_encoder"),
    "a text encoder as a pickle": (instead("text_encoder", "pytorch_model.bin", zipped), "can't open text_encoder"),
    "a pickle that is called safetensors": (instead("unet", SAFE, pickled), "can't open unet"),
    "a torch.save that is called safetensors": (instead("text_encoder", "model.safetensors", zipped), "can't open"),
    "an archive that is called safetensors": (as_zip, "can't open unet"),
    "a shard that is a pickle": (sharded("unet", SAFE[:-12], "evil.bin"), "only safetensors in the same folder"),
    "a shard of a text encoder that is a pickle": (sharded("text_encoder", "model", "evil.bin"), "only safetensors"),
    "a shard that leads out": (sharded("unet", SAFE[:-12], "../outside/x.safetensors"), "only safetensors in the same"),
    "a network's auto_map": (asking("unet", auto_map={"AutoModel": "modeling.Net"}), "asks for code of its own"),
    "a text encoder's auto_map": (asking("text_encoder", auto_map={"AutoModel": "evil.Net"}), "asks for code"),
    "an auto_map inside": (asking("text_encoder", text_config={"auto_map": {"AutoConfig": "evil.C"}}), "asks for code"),
    "a tokenizer's auto_map": (
        asking("tokenizer", "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.T", None]}),
        "asks for code of its own (auto_map)",
    ),
    "trust_remote_code": (asking("text_encoder", trust_remote_code=True), "asks for code of its own"),
    "_attn_implementation": (asking("text_encoder", _attn_implementation="someone/kernel"), "asks for code of its own"),
    "_attn_implementation_internal": (
        asking("text_encoder", _attn_implementation_internal="someone/kernel"),
        "asks for code of its own (_attn_implementation_internal): remove that key if you trust the model",
    ),
    "_attn_implementation inside": (
        asking("text_encoder", text_config={"_attn_implementation_internal": "someone/kernel"}),
        "asks for code of its own",
    ),
    "a part of foreign code": (asking("", "model_index.json", unet=["evil", "Net"]), 'unet = ["evil", "Net"]'),
    "a part of a foreign class": (
        asking("", "model_index.json", text_encoder=["transformers", "AutoModel"]),
        'text_encoder = ["transformers", "AutoModel"] is not supported: only CLIPTextModel is',
    ),
    "a pipeline of its own": (asking("", "model_index.json", _class_name=["evil", "Pipeline"]), "only StableDiff"),
    "a pipeline called None": (asking("", "model_index.json", _class_name=None, custom_pipeline="."), "is a None"),
    "a foreign class in a config": (asking("unet", _class_name="evil.Net"), None),
    "a foreign class in a VAE's config": (asking("vae", _class_name=["evil", "Net"]), None),
    "foreign architectures": (asking("text_encoder", architectures=["evil.Net"], model_type="evil"), None),
    "a foreign scheduler": (
        asking("scheduler", "scheduler_config.json", _class_name="evil.S"),
        "scheduler is a evil.S",
    ),
    "a scheduler of endless steps": (
        asking("scheduler", "scheduler_config.json", num_train_timesteps=10**15),
        "num_train_timesteps = 1000000000000000",
    ),
    "an adapter that loads another model": (
        asking("text_encoder", "adapter_config.json", **REDIRECT),
        "holds an adapter (adapter_config.json)",
    ),
    "a quantisation": (asking("unet", quantization_config={"quant_method": "torchao"}), "quantised"),
    "a config of nonsense": (asking("unet", block_out_channels="x", norm_num_groups=0), "can't open unet"),
}
"""Ways to spoil a model's folder, and what is said; None where it is harmless."""
