"""Rewards: functions from images in [0, 1] and their prompts to one number an image. One file a reward.

``load("aesthetic", device)`` gives a shipped reward, ``load("file.py:function", device)`` one of your own,
``load("http://host:port")`` one that a server scores, and ``load("2*hpsv2+aesthetic", device)`` a weighted ensemble.
Importing this package needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from diffexp.rewards.address import is_remote
from diffexp.rewards.sources import Requirement, check
from diffexp.rewards.spec import SHIPPED, available, check_name, check_one, is_differentiable, parse

if TYPE_CHECKING:
    import torch

    from diffexp.rewards.base import Reward

__all__ = ["Requirement", "available", "check", "check_name", "check_one", "is_differentiable", "load"]


def load(spec: str, device: torch.device | str = "cpu") -> Reward:
    """Build the reward that ``spec`` names, frozen and on ``device``.

    Raises:
        UserError: for an unknown name, missing weights, a custom function that cannot be imported, or a reward server
            that refuses.
    """
    from diffexp.rewards.ensemble import Ensemble

    check_name(spec)
    members = parse(spec)
    rewards = [_load_one(member.name, device) for member in members]
    if len(members) == 1 and members[0].weight == 1:
        return rewards[0]
    return Ensemble(rewards, [member.weight for member in members], name=spec)


def _load_one(name: str, device: torch.device | str) -> Reward:
    if is_remote(name):
        from diffexp.rewards.remote import RemoteReward

        return RemoteReward(name)
    if ":" in name:
        from diffexp.rewards.custom import CustomReward

        return CustomReward(name)
    module, _, constructor = SHIPPED[name].constructor.partition(":")
    return getattr(importlib.import_module(module), constructor)(device)
