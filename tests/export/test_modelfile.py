"""The Modelfile: what Ollama would render from it is what the model was trained on."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from abba_cli.errors import RunError
from abba_cli.export.modelfile import ModelfileReport, write_modelfile
from abba_cli.formats import Example, Message
from abba_cli.prompts import load_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": CHATML,
    "default-system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML,
    "thinking": CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"),
    # As in google/gemma-2-2b-it and meta-llama/Llama-2-7b-chat-hf and Meta-Llama-3-8B-Instruct, in short.
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "llama2": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in (messages[1:] if system else messages) %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
        "('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
LAYOUTS = {
    "braces": "{% raw %}{{ x }} }}{% endraw %} Q: {{ prompt }}\nA:{{ ' ' }}",
    "with-system": "{% if system %}[{{ system }}]{% endif %}Q: {{ prompt }} A:",
}
SAID = [
    Message("user", 'What is "2 + 2" <exactly>?'),
    Message("assistant", "Four:\n\n{{ 4 }}"),
    Message("user", "And 3?"),
    Message("assistant", "- 5"),
    Message("user", "Danke schön!"),
]
SYSTEM = Message("system", "Speak\nplainly.")


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, which adds no beginning-of-sequence token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<end_of_turn>", "<|eot_id|>"]})
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same, but it adds one, as Llama's and Gemma's do."""
    adding = copy.deepcopy(tokenizer)
    single = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    adding._tokenizer.post_processor = single  # type: ignore[attr-defined]
    assert adding("a")["input_ids"][0] == tokenizer.bos_token_id
    return adding


def modelfile(
    name: str, tokenizer: PreTrainedTokenizerBase, folder: Path, adds_bos: bool | None = None
) -> tuple[ModelfileReport, str]:
    """Write a Modelfile for a template by its name here, and read it."""
    tokenizer = copy.deepcopy(tokenizer)
    if name in CHAT_TEMPLATES:
        tokenizer.chat_template = CHAT_TEMPLATES[name]
    if name in LAYOUTS:
        (folder / f"{name}.jinja").write_text(LAYOUTS[name])
    named = "chat" if name in CHAT_TEMPLATES else str(folder / f"{name}.jinja") if name in LAYOUTS else name
    report = write_modelfile(folder, "model.gguf", load_template(named, tokenizer), adds_bos)
    text = report.file.read_text()
    assert text.startswith("FROM ./model.gguf\n")
    return report, text


