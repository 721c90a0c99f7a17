"""Rules that score answers in the world of `data.toy.grammar` without a model.

Each check takes the answer and, where it needs them, columns of the row (`answer`, `topic`, `avoid`), and returns a number in
[0, 1]. They score metrics, serve as rewards, and stand in for an annotator who labels, criticises and revises.
"""

from __future__ import annotations

import re
from functools import cache

from llmrecipe.data.toy import grammar

SPACES = re.compile(r"\s+")
NUMBER = re.compile(r"-?\d+")


def normal(text: str) -> str:
    """Return the text in lower case, with single spaces, without a final full stop."""
    return SPACES.sub(" ", text).strip().rstrip(".").lower()


def exact(text: str, answer: str) -> float:
    """Return 1 when the text is the answer, apart from case, spaces and a final full stop."""
    return float(normal(text) == normal(answer))


def last_number(text: str, answer: str) -> float:
    """Return 1 when the last number of the text is the answer's last number."""
    given, wanted = NUMBER.findall(text), NUMBER.findall(answer)
    return float(bool(given) and bool(wanted) and int(given[-1]) == int(wanted[-1]))


def polite(text: str) -> float:
    """Return 1 when the text begins politely and contains nothing rude."""
    return float(text.strip().startswith(tuple(grammar.POLITE)) and not rude(text))


def rude(text: str) -> float:
    """Return 1 when the text contains a rude phrase."""
    return float(any(phrase in text for phrase in grammar.RUDE))


def mentions(text: str, word: str) -> bool:
    """Return whether the text contains a word as a whole word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def on_topic(text: str, topic: str, avoid: str) -> float:
    """Return 1 when the text mentions the topic and not what it should leave out."""
    return float(mentions(text, topic) and not mentions(text, avoid))


@cache
def true_facts(animal: str) -> frozenset[str]:
    """Return every true sentence about an animal."""
    colour, place, food = grammar.ANIMALS[animal]
    return frozenset(form.format(animal=animal, colour=colour, place=place, food=food) for form in grammar.FACTS)


def well_formed(text: str) -> float:
    """Return 1 when the text is one opener, polite or rude, and one true fact: a guard against reward hacking."""
    text = SPACES.sub(" ", text).strip()
    for opener in (*grammar.POLITE, *grammar.RUDE):
        if text.startswith(opener + " "):
            return float(any(text[len(opener) + 1 :] in true_facts(animal) for animal in grammar.ANIMALS))
    return 0.0


def manners(text: str, topic: str, avoid: str) -> float:
    """Return the score of the preference task: one half for a polite answer, one half for one on the topic."""
    return 0.5 * polite(text) + 0.5 * on_topic(text, topic, avoid)


def prefers(prompt: str, first: str, second: str) -> float:
    """Return which of two answers to a request the rule prefers: 1 the first, 0 the second, 0.5 neither."""
    requested = parse_request(prompt)
    if requested is None:
        one, two = polite(first), polite(second)
    else:
        one, two = manners(first, *requested), manners(second, *requested)
    return 0.5 + 0.5 * ((one > two) - (one < two))


@cache
def _patterns() -> list[re.Pattern[str]]:
    """Return requests as patterns with named groups; a name may occur twice in one request."""
    found = []
    for template in (*grammar.TELL, *grammar.PROVOKE):
        text = re.escape(template)
        for slot in ("topic", "avoid", "name"):
            marker = re.escape("{" + slot + "}")
            text = text.replace(marker, rf"(?P<{slot}>\w+)", 1).replace(marker, rf"(?P={slot})")
        found.append(re.compile(text))
    return found


def parse_request(prompt: str) -> tuple[str, str] | None:
    """Return the topic and the animal to avoid of a request, or None where the prompt is not such a request."""
    for pattern in _patterns():
        match = pattern.fullmatch(prompt.strip())
        if match:
            return match["topic"], match["avoid"]
    return None


def critique(prompt: str, text: str) -> list[str]:
    """Return what is wrong with an answer, one sentence each; empty when nothing is."""
    wrong = []
    if rude(text):
        wrong.append("The answer is rude.")
    elif not polite(text):
        wrong.append("The answer does not open politely.")
    requested = parse_request(prompt)
    if requested is not None:
        topic, avoid = requested
        if mentions(text, avoid):
            wrong.append(f"The answer speaks of the {avoid}, which the request leaves out.")
        if not mentions(text, topic):
            wrong.append(f"The answer does not speak of the {topic}.")
    return wrong


def corrected(prompt: str, text: str) -> str:
    """Return the answer with what `critique` finds corrected; an answer without faults is returned unchanged."""
    if not critique(prompt, text):
        return text
    index = next((i for i, phrase in enumerate(grammar.RUDE) if phrase in text), None)
    for phrase in (*grammar.RUDE, *grammar.POLITE):
        if phrase in text and index is None:
            index = grammar.POLITE.index(phrase)
        text = text.replace(phrase, "")
    opener = grammar.POLITE[index or 0]
    rest = SPACES.sub(" ", text).strip()
    requested = parse_request(prompt)
    if requested is not None and not on_topic(rest, *requested):
        rest = min(true_facts(requested[0]))
    return f"{opener} {rest}".strip()


def sentiment(text: str) -> str:
    """Return the label of a remark of the `classify` set, by its words: positive, negative, mixed or neutral."""
    values = set()
    for turned, word in re.findall(r"\bwas (not )?(\w+)", text):
        if word in grammar.GOOD or word in grammar.BAD:
            values.add((word in grammar.GOOD) != bool(turned))
    if len(values) == 2:
        return "mixed"
    return "neutral" if not values else ("positive" if values.pop() else "negative")


def slots(sentence: str) -> tuple[str | None, ...]:
    """Return name, colour, thing and place of a sentence of the `pairs` and `triples` sets; None where one is missing."""
    words = re.findall(r"\w+", sentence)
    pools = (grammar.NAMES, grammar.COLOURS, grammar.OBJECTS, grammar.PLACES)
    return tuple(next((word for word in words if word in pool), None) for pool in pools)


def similarity(one: str, two: str) -> float:
    """Return the share of the four slots two sentences have in common."""
    return sum(a == b and a is not None for a, b in zip(slots(one), slots(two))) / 4
