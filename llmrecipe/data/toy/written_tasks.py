"""Rows of tasks that people fine-tune for: word problems, summaries, commands to JSON, translations.

They are plain prompts with the answer written out, made from the tables of `data.toy.grammar`.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from llmrecipe.data.toy import grammar

Row = dict[str, Any]


def plural(thing: str) -> str:
    """Return the plural of an object."""
    return f"{thing}es" if thing.endswith("x") else f"{thing}s"


PROBLEMS = {
    "+": [
        "{one} has {a} {things}. {two} gives {one} {b} more. How many {things} does {one} have now?",
        "{one} has {a} {things} and {two} has {b}. How many {things} do they have together?",
        "There are {a} {things} in the {place}. {one} brings {b} more. How many {things} are there now?",
    ],
    "-": [
        "{one} has {a} {things}. {one} gives {two} {b} of them. How many {things} does {one} have now?",
        "There are {a} {things} in the {place}. {one} takes {b} of them. How many {things} are left?",
    ],
}
"""Word problems of one step, by the step."""


def row_problem(rng: Random) -> tuple[str, Row]:
    """Draw a word problem with its step written out and the number behind `####`, as in GSM8K; `answer` is the number."""
    sign = rng.choice(sorted(PROBLEMS))
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    one, two = rng.sample(grammar.NAMES, 2)
    things, place = plural(rng.choice(grammar.OBJECTS)), rng.choice(grammar.PLACES)
    question = rng.choice(PROBLEMS[sign]).format(one=one, two=two, a=a, b=b, things=things, place=place)
    number = a + b if sign == "+" else a - b
    return question, {"prompt": question, "completion": f"{a} {sign} {b} = {number}\n#### {number}", "answer": str(number)}


def row_summary(rng: Random) -> tuple[str, Row]:
    """Draw a story of six sentences, three of which do not matter, and one sentence that says what happened."""
    hero, friend = rng.sample(grammar.NAMES, 2)
    thing, colour = rng.choice(grammar.OBJECTS), rng.choice(grammar.COLOURS)
    here, there = rng.sample(grammar.PLACES, 2)
    old = rng.choice(sorted(grammar.OPPOSITES))
    others = [
        grammar.fact(rng, rng.choice(list(grammar.ANIMALS))),
        f"{friend} and {hero} had {rng.choice(grammar.FOODS)}.",
        f"The day was not {old}, it was {grammar.OPPOSITES[old]}.",
    ]
    rng.shuffle(others)
    first = rng.choice([f"{hero} has a {colour} {thing}.", f"One day {hero} found a {colour} {thing}."])
    sentences = [first, others[0], f"{hero} put the {thing} in the {here}.", others[1]]
    sentences += [f"Then {friend} took the {thing} to the {there}.", others[2]]
    story = " ".join(sentences)
    summary = f"{friend} moved the {colour} {thing} of {hero} from the {here} to the {there}."
    return story, {"prompt": f"{story} In one sentence:", "completion": summary}


COMMANDS = {
    "move": [
        "Please put the {colour} {thing} in the {place}.",
        "The {colour} {thing} belongs in the {place}.",
        "Take the {thing}, the {colour} one, to the {place}.",
    ],
    "give": [
        "Give the {colour} {thing} to {name}.",
        "{name} wants the {colour} {thing}.",
        "{name} needs a {thing}, a {colour} one.",
    ],
    "find": [
        "Where is the {colour} {thing}?",
        "I am looking for the {colour} {thing}.",
        "I lost my {thing}, the {colour} one.",
    ],
}
"""Commands by their intent."""
VALUES = {
    "move": {"object": "the {colour} {thing}", "to": "the {place}"},
    "give": {"object": "the {colour} {thing}", "to": "{name}"},
    "find": {"object": "the {colour} {thing}"},
}
"""Intent -> what its JSON value holds besides the intent."""


def row_intent(rng: Random) -> tuple[str, Row]:
    """Draw a command and the JSON value that says what is to be done with what."""
    intent, slots = rng.choice(sorted(COMMANDS)), grammar.event(rng)
    text = rng.choice(COMMANDS[intent]).format(**slots)
    value = {"intent": intent, **{name: form.format(**slots) for name, form in VALUES[intent].items()}}
    return text, {"prompt": text, "completion": json.dumps(value, separators=(",", ":"))}


def dictionary() -> dict[str, str]:
    """Return the words of an invented language for objects, colours and places; names stay as they are."""
    rng = Random("dictionary")
    found: dict[str, str] = {}
    for ending, words in (("a", grammar.OBJECTS), ("i", grammar.COLOURS), ("o", grammar.PLACES)):
        for word in words:
            made = word
            while made == word or made in found.values():
                made = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))[:-1] + ending
            found[word] = made
    return found


DICTIONARY = dictionary()
SENTENCES = [
    ("The {colour} {thing} is in the {place}.", "Est {thing} {colour} ke {place}."),
    ("{name} put the {colour} {thing} in the {place}.", "Put {name} {thing} {colour} ke {place}."),
    ("{name} has a {colour} {thing}.", "Hat {name} {thing} {colour}."),
    ("Is the {colour} {thing} in the {place}?", "Mi est {thing} {colour} ke {place}?"),
]
"""A sentence and the same in the invented language: the verb comes first, a colour after its thing, and no articles."""


def row_translation(rng: Random) -> tuple[str, Row]:
    """Draw a sentence and its translation into the invented language."""
    slots = grammar.event(rng)
    source, target = rng.choice(SENTENCES)
    text = source.format(**slots)
    other = target.format(**{slot: DICTIONARY.get(word, word) for slot, word in slots.items()})
    return text, {"prompt": f"{text} =", "completion": other}
