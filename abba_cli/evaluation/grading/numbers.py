"""Numbers in answers: found in any common notation, and compared exactly.

What is a number: 1,234,567 and 1 234 567, -5 and (after a mark) - 5, .5, 3/4, 1 1/2, ½, \\frac{3}{4}, 1.2e-3, 1.2 x 10^3, digits
of any script; with currency, units, per cent signs, Markdown and LaTeX around them, which are dropped (50% is 50, not 0.5).
What is none: words, dates, times and ratios (3:30), version numbers, powers (5^2), exponents and subscripts, digits inside a
word (x2, answer1), NaN, infinity, 1/0, exponents beyond 9999. A comma that does not group by three separates: 1,2 is a list.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.answers import ANSWER_IS, HASHES, Prediction, own_part


@dataclass(frozen=True)
class Number:
    """A number in a text.

    Attributes:
        text: Plain notation: a sign, digits, a decimal point, an exponent; or a fraction of two such.
        start: Where it begins in the text that was searched.
    """

    text: str
    start: int


def find_number(response: str) -> Prediction:
    """Return the number that a response answers with, in plain notation ("-1234.5", "3/4").

    After the last mark that a number follows, `The answer is:` or `####`, it is the number that an equation ends with
    ("3 + 4 = 7" is 7), else the first number of the sentence ("5. Therefore 6 apples" is 5). Without a mark it is the last
    number of all.
    """
    text = plain_notation(own_part(response))
    marks = sorted([*ANSWER_IS.finditer(text), *HASHES.finditer(text)], key=lambda mark: mark.start())
    end = len(text)
    for mark in reversed(marks):
        after = text[mark.end() : end]
        answer = _after_hashes(after) if mark.group() == "####" else _after_answer_is(after)
        if answer is not None:
            return Prediction(answer)
        end = mark.start()
    numbers = list(numbers_in(text))
    return Prediction(numbers[-1].text if numbers else None, marked=False)


def gold_number(answer: str) -> str:
    """Return the number of a source's answer: what follows its last `####`, or the whole of it.

    Raises:
        DataError: There is no number, or more than one.
    """
    numbers = list(numbers_in(plain_notation(answer.rpartition("####")[2]), led=True))
    if len(numbers) != 1:
        shown = answer if len(answer) <= 80 else "..." + answer[-80:]
        raise DataError(f"the right answer {shown!r} holds {len(numbers)} numbers; expected '#### N', or one number alone")
    return numbers[0].text


def same_number(gold: str, prediction: str) -> bool:
    """Tell whether two texts are the same number, compared as exact fractions; a text without one number equals nothing."""
    expected = _value(gold)
    return expected is not None and expected == _value(prediction)


# Possessive quantifiers: a run of digits is read once, so that no response takes more than linear time.
_PLAIN = r"(?:\d++(?:[.,:]\d++)*+|\.\d++)(?:[eE][+-]?\d{1,4}(?!\d))?"
_ARGUMENT = rf"(?:\{{ ?(?P<@>[-+]?{_PLAIN}) ?\}}| ?(?P<@_digit>\d))"
_NUMBER = re.compile(
    "|".join(
        [
            r"(?P<date>\d{4}-\d{2}-\d{2}(?!\d)|\d++/\d++(?:/\d++)++)",
            rf"(?:(?P<latex_whole>\d{{1,9}}) ?)?\\frac{_ARGUMENT.replace('@', 'over')} ?{_ARGUMENT.replace('@', 'under')}",
            r"(?P<whole>\d{1,9})(?: and)? (?P<part>[1-9]\d{0,8})/(?P<parts>[1-9]\d{0,8})(?![\d/]|[.,:]\d)",
            r"(?P<spaced>[1-9]\d{0,2}(?: \d{3}(?!\d|[,:]\d))++(?:\.\d++)?)",
            rf"(?P<top>{_PLAIN}) ?/ ?\$?(?P<bottom>{_PLAIN})",
            rf"(?P<plain>{_PLAIN})(?: ?(?:\\times|\*|x) ?10\^\{{?(?P<power>[+-]?\d{{1,4}})(?!\d)\}}?)?",
        ]
    )
)
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?:[eE].*)?")
_SENTENCE_END = re.compile(r"\n|[.!?][\"')\]*$]{0,4}\s(?=\s{0,4}[A-Z\"'(*])")
_CLAUSE_END = re.compile(r"[,;]\s|\b(?:because|since)\b", re.IGNORECASE)
_HEADED = re.compile(r"[^\w\n]{0,20}(?:(?:USD|EUR|GBP|INR|Rs)\b[^\w\n]{0,4})?\Z")
_NOT_ALONE = re.compile(r"\^\{?[-+]?\d|[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]|[eE][-+]?\d")
_IN_A_WORD = re.compile(r"(?<![A-Za-z\\])(?!(?:USD|EUR|GBP|INR|Rs)\Z)[A-Za-z]{1,12}\Z|[A-Za-z]{12}\Z|[^\W\d_A-Za-z]\Z|\\sqrt\Z")
_RAISED_OR_LOWERED = re.compile(r"\^\{?[-+]?\Z|[A-Za-z0-9)}\]]_\{?\Z")
_SIGN = re.compile(r"(?P<before>[^ ]?)(?P<space> {0,3})(?:[$€£¥₹] ?)?-(?P<gap> ?)(?:[$€£¥₹] ?)?\Z")


def numbers_in(text: str, led: bool = False) -> Iterator[Number]:
    """Yield the numbers of a text in plain notation, in order.

    Args:
        text: The text, after `plain_notation`.
        led: The text follows a mark, so that a leading "- 5" is a negative number rather than an item of a list.
    """
    for match in _NUMBER.finditer(text):
        start = match.start()
        before = text[max(0, start - 13) : start]
        if match["date"] or _NOT_ALONE.match(text, match.end()) or _IN_A_WORD.search(before) or _RAISED_OR_LOWERED.search(before):
            continue
        for index, written in enumerate(_written(match)):
            negative = index == 0 and _is_negative(text, start, led)
            yield Number(_negated(written) if negative else written, start)


def plain_notation(text: str) -> str:
    """Rewrite the notations of LaTeX and Unicode that numbers come in: spacing, grouping, fractions, minus signs, digits."""
    if not text.isascii():
        text = _VULGAR.sub(_vulgar_fraction, text.translate(_CHARACTERS))
        text = "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)
    if "\\" in text or "{" in text or "~" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return text


_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"),  # minus sign, en dash, small and full-width hyphen
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),  # spaces that do not break, thin ones
        **{"\u2044": "/", "\u00d7": "x", "\uff04": "$"},  # fraction slash, multiplication sign, full-width dollar
    }
)
_VULGAR = re.compile("(?P<digit>[0-9])?(?P<fraction>[¼½¾⅐-⅞])")
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\! ?", ""),
        (r"\{,\}", ","),
        (r"\\[,;: ]|~", " "),
        (r"\\([$%])", r"\1"),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\^(?:\\circ|\{\\circ\})", ""),
        (r"\\(?:left|right)(?![a-z])", ""),
    ]
]


def _vulgar_fraction(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match["fraction"]).replace("\u2044", "/")
    return f"{match['digit']} {fraction}" if match["digit"] else fraction


def _after_answer_is(text: str) -> str | None:
    text = text.lstrip(" \t\n*:")
    ended = _SENTENCE_END.search(text)
    sentence = text[: ended.start()] if ended else text
    clause_end = _CLAUSE_END.search(sentence)
    clause = sentence[: clause_end.start()] if clause_end else sentence
    left, equals, right = clause.rpartition("=")
    if equals:
        result = next(numbers_in(right, led=True), None) or next(reversed(list(numbers_in(left, led=True))), None)
        if result:
            return result.text
    first = next(numbers_in(sentence, led=True), None)
    return first.text if first else None


def _after_hashes(text: str) -> str | None:
    # Markdown has headings of four hashes: "#### Step 1" and "#### 1. Add the apples" are none of the answer marks.
    line = text.partition("\n")[0]
    first = next(numbers_in(line, led=True), None)
    headed = first is not None and _HEADED.match(line[: first.start])
    if first is None or not headed or re.match(r"\s*\d+[.)]\s+[A-Za-z]", line):
        return None
    return _after_answer_is(line)


def _written(match: re.Match[str]) -> list[str]:
    """Return the unsigned numbers that a match stands for: usually one, several for a list, none for 1/0."""
    if match["part"]:
        whole, part, parts = int(match["whole"]), int(match["part"]), int(match["parts"])
        return [f"{whole * parts + part}/{parts}"] if part < parts else [match["whole"], f"{part}/{parts}"]
    if match["spaced"]:
        return [match["spaced"].replace(" ", "")]
    if match["plain"]:
        numbers = _separated(match["plain"])
        power = match["power"]
        return [f"{number}e{power}" for number in numbers if "e" not in number] if power else numbers
    over = _separated(match["top"] or match["over"] or match["over_digit"])
    under = _separated(match["bottom"] or match["under"] or match["under_digit"])
    if not over or not under or Decimal(under[0]) == 0:
        return []
    if match["latex_whole"] and re.fullmatch(r"\d{1,9}/\d{1,9}", f"{over[0]}/{under[0]}"):
        return [f"{int(match['latex_whole']) * int(under[0]) + int(over[0])}/{under[0]}"]
    return [*over[:-1], f"{over[-1]}/{under[0]}", *under[1:]]


def _separated(digits: str) -> list[str]:
    """Return the numbers in digits joined by points, commas and colons: one if they group by three, none for a time or a date."""
    digits = digits.lower().removeprefix("+")
    if ":" in digits:
        return []
    if _GROUPED.fullmatch(digits):
        return [digits.replace(",", "")]
    return [f"0{one}" if one[0] == "." else one for one in digits.split(",") if one.count(".") <= 1]


def _is_negative(text: str, start: int, led: bool) -> bool:
    sign = _SIGN.search(text[max(0, start - 8) : start])
    if sign is None:
        return False
    before, spaced = sign["before"], bool(sign["space"])
    if before and (before.isdigit() or before in ")]}%°-" or (before.isalpha() and not spaced)):
        return False  # a difference or a hyphen
    if sign["gap"]:  # "- 5" is an item of a list or a dash in a sentence, unless a value is about to be named
        return before in "=(:≈<>" if before else led
    return True


def _negated(number: str) -> str:
    return number[1:] if number.startswith("-") else f"-{number}"


def _value(text: str) -> Fraction | None:
    numbers = list(numbers_in(plain_notation(text), led=True))
    if len(numbers) != 1:
        return None
    over, _, under = numbers[0].text.partition("/")
    return Fraction(Decimal(over)) / Fraction(Decimal(under or "1"))
