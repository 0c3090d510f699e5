"""Builds the emoji world from scratch: ``python -m tools.emoji build``. See docs/emoji_world.md."""
