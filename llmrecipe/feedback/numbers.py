r"""The number an answer states, read as a careful person reads it.

Where the text marks its answer, only that is read: the last `\boxed{...}`, else what follows the last `####`. Of several
numbers the last one counts.

    signs        -5, −5, = - 5, -$5, $-5, is minus 5, negative 5; not the hyphen of 3-5 or COVID-19, nor the bullet of a list
    separators   1,234.5  1.234,5  1 234,5  1'234  12,34,567  1{,}234  3,5 (a decimal comma); (3,5) and 1,2,3 are lists
    fractions    3/4, 1 1/2, ½, \frac{3}{4}, \frac34; not a date such as 3/4/2024
    powers       1.5e3, 3 \times 10^{5}, 2^{10}; the exponent of cm^2 is no number, and neither is the 2 of H2O
    roots        \sqrt{2}, √2, 5\pi and fractions of them are no numbers; such answers are the same where they are written alike
    units        $5, 5 EUR, 12kg, 90°, 5k, 2.5 million; 50% equals 50 and 0.5, whichever the other side writes
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 400
"""Most characters of a number, and the largest exponent: beyond that it is no number anybody states."""
HYPHENS = str.maketrans(dict.fromkeys("\u2212\u2013\u2012\uff0d\ufe63", "-") | {"\u2044": "/", "\u00d7": "*", "\u00b7": "*"})
SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
LATEX = (
    (re.compile(r"\\(?:left|right|displaystyle|!|;|:|quad|qquad|big|Big)(?![A-Za-z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[ ,]|~"), "\u2009"),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree"), "\u00b0"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|emph)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r"\1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2 "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\sqrt\s*(?:\[[^\[\]{}]*\])?\s*(?:\{[^{}]*\}|\d)?|√\s*(?:\([^()]*\)|\d[\d.,]*)?|\\pi(?![A-Za-z])|π"), "\x00"),
    (re.compile(r"\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}"), "\x00"),
)
"""Pattern -> plain text; a quantity that is no fraction of whole numbers becomes `NO_NUMBER`."""
NO_NUMBER = "\x00"
PART = re.compile(rf"\s*[*/]?\s*{NO_NUMBER}")
"""What follows a number that is a part of such a quantity."""
SIGN_WORDS = (
    re.compile(r"(?i)\bnegative\s+(?=[$€£]?\.?\d)"),
    re.compile(
        r"(?i)(?:^|(?<=[=:(])|(?<=\bis)|(?<=\bbe)|(?<=\bwas)|(?<=\bto)|(?<=\bof)|(?<=\bequals))\s*\bminus\s+(?=[$€£]?\.?\d)"
    ),
)
"""Words before a negative number; `10 minus 3` subtracts."""
EMPHASIS = re.compile(r"(?<!\w)_+(?=\S)|(?<=\S)_+(?![\w{])")
GAP = " \u00a0\u2009\u202f'\u2019_"
"""What may stand between groups of three digits besides commas and points."""
INTEGER = rf"""(?:
    \d{{1,3}}(?:,\d{{3}})+(?!\d|,\d) | \d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d|,\d)
  | \d{{1,3}}(?:\.\d{{3}})+(?=,\d+(?![\d,])) | \d{{1,3}}(?:\.\d{{3}}){{2,}}(?![\d.])
  | \d{{1,3}}(?:[{GAP}]\d{{3}})+(?![\d{GAP}]\d|\d) | \d+ )"""
DECIMALS = r"(?: \.\d+ | (?<![(\[,]\d)(?<![(\[,]\d\d)(?<![(\[,]\d\d\d),\d+(?!,\d|\d) )?"
CURRENCY = r"(?:US\$|[$€£¥₹₩₽]|(?<![A-Za-z])(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|Rs\.?))"
SCALES = {
    **{"k": 10**3, "thousand": 10**3, "hundred": 100, "million": 10**6, "m": 10**6, "\u4e07": 10**4, "\u4ebf": 10**8},
    **{"billion": 10**9, "bn": 10**9, "b": 10**9, "trillion": 10**12},
}
NUMBER = re.compile(
    rf"""
    (?P<minus> (?:(?<![\w)\]}}%.°$€£])-|(?<==)\s*-[ ]?|(?<==\s)-[ ]?|(?<=:\s)-[ ])? )
    (?: (?P<currency>{CURRENCY})[ ]? (?P<second>-)?
      | (?<![A-Za-z0-9_^])(?<!\^\{{)(?<!\^-)(?<!\^\{{-)(?<!_\{{)(?<!\d\.)(?<![A-Za-z]-) )
    (?P<body> (?P<whole>\d+)[ ](?P<top>\d+)/(?P<bottom>\d+)(?![\d/])
      | (?<!\d/)(?P<over>{INTEGER}{DECIMALS})\s?/\s?(?P<under>\d+(?:\.\d+)?)(?![\d/])
      | (?P<plain>{INTEGER}{DECIMALS} | \.\d+) )
    (?!\.?\d)
    (?P<e>[eE][+-]?\d{{1,3}}(?![A-Za-z0-9]))?
    (?: \^\{{?(?P<power>-?\d{{1,3}})\}}? )?
    (?: \s?(?:\*|x)\s?10\^\{{?(?P<ten>-?\d{{1,3}})\}}? )?
    (?P<scale> (?:k|K|M|B|bn|(?(currency)m|(?!)))(?![A-Za-z])
      | \s?(?i:hundred|thousand|million|billion|trillion)s?(?![A-Za-z]) | [\u4e07\u4ebf] )?
    (?P<percent> \s?(?:%|(?i:percent|per\ cent)) )?
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    """Whether a percent sign followed; `value` is what stood before it."""

    def same(self, other: Number) -> bool:
        """Return whether both state one quantity; a percentage also equals its share of 1, and its bare number."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        hundred, one = (self, other) if self.percent else (other, self)
        return hundred.value == one.value * 100


def extract_number(text: str) -> Number | None:
    """Return the number an answer states; None where it states none."""
    found, end = None, 0
    plain = _clean(stated_answer(text))
    for match in NUMBER.finditer(plain):
        if PART.match(plain, match.end()) or PART.fullmatch(plain[max(match.start() - 4, 0) : match.start()][::-1].strip()):
            continue
        found, end = _read(match) or found, match.end()
    return None if plain.rfind(NO_NUMBER) >= end else found


def same_number(one: str, other: str) -> bool:
    """Return whether two texts state the same number; False where one states none.

    Roots and multiples of pi are the same where the stated answers are, but for white space, dollar signs and full stops.
    """
    first, second = extract_number(one), extract_number(other)
    if first is None and second is None:
        stated = ["".join(stated_answer(text).split()).strip("$.") for text in (one, other)]
        return stated[0] == stated[1] and NO_NUMBER in _clean(stated[0])
    return first is not None and second is not None and first.same(second)


def states_number(text: str) -> bool:
    """Return whether `same_number` can find a text equal to another: it states a number, or a root or multiple of pi."""
    return extract_number(text) is not None or NO_NUMBER in _clean(stated_answer(text))


def stated_answer(text: str) -> str:
    r"""Return what a text marks as its answer: the content of its last `\boxed{...}`, what follows `####`, else all of it."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at >= 0:
        opened = text.find("{", at)
        if opened < 0:
            return text[at:].partition(" ")[2] or text[at:]
        depth = 0
        for place in range(opened, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[opened + 1 : place]
        return text[opened + 1 :]
    return text.rpartition("####")[2]


def _clean(text: str) -> str:
    """Return the text with LaTeX, special minus signs, fractions of one character and superscripts spelled plainly."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    text = SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text.translate(HYPHENS))
    text = EMPHASIS.sub("", re.sub(r"(\w)?([\u00bc-\u00be\u2150-\u215f\u2189])", _spelled_fraction, text))
    for words in SIGN_WORDS:
        text = words.sub(" -", text)
    return text


def _spelled_fraction(match: re.Match[str]) -> str:
    """Return a fraction of one character as `1/2`, apart from the digit or letter before it."""
    before = f"{match[1]} " if match[1] else ""
    return f"{before}{_vulgar(match[2]) or match[2]}"


def _vulgar(character: str) -> str:
    """Return a fraction of one character as `1/2`; empty where the character is none."""
    value = Fraction(unicodedata.numeric(character, 0.0)).limit_denominator(100)
    return f"{value.numerator}/{value.denominator}" if value.denominator > 1 else ""


def _read(match: re.Match[str]) -> Number | None:
    """Return the number of one match; None where it is too large or divides by zero."""
    if len(match["body"]) > LONGEST:
        return None
    try:
        value = _value(match)
    except ZeroDivisionError:
        return None
    for name in ("e", "ten"):
        if match[name]:
            exponent = int(match[name].lstrip("eE"))
            if abs(exponent) > LONGEST:
                return None
            value *= Fraction(10) ** exponent
    if match["scale"]:
        word = match["scale"].strip().lower().removesuffix("s")
        value *= SCALES[word]
    negative = "-" in match["minus"] or bool(match["second"])
    return Number(-value if negative else value, bool(match["percent"]))


def _value(match: re.Match[str]) -> Fraction:
    if match["whole"]:
        return Fraction(int(match["whole"])) + Fraction(int(match["top"]), int(match["bottom"]))
    value = _decimal(match["over"] or match["plain"])
    if match["under"]:
        value /= _decimal(match["under"])
    if match["power"]:
        exponent = int(match["power"])
        # Bounded by the size of the result, which is exact.
        if abs(exponent) * len(match["body"]) > LONGEST:
            raise ZeroDivisionError
        value = value**exponent
    return value


def _decimal(text: str) -> Fraction:
    """Return the value of digits with separators: the last separator is the decimal one, unless groups of three follow it."""
    text = re.sub(f"[{GAP}]", "", text)
    commas, points = text.count(","), text.count(".")
    if commas and points:
        decimal = max(",", ".", key=text.rfind)
    elif points:
        decimal = "." if points == 1 else ""
    else:
        decimal = "," if commas == 1 and len(text.partition(",")[2]) != 3 else ""
    whole, _, part = text.partition(decimal) if decimal and text.count(decimal) == 1 else (text, "", "")
    whole = re.sub("[.,]", "", whole) or "0"
    return Fraction(int(whole + part), 10 ** len(part))
