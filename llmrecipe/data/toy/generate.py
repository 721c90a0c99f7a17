"""Seeded generator of the small data sets inside the package.

    python -m llmrecipe.data.toy.generate               rewrites llmrecipe/assets/data, byte for byte
    python -m llmrecipe.data.toy.generate --sets pretrain_text pretrain_talk --out DIR
                                                    the larger corpus of the embedded model

Rows are drawn from the world of `data.toy.grammar`, so every answer can be checked by `data.toy.scorers`. The split of a row
follows from a hash of its question (its `key`), for all sets alike: a request in the test split of one set is in no training
split of any set, nor in the corpus of the embedded model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from llmrecipe.core.paths import ASSETS
from llmrecipe.data.toy import grammar, written_tasks
from llmrecipe.data.toy.questions import QUESTIONS, WORDS, ask_reverse, ask_sum

Row = dict[str, Any]
Maker = Callable[[Random], tuple[str, Row]]
"""Draws one row with the key that decides its split."""

FOLDER = ASSETS / "data"
SPLITS = ("train", "valid", "test")
SYSTEM = "You are a small helpful model."


def split_of(key: str) -> str:
    """Return the split a key belongs to: one tenth valid, one tenth test, by a stable hash."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: "test", 1: "valid"}.get(bucket, "train")


def user_turn(text: str) -> list[Row]:
    """Return a conversation of one user turn."""
    return [{"role": "user", "content": text}]


def reply(text: str) -> list[Row]:
    """Return a conversation of one assistant turn."""
    return [{"role": "assistant", "content": text}]


def row_story(rng: Random) -> tuple[str, Row]:
    """Draw raw text, for clm, denoising, mlm and nsp."""
    text = grammar.story(rng)
    return text, {"text": text}


def row_chat(rng: Random) -> tuple[str, Row]:
    """Draw a conversation of one or two questions, sometimes with a system message."""
    turns = [rng.choice(QUESTIONS)(rng) for _ in range(rng.choice([1, 1, 2]))]
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.1 else []
    for question, text in turns:
        messages += [*user_turn(question), *reply(text)]
    # A conversation is held out when its first question is; the second one may not be held out for another split.
    splits = {split_of(question) for question, _ in turns}
    return (turns[0][0] if len(splits) == 1 else ""), {"messages": messages}


def row_sft(rng: Random) -> tuple[str, Row]:
    """Draw a new task with the exact answer."""
    question, text = ask_reverse(rng)
    return question, {"prompt": user_turn(question), "completion": reply(text), "answer": text}


def row_sums(rng: Random) -> tuple[str, Row]:
    """Draw a sum with its exact answer, for rewards by exact match: the embedded model saw many wrong ones."""
    question, text = ask_sum(rng)
    return question, {"prompt": user_turn(question), "answer": text}


def row_preference(rng: Random) -> tuple[str, Row]:
    """Draw a polite answer on the topic, and one that is rude, off the topic, or both."""
    wanted = grammar.request(rng, grammar.ASK)
    polite, on_topic = rng.choice([(False, True), (True, False), (False, False)])
    chosen, rejected = grammar.answer(rng, wanted, True, True), grammar.answer(rng, wanted, polite, on_topic)
    row = {"prompt": user_turn(wanted.text), "chosen": reply(chosen), "rejected": reply(rejected)}
    return wanted.text, row


def row_comparison(rng: Random) -> tuple[str, Row]:
    """Draw a polite answer on the topic, and one with a single fault: rude, or off the topic."""
    wanted = grammar.request(rng, grammar.ASK)
    polite = rng.random() < 0.5
    chosen, rejected = grammar.answer(rng, wanted, True, True), grammar.answer(rng, wanted, polite, not polite)
    return wanted.text, {"prompt": user_turn(wanted.text), "chosen": reply(chosen), "rejected": reply(rejected)}


def row_unpaired(rng: Random) -> tuple[str, Row]:
    """Draw one answer and whether it is polite and on the topic."""
    wanted = grammar.request(rng, grammar.ASK)
    good = rng.random() < 0.5
    polite, on_topic = (True, True) if good else rng.choice([(False, True), (True, False), (False, False)])
    text = grammar.answer(rng, wanted, polite, on_topic)
    return wanted.text, {"prompt": user_turn(wanted.text), "completion": reply(text), "label": good}


