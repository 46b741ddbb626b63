"""Batched generation against transformers' own, one prompt at a time; stop texts, lengths, draws, and memory that runs out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_cli.errors import ModelError
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Completion, Request, answer_batches, plan_batches, within_positions
from abba_cli.prompts import load_template
from abba_cli.speakers import Speaker

SENTENCE = "The quick brown fox jumps over the lazy dog while seven wizards brew a potion of red and blue"
TEXTS = [" ".join(SENTENCE.split()[: 2 + 3 * (number % 6)]) for number in range(11)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def speaker(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    folder = write_model(tmp_path_factory.mktemp("models") / request.param, tiny_llama, request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    # What a checkpoint brings along must not touch the answers.
    model.generation_config.update(do_sample=True, temperature=0.3, repetition_penalty=1.8, max_new_tokens=3)
    return Speaker(request.param, model, load_template("none", tokenizer))


def requests(speaker: Speaker, tokens: int = 12, stop: tuple[str, ...] = ()) -> list[Request]:
    ids = [tuple(speaker.template.tokenizer(text)["input_ids"]) for text in TEXTS]
    return [Request(number, one, stop, tokens) for number, one in enumerate(ids)]


def answered(speaker: Speaker, asked: list[Request], size: int, decoding: Decoding | None = None) -> dict[int, Completion]:
    batches = plan_batches(asked, size)
    return {one.number: one for batch in answer_batches(speaker, batches, decoding or Decoding()) for one in batch}


@torch.no_grad()
def one_by_one(speaker: Speaker, tokens: int) -> list[str]:
    """The likeliest token each time, by whole forward passes without a cache."""
    texts = []
    for request in requests(speaker):
        ids = list(request.ids)
        for _ in range(tokens):
            ids.append(int(speaker.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in speaker.template.stop_token_ids:
                break
        kept = [token for token in ids[len(request.ids) :] if token not in speaker.template.stop_token_ids]
        texts.append(str(speaker.template.tokenizer.decode(kept, skip_special_tokens=True)))
    return texts


@pytest.mark.parametrize("size", [1, 4, 64])
def test_batches_answer_as_single_prompts_do(speaker: Speaker, size: int) -> None:
    found = answered(speaker, requests(speaker), size)
    assert [found[number].text for number in range(len(TEXTS))] == one_by_one(speaker, 12)
    assert speaker.model.generation_config.repetition_penalty == 1.8


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(speaker: Speaker) -> None:
    whole = one_by_one(speaker, 40)
    stops = tuple({text[7:9] for text in whole})
    found = answered(speaker, requests(speaker, 40, stops), 4)
    for number, text in enumerate(whole):
        cut = min([text.find(stop) for stop in stops if stop in text], default=len(text))
        assert found[number].text == text[:cut]
        assert found[number].complete
        assert found[number].tokens < 40


def test_rows_that_have_ended_leave_the_batch(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = one_by_one(speaker, 40)
    # Every other row ends early; the others go on alone, from their keys and values.
    stops = tuple({text[3:6] for text in whole[::2]} - {""})
    sizes = short_of_memory(speaker, 64, monkeypatch)
    found = answered(speaker, requests(speaker, 40, stops), 64)
    assert sizes[0] == len(TEXTS)
    assert len(sizes) > 1
    assert sizes[1] <= len(TEXTS) / 2
    for number, text in enumerate(whole):
        cut = min([text.find(stop) for stop in stops if stop in text], default=len(text))
        assert found[number].text == text[:cut]


def test_the_tokens_of_a_batch_are_told_as_they_come(speaker: Speaker) -> None:
    told: list[tuple[int, int]] = []
    batches = plan_batches(requests(speaker, 20)[:3], 4)
    list(answer_batches(speaker, batches, Decoding(), on_tokens=lambda tokens, most: told.append((tokens, most))))
    assert told == [(8, 20), (16, 20)]


def test_the_plan_puts_like_lengths_together_longest_first(speaker: Speaker) -> None:
    asked = requests(speaker)
    batches = plan_batches(asked, 4)
    lengths = [len(one.ids) for batch in batches for one in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(one.number for batch in batches for one in batch) == list(range(len(asked)))
    mixed = plan_batches([*asked, *requests(speaker, 5), *requests(speaker, 5, ("x",))], 64)
    assert [len(batch) for batch in mixed] == [11, 11, 11]


def test_draws_depend_on_the_seed_alone(speaker: Speaker) -> None:
    found = [answered(speaker, requests(speaker), 4, Decoding(1.0, seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_answers_shrink_to_the_positions_of_the_model() -> None:
    request = Request(0, tuple(range(500)), (), 32)
    assert within_positions(request, None) == request
    shorter = within_positions(request, 512)
    assert shorter is not None
    assert shorter.max_tokens == 12
    assert within_positions(request, 500) is None


def short_of_memory(speaker: Speaker, room: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has the model raise what torch raises without memory, for more than `room` rows; returns the sizes it is asked for."""
    generate: Any = speaker.model.generate
    sizes: list[int] = []

    def limited(**keywords: Any) -> Any:
        sizes.append(len(keywords["input_ids"]))
        if sizes[-1] > room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ...")
        return generate(**keywords)

    monkeypatch.setattr(speaker.model, "generate", limited)
    return sizes


def test_batches_become_smaller_where_memory_runs_out(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = short_of_memory(speaker, 3, monkeypatch)
    said: list[int] = []
    batches = answer_batches(speaker, plan_batches(requests(speaker), 8), Decoding(), said.append)
    found = {one.number: one.text for batch in batches for one in batch}
    assert said == [4, 2]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert [found[number] for number in range(len(TEXTS))] == one_by_one(speaker, 12)


def test_memory_for_not_even_one_prompt_is_an_error(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(speaker, 0, monkeypatch)
    asked = requests(speaker)
    longest = max(len(one.ids) for one in asked)
    with pytest.raises(ModelError, match=f"out of memory with one prompt of {longest} tokens at a time; load the model with "):
        list(answer_batches(speaker, plan_batches(asked, 4), Decoding()))
