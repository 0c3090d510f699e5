"""Where a reward server is, and the token that opens it. Needs no torch.

The token never stands in an address: addresses stand in recipes and run folders.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from diffexp.errors import UserError

TOKEN, TOKEN_FILE = "DIFFEXP_REWARD_TOKEN", "DIFFEXP_REWARD_TOKEN_FILE"
PATIENCE = "DIFFEXP_REWARD_PATIENCE"
DEFAULT_PATIENCE = 600.0  # seconds
HOW_TO_TELL = f"a token goes into {TOKEN} or a file named by {TOKEN_FILE}"


class Address(NamedTuple):
    """A reward server's place; ``path`` is "" or starts with a slash and does not end with one."""

    secure: bool
    host: str
    port: int
    path: str


def is_remote(name: str) -> bool:
    """Whether a reward's name is a server's address."""
    return name.startswith(("http://", "https://"))


def refuse_secrets(spec: str) -> None:
    """Refuses an address with a user or a password in it, without repeating it.

    Raises:
        UserError: then.
    """
    if re.search(r"https?://[^/]*@", spec):
        raise UserError(f"a reward's address has no user or password in it: {HOW_TO_TELL}")


def read_address(name: str) -> Address:
    """Reads ``http://host:port``, ``https://host:port/path`` and the like.

    Raises:
        UserError: for anything else, without repeating what might be a secret.
    """
    refuse_secrets(name)
    where, _, more = name.partition("?")
    wanted = "write http://host:port or https://host:port/path"
    if more or "?" in name or "#" in name:
        raise UserError(f"reward {where.partition('#')[0]!r}: an address has no ? or # part; {wanted}; {HOW_TO_TELL}")
    if not (name.isascii() and name.isprintable()) or " " in name:
        raise UserError(f"reward {name!r} has a letter that no address has: {wanted}")
    try:
        parts = urlsplit(name)
        secure = parts.scheme == "https"
        port = parts.port if parts.port is not None else 443 if secure else 80
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise UserError(f"reward {name!r} is no address ({error}): {wanted}") from None
    if not parts.hostname or not port or parts.scheme not in ("http", "https"):
        raise UserError(f"reward {name!r} is no address: {wanted}")
    return Address(secure, parts.hostname, port, parts.path.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: Path | None = None) -> str | None:
    """The token in ``file``, else in the file that the environment names, else in the environment; else none.

    Raises:
        UserError: if the file can't be read, or what stands there is no token: 16 to 512 printable ASCII characters.
    """
    named = os.environ.get(TOKEN_FILE)
    file = file or (Path(named) if named else None)
    if file is None:
        found, where = os.environ.get(TOKEN), TOKEN
    else:
        try:
            found, where = file.read_text(encoding="ascii").strip(), f"the token file {file}"
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise UserError(f"can't read the token file {file}: {reason}") from None
    if found is not None and not re.fullmatch(r"[\x21-\x7e]{16,512}", found):
        raise UserError(
            f"{where} holds no token: it takes 16 to 512 letters, digits and signs without a space; "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
        )
    return found


def read_patience() -> float:
    """How many seconds a run waits for a reward server that does not answer; "inf" is for ever.

    Raises:
        UserError: if the environment says something else than a number from 0.
    """
    text = os.environ.get(PATIENCE)
    if text is None:
        return DEFAULT_PATIENCE
    try:
        patience = float(text)
    except ValueError:
        patience = math.nan
    if not patience >= 0:
        raise UserError(f"{PATIENCE} = {text!r}: give seconds, 0 or more, or inf")
    return patience