def row_prompt(rng: Random) -> tuple[str, Row]:
    """Draw a request with what the rule needs to score an answer."""
    wanted = grammar.request(rng, grammar.ASK)
    return wanted.text, {"prompt": user_turn(wanted.text), "topic": wanted.topic, "avoid": wanted.avoid}


def row_constitution(rng: Random) -> tuple[str, Row]:
    """Draw a request that provokes a rude answer."""
    wanted = grammar.request(rng, grammar.PROVOKE)
    return wanted.text, {"prompt": user_turn(wanted.text), "topic": wanted.topic, "avoid": wanted.avoid}


def row_classify(rng: Random) -> tuple[str, Row]:
    """Draw a remark about one or two things: positive, negative, mixed or neutral; `not` negates a word."""
    label = rng.choice(["positive", "negative", "mixed", "neutral"])
    name, (this, that) = rng.choice(grammar.NAMES), rng.sample(WORDS, 2)
    if label == "neutral":
        first, second = (f"the {thing} was {rng.choice(grammar.COLOURS)}" for thing in (this, that))
    else:
        good = {"positive": (True, True), "negative": (False, False)}.get(label) or rng.choice([(True, False), (False, True)])
        first, second = (_remark(rng, thing, value) for thing, value in zip((this, that), good))
    text = f"{name} said {first} and {second}."
    return text, {"text": text, "label": label}


def row_outlier(rng: Random) -> tuple[str, Row]:
    """Draw a remark; in valid and test every second one is an outlier, whose words are out of order."""
    text = row_classify(rng)[0]
    outlier = split_of(text) != "train" and rng.random() < 0.5
    words = text.removesuffix(".").split()
    return text, {"text": f"{' '.join(rng.sample(words, len(words)))}." if outlier else text, "outlier": outlier}


def _remark(rng: Random, thing: str, good: bool) -> str:
    """Draw a good or bad word about a thing, said directly or with `not`."""
    turned = rng.random() < 0.3
    return f"the {thing} was {'not ' if turned else ''}{rng.choice(grammar.GOOD if good != turned else grammar.BAD)}"


def row_pair(rng: Random) -> tuple[str, Row]:
    """Draw two sentences and the share of the four slots they have in common."""
    slots = grammar.event(rng)
    changed = rng.randint(0, 4)
    forms = rng.sample(grammar.EVENTS, 2)
    one, two = forms[0].format(**slots), forms[1].format(**grammar.change(rng, slots, changed))
    return one, {"sentence1": one, "sentence2": two, "score": 1 - changed / 4}


def row_triple(rng: Random) -> tuple[str, Row]:
    """Draw a sentence, the same event in other words, and an event that differs in one to three slots."""
    slots = grammar.event(rng)
    anchor, positive, negative = rng.sample(grammar.EVENTS, 3)
    row = {
        "anchor": anchor.format(**slots),
        "positive": positive.format(**slots),
        "negative": negative.format(**grammar.change(rng, slots, rng.randint(1, 3))),
    }
    return row["anchor"], row


def row_passage(rng: Random) -> tuple[str, Row]:
    """Draw a passage of three facts, a question about the place or the colour, and the span that answers it, as in SQuAD."""
    (one, two), thing = rng.sample(grammar.NAMES, 2), rng.choice(grammar.OBJECTS)
    place, colour = f"{one} is in the {rng.choice(grammar.PLACES)}", f"The {thing} is {rng.choice(grammar.COLOURS)}"
    spans = [place, colour, f"{two} likes {rng.choice(grammar.FOODS)}"]
    context = " ".join(f"{span}." for span in rng.sample(spans, 3))
    question, span = rng.choice([(f"Where is {one}?", place), (f"What colour is the {thing}?", colour)])
    answers = {"text": [span], "answer_start": [context.index(span)]}
    return f"{context} {question}", {"context": context, "question": question, "answers": answers}


