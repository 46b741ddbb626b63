"""The scoring rules of the paper's released code, mistakes included, so that numbers made with it can be compared.

Rules: https://github.com/CERT-Lab/abba/tree/9ef120cf/instruction_tuning_eval. What sets them apart from ours:

- Choices: the first that occurs anywhere, also inside a word ("untrue" is true, "answer10" is answer1).
- Numbers: only after "The answer is: "; 1,234,567 is read as 1,234, and everything is rounded to a whole number; an answer wrong
  by a factor of 100, or by 0.01%, is right.
- Formulas: only after "The answer is: "; values within 0.1%, and again the factor of 100. LaTeX is compared as text (the parser
  it asks for is not among its requirements). Where the normalisation crashes, on x/2 for instance, any answer is right.

Two differences remain, both refusals: formulas that would run code, and algebra that does not end in a few seconds, are wrong
here. An answer that ends the released program with an error (1/00 apples) is wrong as well.
"""

import math
import re
from collections.abc import Sequence

from abba_cli.evaluation.grading.symbolic import judged_equal

_MARK = "The answer is: "


def released_choice(response: str, choices: Sequence[str], gold: str) -> bool:
    """Tell whether the first choice found in the response, in small letters, is the right one."""
    found = re.search("|".join(map(re.escape, choices)), response.strip().lower())
    return (found.group() if found else "") == gold


def released_number(response: str, gold_answer: str) -> bool:
    """Tell whether the rounded number after the mark is right.

    Args:
        response: What the model wrote.
        gold_answer: The source's answer with its "#### N".
    """
    try:
        gold = int(gold_answer.split("#### ", 1)[-1].replace(",", ""))
        number = _rounded(response)
        return number is not None and (float(number) == float(gold) or _equal(str(number), str(gold)))
    except (ValueError, ArithmeticError):
        return False


def released_latex(response: str, gold: str) -> bool:
    """Tell whether the text after the mark, up to a full stop and a new line, is equivalent to the right answer."""
    _, mark, after = response.rpartition(_MARK)
    if not mark:
        return False
    answer = after.split(".\n")[0].strip().removesuffix(".").strip()
    try:
        prediction, expected = _stripped(answer), _stripped(gold)
        return _equal(prediction, expected) or prediction == expected
    except (ValueError, IndexError, RecursionError):
        # The released code then compares the prediction with itself, and only nothing and NaN differ from themselves.
        return (bool(answer) and not math.isnan(_as_float(answer) or 0.0)) or answer == gold


def _rounded(response: str) -> int | None:
    _, mark, after = response.rpartition(_MARK)
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", after.strip()) if mark else None
    if found is None:
        return None
    over, slash, under = found.group().replace(",", "").partition("/")
    if not slash:
        number = float(over)
        return None if number == math.inf else round(number)
    if not over.strip("+-"):
        return None
    return round(float(over)) if under == "0" else round(float(over) / float(under))


def _equal(prediction: str, gold: str) -> bool:
    number, expected = _as_float(prediction), _as_float(gold)
    if number is not None and expected is not None:
        return any(math.isclose(one, number, rel_tol=1e-4) for one in (expected / 100, expected, expected * 100))
    if not prediction:
        return False
    prediction, gold = prediction.strip(), gold.strip()
    loose = [one.strip("[]()") for one in (prediction, gold)] if _may_drop_brackets(prediction, gold) else [prediction, gold]
    if len({re.sub("[{}()]", "", one) for one in loose}) == 1:
        return True
    if any(all(one.startswith(left) and one.endswith(right) for one in (prediction, gold)) for left, right in ("[]", "()")):
        parts, wanted = prediction[1:-1].split(","), gold[1:-1].split(",")
        if len(parts) == len(wanted) and all(map(_equal, parts, wanted)):
            return True
    return judged_equal("released", gold, prediction)


def _may_drop_brackets(prediction: str, gold: str) -> bool:
    ends = prediction[:1] + prediction[-1:]
    return len(prediction) > 1 and ((ends == "[]" and gold[:1] != "(") or (ends == "()" and gold[:1] != "["))


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _stripped(text: str) -> str:
    """Return the released code's normal form of LaTeX; crashes, with ValueError or IndexError, where that does."""
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    head, *tails = text.split("\\text{ ")
    if len(tails) > 1:
        raise ValueError("two units")
    text = head.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    root, *roots = text.split("\\sqrt")
    text = root + "".join(f"\\sqrt{one}" if one[0] == "{" else f"\\sqrt{{{one[0]}}}{one[1:]}" for one in roots)
    text = _with_braced_fractions(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    parts = text.split("/")
    if len(parts) == 2:
        over, under = int(parts[0]), int(parts[1])  # x/2 crashes here
        text = f"\\frac{{{over}}}{{{under}}}" if text == f"{over}/{under}" else text
    return text


_SPELLINGS = [
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
]


def _with_braced_fractions(text: str) -> str:
    head, *fractions = text.split("\\frac")
    written = head
    for one in fractions:
        if one[0] == "{":
            written += f"\\frac{one}"
        elif len(one) < 2:
            return text
        else:
            written += f"\\frac{{{one[0]}}}" + (one[1:] if one[1] == "{" else f"{{{one[1]}}}{one[2:]}")
    return written