def quoted(text: str, keyword: str) -> str | None:
    """What a Modelfile gives in three quotes after a keyword."""
    found = re.search(rf'^{keyword} """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    return found[1] if found else None


def ollama(text: str, messages: Sequence[Message]) -> str:
    """What Ollama sends to the model, as `Execute` does it.

    https://github.com/ollama/ollama/blob/aac17d5f158d5ba6e3b22dae9752f19d6f002cdc/template/template.go
    """
    template, default = quoted(text, "TEMPLATE"), quoted(text, "SYSTEM")
    assert template is not None
    if default is not None and messages[0].role != "system":
        messages = [Message("system", default), *messages]
    tree = parse(re.split(r"\{\{ (.*?) \}\}", template))
    if ".Messages" in template:
        return execute(tree, {"Messages": [{"Role": one.role, "Content": one.content} for one in messages]})
    out, turn = "", {"System": "", "Prompt": "", "Response": ""}
    for one in messages:
        if (one.role == "system" and turn["Prompt"]) or (one.role == "user" and turn["Response"]):
            out, turn = out + execute(tree, turn), {"System": "", "Prompt": "", "Response": ""}
        turn[{"system": "System", "user": "Prompt", "assistant": "Response"}[one.role]] = one.content
    # The last turn ends where the response begins.
    return out + execute(tree, turn | {"Response": "\0"}).partition("\0")[0]


def parse(parts: list[str]) -> list[Any]:
    """Go's template language as far as the Modelfile needs it: a list of texts, actions, and (action, list, list)."""
    nodes: list[Any] = []
    while parts:
        nodes.append(parts.pop(0))
        if not parts:
            break
        action = parts.pop(0)
        if action == "end" or action.startswith("else"):
            return [*nodes, ("stop", action)]
        if not action.startswith(("if ", "range ")):
            nodes.append((action,))
            continue
        nodes.append(branch(action, parts))
    return nodes


def branch(action: str, parts: list[str]) -> tuple[str, list[Any], list[Any]]:
    *then, (_, stop) = parse(parts)
    if stop == "end":
        return (action, then, [])
    if stop == "else":
        *other, (_, last) = parse(parts)
        assert last == "end"
        return (action, then, other)
    return (action, then, [branch(stop.removeprefix("else "), parts)])


def execute(nodes: list[Any], root: dict[str, Any], dot: dict[str, Any] | None = None, i: int = 0) -> str:
    out, dot = "", root if dot is None else dot
    for node in nodes:
        if isinstance(node, str):
            out += node
        elif len(node) == 1:
            out += node[0][1:-1] if node[0].startswith('"') else dot[node[0].removeprefix(".")]
        elif node[0] == "range $i, $_ := .Messages":
            out += "".join(execute(node[1], root, one, index) for index, one in enumerate(root["Messages"]))
        else:
            out += execute(node[1] if holds(node[0].removeprefix("if "), root, dot, i) else node[2], root, dot, i)
    return out


def holds(condition: str, root: dict[str, Any], dot: dict[str, Any], i: int) -> bool:
    if condition.startswith("eq .Role "):
        return bool(dot["Role"] == condition.split('"')[1])
    fixed = {"eq $i 0": i == 0, "gt $i 1": i > 1, "le $i 1": i <= 1}
    if condition in fixed:
        return fixed[condition]
    if condition == "eq (len (slice $.Messages $i)) 1":
        return len(root["Messages"][i:]) == 1
    assert condition == ".System", condition
    return bool(root["System"])


@pytest.mark.parametrize("bos", ["plain", "added"])
@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, *LAYOUTS, "alpaca", "none"])
def test_ollama_renders_what_training_saw(name: str, bos: str, plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer = with_bos(plain) if bos == "added" else plain
    report, text = modelfile(name, tokenizer, tmp_path)
    assert report.untemplated is None
    assert report.takes_system == (name not in ("gemma", "braces"))
    template = CHAT_TEMPLATES.get(name)
    for length in (1, 3, 5):
        for system in [[], [SYSTEM]] if report.takes_system else [[]]:
            conversation = [*system, *SAID[:length]]
            if template:  # transformers' own word
                dicts = [{"role": one.role, "content": one.content} for one in conversation]
                expected = tokenizer.apply_chat_template(
                    dicts, chat_template=template, tokenize=False, add_generation_prompt=True
                )
                expected = expected.removeprefix("<s>") if bos == "added" else expected
            else:
                chosen = str(tmp_path / f"{name}.jinja") if name in LAYOUTS else name
                expected = load_template(chosen, tokenizer).prompt_text(Example(tuple(conversation)))
            assert ollama(text, conversation) == expected


def test_the_simple_form_where_all_turns_are_alike(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _, text = modelfile("chatml", plain, tmp_path)
    assert quoted(text, "TEMPLATE") == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}<|im_start|>user\n{{ end }}"
        "{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    )


def test_the_templates_own_system_message(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    report, text = modelfile("default-system", plain, tmp_path)
    assert report.system == quoted(text, "SYSTEM") == "Be good."
    report, text = modelfile("chatml", plain, tmp_path)
    assert report.system is quoted(text, "SYSTEM") is None


def test_a_template_that_refuses_system_messages_gets_none(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _, text = modelfile("gemma", plain, tmp_path)
    assert "system" not in text.lower()
    assert ollama(text, [SYSTEM, *SAID[:3]]) == ollama(text, SAID[:3])


@pytest.mark.parametrize(("name", "starts"), [("llama3", 1), ("llama2", 2), ("chatml", 0)])
def test_the_beginning_of_sequence_token_comes_once(
    name: str, starts: int, plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """However the tokenizer, the template and llama.cpp share the work: `starts` are those that the template has of its own."""
    for tokenizer in (plain, with_bos(plain)):
        wanted = starts or int(tokenizer is not plain)
        for adds in (True, False):
            _, text = modelfile(name, tokenizer, tmp_path, adds)
            rendered = ollama(text, SAID[:3])
            assert rendered.startswith("<s>") == (not adds and wanted > 0)
            # What llama.cpp adds is left to it where it alone adds one.
            assert rendered.count("<s>") == wanted - (adds and wanted > 0)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("Turn {{ turn }}: {{ prompt }} A:", "a conversation of user, assistant, user, assistant, user comes out differently"),
        ("{{ prompt | upper }} A:", "what is said is rewritten, repeated or moved"),
        ("{{ prompt }} {{ prompt }} A:", "what is said is rewritten, repeated or moved"),
        ("{{ prompt }} A{{ messages | length }}:", "a turn is written in another way when others follow or precede it"),
        ("{% if system %}{{ system }} {{ prompt }}!{% else %}{{ prompt }}{% endif %}", "in another way after a system message"),
        ('{{ prompt }} """A""":', 'it contains """'),
    ],
)
def test_a_template_that_ollama_cannot_render_is_left_out_and_said_so(
    layout: str, why: str, plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(layout)
    report, text = modelfile(str(file), plain, tmp_path)
    assert report.untemplated is not None
    assert why in report.untemplated
    assert str(file) in report.untemplated
    assert text == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_every_stop_token_has_its_text(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    report, text = modelfile("llama3", plain, tmp_path)
    assert report.stops == ("<|eot_id|>", "<|im_end|>")
    assert text.endswith('PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|im_end|>"\n')


def test_a_folder_that_is_not_there(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write to"):
        write_modelfile(tmp_path / "nowhere", "model.gguf", load_template("none", plain))
