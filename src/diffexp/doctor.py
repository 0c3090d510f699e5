"""What is installed, what is missing, and what this machine can run: ``diffexp doctor``, for bug reports.

Names no person: the home folder is ``~``, and of environment variables only what they mean is told. Works where half of
the installation is broken, so each part is looked at on its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffexp import emoji
from diffexp.durations import counted
from diffexp.errors import one_line
from diffexp.version import __version__

GIB = 2**30
CPU_ABILITIES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX bf16"}
"""Flags of /proc/cpuinfo, and what they are called."""
RESERVE = 0.9
"""The share of a device's memory that a run can have: the rest is the driver's and the display's."""


def examine() -> dict[str, Any]:
    """Everything there is to know, part by part; a part that can't be looked at says why."""
    parts: dict[str, Callable[[], Any]] = {
        "packages": packages,
        "devices": devices,
        "cpu": cpu,
        "memory": memory,
        "disk": disk,
        "hub": hub,
        "extras": extras,
        "rewards": rewards,
        "models": models,
        "recipes": recipes,
    }
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    found: dict[str, Any] = {"diffexp": __version__, "python": platform.python_version(), "system": system}
    for name, look in parts.items():
        try:
            found[name] = look()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {one_line(error)}"}
    return json.loads(without_home(json.dumps(found)))


def without_home(text: str) -> str:
    """Text in which the user's home folder is ``~``."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def requirements() -> Iterator[Any]:
    """What the package asks for, as ``packaging`` reads it."""
    from packaging.requirements import Requirement

    return map(Requirement, requires("diffexp") or [])


def state(requirement: Any) -> str:
    """The installed version of a requirement, and whether it is too old."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "missing"
    needs = requirement.specifier
    return found if needs.contains(found, prereleases=True) else f"{found}, but needs {needs}"


def packages() -> dict[str, str]:
    """The versions of what is always needed."""
    needed = [each for each in requirements() if each.marker is None or each.marker.evaluate({"extra": ""})]
    hub = {"huggingface_hub": version("huggingface_hub")} if find_spec("huggingface_hub") else {}
    return {each.name: state(each) for each in needed} | hub


def extras() -> dict[str, str]:
    """Whether what each extra brings is here."""
    found: dict[str, list[str]] = {}
    for each in requirements():
        for extra in re.findall(r'extra == "([^"]+)"', str(each.marker)):
            found.setdefault(extra, []).append("" if state(each)[0].isdigit() and "," not in state(each) else each.name)
    return {extra: completeness(names) for extra, names in sorted(found.items())}


def completeness(lacking: list[str]) -> str:
    """What to say of an extra, of whose packages the lacking ones are named and the others empty."""
    names = list(filter(None, lacking))
    if not names:
        return "installed"
    return "not installed" if len(names) == len(lacking) else f"incomplete (packages missing: {', '.join(names)})"


def devices() -> dict[str, Any]:
    """What torch can compute on besides the CPU, and what "auto" takes."""
    import torch

    from diffexp.devices import device

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "gib": gib(total), "free_gib": gib(free), "capability": capability})
    found: dict[str, Any] = {"auto": device("auto").type, "cuda": gpus, "cuda_version": torch.version.cuda}
    if torch.backends.mps.is_available():
        found["mps"] = {"gib": gib(torch.mps.recommended_max_memory())}
    return found


def cpu() -> dict[str, Any]:
    """The processor, and which short number formats it multiplies by itself."""
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "abilities": [title for flag, title in CPU_ABILITIES.items() if flag in known] if flags else None,
    }


def memory() -> dict[str, Any]:
    """The machine's memory, or what the container may have of it, in GiB."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return {"gib": gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))}
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(encoding="utf-8"), re.MULTILINE))
    total, free = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    total = min(total, int(allowed)) if allowed.isdigit() else total
    return {"gib": gib(total), "free_gib": gib(min(free, total))}


def disk() -> dict[str, Any]:
    """Free space where runs and downloads go, in GiB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return {"here": gib(shutil.disk_usage(".").free), "hub_cache": gib(shutil.disk_usage(existing(HF_HUB_CACHE)).free)}


