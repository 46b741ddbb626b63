r"""Formulas in answers: where they are found, and which mean the same."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.answers import Prediction
from abba_cli.evaluation.grading.latex import find_latex, gold_latex, same_latex

SAME = [
    (r"\frac{3}{4}", "0.75"),
    (r"\dfrac34", "3/4"),
    (r"\tfrac{3}{4}", r"\frac 34"),
    (r"1\frac{4}{5}", "9/5"),
    (r"137 \frac{1}{2}", "137 1/2"),
    (".35625", "0.35625"),
    ("3", "3.0"),
    ("2", r"\boxed{2}."),
    ("58,500", "58500"),
    ("10{,}000", "10 000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"1.2\times 10^3", "1200"),
    (r"\$18.90", "18.90"),
    (r"\$32,\!348", "$32,348$"),
    (r"50\%", "50"),
    (r"50\%", r"\frac{1}{2}"),
    (r"90^\circ", "90"),
    ("90", r"90 \text{ degrees}"),
    (r"15\mbox{ cm}^2", "15"),
    (r"864 \mbox{ inches}^2", "864 square inches"),
    ("12", "12 apples"),
    (r"7\pi", r"7\pi \text{ cm}"),
    (r"288 \pi", "288\u03c0"),
    (r"2\sqrt{5}", r"\sqrt{20}"),
    (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}"),
    (r"\pm 3", "3, -3"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    ("6+9i", "9i + 6"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("9", "2 + 7 = 9"),
    ("y = 2x + 3", "y=3+2x"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"),
    ("x^3+3x-6", "-6+x^3+3x"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("2k+2", "2(k+1)"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(0.6, 8/3]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"x \in [-2,7]", "[-2, 7]"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", r"7, 5 \text{ and } 3"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix}0.2\\-3.6\end{bmatrix}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}"),
    ("4210_{5}", "4210_5"),
    ("1101_2", "1101"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{June 20}", "June 20"),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", r"\textbf{(C)}"),
    ("x > 3", "3 < x"),
    ("12", "3(4)"),
]
DIFFERENT = [
    ("0.5", "50"),
    ("50", "0.5"),
    ("5", "0.05"),
    ("1/3", "0.33"),
    ("1/3", "0.333333"),
    (r"\pi", "3.14"),
    (r"\sqrt2", "1.41421"),
    ("2^{-60}", "2^{-61}"),
    ("5", "-5"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("[1,2)", "[1,2]"),
    ("(2,5)", r"\{2,5\}"),
    (r"\{2,5\}", "(2,5)"),
    ("12", "12x"),
    ("12x", "12"),
    ("5c", "5"),
    ("5", "5c"),
    ("12ab", "12"),
    ("12", ""),
    ("", "12"),
    ("", ""),
    (r"\frac{1}{2}", r"\frac{"),
    (r"\frac{", r"\frac{"),
    ("3", "3} or \\boxed{4"),
    ("3", "1, 2, 3, 4"),
    ("3", "3 or 4"),
    ("3", r"3 \text{ or 4}"),
    ("3", "1 2 3"),
    ("25", "12 13"),  # side by side is a sum to the parser of LaTeX
    ("7", "3(4)"),
    ("7", "(3)(4)"),
    ("1", "1 1/2"),
    ("1234", "1, 234"),
    ("1101_2", "1101_3"),
    ("13", "1101_2"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{even}", "neve"),
    (r"\text{(C)}", "(B)"),
    ("x=5", "y=5"),
    ("y=2x", "y=3x"),
    ("6 - 5i", "6+5i"),
    ("1/0", "2/0"),
    ("10", "10^2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"(5,\infty)", r"[5,\infty)"),
    ("3", "3" * 501),
]


@pytest.mark.parametrize(("gold", "prediction"), SAME)
def test_formulas_that_mean_the_same(gold: str, prediction: str) -> None:
    assert same_latex(gold, prediction)


@pytest.mark.parametrize(("gold", "prediction"), DIFFERENT)
def test_formulas_that_differ(gold: str, prediction: str) -> None:
    assert not same_latex(gold, prediction)


# (gold, the end of its solution), as MATH writes them.
SOURCES = [gold for gold, _ in SAME]


@pytest.mark.parametrize("gold", SOURCES)
def test_an_answer_is_found_wherever_it_stands(gold: str) -> None:
    for response in (
        f"The answer is: {gold}",
        f"Hence the answer is ${gold}$.",
        f"Thus $x = \\boxed{{{gold}}}$.",
        f"So 4.\n#### {gold}",
        f"The answer is:\n\\[\n{gold}\n\\]\n",
        f"The answer is: {gold}.\n\n### Instruction:\nAnother. The answer is: 99",
    ):
        found = find_latex(response)
        assert found.marked
        assert found.text is not None
        assert same_latex(gold, found.text), (response, found)


@pytest.mark.parametrize(
    ("response", "expected", "marked"),
    [
        ("The answer is: 5. Therefore 6 apples", "5", True),
        (r"The answer is: $\frac{1}{2}$ because $x=3$", r"\frac{1}{2}", True),
        ("The answer is $x=5$ and $y=6$.", "x=5, y=6", True),
        ("The answer is the interval $[1,2)$.", "[1,2)", True),
        (r"The answer is $5$\%.", r"5\%", True),
        ("The answer is: **7**", "7", True),
        ("The answer is: Evelyn.", "Evelyn", True),
        ("The answer is obviously clear to everybody. So 5", "5", False),
        (r"The answer is: 4. No: \boxed{5}", "5", True),
        (r"\boxed{4}, no, the answer is: 5", "5", True),
        (r"The answer is: \boxed{5}.", "5", True),
        (r"\boxed{1}, \boxed{2}", "2", True),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}", True),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", True),
        (r"\boxed{5} and \boxed{", "5", True),
        (r"\boxed 5", "5", True),
        (r"\fbox{5}", "5", True),
        ("#### 5", "5", True),
        ("#### Step 1\nwe get $x+1$", "x+1", False),
        ("we get $x+1$, so", "x+1", False),
        ("we get $x$ and then 12.", "12", False),
        ("it costs $5", "5", False),
        ("nothing", None, False),
        (r"\boxed{", None, False),
        ("", None, False),
    ],
)
def test_where_a_formula_is_found(response: str, expected: str | None, marked: bool) -> None:
    assert find_latex(response) == Prediction(expected, marked)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": " 5 ", "solution": r"\boxed{6}"}, "5"),
        ({"answer": 5}, "5"),
        ({"answer": None, "solution": r"\boxed{1} so \boxed{\frac{1}{2}}."}, r"\frac{1}{2}"),
        ({"answer": "", "output": r"hence $\boxed{(1,2)}$"}, "(1,2)"),
        ({"solution": r"it is $\boxed 7$."}, "7"),
    ],
)
def test_the_source_s_formula(row: dict[str, object], expected: str) -> None:
    assert gold_latex(row) == expected


@pytest.mark.parametrize("row", [{}, {"answer": " "}, {"solution": "5"}, {"solution": r"\boxed{"}, {"output": None}])
def test_a_row_without_a_formula_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match="the row has no right answer"):
        gold_latex(row)


@settings(deadline=None, database=None, max_examples=300)
@given(st.text() | st.text(alphabet="\\boxed{}$ 12()[].#\nThe answer is:frac%^_,", max_size=200))
def test_no_text_raises(text: str) -> None:
    for response in (text, f"The answer is: {text}", f"\\boxed{{{text}}}"):
        found = find_latex(response).text
        assert found is None or found.strip()
        same_latex(text, f"{text} ")


@settings(deadline=None, database=None, max_examples=60)
@given(st.text(alphabet="\\12x+-*/^_(){},. ", max_size=12), st.text(alphabet="\\12x+-*/^_(){},. ", max_size=12))
def test_no_comparison_raises(gold: str, prediction: str) -> None:
    assert same_latex(gold, prediction) in (True, False)


PIECES = [
    "1,",
    "{",
    "\\boxed{",
    "-",
    "$",
    "\\[",
    "\\(",
    "the answer is ",
    "the answer is: $",
    "####",
    "#### x\n",
    "\\boxed 5",
    "\\",
]
PIECES += ["}", "\\boxed{5}", " ", "\n", "$1$,", "\\boxed{1}", "\\text{", "the ", ". ", "x", "\\begin{pmatrix}"]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("lead", ["", "The answer is: "])
def test_long_texts_take_little_time(piece: str, lead: str) -> None:
    response = lead + piece * (100_000 // len(piece))
    begun = time.process_time()
    same_latex("3", find_latex(response).text or "")
    assert time.process_time() - begun < 4
