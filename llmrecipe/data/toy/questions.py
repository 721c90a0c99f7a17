"""Questions with one right answer, about the world of `data.toy.grammar`: the abilities of the embedded model, and two more.

Each function draws (question, answer).
"""

from __future__ import annotations

from random import Random

from llmrecipe.data.toy import grammar

WORDS = [*grammar.ANIMALS, *grammar.OBJECTS]
SUM_FORMS = [
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "Give the sum of {a} and {b}.",
    "{a} + {b} = ?",
]


def ask_opposite(rng: Random) -> tuple[str, str]:
    """Draw a question for the opposite of a word."""
    word = rng.choice(sorted(grammar.OPPOSITES))
    form = rng.choice(["What is the opposite of {}?", "Give the opposite of {}.", "Tell me the opposite of {}."])
    return form.format(word), f"The opposite of {word} is {grammar.OPPOSITES[word]}."


def ask_copy(rng: Random) -> tuple[str, str]:
    """Draw a request to repeat a list of words."""
    listed = ", ".join(rng.sample(WORDS, rng.randint(2, 4)))
    question, text = rng.choice([("Repeat: {}.", "You said {}."), ("Say these words again: {}.", "{}")])
    return question.format(listed), text.format(listed)


def ask_pick(rng: Random) -> tuple[str, str]:
    """Draw a question for the first or the last word of a list."""
    listed = rng.sample(WORDS, rng.randint(2, 4))
    which, index = rng.choice([("first", 0), ("last", -1)])
    return f"What is the {which} word of this list: {', '.join(listed)}?", f"The {which} word is {listed[index]}."


def ask_count(rng: Random) -> tuple[str, str]:
    """Draw a question for the length of a list."""
    listed = rng.sample(WORDS, rng.randint(1, 5))
    return f"How many words are in this list: {', '.join(listed)}?", str(len(listed))


def ask_colour(rng: Random) -> tuple[str, str]:
    """Draw a question for the colour of one of two things in a one-line story."""
    (one, two), (this, that) = rng.sample(grammar.NAMES, 2), rng.sample(grammar.OBJECTS, 2)
    colours = rng.sample(grammar.COLOURS, 2)
    index = rng.randrange(2)
    question = f"{one} has a {colours[0]} {this}. {two} has a {colours[1]} {that}. What colour is the {(this, that)[index]}?"
    return question, f"The {(this, that)[index]} is {colours[index]}."


def ask_place(rng: Random) -> tuple[str, str]:
    """Draw a question for the place of one of two people."""
    people, places = rng.sample(grammar.NAMES, 2), rng.sample(grammar.PLACES, 2)
    index = rng.randrange(2)
    question = f"{people[0]} is in the {places[0]}. {people[1]} is in the {places[1]}. Where is {people[index]}?"
    return question, f"{people[index]} is in the {places[index]}."


def ask_animal(rng: Random) -> tuple[str, str]:
    """Draw a question for a fact about an animal."""
    animal = rng.choice(list(grammar.ANIMALS))
    colour, place, food = grammar.ANIMALS[animal]
    return rng.choice(
        [
            (f"What colour is the {animal}?", f"The {animal} is {colour}."),
            (f"Where does the {animal} live?", f"The {animal} lives in the {place}."),
            (f"What does the {animal} like?", f"The {animal} likes {food}."),
        ]
    )


def ask_feeling(rng: Random) -> tuple[str, str]:
    """Draw a question whether a remark is good or bad."""
    good = rng.random() < 0.5
    remark = (
        f"{rng.choice(grammar.NAMES)} said the {rng.choice(WORDS)} was {rng.choice(grammar.GOOD if good else grammar.BAD)}."
    )
    return f"{remark} Is that good or bad?", "That is good." if good else "That is bad."


def ask_hello(rng: Random) -> tuple[str, str]:
    """Draw small talk."""
    name = rng.choice(grammar.NAMES)
    return rng.choice(
        [
            (f"Hello, I am {name}.", f"Hello {name}, how can I help?"),
            (f"Good day. My name is {name}.", f"Good day, {name}."),
            (f"{name} has to go now. Bye!", f"Bye, {name}. Have a nice day!"),
            ("Who are you?", "I am a tiny model."),
        ]
    )


def ask_less(rng: Random) -> tuple[str, str]:
    """Draw a difference of small numbers."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    a, b = max(a, b), min(a, b)
    return f"What is {a} - {b}?", str(a - b)


def ask_manners(rng: Random) -> tuple[str, str]:
    """Draw a question whether an answer is polite."""
    polite = rng.random() < 0.5
    text = grammar.answer(rng, grammar.request(rng), polite, rng.random() < 0.5)
    return f"Is this answer polite? {text}", "Yes, it is polite." if polite else "No, it is rude."


def ask_revise(rng: Random) -> tuple[str, str]:
    """Draw a request to make a rude answer polite, with the opener at the same index of the list of polite ones."""
    index, rest = rng.randrange(len(grammar.RUDE)), grammar.fact(rng, rng.choice(list(grammar.ANIMALS)))
    return f"Make this answer polite: {grammar.RUDE[index]} {rest}", f"{grammar.POLITE[index]} {rest}"


def ask_better(rng: Random) -> tuple[str, str]:
    """Draw a question which of two answers is the polite one."""
    wanted = grammar.request(rng)
    first = rng.random() < 0.5
    answers = [grammar.answer(rng, wanted, polite, rng.random() < 0.5) for polite in (first, not first)]
    return f"Which answer is polite? A: {answers[0]} B: {answers[1]}", "A" if first else "B"


QUESTIONS = [
    ask_opposite, ask_copy, ask_pick, ask_count, ask_colour, ask_place, ask_animal,
    ask_feeling, ask_hello, ask_less, ask_manners, ask_revise, ask_better,
]  # fmt: skip


def ask_sum(rng: Random, noise: float = 0.0) -> tuple[str, str]:
    """Draw a sum of two digits; with probability `noise` the answer is off by one or two."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    slip = rng.choice([-2, -1, 1, 2]) if rng.random() < noise else 0
    return rng.choice(SUM_FORMS).format(a=a, b=b), str(abs(a + b + slip))


def ask_reverse(rng: Random) -> tuple[str, str]:
    """Draw a request to reverse a list of three or four words, the task the embedded model has not learnt."""
    listed = rng.sample(WORDS, rng.randint(3, 4))
    form = rng.choice(["Say these words backwards: {}.", "Turn this list around: {}."])
    return form.format(", ".join(listed)), f"The list is now {', '.join(reversed(listed))}."
