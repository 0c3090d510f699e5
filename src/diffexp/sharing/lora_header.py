"""What a LoRA file, or a fine-tuned network, says about itself, and the recipe that made it. Needs no torch.

A header is a stranger's text. Nothing in it is run: a reward of one's own, which is code, is left out of the recipe.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffexp.config import Recipe
from diffexp.errors import UserError, one_line, printable
from diffexp.rewards import available
from diffexp.rewards.checksum import checksum
from diffexp.rewards.spec import parse
from diffexp.toml import check_depth, section, toml_lines

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
UNET_FILE = "diffusion_pytorch_model.safetensors"
LONGEST_HEADER = 10_000_000
"""Bytes; those of LoRA files have some 100 kB, with the captions of a data set a few million."""
METADATA_KEY = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
RECIPE, REWARD, ITERATIONS, QUERIES, VERSION, COMMIT, CHECKSUM = (
    f"diffexp.{key}" for key in ("recipe", "reward", "iterations", "queries", "version", "base_commit", "reward_sha256")
)
FOLDERS = {"lora": DIFFUSERS_FILE, "unet": UNET_FILE}
"""Where in a run's folder its result is, and in which file."""


LAYOUTS = {
    "diffusers": "diffusers keys",
    "kohya": "kohya keys",
    "network": "a whole denoising network",
    "unknown": "unknown keys",
}
NETWORKS = {
    "the network": re.compile(r"unet\.|lora_unet_"),
    "text encoder 1": re.compile(r"text_encoder\.|lora_te1?_"),
    "text encoder 2": re.compile(r"text_encoder_2\.|lora_te2_"),
}
"""How the keys of each network's adapter begin."""


@dataclass(frozen=True)
class LoraHeader:
    """The header of a LoRA file: ``metadata`` as it stands there, and the ``shapes`` of its tensors."""

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path | str) -> LoraHeader:
        """Reads a file, or the result in a run's folder or in that folder's ``lora`` or ``unet``.

        Raises:
            UserError: if there is none, or it is no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        for folder, file in FOLDERS.items():
            path = next((inside for inside in (path / file, path / folder / file) if inside.is_file()), path)
        if not path.is_file():
            raise UserError(f"{path}: no such LoRA file; give a .safetensors file, or a run folder")
        try:
            check_header_size(path)
            with safe_open(path, framework="numpy") as opened:
                keys = list(opened.keys())
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
                return cls(path, opened.metadata() or {}, shapes)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: no safetensors file ({one_line(error)})") from error

    @property
    def layout(self) -> str:
        """Whose keys the file has."""
        if any(".lora_A." in key for key in self.shapes):
            return "diffusers"
        if any(".lora_down." in key for key in self.shapes):
            return "kohya"
        return "network" if "conv_in.weight" in self.shapes else "unknown"

    @property
    def rank(self) -> int | None:
        """The largest rank of its matrices."""
        ranks = [shape[0] for key, shape in self.shapes.items() if ".lora_A." in key or ".lora_down." in key]
        return max(ranks, default=None)

    @property
    def adapted(self) -> list[str]:
        """The networks that have an adapter in it."""
        return [network for network, starts in NETWORKS.items() if any(map(starts.match, self.shapes))]

    @property
    def alpha(self) -> str | None:
        """The alpha that the header states."""
        adapter = self.table(METADATA_KEY)
        stated = next((value for key, value in adapter.items() if key.endswith("lora_alpha")), None)
        return str(stated) if stated is not None else self.metadata.get("ss_network_alpha")

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that made it, as nested tables; empty if the file was not made by diffexp."""
        return self.table(RECIPE)

    def table(self, key: str) -> dict[str, Any]:
        """An entry that holds a JSON object; empty if there is none."""
        try:
            content = json.loads(self.metadata.get(key, "{}"))
            check_depth(content)
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def describe(self) -> str:
        """The header as people read it: first the essentials, then the recipe in TOML."""
        get, first = self.metadata.get, next(iter(self.shapes), "none")
        done = [f"{get(key)} {word}" for key, word in ((ITERATIONS, "iterations"), (QUERIES, "queries")) if get(key)]
        further = sorted(key for key in self.metadata if not key.startswith("diffexp."))
        rows = {
            "file": f"{self.path}, {LAYOUTS[self.layout]}",
            "base model": " at ".join(filter(None, (str(section(self.recipe, "model").get("path", "")), get(COMMIT)))),
            "kind": get("modelspec.architecture"),
            "reward": get(REWARD),
            "its SHA-256": get(CHECKSUM),
            "trained": ", ".join(done),
            "adapts": " and ".join(self.adapted),
            "rank, alpha": f"{self.rank}, {self.alpha or 'as the rank'}" if self.rank else None,
            "tensors": f"{len(self.shapes)}, such as {first} {self.shapes.get(first, ())}",
            "made by": f"diffexp {get(VERSION)}" if get(VERSION) else None,
            "further": f"{', '.join(further)}; --json has their values" if further else None,
        }
        lines = [f"{name + ':':<13}{value}" for name, value in rows.items() if value]
        if self.recipe:
            again = f"diffexp train --like {shlex.quote(str(self.path))}"
            lines += ["", f"# the recipe; `{again}` repeats it", *toml_lines(self.recipe)]
        return printable("\n".join(lines))

    def to_json(self) -> str:
        """The whole header in JSON; entries that hold JSON themselves are unpacked."""
        tables = {key: self.table(key) or value for key, value in self.metadata.items()}
        return json.dumps({"metadata": tables, "shapes": self.shapes}, indent=2)