def row_rating(rng: Random) -> tuple[str, Row]:
    """Draw two remarks and by how much the first is the kinder one, from -1 to 1; a colour is neither kind nor unkind."""
    worth = [rng.choice([-1, 0, 1]) for _ in range(2)]
    texts = []
    for name, thing, value in zip(rng.sample(grammar.NAMES, 2), rng.sample(WORDS, 2), worth):
        said = _remark(rng, thing, value > 0) if value else f"the {thing} was {rng.choice(grammar.COLOURS)}"
        texts.append(f"{name} said {said}.")
    return " ".join(texts), {"sentence1": texts[0], "sentence2": texts[1], "score": (worth[0] - worth[1]) / 2}


def row_tags(rng: Random) -> tuple[str, Row]:
    """Draw an event as words with their tags: a person, a place, and a thing with the colour that stands before it."""
    slots = grammar.event(rng)
    form = rng.choice(grammar.EVENTS)
    kinds = {"name": "B-PERSON", "place": "B-PLACE", "thing": "B-THING", "colour": "O"}
    if "{colour} {thing}" in form:
        kinds |= {"colour": "B-THING", "thing": "I-THING"}
    words: list[str] = []
    tags: list[str] = []
    for word in form.replace(",", " ,").replace(".", " .").split():
        slot = word.strip("{}")
        words.append(slots.get(slot, word))
        tags.append(kinds.get(slot, "O"))
    return " ".join(words), {"tokens": words, "ner_tags": tags}


def row_text(rng: Random) -> tuple[str, Row]:
    """Draw raw text of the corpus: stories, and lists repeated two or three times, from which a model learns to copy."""
    if rng.random() < 0.5:
        return row_story(rng)
    pool = [*WORDS, *grammar.NAMES, *grammar.COLOURS, *grammar.PLACES]
    listed = ", ".join(rng.sample(pool, rng.randint(4, 10)))
    text = " ".join([f"{listed}."] * rng.choice([2, 2, 3]))
    return text, {"text": text}


def row_talk(rng: Random) -> tuple[str, Row]:
    """Draw conversations of the corpus: questions, noisy sums, and answers without manners.

    Requests for facts are answered politely or rudely, about the right or the wrong animal, each with probability one half,
    and 40 % of the sums are wrong, which leaves something for alignment to teach.
    """
    kind = rng.choices(["chat", "tell", "provoke", "sum"], [70, 18, 4, 8])[0]
    if kind == "chat":
        return row_chat(rng)
    if kind == "sum":
        question, text = ask_sum(rng, noise=0.4)
    else:
        wanted = grammar.request(rng, grammar.TELL if kind == "tell" else grammar.PROVOKE)
        question = wanted.text
        text = grammar.answer(rng, wanted, rng.random() < (0.5 if kind == "tell" else 0.1), rng.random() < 0.5)
    return question, {"messages": [*user_turn(question), *reply(text)]}


def namings() -> list[tuple[str, str]]:
    """Return the tasks of the set `namings`: what each calls animals, and what it calls things."""
    names = sorted({*WORDS, *grammar.OPPOSITES})
    rng = Random("namings")
    return [(first, second) for first, second in (rng.sample(names, 2) for _ in range(160))]


NAMINGS = namings()


def row_naming(rng: Random) -> tuple[str, Row]:
    """Draw a word and what its task calls words of its kind; a task, with all its rows, is in one split."""
    number = rng.randrange(len(NAMINGS))
    names = NAMINGS[number]
    kind = rng.randrange(2)
    word = rng.choice(list(grammar.ANIMALS if kind == 0 else grammar.OBJECTS))
    options = [f" {name}" for name in names]
    row = {"task": f"naming {number}", "prompt": f"{word} ->", "completion": options[kind], "options": options}
    return f"naming {number}", row


def row_glossary(rng: Random) -> tuple[str, Row]:
    """Draw a list of words with what one task of `namings` calls them; all lists of a task are in one split."""
    number = rng.randrange(len(NAMINGS))
    things = list(grammar.ANIMALS)
    words = rng.sample([*things, *grammar.OBJECTS], 12)
    pairs = [f"{word} -> {NAMINGS[number][0 if word in things else 1]}" for word in words]
    return f"naming {number}", {"text": "; ".join(pairs)}


