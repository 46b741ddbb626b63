"""Answers as text: what a response's prediction is, choices and patterns, and where an answer begins and ends.

Numbers and formulas have files of their own; all three agree on this:

- An answer follows a mark, `The answer is:` or `####`; the last mark wins, so that a model may correct itself.
- A model that has answered often goes on with a new question of its own. What follows such a heading is not its answer, so the
  response ends there; but only after an answer, because some models begin by repeating the question.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from abba_cli.errors import DataError

ANSWER_IS = re.compile(r"\bthe (?:final |correct )?answer is[ \t]{0,4}(?P<colon>:?)", re.IGNORECASE)
HASHES = re.compile(r"(?<!#)####(?!#)")

_ANSWERED = re.compile(rf"{ANSWER_IS.pattern}|{HASHES.pattern}[^\S\n]{{0,8}}\S|\\boxed", re.IGNORECASE)
_NEXT_QUESTION = re.compile(
    r"^[ \t>*#]{0,8}(?:below is an instruction|(?:question|problem|exercise|instruction|input|response|user|human|q)"
    r"(?:[ \t*]{0,4}:|[ \t]{1,2}\d{1,4}[ \t*]{0,4}(?:[:.)]|$)))",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Prediction:
    """What was read from a response.

    Attributes:
        text: The answer; None where none was found (an extraction failure).
        marked: False for an answer taken without a mark: the last number, the last formula.
    """

    text: str | None
    marked: bool = True


def find_choice(response: str, choices: Sequence[str]) -> Prediction:
    """Return the choice that occurs first, as listed.

    Case and the width of white space do not matter. A choice is a whole word: "untrue" is not "true", and "answer10" is not
    "answer1"; an underscore is no part of a word, because Markdown writes _true_. Where two choices begin at the same place
    the longer one is meant ("New York City", not "New York").
    """
    listed: dict[str, str] = {}
    for choice in choices:
        listed.setdefault(_folded(choice), choice)
    listed.pop("", None)
    if not listed:
        return Prediction(None)
    found = re.search("|".join(map(_whole_word, sorted(listed, key=len, reverse=True))), _folded(response))
    return Prediction(listed[found.group()] if found else None)


def find_pattern(response: str, pattern: str) -> Prediction:
    """Return the last match of a user's regular expression that is not blank, trimmed.

    Args:
        response: What the model wrote.
        pattern: If it has groups, the first one that took part is the answer; otherwise the whole match.

    Raises:
        DataError: The pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"the pattern {pattern!r} is no regular expression: {error}; see docs.python.org/3/library/re") from None
    answer = None
    for match in compiled.finditer(response):
        taken = next((group for group in match.groups() if group is not None), match.group()).strip()
        answer = taken or answer
    return Prediction(answer)


def same_text(gold: str, prediction: str) -> bool:
    """Tell whether two texts are equal, whatever their case and the width of their white space."""
    return " ".join(gold.split()).casefold() == " ".join(prediction.split()).casefold()


def own_part(response: str) -> str:
    """Return the response up to the question that the model invents after it has answered."""
    answered = _ANSWERED.search(response)
    following = _NEXT_QUESTION.search(response, answered.end()) if answered else None
    return response[: following.start()] if following else response


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _whole_word(choice: str) -> str:
    before = r"(?<![^\W_])" if choice[0].isalnum() else ""
    after = r"(?![^\W_])" if choice[-1].isalnum() else ""
    return before + re.escape(choice) + after
