"""What a reward server says about itself. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SAFETENSORS, PNG = "application/x-safetensors", "image/png"
FORMS = (SAFETENSORS, PNG)
"""How images can travel; the first is exact."""


class Limits(NamedTuple):
    """What a server takes in one request."""

    images: int = 64
    bytes: int = 1 << 28
    """Of the request, and of its images in float32."""
    side: int = 4096
    """Pixels."""
    prompt: int = 10_000
    """Characters."""


class Service(NamedTuple):
    """A server's reward, its software and what it takes."""

    name: str
    software: str = "unknown software"
    images: tuple[str, ...] = FORMS
    limits: Limits = Limits()

    def to_json(self) -> dict[str, Any]:
        """The answer to ``GET /health``."""
        return {
            "name": self.name,
            "software": self.software,
            "differentiable": False,
            "images": list(self.images),
            "limits": self.limits._asdict(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Service:
        """Reads that answer; only ``name`` has to be there.

        Raises:
            ValueError: saying what is wrong with it.
        """
        name, software = data.get("name"), data.get("software", "unknown software")
        forms, limits = data.get("images", [SAFETENSORS]), data.get("limits", {})
        if not isinstance(name, str) or not isinstance(software, str) or not name:
            raise ValueError("it has no name")
        if not isinstance(forms, list) or not set(FORMS) & {form for form in forms if isinstance(form, str)}:
            raise ValueError(f"it takes images neither as {SAFETENSORS} nor as {PNG}")
        if not isinstance(limits, Mapping):
            raise ValueError("its limits are no table")
        known = {key: limits[key] for key in Limits._fields if key in limits}
        if not all(type(value) is int and value > 0 for value in known.values()):
            raise ValueError("its limits are no positive whole numbers")
        return cls(name, software, tuple(form for form in FORMS if form in forms), Limits(**known))
