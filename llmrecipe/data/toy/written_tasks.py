"""Rows of tasks that people fine-tune for: word problems and summaries.

They are plain prompts with the answer written out, made from the tables of `data.toy.grammar`.
"""

from __future__ import annotations

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
