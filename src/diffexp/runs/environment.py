"""What a run was made with: versions, device, and the memory it takes. Names no person, folder or machine."""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffexp.runs.names import ENVIRONMENT
from diffexp.version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")
GIB = 2**30


def describe(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What ``environment.json`` holds: versions, the kind of machine, and the device."""
    return {
        "diffexp": __version__,
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := installed(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "processes": processes,
    }


def read(folder: Path) -> dict[str, Any]:
    """A run folder's ``environment.json``; nothing where it is missing or damaged."""
    try:
        found = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def base_commit(folder: Path, model: str) -> str | None:
    """The commit that the hub's ``model`` had when the run in a folder began; None if it began with no such model.

    A branch moves. Whoever opens the run again wants the weights that it was trained on.
    """
    found = read(folder)
    commit = str(found.get("base_commit"))
    return commit if found.get("base_model") == model and re.fullmatch("[0-9a-f]{40}", commit) else None


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return device.type.upper()


def peak_memory(device: torch.device) -> float | None:
    """GiB that this process has held at most: of the device's memory, or of the machine's where there is no device.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / GIB if sys.platform == "darwin" else most * 1024 / GIB