def check_header_size(path: Path) -> None:
    """Checks how long a safetensors file says that its header is, before anything reads it.

    Raises:
        ValueError: if it is longer than any LoRA's, or than the file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > min(LONGEST_HEADER, path.stat().st_size):
        raise ValueError(f"a header of {size:,} bytes")


def like(path: Path | str, overrides: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe that made a LoRA, with overrides, and what was left out of it, a line each.

    Raises:
        UserError: if the header has no recipe, or one that this version can't read, or whose reward was left out.
    """
    header = LoraHeader.read(path)
    data = header.recipe
    if not data:
        raise UserError(f"{header.path} has no recipe in its header: only LoRA files made by diffexp have one")
    data, left_out = without_code(data, overrides.get("reward"))
    for key in {"reward", "algorithm.name"} & left_out.keys() - overrides.keys():
        raise UserError(f"{header.path}: {printable(left_out[key])}; name the {key} yourself: --set {key}=...")
    notes = list(left_out.values())
    if "reward" in data and "reward" not in overrides:
        stated, own = header.metadata.get(CHECKSUM), checksum(str(data["reward"]))
        if stated and own and stated != own:
            notes.append(f"the reward {data['reward']!r} is another one than the header's: its SHA-256 differs")
    commit = header.metadata.get(COMMIT)
    if commit and "model.path" not in overrides:
        data["model"] = {**section(data, "model"), "revision": commit}
    return Recipe.parse(data, header.path.name, overrides), [printable(note) for note in notes]


def without_code(data: Mapping[str, Any], instead: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe without what is not diffexp's own, code or a stranger's server; and a line about each setting left out.

    Where the training reward is one of them, evaluations take ``instead`` for it.
    """
    kept, notes, replaced = dict(data), dict[str, str](), {}
    if "reward" in kept and not is_shipped(kept["reward"]):
        foreign = kept.pop("reward")
        replaced[str(foreign)] = instead
        notes["reward"] = f"the header's reward {foreign!r} is not one of diffexp's own and was left out"
    evaluation = dict(section(kept, "evaluation"))
    if isinstance(evaluation.get("rewards"), list):
        names = [str(name) for name in evaluation["rewards"]]
        foreign = [name for name in names if not is_shipped(name) and not replaced.get(name)]
        evaluation["rewards"] = [replaced.get(name) or name for name in names if name not in foreign] or None
        kept["evaluation"] = evaluation
        if foreign:
            what = "left out of evaluation.rewards, as they are not diffexp's own"
            notes["evaluation.rewards"] = f"{what}: {', '.join(foreign)}"
    if evaluation.get("held_out") is not None and not is_shipped(evaluation["held_out"]):
        foreign = evaluation.pop("held_out")
        evaluation.pop("patience", None)  # of that reward
        kept["evaluation"] = evaluation
        what = "is not one of diffexp's own and was left out"
        notes["evaluation.held_out"] = f"the header's evaluation.held_out {foreign!r} {what}"
    for table, key in (("algorithm", "name"), ("exploration", "strategy")):
        inside = dict(section(kept, table))
        if ":" in str(inside.get(key)):
            foreign = inside.pop(key)
            notes[f"{table}.{key}"] = f"the header's {table}.{key} {foreign!r} is code and was left out"
            kept[table] = inside
    return kept, notes


def is_shipped(reward: object) -> bool:
    """Whether a reward is made of diffexp's own only."""
    try:
        return isinstance(reward, str) and all(member.name in available() for member in parse(reward))
    except UserError:
        return False


def without_paths(content: Any) -> Any:
    """A recipe, or a name in one, as cards and headers may have it: absolute paths are cut down to their last part, and
    the addresses of reward servers name no host.
    """
    if isinstance(content, Mapping):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and not content.startswith("text:"):
        content = re.sub(r"(https?://)(?:\[[^\]]*\]|[^]/:+*\s[]+)", r"\1…", content)
        return re.sub(r"(^|[+*\s])(?:/|~|[A-Za-z]:[/\\])[^+*\n]*[/\\]", r"\1", content.rstrip("/\\"))
    return content
