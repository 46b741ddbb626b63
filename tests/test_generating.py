"""`abba generate` and `abba chat`: real processes, pipes and terminals, against PEFT's and transformers' own answers."""

import io
import os
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_cli import train
from abba_cli.cli import main
from abba_cli.errors import AbbaError, DataError, ModelError
from abba_cli.formats import Message
from abba_cli.generating import Sampling, _Stream, answer, prompt_ids, within_positions
from abba_cli.merging import merge
from abba_cli.speakers import Source, Speaker, load_for_generation
from abba_cli.ui.chat import SideBySide, Streamed

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
PROMPT = "What is 2 + 3?"
TOKENS = 12
Abba = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tiny_llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of the tiny model under out/, the alpaca one older than the one with the chat template."""
    folder = tmp_path_factory.mktemp("place")
    for name, template in (("older", "alpaca"), ("newest", "chat")):
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            f"model: {{name: {tiny_llama}, dtype: float32}}\n"
            "adapter: {r1: 4, r2: 3, alpha: 8}\n"
            f"data: {{train: {rows}, template: {template}, max_length_tokens: 64}}\n"
            "training: {max_steps: 4, batch_size: 4, learning_rate: 5e-2}\n"
            "checkpoints: {every_steps: 2, keep: 2}\n"
            f"output: {folder / 'out' / name}\n"
        )
        train(recipe)
    os.utime(folder / "out" / "older" / "provenance.json", (1, 1))
    return folder


@pytest.fixture
def abba(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path) -> Abba:
    """Runs the command in this process, in `place`; returns exit code, stdout and stderr."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["abba", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def chat_text(folder: Path, *messages: tuple[str, str]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def reference(model: Any, folder: Path, text: str, tokens: int = TOKENS) -> str:
    """The answer by the libraries alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def tuned_model(folder: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def process(place: Path, *arguments: object, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "abba_cli", *map(str, arguments)]
    source = subprocess.DEVNULL if stdin is None else None
    return subprocess.run(command, cwd=place, env=ENVIRONMENT, input=stdin, stdin=source, capture_output=True, text=True)


# --- pipes -------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_text_and_nothing_else(place: Path) -> None:
    newest = place / "out" / "newest"
    done = process(place, "generate", "--max-tokens", TOKENS, stdin=f"{PROMPT}\n")
    assert done.returncode == 0, done.stderr
    expected = reference(tuned_model(newest), newest, chat_text(newest, ("user", PROMPT)))
    assert expected.strip()
    assert done.stdout == f"{expected}\n"
    assert done.stderr == "abba: this is out/newest, the newest finished run there\n"


def test_compare_into_a_pipe_labels_both(place: Path, tiny_llama: Path) -> None:
    newest = place / "out" / "newest"
    done = process(place, "generate", PROMPT, "--adapter", "out/newest", "--compare", "--max-tokens", TOKENS)
    assert done.returncode == 0, done.stderr
    text = chat_text(newest, ("user", PROMPT))
    base, tuned = reference(base_model(tiny_llama), newest, text), reference(tuned_model(newest), newest, text)
    assert base != tuned
    assert done.stdout == f"== {tiny_llama}, without the adapter ==\n{base}\n== out/newest ==\n{tuned}\n"
    assert done.stderr == ""


def test_chat_through_pipes_keeps_the_conversation(place: Path) -> None:
    newest = place / "out" / "newest"
    lines = "What is 1 + 1?\n\nAnd 2 + 2?\n/reset\n/help\nAnd 2 + 2?\n"
    done = process(place, "chat", "--adapter", "out/newest", "--max-tokens", 5, stdin=lines)
    assert done.returncode == 0, done.stderr
    model, first = tuned_model(newest), ("user", "What is 1 + 1?")
    said = reference(model, newest, chat_text(newest, first), 5)
    second = reference(model, newest, chat_text(newest, first, ("assistant", said), ("user", "And 2 + 2?")), 5)
    alone = reference(model, newest, chat_text(newest, ("user", "And 2 + 2?")), 5)
    assert done.stdout == f"{said}\n{second}\n{alone}\n"
    assert done.stderr == "starting over\nthere is no /help; there are /reset and /exit\n"


# --- terminals ---------------------------------------------------------------------------------------------------


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, place: Path, *arguments: object, columns: int = 100, rows: int = 30) -> None:
        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (rows, columns))
        # Makes the terminal the controlling one, so that Ctrl-C typed into it is a signal.
        # A shell that started the tests in the background has it ignored, which is inherited.
        code = (
            "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, sys.executable, "-m", "abba_cli", *map(str, arguments)]
        environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            command, cwd=place, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.raw = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Read until the pattern appears in what has been drawn since the last call; returns that, without colours."""
        seen, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, plain(seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {plain(self.raw)!r}"
            chunk = self._read(1.0)
            assert chunk is not None, f"ended without {pattern!r}: {plain(self.raw)!r}"
            seen += chunk
        return plain(seen)

    def rest(self) -> str:
        seen = ""
        while (chunk := self._read(60.0)) is not None:
            seen += chunk
        return plain(seen)

    def _read(self, seconds: float) -> str | None:
        if not select.select([self.master], [], [], seconds)[0]:
            return ""
        try:
            chunk = os.read(self.master, 65536).decode(errors="replace")
        except OSError:  # Linux: the other end is closed
            return None
        self.raw += chunk
        return chunk or None


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.fixture
def terminal(place: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: object, **size: int) -> Terminal:
        opened.append(Terminal(place, *arguments, **size))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_a_conversation_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("chat", "--adapter", "out/newest", "--max-tokens", "3000")
    assert "out/newest, template chat" in screen.until("> $")
    screen.type(f"{PROMPT}\n")
    screen.until(r"\n.*\S+ \S+ ")  # the answer has begun, and would go on for two thousand tokens
    screen.type("\x03")
    stopped = screen.until("> $")
    assert "stopped" in stopped
    assert "tokens/s" not in stopped
    assert screen.process.poll() is None
    screen.type("/reset\n")
    assert "starting over" in screen.until("> $")
    screen.type("\x04")
    screen.rest()
    assert screen.process.wait(60) == 0


def test_ctrl_c_at_the_prompt_ends(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("chat", "--adapter", "out/newest", "--max-tokens", "4")
    screen.until("> $")
    screen.type(f"{PROMPT}\n")
    assert re.search(r"4 tokens in .* tokens/s", screen.until("tokens/s[\\s\\S]*> $"))
    # Python's `input` shows the prompt a moment before it waits for keys, and misses a signal that comes in between.
    time.sleep(1)
    screen.type("\x03")
    assert "Traceback" not in screen.rest()
    assert screen.process.wait(60) == 130


@pytest.mark.parametrize(("columns", "together"), [(100, True), (60, False)])
def test_compare_on_a_terminal(terminal: Callable[..., Terminal], columns: int, together: bool) -> None:
    screen = terminal("generate", PROMPT, "--adapter", "out/newest", "--compare", "--max-tokens", "30", columns=columns)
    drawn = screen.rest()
    assert screen.process.wait(60) == 0, drawn
    headings = [line.strip() for line in drawn.splitlines() if line.rstrip().endswith("out/newest")]
    # Printed whole at the end; beside the base's heading, or on a line of its own.
    assert (headings[-1] != "out/newest") == together, drawn
    assert len(re.findall(r"tokens/s", drawn)) == 2


# --- what is loaded ----------------------------------------------------------------------------------------------


def ask(source: Source, *messages: tuple[str, str], compare: bool = False, **sampling: Any) -> str:
    speaker = load_for_generation(source, compare)[-1]
    settings = Sampling(**{"max_tokens": TOKENS, **sampling})
    return answer(speaker, [Message(role, content) for role, content in messages], settings).text


def test_the_runs_own_template_is_taken(place: Path) -> None:
    older = place / "out" / "older"
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{PROMPT}\n\n### Response:"
    )
    expected = reference(tuned_model(older), older, text)
    assert ask(Source(adapter=str(older)), ("user", PROMPT)) == expected
    assert ask(Source(adapter=str(older), template="none"), ("user", PROMPT)) != expected
    # A checkpoint knows its run's template and tokenizer.
    checkpoint = older / "checkpoints" / "checkpoint-2"
    [speaker] = load_for_generation(Source(adapter=str(checkpoint)))
    assert speaker.template.name == "alpaca"
    assert ask(Source(adapter=str(checkpoint)), ("user", PROMPT)) == reference(tuned_model(checkpoint), older, text)


def test_an_adapter_without_its_run_takes_the_tokenizers_template(place: Path, tmp_path: Path) -> None:
    newest = place / "out" / "newest"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(newest / name, tmp_path)
    expected = reference(tuned_model(newest), newest, chat_text(newest, ("user", PROMPT)))
    [speaker] = load_for_generation(Source(adapter=str(tmp_path), dtype="float32"))
    assert answer(speaker, [Message("user", PROMPT)], Sampling(TOKENS)).text == expected


def test_a_system_message(place: Path) -> None:
    newest = place / "out" / "newest"
    messages = (("system", "Answer in French."), ("user", PROMPT))
    expected = reference(tuned_model(newest), newest, chat_text(newest, *messages))
    assert ask(Source(adapter=str(newest)), *messages) == expected


def test_a_merged_model_keeps_the_runs_template(place: Path, tmp_path: Path) -> None:
    merged = merge([place / "out" / "older"], output=tmp_path / "merged", verify=False)
    assert merged.template == "alpaca"
    [speaker] = load_for_generation(Source(model=str(merged.path)))
    assert speaker.template.name == "alpaca"
    [speaker] = load_for_generation(Source(model=str(merged.path), template="chat"))
    assert speaker.template.name == "chat"


def test_a_merged_model_beside_its_base(place: Path, tiny_llama: Path, tmp_path: Path) -> None:
    newest = place / "out" / "newest"
    merged = tuned_model(newest).merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(newest).save_pretrained(tmp_path)
    base, tuned = load_for_generation(Source(model=str(tmp_path), base=str(tiny_llama)), compare=True)
    assert (base.label, tuned.label) == (str(tiny_llama), str(tmp_path))
    # Each in the dtype it is stored in.
    assert (base.model.dtype, tuned.model.dtype) == (torch.float32, torch.bfloat16)
    text = chat_text(newest, ("user", PROMPT))
    asked = [Message("user", PROMPT)]
    assert answer(base, asked, Sampling(TOKENS)).text == reference(base_model(tiny_llama), newest, text)
    assert answer(tuned, asked, Sampling(TOKENS)).text == reference(merged, newest, text)
    [other] = load_for_generation(Source(model=str(tmp_path), dtype="float32"))
    assert other.model.dtype == torch.float32


def test_quantised(place: Path) -> None:
    [speaker] = load_for_generation(Source(adapter=str(place / "out" / "newest"), quantization="nf4"))
    kinds = {type(module).__name__ for module in speaker.model.modules()}
    assert "Linear4bit" in kinds
    assert answer(speaker, [Message("user", PROMPT)], Sampling(3)).tokens <= 3


def test_draws(place: Path) -> None:
    [speaker] = load_for_generation(Source(adapter=str(place / "out" / "newest")))

    def draw(**settings: Any) -> str:
        return answer(speaker, [Message("user", PROMPT)], Sampling(**{"max_tokens": TOKENS, "temperature": 3.0, **settings})).text

    greedy = draw(temperature=0.0)
    assert draw(seed=1) == draw(seed=1)
    assert len({greedy, draw(seed=1), draw(seed=2), draw(), draw()}) == 5
    assert draw(seed=1, top_p=1e-9) == greedy  # the likeliest token alone has that much


def test_pieces_add_up_to_the_answer(place: Path) -> None:
    [speaker] = load_for_generation(Source(adapter=str(place / "out" / "newest")))
    pieces: list[str] = []
    said = answer(speaker, [Message("user", PROMPT)], Sampling(20), pieces.append)
    assert "".join(pieces) == said.text
    assert len(pieces) > 5
    assert (said.tokens, said.seconds > 0) == (20, True)


def test_a_character_is_handed_on_whole(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "  héllo 🦜\n\n    if x:\n🏴‍☠️ 漢字 ."
    pieces: list[str] = []
    stream = _Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.split())
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 8


# --- the model's positions ---------------------------------------------------------------------------------------


@pytest.fixture
def narrow(place: Path) -> Speaker:
    [speaker] = load_for_generation(Source(adapter=str(place / "out" / "newest")))
    speaker.model.config.max_position_embeddings = 120
    return speaker


def test_an_answer_ends_with_the_positions(narrow: Speaker) -> None:
    asked = [Message("user", "word " * 80)]
    room = 120 - len(prompt_ids(narrow, asked))
    assert 0 < room < 40
    assert answer(narrow, asked, Sampling(500)).tokens == room


def test_a_prompt_longer_than_the_positions(narrow: Speaker) -> None:
    asked = [Message("user", "word " * 200)]
    with pytest.raises(
        DataError, match=rf"the prompt has {len(prompt_ids(narrow, asked))} tokens, .* positions for 120.*shorten"
    ):
        answer(narrow, asked, Sampling(5))


def test_the_oldest_turns_are_dropped(narrow: Speaker) -> None:
    system, last = Message("system", "Be brief."), Message("user", "last")
    turns = [Message(role, f"turn {i} {'word ' * 10}") for i in range(6) for role in ("user", "assistant")]
    kept = within_positions(narrow, [system, *turns, last], Sampling(20))
    assert kept[0] == system
    assert kept[1].role == "user"
    assert kept[1:] == [*turns, last][-len(kept) + 1 :]
    assert len(prompt_ids(narrow, kept)) <= 100 < len(prompt_ids(narrow, [system, *turns[-len(kept) :], last]))
    assert within_positions(narrow, kept, Sampling(20)) == kept
    alone = within_positions(narrow, [*turns, Message("user", "word " * 300)], Sampling(20))
    assert len(alone) == 1


# --- drawing -----------------------------------------------------------------------------------------------------


def console(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, height=8, color_system=None, legacy_windows=False), file


def test_words_are_wrapped_on_a_terminal() -> None:
    drawn, file = console(20)
    stream = Streamed(drawn)
    for piece in (
        "The qu",
        "ick brown",
        " fox jumps",
        " over\n    the",
        " lazy dog",
        " of twenty-three-letters-and-more.",
        " Ok",
    ):
        stream(piece)
    stream.close()
    lines = file.getvalue().split("\n")
    assert [line.rstrip() for line in lines] == [
        "The quick brown fox",
        "jumps over",
        "    the lazy dog of",
        "twenty-three-letters-and-more.",
        "Ok",
        "",
    ]


def test_a_models_escape_sequences_are_no_commands() -> None:
    drawn, file = console(60)
    stream = Streamed(drawn)
    stream("clear \x1b[2J and\x07 title \x9d\ttab")
    stream.close()
    assert file.getvalue() == "clear \ufffd[2J and\ufffd title \ufffd\ttab\n"
    piped = io.StringIO()
    stream = Streamed(Console(file=piped))
    stream("clear \x1b[2J")
    stream.close()
    assert piped.getvalue() == "clear \x1b[2J\n"


def test_columns_show_the_end_while_they_grow_and_everything_at_last() -> None:
    drawn, file = console(80)
    with SideBySide(drawn, ["base", "tuned"]) as columns:
        columns.add(0, "\n".join(f"left {i}" for i in range(30)))
        columns.add(1, "right [red]\x1b[2J")
        window = io.StringIO()
        Console(file=window, width=80, height=8).print(columns._window())
        assert "left 29" in window.getvalue()
        assert "left 0\n" not in window.getvalue()
        assert len(window.getvalue().splitlines()) <= 8
        file.truncate(0)
    final = file.getvalue()
    assert all(f"left {i} " in final for i in range(30))
    assert "right [red]\ufffd[2J" in final


# --- bad input ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], int, str]] = {
    "empty prompt": (["generate", "  "], 1, "the prompt is empty; give it as an argument, or on standard input"),
    "nothing on standard input": (["generate", "-"], 1, "the prompt is empty"),
    "unknown template": (
        ["generate", "hi", "--template", "vicuna"],
        1,
        "--template vicuna: expected none, alpaca, chat or the path of a Jinja file",
    ),
    "temperature below 0": (["generate", "hi", "--temperature", "-1"], 2, "Invalid value for '--temperature'"),
    "top-p above 1": (["chat", "--temperature", "1", "--top-p", "1.5"], 2, "Invalid value for '--top-p'"),
    "top-p without draws": (["generate", "hi", "--top-p", "0.5"], 2, "--top-p needs a --temperature above 0"),
    "no tokens": (["generate", "hi", "--max-tokens", "0"], 2, "Invalid value for '--max-tokens'"),
    "unknown quantisation": (["generate", "hi", "--quantization", "nf3"], 2, "Invalid value for '--quantization'.*nf4"),
    "adapter and model": (["chat", "--adapter", "out/newest", "--model", "x"], 2, "one of --adapter and --model, not both"),
    "a base beside a model": (
        ["generate", "hi", "--model", "x", "--base", "y"],
        2,
        "--base goes with an adapter, or with --model",
    ),
    "a model without its base": (
        ["generate", "hi", "--model", "x", "--compare"],
        1,
        "to compare x with its base, name that with",
    ),
    "an adapter as model": (
        ["generate", "hi", "--model", "out/newest"],
        1,
        "holds an adapter, not a model; give it with --adapter",
    ),
    "a model as adapter": (["generate", "hi", "--adapter", "MODEL"], 1, "there is no adapter in"),
    "no such adapter": (["chat", "--adapter", "./nowhere"], 1, "there is no directory ./nowhere"),
    "another base": (["generate", "hi", "--base", "me/model"], 1, "was trained on .*, not on me/model; .* --force"),
    "no such model": (["generate", "hi", "--model", "/no/such/model"], 1, "there is no directory /no/such/model"),
    "a model on the hub": (["generate", "hi", "--model", "me/model"], 1, "hub cannot be reached|not in the local cache"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(abba: Abba, tiny_llama: Path, case: str) -> None:
    arguments, code, wanted = BAD[case]
    got, out, err = abba(*(str(tiny_llama) if one == "MODEL" else one for one in arguments))
    assert got == code, err
    assert re.search(wanted, " ".join(err.replace("│", " ").split())), err
    assert "Traceback" not in err
    assert out == ""


def test_no_run_to_talk_to(abba: Abba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"there is no folder out/ here; train with `abba train RECIPE`, or name one with --adapter"
    ):
        load_for_generation(Source())
    (tmp_path / "out" / "half").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"there is no adapter in out: .* found half; train with"):
        load_for_generation(Source())


def test_a_template_that_is_gone(place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(place / "out" / "newest", moved)
    recipe = moved / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("template: chat", f"template: {tmp_path / 'own.jinja'}"))
    with pytest.raises(AbbaError, match=r"trained with the template .*own.jinja, which is gone; --template: expected none"):
        load_for_generation(Source(adapter=str(moved)))


def test_no_chat_template(place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(place / "out" / "newest", moved)
    (moved / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="the tokenizer has no chat template; give --template alpaca"):
        load_for_generation(Source(adapter=str(moved)))


def test_the_base_of_another_model(place: Path, tiny_llama: Path, tmp_path: Path) -> None:
    small = base_model(tiny_llama)
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"embeddings for 100 tokens, the tokenizer of .* is it the base of another model"):
        load_for_generation(Source(model=str(tiny_llama), base=str(tmp_path)), compare=True)
