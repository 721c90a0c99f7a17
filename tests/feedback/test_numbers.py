"""The number an answer states is the one a careful person reads: each case is read by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.feedback.numbers import extract_number, same_number, stated_answer
from tests.feedback.test_rewards import answer, scores
from tests.support import shared

Q = Fraction
READ: dict[str, dict[str, Any]] = {
    "plain": {
        "42": 42, "42.": 42, "5,": 5, "0": 0, "-0": 0, "0.50": Q(1, 2), ".5": Q(1, 2), "#42": 42, "**42**": 42, "3rd": 3,
        "approx.5": 5, "7 of 10": 10, "page 7, line 3.": 3, "答案是42": 42, "４２": 42, "no": None, "": None,
    },
    "signs": {
        "-5": -5, "+5": 5, "\u22125": -5, "\u20135": -5, "(-3)": -3, "x = -5": -5, "= - 5": -5, "Total: -7": -7,
        "answer:-7": -7, "10 - 5": 5, "3-5": 5, "- 5 apples": 5, "a 3-year-old": 3, "COVID-19": None, "GPT-4": None,
        "-1 1/2": Q(-3, 2), "\u2212\u00bd": Q(-1, 2), "negative 3": -3, "is minus 3": -3, "10 minus 3": 3, "(minus 3)": -3,
    },
    "currency": {
        "$5.50": Q(11, 2), "$ 5": 5, "-$5": -5, "$-5": -5, "\u20ac12": 12, "12 \u20ac": 12, "USD42": 42, "USD 42": 42,
        "US$3,000": 3000, "Rs. 500": 500, "\u20ac1.234,56": Q(123456, 100), "$3 billion": 3 * 10**9,
        "\u00a31.5m": 1500000, "$2m": 2 * 10**6,
    },
    "separators": {
        "1,042.": 1042, "1,234,567": 1234567, "1,000.50": Q(2001, 2), "1.234.567": 1234567, "1.234,56": Q(123456, 100),
        "1.234": Q(1234, 1000), "1 234,5": Q(12345, 10), "1\u202f234": 1234, "1'234": 1234, "1_000": 1000, "1 000 000": 10**6,
        "12,34,567": 1234567, "3,5": Q(7, 2), "12,5 kg": Q(25, 2), "(3,5)": 5, "1,2,3": 3, "v1.2.3": None, "12.05.2024": None,
    },
    "fractions": {
        "3/4": Q(3, 4), "1 1/2": Q(3, 2), "\u00bd": Q(1, 2), "2\u00bd": Q(5, 2),
        "1 \u00be": Q(7, 4), "\u2212 \u00bd": Q(1, 2), "3\u20444": Q(3, 4), "5/0": None,
        "on 3/4/2024": 2024,
    },
    "powers": {
        "1.5e3": 1500, "1e999": None, "3\u00d710^5": 300000, "3x10^-2": Q(3, 100), "2^10": 1024, "9^9999": None,
        "9" * 500: None, "5\u00b2": 25,
    },
    "units": {
        "12kg": 12, "25 cm\u00b2": 25, "25 cm^2": 25, "90\u00b0": 90, "50%": 50, "3m": 3, "5 km": 5, "5k": 5000,
        "2.5M": 2500000, "2.5 million": 2500000, "3\u4e07": 30000, "H2O": None, "x2": None,
    },
    "latex": {
        r"\frac{3}{4}": Q(3, 4), r"-\frac{3}{4}": Q(-3, 4), r"\frac{-3}{4}": Q(-3, 4), r"\dfrac34": Q(3, 4),
        r"2\frac{1}{2}": Q(5, 2), r"1{,}234": 1234, r"1\,234": 1234, r"3 \times 10^{5}": 300000, r"90^\circ": 90, r"\$5": 5,
        r"25\text{ cm}^2": 25, r"50\%": 50,
    },
    "roots": {
        r"\sqrt{2}": None, r"\boxed{3\sqrt{2}}": None, r"\frac{\sqrt{3}}{2}": None, r"5\pi": None, "2\u221a3": None,
        r"\frac{3}{4}\pi": None, r"r = 5, so the side is \sqrt{2}": None, r"1/\sqrt{2}": None, "\u03c0/2": None,
        r"2\pi \approx 6.28": Q(628, 100), r"\sqrt[3]{8} = 2": 2, r"\sqrt{\frac{1}{4}} = 0.5": Q(1, 2),
    },
    "emphasis": {"_5_": 5, "__5__": 5, "x_5": None, "a_{10}": None, "Answer: _5_.": 5},
    "marked": {
        r"\boxed{42}": 42, r"so 3 + 4 = \boxed{7}. Done in 2 steps": 7, r"\boxed{\$1{,}000}": 1000,
        r"\boxed{\frac{1}{2}}": Q(1, 2), r"\boxed{12 \text{ cm}^2}": 12, r"\boxed{x = -3}": -3, r"$\boxed{42}$.": 42,
        r"\boxed{1} or \boxed{2}": 2, r"\boxed{9": 9,
        r"\boxed{\text{yes}} 5": None, "#### 1042": 1042, "3 apples #### 5": 5,
    },
}  # fmt: skip
CASES = [(kind, text, value) for kind, found in READ.items() for text, value in found.items()]


@pytest.mark.parametrize(("kind", "text", "value"), CASES, ids=[f"{k}-{t[:24]!a}" for k, t, _ in CASES])
def test_what_is_read(kind: str, text: str, value: Any) -> None:
    found = extract_number(text)
    assert (None if found is None else found.value) == value


@pytest.mark.parametrize("kind", ["signs", "separators", "fractions", "units", "latex"])
def test_inside_a_sentence_the_same_is_read(kind: str) -> None:
    for text, value in READ[kind].items():
        if value is not None and not text.startswith(("= ", "- ")):
            found = extract_number(f"There were 3 hens, so it is {text} altogether")
            assert found is not None and found.value == value, text


def test_percentages_equal_their_share_of_one_and_their_bare_number() -> None:
    same = [("50%", "0.5"), ("0.5", "50 percent"), ("50", "50%"), ("50%", "1/2"), ("5.0 %", "5%"), ("1,042", "1042.00")]
    other = [("50%", "5"), ("50%", "0.5%"), ("1/3", "0.333"), ("7", "-7"), ("7", "seven")]
    assert all(same_number(a, b) and same_number(b, a) for a, b in same)
    assert not any(same_number(a, b) or same_number(b, a) for a, b in other)


def test_roots_are_the_same_where_they_are_written_alike() -> None:
    assert same_number(r"The side is $\boxed{\sqrt{2}}$.", r"\boxed{ \sqrt{2} }")
    for one, other in ((r"\sqrt{2}", "2"), (r"5\pi", "5"), (r"\sqrt{2}", r"\sqrt{3}"), ("no", "no"), ("", "")):
        assert not same_number(one, other) and not same_number(other, one)


@pytest.mark.parametrize(("value", "text"), [(42.0, "42"), (42, "42"), ([1, "a"], '[1, "a"]'), (True, "true"), (0.5, "0.5")])
def test_a_cell_is_compared_as_it_stands_in_its_file(value: Any, text: str) -> None:
    """A table of numbers with a gap holds floats, whose `42.0` no answer says."""
    assert scores("exact_match", answer(f" {text} ", answer=value)) == [1.0]


def test_braces_inside_a_box() -> None:
    assert stated_answer(r"\boxed{\frac{a}{b}} and more") == r"\frac{a}{b}"
    assert stated_answer("no mark 5") == "no mark 5"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9," * 20000, 9), ("1 " * 20000, 1), ("{" * 20000 + "\\boxed", None), ("1.234." * 5000, None), ("3 * " * 10000, 3),
        ("- " * 20000, None),
    ],
)  # fmt: skip
def test_long_nonsense_is_read_in_time_that_grows_with_its_length(text: str, value: int | None) -> None:
    """A pattern that backtracks would not return within the life of the machine."""
    found = extract_number(text)
    assert (None if found is None else found.value) == value


def test_metric_and_reward_read_numbers_alike() -> None:
    metric = registry.load_class("metric", "last_number")()
    for text, gold in (
        ("It costs $1,042.", "#### 1042"),
        (r"\boxed{\frac{3}{4}} of 8", "0.75"),
        ("-5", "\u22125"),
        ("5", "-5"),
    ):
        wanted = float((text, gold) != ("5", "-5"))
        assert metric.score(text, gold) == wanted
        assert scores("exact_match", answer(text, answer=gold), compare="last_number") == [wanted]


def test_of_alternatives_in_a_pattern_the_one_that_matched_counts() -> None:
    pattern = r"Answer: (\w+)|It is (\w+)"
    assert scores("exact_match", answer("Answer: no. It is yes.", answer="yes"), extract=pattern) == [1.0]
    assert scores("exact_match", answer("Answer: yes", answer="yes"), extract=pattern) == [1.0]


def test_every_answer_of_gsm8k_is_the_number_behind_its_mark() -> None:
    path: Path = shared("data", "gsm8k", "valid.jsonl")
    rows = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    for text in rows:
        wanted = float(text.rpartition("####")[2].replace(",", ""))
        for written in (text, text.rpartition("####")[2] + " hens."):
            found = extract_number(written)
            assert found is not None and float(found.value) == wanted
    assert len(rows) > 50
