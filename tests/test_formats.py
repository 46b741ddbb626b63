"""Rows of every known shape, and every message for rows of none."""

import pickle
import re
from typing import Any

import pytest

from abba_cli.errors import DataError
from abba_cli.formats import Example, Message, compile_template, reader_for

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))


def read(row: dict[str, Any], **templates: str) -> Example:
    return reader_for(list(row), **templates).read(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example((U("p"), A("c")))),
        ({"instruction": "i", "input": "", "output": "o"}, Example((U("i"), A("o")))),
        ({"instruction": "i", "input": "x", "output": "o"}, Example((U("i"), A("o")), input="x")),
        ({"instruction": "i", "context": "x", "response": "o"}, Example((U("i"), A("o")), input="x")),
        ({"query": "q", "response": "r", "type": "t"}, Example((U("q"), A("r")))),
        ({"question": "q", "answer": 7, "system": "s"}, Example((S("s"), U("q"), A("7")))),
        ({"question": "q", "answer": None}, Example((U("q"), A("")))),
        ({"problem": "q", "solution": "r"}, Example((U("q"), A("r")))),
        ({"text": "t", "id": 1}, Example(text="t")),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            Example((U("u"), A("a"))),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]}]},
            Example((U("uv"),)),
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Example((S("s"), U("u"), A("a"))),
        ),
        (
            {"conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "u"}], "system": "s"},
            Example((S("own"), U("u"))),
        ),
        (
            {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
            Example((U("u"), A("a"))),
        ),
    ],
)
def test_known_shapes(row: dict[str, Any], expected: Example) -> None:
    assert read(row) == expected


def test_alpaca_wins_over_a_lone_answer_column() -> None:
    reader = reader_for(["instruction", "input", "output", "answer"])
    assert (reader.shape, reader.columns) == ("instruction/output", ("instruction", "output", "input"))


def test_turns_after_the_last_answer_are_cut() -> None:
    turns = [("human", "u"), ("gpt", "a"), ("human", "never answered")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert read(row) == Example((U("u"), A("a")))


def test_templates_replace_columns() -> None:
    row = {"question": "q", "answer": "so\n#### 3", "level": None}
    completion = "{{ answer | replace('#### ', 'The answer is: ') }}"
    assert read(row, completion=completion) == Example((U("q"), A("so\nThe answer is: 3")))
    both = read(row, prompt="Q: {{ question }}{{ level }}", completion=completion)
    assert both == Example((U("Q: q"), A("so\nThe answer is: 3")))


def test_completion_template_keeps_the_input_column() -> None:
    example = read({"instruction": "i", "input": "x", "output": "o"}, completion="<{{ output }}>")
    assert example == Example((U("i"), A("<o>")), input="x")


@pytest.mark.parametrize(
    ("row", "templates", "message"),
    [
        (
            {"foo": 1, "bar": 2},
            {},
            "columns `foo`, `bar` are of no known shape (prompt/completion, prompt/response, instruction/output, "
            "instruction/response, query/response, question/answer, problem/solution, messages, conversations, text): "
            'say what to read with `prompt:` and `completion:` templates, such as prompt: "{{ COLUMN }}"',
        ),
        (
            {"question": "q", "answer": "a"},
            {"completion": "{{ anwser }}"},
            "the completion template '{{ anwser }}' uses `anwser`, which is not there: found `question`, `answer`; "
            "did you mean `answer`?",
        ),
        (
            {"question": "q", "answer": "a"},
            {"prompt": "{{ zzz }}", "completion": "x"},
            "the prompt template '{{ zzz }}' uses `zzz`, which is not there: found `question`, `answer`",
        ),
        (
            {"question": "q", "answer": "a"},
            {"completion": "{{ answer"},
            "the completion template is not a valid Jinja template: unexpected end of template, expected "
            "'end of print statement'. (line 1): '{{ answer'",
        ),
        (
            {"question": "q", "answer": "a"},
            {"completion": "{{ answer + 1 }}"},
            "the completion template '{{ answer + 1 }}' cannot be rendered: can only concatenate str (not \"int\") to str",
        ),
        (
            {"foo": "q", "answer": "a"},
            {"completion": "{{ answer }}"},
            "a completion template alone needs one of the prompt columns prompt, instruction, query, question, "
            "problem, found `foo`, `answer`: add a `prompt:` template",
        ),
        (
            {"question": "q", "answer": ["a", "b"]},
            {},
            "`answer`[0] must be a message with role and content (or from and value), found 'a'",
        ),
        (
            {"question": {"a": 1}, "answer": "a"},
            {},
            "column `question` must be text, found {'a': 1}: choose what to read with a template, such as \"{{ question[0] }}\"",
        ),
        ({"messages": "hello"}, {}, "column `messages` must be a list of messages, found 'hello'"),
        ({"messages": []}, {}, "column `messages` must be a list of messages, found []"),
        (
            {"messages": [{"role": "usr", "content": "u"}]},
            {},
            "`messages`[0] has the role 'usr', expected one of system, user, human, assistant, gpt, chatgpt, model, "
            "tool, observation",
        ),
        (
            {"messages": [{"role": ["user"], "content": "u"}]},
            {},
            "`messages`[0] has the role ['user'], expected one of system, user, human, assistant, gpt, chatgpt, model, "
            "tool, observation",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            {},
            "`messages`[0] must have a text as its content, found None",
        ),
    ],
)
def test_error_messages(row: dict[str, Any], templates: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as raised:
        read(row, **templates)
    assert str(raised.value) == message


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ rows.append(1) }}"])
def test_templates_are_sandboxed(attack: str) -> None:
    rows: list[int] = []
    with pytest.raises(DataError, match=re.escape("cannot be rendered") + ".*(unsafe|not safe)"):
        compile_template(attack, "the template")({"rows": rows})
    assert rows == []


def test_a_compiled_template_travels_to_another_process() -> None:
    template = compile_template("{{ question | upper }}?", "the prompt template")
    arrived = pickle.loads(pickle.dumps(template))
    assert arrived({"question": "why"}) == "WHY?"
    with pytest.raises(DataError, match="uses `question`"):
        arrived({"query": "why"})