def hub() -> dict[str, Any]:
    """Where downloads lie, and whether there may be new ones."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    from diffexp.rewards.sources import cache_folder

    return {
        "cache": HF_HUB_CACHE,
        "exists": Path(HF_HUB_CACHE).is_dir(),
        "offline": bool(HF_HUB_OFFLINE),
        "converted_rewards": str(cache_folder()),
    }


def rewards() -> dict[str, str]:
    """Whether each shipped reward's weights are here."""
    from diffexp.rewards import available, check
    from diffexp.rewards.needs import size

    missing = {name: [each.source.size for each in check(name) if not each.present] for name in available()}
    return {name: f"to download: {size(sum(sizes))}" if sizes else "here" for name, sizes in missing.items()}


def models() -> dict[str, str]:
    """Whether the models of the shipped recipes are here."""
    from huggingface_hub import try_to_load_from_cache

    from diffexp.config import Recipe
    from diffexp.toml import shipped

    found = {}
    for path in dict.fromkeys(Recipe.load(name).model.path for name in shipped()):
        here = path in emoji.MODELS or isinstance(try_to_load_from_cache(path, "model_index.json"), str)
        found[path] = "here" if here else "to download"
    return found


def recipes() -> dict[str, str]:
    """Which shipped recipes this machine has the memory for."""
    import torch

    from diffexp.config import Recipe
    from diffexp.devices import device, slow
    from diffexp.toml import memory_of, shipped

    kind = device("auto").type
    if kind == "cuda":
        space = torch.cuda.mem_get_info()[1] / GIB
    else:
        space = torch.mps.recommended_max_memory() / GIB if kind == "mps" else memory()["gib"]
    found = {}
    for name in shipped():
        needs, emoji = memory_of(name), not name.startswith("sd")
        if needs <= space * RESERVE and (emoji or kind != "cpu"):
            bad = slow(Recipe.load(name).model.precision, torch.device(kind))
            found[name] = "runs here" if bad is None else "runs here with --set model.precision=fp16"
        else:
            found[name] = f"needs about {needs:g} GiB of memory" if emoji else f"needs a GPU with about {needs:g} GiB"
    return found


def existing(path: str) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = Path(path).absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def gib(count: float) -> float:
    return round(count / GIB, 1)


def describe(found: dict[str, Any]) -> str:
    """What ``examine`` found, as lines to paste into a report."""
    lines = [f"diffexp {found['diffexp']}, Python {found['python']}, {found['system']}"]
    for name in ("packages", "devices", "cpu", "memory", "disk", "hub", "extras", "rewards", "models", "recipes"):
        part = found[name]
        words = part["error"] if "error" in part else WORDS[name](part)
        lines.append(f"{name:<9} {words}")
    return "\n".join(lines)


def listed(part: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in part.items())


def grouped(part: dict[str, str]) -> str:
    """The names under what is said of them."""
    groups: dict[str, list[str]] = {}
    for name, value in part.items():
        groups.setdefault(value, []).append(name)
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())


def say_devices(part: dict[str, Any]) -> str:
    gpus = [f"{g['name']}, {g['gib']} GiB ({g['free_gib']} free), capability {g['capability']}" for g in part["cuda"]]
    mps = [f"Apple GPU, {part['mps']['gib']} GiB"] if "mps" in part else []
    what = "; ".join([*gpus, *mps]) or "no GPU"
    return f"{what}; torch is built for {'CUDA ' + part['cuda_version'] if part['cuda_version'] else 'the CPU'}"


def say_cpu(part: dict[str, Any]) -> str:
    abilities = "unknown" if part["abilities"] is None else ", ".join(part["abilities"]) or "none of bf16, AMX"
    cores, threads = counted(part["cores"], "core"), counted(part["threads"], "thread")
    return f"{part['name']}, {cores}, {threads}; {abilities}"


def say_hub(part: dict[str, Any]) -> str:
    there = "" if part["exists"] else " (not there yet)"
    return f"cache {part['cache']}{there}, {'offline' if part['offline'] else 'online'}; {part['converted_rewards']}"


WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "packages": listed,
    "devices": say_devices,
    "cpu": say_cpu,
    "memory": lambda part: f"{part['gib']} GiB, {part.get('free_gib', '?')} free",
    "disk": lambda part: f"{part['here']} GiB free here, {part['hub_cache']} GiB for the hub's cache",
    "hub": say_hub,
    "extras": grouped,
    "rewards": grouped,
    "models": grouped,
    "recipes": grouped,
}
