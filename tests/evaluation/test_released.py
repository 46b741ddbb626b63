"""The released code's rules, each worked by hand from its source: what is right by them, mistakes included."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abba_cli.evaluation.grading.released import released_choice, released_latex, released_number

BOOL = ("true", "false")
ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")


@pytest.mark.parametrize(
    ("choices", "response", "gold", "right"),
    [
        (BOOL, "the correct answer is true", "true", True),
        (BOOL, " TRUE ", "true", True),
        (BOOL, "untrue", "true", True),  # inside a word
        (BOOL, "false, not true", "true", False),
        (BOOL, "", "true", False),
        (BOOL, "yes", "true", False),
        (ANSWERS, "answer10", "answer1", True),
        (ANSWERS, "answer2answer1", "answer2", True),
        (ANSWERS, "answer 1", "answer1", False),
        (ANSWERS, "answer6", "answer1", False),
    ],
)
def test_choices(choices: tuple[str, ...], response: str, gold: str, right: bool) -> None:
    assert released_choice(response, choices, gold) is right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("42", "42", True),
        ("$42.", "42", True),
        ("42.4", "42", True),  # rounded
        ("41.5", "42", True),
        ("42.5", "42", True),  # to the even number
        ("42.6", "42", False),
        ("1,234", "1234", True),
        ("1,234,567", "1234567", False),  # read as 1,234
        ("1,234,567", "1,234", True),
        ("4200", "42", True),  # the factor of 100
        ("1", "100", True),
        ("10000", "10001", True),  # within 0.01%
        ("-42", "42", False),
        ("-42", "-42", True),
        ("- 42", "42", True),  # the sign must touch the number
        ("84/2", "42", True),
        ("85/2", "42", True),
        ("42/0", "42", True),  # by zero: the numerator
        ("42/00", "42", False),  # an error that ended the program
        ("/42", "42", False),
        ("1e3", "1", True),
        (".9", "1", True),
        ("12 or 42", "42", False),
        ("12, The answer is: 42", "42", True),
        ("forty-two", "42", False),
        ("", "42", False),
        ("9" * 400, "42", False),
        ("-" + "9" * 400, "42", False),
    ],
)
def test_numbers(answer: str, gold: str, right: bool) -> None:
    assert released_number(f"Some 7. The answer is: {answer}", f"2 + 2\n#### {gold}") is right


@pytest.mark.parametrize("mark", ["The answer is ", "the answer is: ", "The answer is:", "#### ", ""])
def test_the_mark_is_exact(mark: str) -> None:
    assert not released_number(f"{mark}42", "#### 42")
    assert not released_latex(f"{mark}42", "42")


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        (r"\frac12", r"\frac{1}{2}", True),
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("0.25", r"\frac{1}{4}", False),  # only 0.5 is known
        (r"2\sqrt5", r"2\sqrt{5}", True),
        (r"\sqrt{20}", r"2\sqrt{5}", False),  # LaTeX is text
        (r"5\text{ cm}", "5", True),
        (r"50\%", "50", True),
        (r"90^\circ", "90", True),
        (r"\$5", "5", True),
        ("x = 5", "5", True),
        ("abc = 5", "5", False),
        ("5.", "5", True),
        ("5.\nSo 6", "5", True),
        ("5. So 6", "5", False),
        ("5.\n\n\n", "5", True),
        ("500", "5", True),  # the factor of 100
        ("0.05", "5", True),
        ("1,000", "1000", True),
        ("10000", "10001", True),
        (r"\left(1, 2\right)", "(1,2)", True),
        ("(2,1)", "(1,2)", False),
        ("(100,2)", "(1,2)", True),  # the factor of 100 within
        ("(1,2)", "1,2", True),
        ("[1,2]", "(1,2)", False),
        ("{5}", "5", True),
        ("1+x", "x+1", True),
        ("2*x+2", "2*(x+1)", True),
        ("2x", "2*x", False),  # 2x is no Python
        ("2**3", "8", True),
        ("True", "1", True),
        ("2^3", "1", True),  # Python's exclusive or
        ("sqrt(2)", "1.4142", True),  # within 0.1%
        ("pi", "3.1416", True),
        ("x/2", "17", True),  # a crash is right
        ("x/2", r"\pi", True),
        ("5", "x/2", True),  # also one over the right answer
        (r"\frac", "17", True),
        (r"3\sqrt", "17", True),
        (r"1\text{ a}\text{ b}", "17", True),
        ("nan", "x/2", False),  # but NaN is not itself
        ("", "x/2", False),
        ("", "", True),
        ("1/2/3", "17", False),
        ("17", "18", False),
        ("print(17)", "17", False),
    ],
)
def test_formulas(answer: str, gold: str, right: bool) -> None:
    assert released_latex(f"No. The answer is: {answer}", gold) is right


ANYTHING = st.text() | st.text(alphabet="\\fracsqrtext{}()[]0123456789.,/=+-% \n$^", max_size=40)


@settings(deadline=None, database=None, max_examples=300)
@given(ANYTHING, ANYTHING)
def test_no_text_raises(text: str, gold: str) -> None:
    for response in (text, f"The answer is: {text}"):
        assert released_choice(response, ANSWERS, gold) in (True, False)
        assert released_number(response, gold) in (True, False)
        assert released_number(response, f"#### {gold}") in (True, False)


@settings(deadline=None, database=None, max_examples=100)
@given(ANYTHING, ANYTHING)
def test_no_formula_raises(text: str, gold: str) -> None:
    assert released_latex(f"The answer is: {text}", gold) in (True, False)


@pytest.mark.parametrize("piece", ["1,", "{", "(", "\\frac", "\\sqrt{", "-", "9", "/", "=", "The answer is: ", ".\n"])
def test_long_texts_take_little_time(piece: str) -> None:
    response = "The answer is: " + piece * (100_000 // len(piece))
    begun = time.monotonic()
    released_number(response, "#### 5")
    released_latex(response, "(1,2)")
    assert time.monotonic() - begun < 60
