"""Answers as text: choices as whole words, users' patterns, and where a model's own answer ends."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.answers import find_choice, find_pattern, own_part, same_text

BOOL = ("true", "false")
ANSWERS = tuple(f"answer{n}" for n in (1, 2, 3, 4, 5))
TEN = tuple(f"answer{n}" for n in range(1, 11))
SIDES = ("solution1", "solution2")
CITIES = ("New York", "New York City", "Paris")
LETTERS = ("(A)", "(B)")


@pytest.mark.parametrize(
    ("choices", "response", "expected"),
    [
        (BOOL, "true", "true"),
        (BOOL, "the correct answer is false", "false"),
        (BOOL, "True.", "true"),
        (BOOL, "FALSE!", "false"),
        (BOOL, "**true**", "true"),
        (BOOL, "_true_", "true"),
        (BOOL, "<true>", "true"),
        (BOOL, "answer:true", "true"),
        (BOOL, "true or false? false", "true"),
        (BOOL, "\n\nfalse\n", "false"),
        (BOOL, "untrue", None),
        (BOOL, "It is untrue, so false", "false"),
        (BOOL, "truely", None),
        (BOOL, "falsehood and truth", None),
        (BOOL, "true1", None),
        (BOOL, "\u00e9true", None),
        (BOOL, "yes", None),
        (BOOL, "", None),
        (BOOL, "t r u e", None),
        (ANSWERS, "the correct answer is answer3", "answer3"),
        (ANSWERS, "Answer2: a cat", "answer2"),
        (ANSWERS, "answer1, not answer2", "answer1"),
        (ANSWERS, "answer10", None),
        (ANSWERS, "answer10 answer2", "answer2"),
        (ANSWERS, "answer 1", None),
        (ANSWERS, "answer6", None),
        (ANSWERS, "myanswer1", None),
        (ANSWERS, "answer1answer2", None),
        (ANSWERS, "answer1/answer2", "answer1"),
        (ANSWERS, "(answer4)", "answer4"),
        (TEN, "answer10", "answer10"),
        (TEN, "answer1 or answer10", "answer1"),
        (SIDES, "solution2 is right", "solution2"),
        (SIDES, "Solution1\nSolution2", "solution1"),
        (SIDES, "solutions: solution", None),
        (CITIES, "new york city", "New York City"),
        (CITIES, "New  York\nCity", "New York City"),
        (CITIES, "in New York.", "New York"),
        (CITIES, "New Yorker", None),
        (CITIES, "PARIS, then new york", "Paris"),
        (LETTERS, "It is (b)", "(B)"),
        (LETTERS, "(A)(B)", "(A)"),
        (LETTERS, "A", None),
        (("", " ", "yes"), "yes", "yes"),
        (("", " "), "anything", None),
        ((), "anything", None),
        (("Yes", "yes"), "YES", "Yes"),
        (("a.c", "x"), "abc", None),
    ],
)
def test_the_first_choice_that_is_a_whole_word_counts(choices: tuple[str, ...], response: str, expected: str | None) -> None:
    assert find_choice(response, choices).text == expected


@settings(deadline=None, database=None, max_examples=200)
@given(st.text(), st.lists(st.text(max_size=8), max_size=5))
def test_a_choice_found_is_one_of_them_and_stands_in_the_text(response: str, choices: list[str]) -> None:
    found = find_choice(response, choices).text
    if found is not None:
        assert found in choices
        assert " ".join(found.lower().split()) in " ".join(response.lower().split())


@settings(deadline=None, database=None, max_examples=100)
@given(st.sampled_from(ANSWERS), st.text(alphabet=st.characters(exclude_categories=["L", "N", "M"]), max_size=20))
def test_a_choice_among_signs_is_found(choice: str, signs: str) -> None:
    assert find_choice(f"{signs}{choice.upper()}{signs}", ANSWERS).text == choice


@pytest.mark.parametrize(
    ("pattern", "response", "expected"),
    [
        (r"\d+", "1 and 22", "22"),
        (r"answer: (\w+)", "answer: a; answer: b", "b"),
        (r"answer: (\w+)", "no", None),
        (r"\[(.*?)\]", "[ x ]", "x"),
        (r"A: (\w+)|B: (\w+)", "A: one B: two", "two"),
        (r"x(\d)?", "x", "x"),
        (r"\d*", "7 apples", "7"),
        (r"(?m)^> *(.*)$", "> one\n> two\nthree", "two"),
        (r"\[(.*?)\]", "[a] [ ]", "a"),
        (r".", "", None),
    ],
)
def test_the_last_match_of_a_pattern_counts(pattern: str, response: str, expected: str | None) -> None:
    assert find_pattern(response, pattern).text == expected


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<1>x)", "a{99999999999}"])
def test_a_pattern_that_is_none_is_named(pattern: str) -> None:
    with pytest.raises(DataError, match="is no regular expression"):
        find_pattern("text", pattern)


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ("Paris", " paris ", True),
        ("New York", "new\n  york", True),
        ("Straße", "STRASSE", True),
        ("Paris", "Paris.", False),
        ("a b", "ab", False),
        ("Paris", "", False),
    ],
)
def test_texts_are_equal_but_for_case_and_white_space(gold: str, prediction: str, equal: bool) -> None:
    assert same_text(gold, prediction) is equal


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        ("The answer is: 5\n\n### Instruction:\nHow many?\nThe answer is: 9", "The answer is: 5\n\n"),
        ("The answer is: 5\nQuestion: x", "The answer is: 5\n"),
        ("#### 5\nQ: x", "#### 5\n"),
        ("\\boxed{5}\n**Problem 2.** x", "\\boxed{5}\n"),
        ("the final answer is 5\nQuestion 2\nx", "the final answer is 5\n"),
        ("The answer is 5\nBelow is an instruction that", "The answer is 5\n"),
        # No answer yet: the model repeats the question, or numbers its steps with hashes.
        ("Question: x\nThe answer is: 5", "Question: x\nThe answer is: 5"),
        ("####\nQuestion: x", "####\nQuestion: x"),
        # Not headings.
        ("The answer is: 5\nProblem solved.", "The answer is: 5\nProblem solved."),
        ("The answer is: 5. Question: x", "The answer is: 5. Question: x"),
        ("", ""),
    ],
)
def test_a_response_ends_where_the_model_asks_itself_something_new(response: str, kept: str) -> None:
    assert own_part(response) == kept


@pytest.mark.parametrize("piece", ["question ", "The answer is ", "####", "\\boxed", "#" * 9 + "\n", "> * ", "q ", "\n", " "])
def test_long_texts_take_no_time(piece: str) -> None:
    response = "The answer is: 5\n" + piece * (100_000 // len(piece))
    begun = time.process_time()
    own_part(response)
    find_choice(response, ANSWERS)
    assert time.process_time() - begun < 2
