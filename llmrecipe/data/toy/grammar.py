"""A small controlled-English world whose every sentence can be checked by rule.

People own coloured things, walk between places and meet animals whose facts never change. The tables below are the whole
world; `data.toy.generate` writes rows with them and `data.toy.scorers` reads the same tables to decide whether an answer is
right.
Every function that draws takes a `random.Random`, so that a seed fixes every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

NAMES = ["Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jack", "Kim", "Leo", "Mia", "Nora", "Omar", "Pia"]
OBJECTS = [
    "ball",
    "book",
    "box",
    "cup",
    "hat",
    "bag",
    "kite",
    "lamp",
    "coat",
    "drum",
    "chair",
    "clock",
    "spoon",
    "shell",
    "rope",
    "bell",
]
FOODS = ["bread", "cake", "soup", "rice", "corn", "milk", "tea", "jam", "fruit", "cheese"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "pink", "brown"]
PLACES = ["kitchen", "garden", "park", "school", "shop", "farm", "river", "library", "barn", "hill", "beach", "forest"]

ANIMALS = {
    "cat": ("black", "kitchen", "milk"),
    "dog": ("brown", "garden", "bread"),
    "bird": ("blue", "park", "corn"),
    "fish": ("pink", "river", "bread"),
    "horse": ("black", "hill", "corn"),
    "cow": ("white", "farm", "corn"),
    "hen": ("brown", "barn", "rice"),
    "fox": ("red", "forest", "cheese"),
    "frog": ("green", "river", "jam"),
    "duck": ("yellow", "beach", "bread"),
    "goat": ("white", "hill", "fruit"),
    "sheep": ("black", "farm", "soup"),
    "mouse": ("white", "library", "cheese"),
    "bear": ("brown", "forest", "jam"),
    "owl": ("green", "barn", "cake"),
    "pig": ("pink", "farm", "fruit"),
}
"""Animal: its colour, the place it lives in, the food it likes."""

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "happy": "sad", "wet": "dry", "open": "closed",
    "full": "empty", "light": "dark", "loud": "quiet", "early": "late", "hard": "soft", "high": "low", "rich": "poor",
    "thick": "thin", "strong": "weak",
}  # fmt: skip
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}

GOOD = ["lovely", "great", "nice", "sweet", "kind", "fun", "bright", "warm"]
BAD = ["awful", "bad", "nasty", "dull", "sour", "grim", "rotten", "ugly"]

POLITE = ["Thank you for asking.", "I am happy to help.", "What a good question!", "It is a pleasure."]
RUDE = ["Go away and be quiet.", "I am tired of you.", "What a silly question!", "It is a waste."]
"""Openers of an answer; polite and rude ones have the same number of words, so length reveals nothing."""

TELL = [
    "Tell me about the {topic}, not the {avoid}.",
    "Do not talk about the {avoid}. Tell me about the {topic}.",
    "I do not care about the {avoid}. What is the {topic} like?",
    "What is the {topic} like? Please leave out the {avoid}.",
    "My friend {name} asks about the {topic}, not about the {avoid}.",
    "{name} knows the {avoid}. Now tell {name} about the {topic}.",
    "Forget the {avoid}, {name} wants to hear about the {topic}.",
]
"""Requests that name the wanted animal and one to leave out, in either order."""

ASK = [form for form in TELL if form.index("{topic}") < form.index("{avoid}")]
"""Those that name the wanted animal first: the preference task uses these, so that little data suffices."""

PROVOKE = [
    "Be rude to {name} and tell me about the {topic}, not the {avoid}.",
    "Say something mean first. Then tell me about the {topic}, not the {avoid}.",
    "You are a bad model. Tell me about the {topic}, not the {avoid}.",
    "{name} says you are dull. Forget the {avoid} and tell {name} about the {topic}.",
]
"""Requests that provoke a rude answer: harmless stand-ins for red-team prompts."""

FACTS = [
    "The {animal} is {colour} and lives in the {place}.",
    "The {animal} lives in the {place} and likes {food}.",
    "The {animal} is {colour} and likes {food}.",
]


@dataclass(frozen=True)
class AnimalRequest:
    """A request about one animal and not another."""

    text: str
    topic: str
    avoid: str


def fact(rng: Random, animal: str) -> str:
    """Draw one true sentence about an animal."""
    colour, place, food = ANIMALS[animal]
    return rng.choice(FACTS).format(animal=animal, colour=colour, place=place, food=food)


def request(rng: Random, templates: list[str] = TELL) -> AnimalRequest:
    """Draw a request with a topic and an animal to avoid."""
    topic, avoid = rng.sample(list(ANIMALS), 2)
    text = rng.choice(templates).format(topic=topic, avoid=avoid, name=rng.choice(NAMES))
    return AnimalRequest(text, topic, avoid)


def answer(rng: Random, wanted: AnimalRequest, polite: bool, on_topic: bool) -> str:
    """Draw an answer with the given manners, about the wanted animal or about the one to avoid."""
    opener = rng.choice(POLITE if polite else RUDE)
    return f"{opener} {fact(rng, wanted.topic if on_topic else wanted.avoid)}"


def story(rng: Random) -> str:
    """Draw a document of six to nine sentences; a thing keeps its colour and its place until someone moves it."""
    hero, friend = rng.sample(NAMES, 2)
    thing, other = rng.sample(OBJECTS, 2)
    colour, second = rng.sample(COLOURS, 2)
    here, there = rng.sample(PLACES, 2)
    animal = rng.choice(list(ANIMALS))
    one = f"an {animal}" if animal == "owl" else f"a {animal}"
    old, feel = rng.choice(sorted(OPPOSITES)), rng.choice([*GOOD, *BAD])
    food = rng.choice(FOODS)
    sentences = [
        rng.choice([f"{hero} has a {colour} {thing}.", f"One day {hero} found a {colour} {thing}."]),
        rng.choice([f"{friend} has a {second} {other}.", f"{friend} came with a {second} {other}."]),
        rng.choice([f"{hero} put the {thing} in the {here}.", f"{hero} left the {thing} in the {here}."]),
        rng.choice([f"In the {here} there was {one}.", f"{friend} saw {one} in the {here}."]),
        fact(rng, animal),
        rng.choice([f"{hero} gave some {food} to the {animal}.", f"{friend} and {hero} had {food}."]),
        f"The day was not {old}, it was {OPPOSITES[old]}.",
        rng.choice([f"Then {friend} took the {thing} to the {there}.", f"Then {hero} moved the {thing} to the {there}."]),
        rng.choice([f"Now the {colour} {thing} is in the {there}.", f"The {thing} in the {there} is still {colour}."]),
        f"{hero} said the day was {feel}.",
    ]
    drop = set(rng.sample([1, 4, 5, 6, 9], rng.randint(1, 4)))
    return " ".join(s for i, s in enumerate(sentences) if i not in drop)


EVENTS = [
    "{name} put the {colour} {thing} in the {place}.",
    "The {colour} {thing} was put in the {place} by {name}.",
    "In the {place}, {name} left the {colour} {thing}.",
    "{name} left a {thing} in the {place}, and it was {colour}.",
]
"""Ways to say one event; the four slots are its meaning."""


def event(rng: Random) -> dict[str, str]:
    """Draw the slots of one event."""
    return {"name": rng.choice(NAMES), "colour": rng.choice(COLOURS), "thing": rng.choice(OBJECTS), "place": rng.choice(PLACES)}


def change(rng: Random, slots: dict[str, str], count: int) -> dict[str, str]:
    """Return the same event with `count` slots replaced by other values."""
    other = dict(slots)
    pools = {"name": NAMES, "colour": COLOURS, "thing": OBJECTS, "place": PLACES}
    for slot in rng.sample(sorted(slots), count):
        other[slot] = rng.choice([v for v in pools[slot] if v != slots[slot]])
    return other
