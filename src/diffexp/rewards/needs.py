"""What a reward needs, in words. Needs no torch."""

from __future__ import annotations

from contextlib import closing

from diffexp.rewards.address import is_remote
from diffexp.rewards.client import Client, Unreachable
from diffexp.rewards.service import SAFETENSORS
from diffexp.rewards.sources import Requirement, check
from diffexp.rewards.spec import parse


def describe(spec: str) -> str:
    """A paragraph for each source that the rewards of ``spec`` need: from where, how big, which licence, what is here.

    A reward server is asked what it serves.

    Raises:
        UserError: for an unknown reward, or a server that does not answer.
    """
    needed = list({item.source: item for item in check(spec)}.values())
    servers = [server(member.name) for member in parse(spec) if is_remote(member.name)]
    if not needed and not servers:
        return f"{spec}: needs nothing beyond this package"
    missing = [item.source.size for item in needed if not item.present]
    total = f"to download: {size(sum(missing))}" if missing else "everything is here"
    return "\n".join([*(paragraph(item) for item in needed), *servers, f"{spec}: {total}"])


def server(address: str) -> str:
    """What a reward server says about itself, asked once: a check does not wait, as a run does.

    Raises:
        UserError: if it does not answer, refuses the token or is no reward server.
    """
    with closing(Client(address)) as client:
        try:
            service = client.health()
        except Unreachable as error:
            raise client.mistake(f"does not answer ({error}); `diffexp serve-reward` starts one") from None
    name, software = client.clean(service.name), client.clean(service.software)
    exact = "exactly" if SAFETENSORS in service.images else "as PNG, 8 bits a channel"
    takes = f"{service.limits.images} images at once, {exact}"
    return f"{address}\n  serves   {name}, by {software}; takes {takes}; no gradient"


def paragraph(need: Requirement) -> str:
    """Four lines about one source."""
    source = need.source
    state = "here" if need.present else f"missing: {', '.join(need.missing)}"
    pickled = "; a pickle, read once its SHA-256 is checked and converted to safetensors" if source.pickled else ""
    vouch = "; no hash of it is published: vouch for yours with DIFFEXP_TRUST_SHA256" if needs_trust(need) else ""
    return "\n".join(
        [
            f"{source.what} ({size(source.size)}{pickled}{vouch})",
            f"  from     https://huggingface.co/{source.repo} at {source.revision}",
            f"  licence  {source.licence}",
            f"  state    {state}",
        ]
    )


def needs_trust(need: Requirement) -> bool:
    """Whether only the user can say that the file is the right one."""
    return need.source.pickled and need.source.sha256 is None


def size(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
