"""The animals and activities of the paper's Tables 1 and 2, and how a prompt is made of them."""

from __future__ import annotations

ANIMALS: tuple[str, ...] = (
    *("ant", "bat", "bear", "beetle", "bee", "bird", "butterfly", "camel", "cat", "chicken", "cow", "deer"),
    *("dog", "dolphin", "duck", "fish", "fly", "fox", "frog", "goat", "goose", "gorilla", "hedgehog", "horse"),
    *("kangaroo", "lion", "lizard", "llama", "monkey", "mouse", "pig", "rabbit", "raccoon", "rat", "shark", "sheep"),
    *("snake", "spider", "squirrel", "tiger", "turkey", "turtle", "whale", "wolf", "zebra"),
)
"""The 45 animals of the training prompts (Table 1), in the paper's order."""

UNSEEN_ANIMALS: tuple[str, ...] = ("hippopotamus", "snail", "crocodile", "cheetah", "lobster", "octopus")
"""The 6 animals that no training prompt names (Table 2)."""

ACTIVITIES: tuple[str, ...] = ("washing the dishes", "riding a bike", "playing chess")
"""The 3 activities of the training prompts (Table 1)."""

UNSEEN_ACTIVITIES: tuple[str, ...] = ("doing laundry", "driving a car", "playing soccer")
"""The 3 activities that no training prompt names (Table 2)."""


def article(noun: str) -> str:
    """The indefinite article before ``noun``, by its first letter: "an" before a vowel, otherwise "a".

    Right for every animal of the tables; the letter knows nothing of the sound ("an hour", "a unicorn").
    """
    return "an" if noun[:1].lower() in set("aeiou") else "a"


def activity_prompts(animals: tuple[str, ...], activities: tuple[str, ...]) -> tuple[str, ...]:
    """Every animal with every activity, animal by animal: "a cat riding a bike", "an ant playing chess"."""
    return tuple(f"{article(animal)} {animal} {activity}" for animal in animals for activity in activities)
