"""Formulas in answers: found in a response or in a source's row, and compared by what they mean."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from abba_cli.errors import DataError
from abba_cli.evaluation.grading import formulas
from abba_cli.evaluation.grading.answers import ANSWER_IS, HASHES, Prediction, own_part
from abba_cli.evaluation.grading.numbers import numbers_in, plain_notation
from abba_cli.evaluation.grading.symbolic import judged_equal

LONGEST = 500  # characters; the longest answer of MATH-500 has 53, and algebra on a page of text is a waste of its time limit


class _Span(NamedTuple):
    start: int
    end: int
    text: str


def find_latex(response: str) -> Prediction:
    r"""Return the formula that a response answers with.

    Whichever comes last: what follows `The answer is:`, or a \boxed{}. Then what follows `####`; then, without a mark, the last
    formula between dollar signs or the last number.
    """
    found = _last_formula(response)
    # Control characters that Python takes for white space may be all that is there.
    return found if found.text is None or found.text.strip() else Prediction(None, marked=found.marked)


def _last_formula(response: str) -> Prediction:
    text = own_part(response)
    box = next(reversed(list(_boxes(text))), None)
    marks = list(ANSWER_IS.finditer(text))
    if marks and (box is None or box.start < marks[-1].start()):
        answer = _statement(text[marks[-1].end() :], any_words=bool(marks[-1]["colon"]))
        if answer:
            return Prediction(answer)
    if box is not None:
        return Prediction(box.text)
    for mark in HASHES.finditer(text):
        line = text[mark.end() :].partition("\n")[0].strip()
        # Markdown has headings of four hashes: "#### Step 1", "#### 1. Expand"
        if line and not re.match(r"\d+[.)]\s|[A-Za-z]{2}", line):
            box = _Span(mark.start(), mark.end(), line)
    if box is not None and (answer := _statement(box.text, any_words=True)):
        return Prediction(answer)
    span = next(reversed(list(_spans(text))), None)
    plain = plain_notation(text[span.end :] if span else text)
    number = next(reversed(list(numbers_in(plain))), None)
    return Prediction(number.text if number else span.text if span else None, marked=False)


def gold_latex(row: Mapping[str, Any]) -> str:
    r"""Return the right answer of a row: its `answer` (MATH-500), else the last \boxed{} of its `solution` or `output`.

    Raises:
        DataError: There is neither.
    """
    answer = row.get("answer")
    if answer is not None and str(answer).strip():
        return str(answer).strip()
    for column in ("solution", "output"):
        box = next(reversed(list(_boxes(str(row.get(column) or "")))), None)
        if box is not None:
            return box.text
    raise DataError(
        f"the row has no right answer (columns: {', '.join(map(str, row)) or 'none'}); "
        "expected one in `answer`, or in the last \\boxed{} of `solution` or `output`"
    )


def same_latex(gold: str, prediction: str) -> bool:
    r"""Tell whether two LaTeX answers mean the same; what cannot be read, or not in a few seconds, equals nothing.

    Units, degrees and currency are not compared. Fractions and decimals are compared exactly: 1/3 is not 0.333333. A percent sign
    is read either way: 50\% is 50 and is 1/2. Points and intervals are ordered, sets and lists are not; \{2, 5\} is not (2, 5).
    A numeral with a base, 1101_2, may be answered without it, not with another one. Words are compared as words.
    """
    if len(gold) > LONGEST or len(prediction) > LONGEST:
        return False
    expected, given = formulas.normal_form(gold), formulas.normal_form(prediction)
    if not expected or not given:
        return False
    if expected == given:
        return True
    words = formulas.as_words(expected) or formulas.as_words(given)
    if words is not None:
        return formulas.same_words(words, given if formulas.as_words(expected) else expected)
    based, answered = formulas.numeral_with_base(expected), formulas.numeral_with_base(given)
    if based or answered:
        return based is not None and (answered == based or given.casefold() == based[0])
    if not formulas.has_variables(expected):
        given = formulas.without_plain_units(given)
    kinds = formulas.brackets(expected), formulas.brackets(given)
    left, right = formulas.for_algebra(expected), formulas.for_algebra(given)
    if left is None or right is None or set(kinds) == {"(", "{"}:
        return False
    # The parser's readings of a percent sign differ with its version, so both are given to it in words of its own.
    pairs = [(one, other) for one in _percent_readings(left) for other in _percent_readings(right)]
    return any(one == other or judged_equal("math-verify", one, other) for one, other in pairs)


def _percent_readings(formula: str) -> list[str]:
    if not formula.endswith(r"\%"):
        return [formula]
    number = formula.removesuffix(r"\%").rstrip()
    return [number, rf"\frac{{{number}}}{{100}}"]


def _statement(text: str, any_words: bool) -> str | None:
    """Return the formula that a text begins with, or None.

    Args:
        text: What follows a mark.
        any_words: Whether the answer may be a few words; after "the answer is" without a colon they are prose more often.
    """
    text = text.lstrip(" \t\n*:")
    inside = _boxed_or_delimited(text)
    if inside:
        return inside
    ended = re.search(r"\n|\.[\"')*]{0,4}(?:\s{1,4}(?=[A-Z\"'(*])|\s{0,4}\Z)|,? (?:because|since)\b", text)
    answer = (text[: ended.start()] if ended else text).strip(" \t*\"'")
    mathematical = re.search(r"[\d\\^=+<>]", answer) is not None
    return answer if answer and (any_words or mathematical or len(answer.split()) <= 3) else None


def _boxed_or_delimited(text: str) -> str | None:
    """Return what is in the first \\boxed{} or delimiters of a text, unless a figure or a new line comes before."""
    spans = sorted([*_boxes(text), *_spans(text)])
    if not spans or re.search(r"[\d\n]|\.\s", text[: spans[0].start]):
        return None
    first, *others = spans
    answer, end = first.text, first.end
    for span in others:
        between = text[end : span.start]
        if span.start >= end and re.fullmatch(r"\s{0,4}(?:,|;|(?:, ?)?(?:and|or)\b)\s{0,4}", between):
            answer, end = f"{answer}, {span.text}", span.end
        elif span.start >= end:
            break
    inner = next(_boxes(answer), None)
    answer = inner.text if inner else answer
    return answer + r"\%" if re.match(r"\s?\\?%", text[end:]) else answer or None


def _boxes(text: str) -> Iterator[_Span]:
    r"""Yield the contents of every \boxed{} and \fbox{} that holds something, in the order of their ends; also `\boxed 5`."""
    openings: list[tuple[int, int] | None] = []
    for token in re.finditer(r"\\(?:boxed|fbox)(?:\s{0,4}(?P<opening>\{)|\s{1,4}(?P<bare>[^\s{}$.,\\]{1,20}))|\\.|[{}]", text):
        if token["bare"]:
            yield _Span(token.start(), token.end(), token["bare"])
        elif token["opening"] or token.group() == "{":
            openings.append((token.start(), token.end()) if token["opening"] else None)
        elif token.group() == "}" and openings:
            opened = openings.pop()
            inside = text[opened[1] : token.start()].strip() if opened else ""
            if opened and inside:
                yield _Span(opened[0], token.end(), inside)


def _spans(text: str) -> Iterator[_Span]:
    r"""Yield what is between $ $, $$ $$, \( \) and \[ \]."""
    closing_of = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
    opening: re.Match[str] | None = None
    for token in re.finditer(r"\\.|\$\$?", text, re.DOTALL):
        if opening is not None and token.group() == closing_of[opening.group()]:
            inside = text[opening.end() : token.start()].strip()
            if inside:
                yield _Span(opening.start(), token.end(), inside)
            opening = None
        elif opening is None and token.group() in closing_of:
            opening = token
