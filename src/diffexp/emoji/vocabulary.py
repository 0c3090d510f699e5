"""What the emoji world knows: 51 animals, 6 activities, and how a prompt names them.

The animals and activities are those of Tables 1 and 2 of the DiffExp paper; "unseen" means unseen in reward
fine-tuning, the base model knows them all.
"""

from __future__ import annotations

from diffexp.prompts.words import ACTIVITIES, ANIMALS, UNSEEN_ACTIVITIES, UNSEEN_ANIMALS, article

ALL_ANIMALS = ANIMALS + UNSEEN_ANIMALS

# Each activity is drawn as one object, which has a caption of its own.
OBJECTS = {
    "washing the dishes": "plate",
    "riding a bike": "bike",
    "playing chess": "chess pawn",
    "doing laundry": "basket",
    "driving a car": "car",
    "playing soccer": "soccer ball",
}
ALL_ACTIVITIES = ACTIVITIES + UNSEEN_ACTIVITIES


def with_article(noun: str) -> str:
    """``noun`` behind its indefinite article: "an ant", "a cat"."""
    return f"{article(noun)} {noun}"


def prompt(animal: str | None, activity: str | None) -> str:
    """The world's prompt for an animal, an activity's object, or both: "cat", "a bike", "a cat riding a bike"."""
    if activity is None:
        return animal or ""
    return with_article(OBJECTS[activity]) if animal is None else f"{with_article(animal)} {activity}"


def scenes() -> list[tuple[str | None, str | None]]:
    """Every (animal, activity) that the world can show, 363 in all; ``None`` where a half is absent."""
    singles: list[tuple[str | None, str | None]] = [(animal, None) for animal in ALL_ANIMALS]
    objects: list[tuple[str | None, str | None]] = [(None, activity) for activity in ALL_ACTIVITIES]
    return [*singles, *objects, *((animal, activity) for animal in ALL_ANIMALS for activity in ALL_ACTIVITIES)]


def prompts() -> list[str]:
    """The prompt of every scene, in the order of :func:`scenes`."""
    return [prompt(*scene) for scene in scenes()]
