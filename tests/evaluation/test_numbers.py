"""Numbers in answers: every notation, what is no number, and exact comparison."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.answers import Prediction
from abba_cli.evaluation.grading.numbers import find_number, gold_number, same_number

AFTER_A_MARK = {
    "42": "42",
    "42.": "42",
    "42.0": "42.0",
    "1,234,567.": "1234567",
    "1,234.50": "1234.50",
    "1 000": "1000",
    "12\u202f345\u202f678": "12345678",
    "10{,}000": "10000",
    "10,\\!000": "10000",
    "1,2": "1",
    "1,234, 5": "1234",
    ".5": "0.5",
    "-5": "-5",
    "- 5": "-5",
    "\u22125": "-5",
    "+5": "5",
    "-1,000": "-1000",
    "--5": "5",
    "3/4": "3/4",
    "3 / 4": "3/4",
    "1 1/2": "3/2",
    "2 and 1/2": "5/2",
    "2½": "5/2",
    "-½": "-1/2",
    r"\frac{3}{4}": "3/4",
    r"-\frac34": "-3/4",
    r"1\dfrac{1}{2}": "3/2",
    "1e3": "1e3",
    "1.2e-3": "1.2e-3",
    r"1.2 \times 10^{3}": "1.2e3",
    "1.2 \u00d7 10^3": "1.2e3",
    "$1,234": "1234",
    "-$5": "-5",
    "$-5": "-5",
    "€ 12": "12",
    "£12.50": "12.50",
    "USD 42": "42",
    "Rs. 42": "42",
    r"\$18.90": "18.90",
    "42%": "42",
    r"42\%": "42",
    "12 apples": "12",
    "5km": "5",
    "12 cm^2": "12",
    "90^\\circ": "90",
    "**42**": "42",
    "__42__": "42",
    "$42$": "42",
    r"\boxed{42}": "42",
    r"\text{42}": "42",
    "= 42": "42",
    "x = 5": "5",
    "5 = x": "5",
    "3 + 4 = 7": "7",
    "$10-$5 = $5": "5",
    "7, since 3+5=8": "7",
    "5. Therefore 6 apples": "5",
    "5 (not 6)": "5",
    "the number -7": "-7",
    "\n\n42": "42",
    "1101_2": "1101",
    "\u0664\u0662": "42",
    "\uff14\uff12": "42",
    "100-20": "100",
    "5\nQuestion: how many?\nThe answer is: 7": "5",
    "5. No, the answer is 6": "6",
    "5. I repeat, the answer is clear.": "5",
}


@pytest.mark.parametrize(("answer", "expected"), AFTER_A_MARK.items())
def test_the_number_after_the_mark(answer: str, expected: str) -> None:
    assert find_number(f"2 of 9. The answer is: {answer}") == Prediction(expected)


NO_NUMBER = [
    "five",
    "NaN",
    "inf",
    "-infinity",
    "1/0",
    "0/0",
    "3:30",
    "2020-05-12",
    "12/05/2020",
    "1.2.3",
    "10^2",
    "4\u00b2",
    "H2O",
]
NO_NUMBER += ["", "-", "$", "x2", "answer1", "1e99999", r"\frac{1}{0}", r"\frac{}{}", ".", ",", "x_1", "\u2460", "\u4e00"]


@pytest.mark.parametrize("answer", NO_NUMBER)
def test_what_is_no_number(answer: str) -> None:
    assert find_number(f"The answer is: {answer}").text is None
    assert not same_number(answer, answer)


@pytest.mark.parametrize(
    ("response", "expected", "marked"),
    [
        ("3 + 4 is 7\n#### 7", "7", True),
        ("####7", "7", True),
        ("x\n#### $1,234\n", "1234", True),
        ("so 9\n#### ", "9", False),
        ("#### Step 1\nHe has 9", "9", False),
        ("#### 1. Add 5\nHe has 9", "9", False),
        ("##### 7 then 8", "8", False),
        ("The final answer is **8**.", "8", True),
        ("THE ANSWER IS 8", "8", True),
        ("The answer is: unknown. He has 6", "6", False),
        ("The answer is: five\nor 6", "6", False),
        ("He has 3 and then 5 apples.", "5", False),
        ("- 5 apples", "5", False),
        ("It fell to -5", "-5", False),
        ("7 - 5", "5", False),
        ("7 -5", "5", False),
        ("covid-19", "19", False),
        ("a = - 5", "-5", False),
        ("The area is 12 cm^2", "12", False),
        ("At 5 he left, arriving at 6:30", "5", False),
        ("nothing", None, False),
        ("", None, False),
    ],
)
def test_marks_and_last_numbers(response: str, expected: str | None, marked: bool) -> None:
    assert find_number(response) == Prediction(expected, marked)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("3+4=<<3+4=7>>7\n#### 7", "7"), ("#### 1,234", "1234"), ("#### -5", "-5"), ("72", "72"), ("145.0", "145.0"), ("$5", "5")],
)
def test_the_source_s_number(answer: str, expected: str) -> None:
    assert gold_number(answer) == expected


@pytest.mark.parametrize("answer", ["", "####", "#### x", "#### 1 or 2", "1/0", "3 4"])
def test_a_source_without_one_number_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match=r"holds \d+ numbers; expected '#### N'"):
        gold_number(answer)


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ("7", "7.0", True),
        ("1000", "1,000", True),
        ("0.75", "3/4", True),
        ("1.5", "1 1/2", True),
        ("1200", "1.2e3", True),
        ("0", "-0", True),
        ("5", "$5.00", True),
        ("10", "20/2", True),
        ("1" + "0" * 5000, "1e5000", True),
        ("7", "7.4", False),  # no rounding
        ("7", "6.9999", False),
        ("7", "700", False),  # no factor of 100
        ("7", "0.07", False),
        ("0.5", "50%", False),
        ("5", "-5", False),
        ("1/3", "0.333333", False),
        ("1234", "1", False),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("7", "7 or 8", False),
        ("7", "", False),
        ("", "", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
    ],
)
def test_numbers_are_compared_exactly(gold: str, prediction: str, equal: bool) -> None:
    assert same_number(gold, prediction) is equal
    assert same_number(prediction, gold) is equal


STYLES = [
    "{}",
    "**{}**",
    "{}.",
    "$ {}",
    "{} apples",
    "${}$",
    "\\boxed{{{}}}",
    "about {}, or so",
    "= {}",
    "{}%",
    "({})",
    "€{}",
    "`{}`",
]


@settings(deadline=None, database=None, max_examples=300)
@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(STYLES),
    st.sampled_from(["The answer is: ", "#### "]),
)
def test_a_number_in_any_style_is_found(whole: int, decimals: int, commas: bool, style: str, mark: str) -> None:
    value = Fraction(whole, 10**decimals)
    sign, digits = "-" * (whole < 0), str(abs(whole)).rjust(decimals + 1, "0")
    before, after = digits[: len(digits) - decimals], digits[len(digits) - decimals :]
    written = sign + (f"{int(before):,}" if commas else before) + (f".{after}" if after else "")
    if mark == "#### " and "about" in style:
        mark = "The answer is: "
    found = find_number(f"First 17.\n{mark}{style.format(written)}\n").text
    assert found is not None
    assert same_number(str(value), found)


@settings(deadline=None, database=None, max_examples=200)
@given(st.fractions(), st.fractions(), st.fractions())
def test_equality_is_an_equivalence(a: Fraction, b: Fraction, c: Fraction) -> None:
    assert same_number(str(a), str(a))
    assert same_number(str(a), f"{a.numerator * 3}/{a.denominator * 3}")
    assert same_number(str(a), str(b)) is same_number(str(b), str(a)) is (a == b)
    if same_number(str(a), str(b)) and same_number(str(b), str(c)):
        assert same_number(str(a), str(c))


HARD = st.text() | st.text(alphabet="0123456789.,:/-+ eE$%^_{}\\frac#\nThe answer is½²\u0664", max_size=200)


@settings(deadline=None, database=None, max_examples=500)
@given(HARD)
def test_no_text_raises_and_what_is_found_is_a_number(text: str) -> None:
    for response in (text, f"The answer is: {text}", f"#### {text}"):
        found = find_number(response).text
        assert found is None or same_number(found, found)


PIECES = [
    "1,",
    "{",
    "\\boxed{",
    "-",
    "9",
    "the answer is",
    "####",
    "#### 1",
    "1 ",
    "1 000 ",
    "1/",
    "\\frac{",
    "\\frac{1}",
    ".",
    "x1",
]
PIECES += ["1:", "1.5e", "= ", " ", "\n", "½", "\u0664", "3+4=", "a", "\\", "$", "1 1/", "0-", "1. "]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("lead", ["", "The answer is: "])
def test_long_texts_take_little_time(piece: str, lead: str) -> None:
    response = lead + piece * (100_000 // len(piece))
    begun = time.process_time()
    found = find_number(response).text
    same_number("3", found or "")
    assert time.process_time() - begun < 4
