"""What the user can mend is a ``UserError``; the command line prints it as one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can mend: its message names the setting, the value and the remedy."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """What the user may have meant by ``name``."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not among ``known``, with the closest match as a suggestion.

    ``kind`` is what the name was meant to be ("reward"), ``remedy`` where to look for the right one.
    """
    known = sorted(known)
    guess = closest(name, known)
    hint = f"did you mean {guess!r}? " if guess else ""
    return UserError(f"unknown {kind} {name!r}: {hint}{remedy or 'known: ' + ', '.join(known)}")
