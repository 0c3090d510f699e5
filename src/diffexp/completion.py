"""What the shell completes: names of recipes, prompt sets, rewards, runs and settings. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

Completions = list[tuple[str, str]]  # what may stand there, and a line about it


def starting(known: Mapping[str, str], incomplete: str) -> Completions:
    """Those of the known names that begin so."""
    return [(name, about) for name, about in known.items() if name.startswith(incomplete)]


def recipes(incomplete: str) -> Completions:
    """Shipped recipes, and TOML files."""
    return shipped(incomplete) + files(incomplete, "*.toml")


def shipped(incomplete: str) -> Completions:
    """Shipped recipes."""
    from diffexp.toml import shipped

    return starting(shipped(), incomplete)


def prompts(incomplete: str) -> Completions:
    """Prompt sets, and files of prompts."""
    from diffexp.prompts import available
    from diffexp.prompts.files import SUFFIXES

    return starting(available(), incomplete) + files(incomplete, *(f"*{suffix}" for suffix in SUFFIXES))


def rewards(incomplete: str) -> Completions:
    """Rewards; also the last of a sum, as in ``2*hpsv2+aes``."""
    from diffexp.rewards import available

    last = max(incomplete.rfind("+"), incomplete.rfind("*")) + 1
    return [(incomplete[:last] + name, about) for name, about in starting(available(), incomplete[last:])]


def runs(incomplete: str) -> Completions:
    """Run folders, and the emoji model."""
    from diffexp.emoji import MODELS

    found = [(str(path.parent), "a run") for path in paths(incomplete, "*/config.toml")]
    return starting(dict.fromkeys(MODELS, "an embedded model"), incomplete) + found


def settings(incomplete: str) -> Completions:
    """``section.key=`` of a recipe; after the ``=`` the values, where they are names."""
    from diffexp.schema import choices, settings

    key, equals, value = incomplete.partition("=")
    if not equals:
        return starting({f"{name}=": field.description or "" for name, field in settings()}, key)
    named = {"reward": rewards, "prompts": prompts}.get(key)
    found = named(value) if named else starting(dict.fromkeys(choices(key), ""), value)
    return [(f"{key}={name}", about) for name, about in found]


def files(incomplete: str, *patterns: str) -> Completions:
    """Files of some kinds, and the folders on the way to them."""
    found = [path for pattern in patterns for path in paths(incomplete, pattern) if path.is_file()]
    folders = [path for path in paths(incomplete, "*") if path.is_dir()] if "/" in incomplete else []
    return [(str(path), "") for path in found] + [(f"{path}/", "") for path in folders]


def paths(incomplete: str, pattern: str) -> Iterable[Path]:
    """What fits the pattern in the folder that is being typed, and begins so."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    return sorted(path for path in folder.glob(pattern) if str(path).startswith(incomplete.removeprefix("./")))
