"""What a model's folder, which may be anybody's, must not ask for: code of its own, parts of other classes, pickles."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from diffexp.errors import UserError, cut, one_line

LIBRARIES = ("diffusers", "transformers")
CODE = ("auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines")
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""What each part of a pipeline is opened as. An index that names another class means something else."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"can't read {path}: a JSON object was expected")
    return content


def check_index(index: Mapping[str, Any], file: Path) -> None:
    """Checks that a pipeline's parts are of the libraries' classes that they are opened as.

    Raises:
        UserError: if one is not (CVE-2026-44513).
    """
    for part, classes in CLASSES.items():
        named = index.get(part)
        if named is not None and named not in ([library, name] for library in LIBRARIES for name in classes):
            raise UserError(
                f"{file}: {part} = {cut(json.dumps(named))} is not supported: only {' or '.join(classes)} is"
            )


def check_part(folder: Path) -> None:
    """Checks what is beside the weights of a part.

    Raises:
        UserError: if a config asks for code (CVE-2026-4372, CVE-2026-5241) or says that the weights are quantised, an
            index names anything but safetensors in this folder, or an adapter is to be loaded with it.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            for key in keys(read_json(folder / name)):
                if key in CODE or key.startswith("_attn_implementation"):
                    raise UserError(
                        f"{folder / name} asks for code of its own ({cut(key)}): remove that key if you trust the model"
                    )
                if key == "quantization_config":
                    raise UserError(f"{folder / name}: its weights are quantised, which is not supported")
    for file in folder.glob("*.index.json"):
        shards = read_json(file).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [shards]
        if wrong := [name for name in names if not is_safetensors(name)]:
            raise UserError(f"{file} names {cut(repr(wrong[0]))}: only safetensors in the same folder are read")
    # transformers would go and load the model that such a file names
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter (adapter_config.json), which is not supported: merge or remove it")


def keys(content: Any) -> Iterator[str]:
    """All keys of nested objects."""
    waiting = [content]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield from inner
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner


def is_safetensors(name: object) -> bool:
    """Whether it is the plain name of a safetensors file."""
    return isinstance(name, str) and PurePath(name).name == name and "\\" not in name and name.endswith(".safetensors")