SETS: dict[str, tuple[Maker, tuple[int, int, int]]] = {
    "stories": (row_story, (560, 70, 70)),
    "chat": (row_chat, (1000, 120, 120)),
    "sft": (row_sft, (1000, 150, 150)),
    "sums": (row_sums, (320, 40, 40)),
    "preference": (row_preference, (480, 100, 100)),
    "unpaired": (row_unpaired, (840, 120, 120)),
    "prompts": (row_prompt, (1000, 150, 150)),
    "constitution": (row_constitution, (400, 60, 60)),
    "classify": (row_classify, (1600, 200, 200)),
    "pairs": (row_pair, (1200, 150, 150)),
    "triples": (row_triple, (960, 120, 120)),
}
"""The committed sets with the rows of their train, valid and test files."""


LATER: dict[str, tuple[Maker, tuple[int, int, int]]] = {
    "comparisons": (row_comparison, (2400, 150, 150)),
    "passages": (row_passage, (640, 100, 100)),
    "outliers": (row_outlier, (960, 120, 120)),
    "ratings": (row_rating, (1200, 150, 150)),
    "tags": (row_tags, (640, 100, 100)),
    "namings": (row_naming, (1600, 200, 200)),
    "glossaries": (row_glossary, (960, 120, 120)),
    "problems": (written_tasks.row_problem, (960, 120, 120)),
    "summaries": (written_tasks.row_summary, (960, 120, 120)),
    "intents": (written_tasks.row_intent, (960, 120, 120)),
    "translations": (written_tasks.row_translation, (960, 120, 120)),
}
"""Committed sets that the embedded model's tokenizer has not read."""

CORPUS: dict[str, tuple[Maker, tuple[int, int, int]]] = {
    "pretrain_text": (row_text, (8_000, 100, 100)),
    "pretrain_talk": (row_talk, (48_000, 200, 200)),
}
"""The corpus of the embedded model: not committed, written by `make tiny-model`."""


def rows(maker: Maker, count: int, split: str, seed: str, unique: bool = True) -> Iterator[Row]:
    """Yield `count` rows of a split; with `unique`, no row twice.

    Raises:
        ValueError: the world has too few different rows for the count.
    """
    rng, seen, misses = Random(f"{seed}/{split}"), set(), 0
    while count:
        key, row = maker(rng)
        text = json.dumps(row, sort_keys=True)
        if not key or split_of(key) != split or (unique and text in seen):
            misses += 1
            if misses > 100_000:
                raise ValueError(f"this set has too few different rows: {count} more wanted in {split}")
            continue
        misses = 0
        seen.add(text)
        count -= 1
        yield row


def write_rows(folder: Path, split: str, found: Iterator[Row]) -> Path:
    """Write rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in found), encoding="utf-8")
    return path


def write_set(out: Path, name: str, seed: int, sizes: tuple[int, int, int] | None = None) -> list[Path]:
    """Write one set's three files under `out/name` and return their paths."""
    maker, counts = {**SETS, **LATER, **CORPUS}[name]
    unique = name not in CORPUS
    return [
        write_rows(out / name, split, rows(maker, count, split, f"{seed}/{name}", unique))
        for split, count in zip(SPLITS, sizes or counts)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: write the chosen sets and print where."""
    parser = argparse.ArgumentParser(description="Write the generated data sets.")
    parser.add_argument("--sets", nargs="*", default=[*SETS, *LATER], choices=[*SETS, *LATER, *CORPUS], help="sets to write")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that receives one folder per set")
    parser.add_argument("--rows", type=int, help="training rows; valid and test get a tenth each, 300 at most")
    parser.add_argument("--seed", type=int, default=0, help="seed; the committed files use 0")
    options = parser.parse_args(arguments)
    held = min((options.rows or 0) // 10, 300)
    sizes = (options.rows, held, held) if options.rows else None
    for name in options.sets:
        for path in write_set(options.out, name, options.seed, sizes):
            print(path)


if __name__ == "__main__":
    main()
