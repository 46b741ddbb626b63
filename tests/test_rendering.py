"""Templates made to do harm are stopped: they cannot hang, take all memory, or end in a traceback."""

import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from abba_cli import rendering
from abba_cli.errors import DataError
from abba_cli.formats import Example, Message, compile_template
from abba_cli.prompts import load_template
from abba_cli.rendering import within_limits

LOOP = "{% for i in range(99999) %}"
ENDLESS = {
    "loops in loops": LOOP * 5 + "{% endfor %}" * 5,
    "numbers squared": "{% set ns = namespace(x=10**1000) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a power": "{% set n = 10**9 %}{{ 10**n > 1 }}",
    "a long expression": "{{ 1" + "+x" * 100_000 + " }}",
    "filler": "{{ lipsum(n=10**9) }}",
}
HUGE = {
    "a text, when compiled": "{{ 'a' * 10**10 }}",
    "a text, when rendered": "{% set n = 10**10 %}{{ 'a' * n }}",
    "a list": "{% set n = 10**10 %}{{ ([0] * n)|length }}",
    "doubled": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a format string": "{{ '{:9999999999d}'.format(1) }}",
    "padding": "{{ 'a'|center(10**10) }}",
}
BROKEN = {
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "more loops than Python nests": LOOP * 25 + "{% endfor %}" * 25,
    "more conditions than Python nests": "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "another template": "{% include '/etc/passwd' %}",
    "an object's class": "{{ ''.__class__.__mro__ }}",
    "a division": "{{ 1 / (x|length - 1) }}",
    "no arguments": "{{ cycler() }}",
}
CONVERSATION = Example((Message("user", "Hi"), Message("assistant", "Hello")))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)


def in_recipe(source: str, tokenizer: Path) -> None:
    compile_template(source, "the template")({"x": "y"})


def in_tokenizer(source: str, tokenizer: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = f"{{% set x = 'y' %}}{source}"
    load_template("chat", loaded).segments(CONVERSATION)


@pytest.mark.parametrize("use", [in_recipe, in_tokenizer])
@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        pytest.param(source, r"template.* computed for more than 0.3 seconds .* use another", id=name)
        for name, source in ENDLESS.items()
    ]
    + [pytest.param(source, r"template.* more than 512 MB of memory .* use another", id=name) for name, source in HUGE.items()]
    + [
        pytest.param(source, r"(cannot be rendered|not a valid Jinja|refuses a conv)", id=name) for name, source in BROKEN.items()
    ],
)
def test_harm(source: str, wanted: str, use: Callable[[str, Path], None], tiny_llama: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(DataError, match=wanted) as caught:
        use(source, tiny_llama)
    assert len(str(caught.value)) < 500
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_which_template_it_was(tiny_llama: Path) -> None:
    with pytest.raises(DataError, match=f"^the chat template of {tiny_llama} computed for more"):
        in_tokenizer(ENDLESS["loops in loops"], tiny_llama)


def test_long_text() -> None:
    render = compile_template("{{ 'ab' * n }}", "the template")
    assert render({"n": 10_000_000}) == "ab" * 10_000_000
    with pytest.raises(DataError, match="wrote 20,000,002 characters, more than 20,000,000"):
        render({"n": 10_000_001})


def test_code_that_catches_everything_is_stopped_all_the_same() -> None:
    def stubborn() -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    with pytest.raises(DataError, match="computed for more than"):
        within_limits("it", stubborn)


def test_a_limit_that_was_there_is_kept() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    lower = 2**45 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        assert within_limits("it", lambda: resource.getrlimit(resource.RLIMIT_AS)[0]) <= lower
        assert resource.getrlimit(resource.RLIMIT_AS) == (lower, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_in_another_thread() -> None:
    """Signals reach the main thread only: the memory is limited there, too, and nothing else goes wrong."""
    made: list[object] = []

    def work() -> None:
        made.append(within_limits("it", lambda: "text"))
        try:
            within_limits("it", lambda: "a" * 10**11)
        except DataError as error:
            made.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert made[0] == "text"
    assert "more than 512 MB of memory" in str(made[1])
