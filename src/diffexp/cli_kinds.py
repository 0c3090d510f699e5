"""Kinds of commands: what they do besides their own work."""

from __future__ import annotations

import gc
from typing import Any

from typer.core import TyperCommand, TyperGroup

HELP = {"help_option_names": ["-h", "--help"]}


class Stopped(Exception):
    """Ctrl-C or SIGTERM, and what it left."""


class Commands(TyperGroup):
    """Hands Ctrl-C on to ``main``: typer would end without a word about how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(str(stop) or "stopped") from stop


class Computing(TyperCommand):
    """A command that computes. It loads the heavy libraries first, without a look for garbage.

    Imports make objects by the million that stay, and Python goes through all of them again and again: a sixth of the
    time until a first image.
    """

    def invoke(self, ctx: Any) -> Any:
        gc.disable()
        try:
            from diffexp import commands  # noqa: F401
        finally:
            gc.freeze()
            gc.enable()
        return super().invoke(ctx)
