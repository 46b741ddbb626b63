"""Tokenising with masks, padding, packing, and which real models keep packed documents apart."""

import random
from typing import Any

import pytest
import torch
from test_prompts import smollm2
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from abba_cli.batches import (
    PackedBatches,
    PaddedBatches,
    grouped_by_length,
    pack,
    require_separation,
    separates_documents,
    tokenize,
)
from abba_cli.errors import ModelError
from abba_cli.prompts import Segment

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str, attention: str, **extra: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY, **extra)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def bpe(bos: bool, merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A character-level BPE over whole texts, without pre-tokenisation, like Llama 2's; `_` stands for a space."""
    characters = sorted(set("_abcdefghijklmnopqrstuvwxyzQAN:?!."))
    pieces = ["<unk>", "<s>", "</s>", *characters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "_")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def marked(row: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    pairs = zip(row.input_ids, row.answers, strict=True)
    return [tokenizer.convert_ids_to_tokens(token) for token, answer in pairs if answer]


def test_joint_tokenisation_marks_only_the_answer() -> None:
    tokenizer = bpe(bos=True, merges=[("h", "i")])
    [row] = tokenize([[Segment("hi:", False), Segment("hi!</s>", True)]], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["<s>", "hi", ":", "hi", "!", "</s>"]
    assert marked(row, tokenizer) == ["hi", "!", "</s>"]


def test_a_token_across_the_border_is_split_as_at_inference() -> None:
    tokenizer = bpe(bos=True, merges=[(":", "a")])
    assert tokenizer.tokenize("q:a") == ["q", ":a"]
    [row] = tokenize([[Segment("q:", False), Segment("ab</s>", True)]], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["<s>", "q", ":", "a", "b", "</s>"]
    assert marked(row, tokenizer) == ["a", "b", "</s>"]


def test_a_token_across_an_earlier_border_is_split_too() -> None:
    tokenizer = bpe(bos=False, merges=[(":", "a")])
    segments = [Segment("q:", False), Segment("ab</s>", True), Segment("c", False), Segment("d</s>", True)]
    [row] = tokenize([segments], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["q", ":", "a", "b", "</s>", "c", "d", "</s>"]
    assert marked(row, tokenizer) == ["a", "b", "</s>", "d", "</s>"]


def test_a_prompt_that_tokenises_otherwise_alone_is_split_although_no_token_crosses() -> None:
    tokenizer = smollm2()  # its regular expression keeps "\n\n" together at the end of a text, but not before a letter
    prompt, answer = tokenizer("Q\n\n")["input_ids"], tokenizer("A<|im_end|>")["input_ids"]
    assert tokenizer("Q\n\nA<|im_end|>")["input_ids"] != prompt + answer
    [row] = tokenize([[Segment("Q\n\n", False), Segment("A<|im_end|>", True)]], tokenizer)
    assert row.input_ids == prompt + answer
    assert row.answers == [False] * len(prompt) + [True] * len(answer)


def test_several_answers_and_empty_segments() -> None:
    tokenizer = bpe(bos=True, merges=[])
    segments = [
        Segment("a", False),
        Segment("b</s>", True),
        Segment("", False),
        Segment("c", False),
        Segment("", True),
        Segment("d</s>", True),
    ]
    [row, empty] = tokenize([segments, [Segment("", False), Segment("", True)]], tokenizer)
    assert tokenizer.decode(row.input_ids) == "<s>ab</s>cd</s>"
    assert marked(row, tokenizer) == ["b", "</s>", "d", "</s>"]
    assert (empty.input_ids, empty.answers) == ([1], [False])


@pytest.mark.parametrize("seed", range(5))
def test_pack_keeps_every_row_once_and_within_capacity(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 64) for _ in range(500)]
    sequences = pack(lengths, 64)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(500))
    assert max(sum(lengths[row] for row in sequence) for sequence in sequences) <= 64
    unbeatable = max(-(-sum(lengths) // 64), sum(length > 32 for length in lengths))
    assert len(sequences) <= 1.02 * unbeatable + 1
    assert pack(lengths, 64) == sequences


def test_pack_agrees_with_trl() -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rng = random.Random(7)
    lengths = [rng.randint(1, 40) for _ in range(300)]
    rows = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    reference = trl.pack_dataset(rows, 40, strategy="bfd")["seq_lengths"]
    ours = [[lengths[row] for row in sequence] for sequence in pack(lengths, 40)]
    assert sorted(map(sum, ours)) == sorted(map(sum, reference))


def test_pack_of_full_rows_and_of_nothing() -> None:
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([], 8) == []


def padding(lengths: list[int], order: list[int], batch: int) -> int:
    batches = [[lengths[row] for row in order[start : start + batch]] for start in range(0, len(order), batch)]
    return sum(max(one) * len(one) - sum(one) for one in batches)


@pytest.mark.parametrize(("rows", "batch"), [(1000, 8), (1003, 8), (5, 8), (8, 8), (0, 4), (7, 1)])
def test_grouping_by_length_keeps_every_row_once(rows: int, batch: int) -> None:
    rng = random.Random(rows)
    lengths = [rng.randint(1, 300) for _ in range(rows)]
    order = grouped_by_length(lengths, batch, seed=1)
    assert sorted(order) == list(range(rows))
    assert grouped_by_length(lengths, batch, seed=1) == order
    if rows > batch > 1:
        assert grouped_by_length(lengths, batch, seed=2) != order


def test_grouping_by_length_saves_padding_and_mixes_the_batches() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(4000)]
    drawn = rng.sample(range(4000), 4000)
    order = grouped_by_length(lengths, 8, seed=0)
    assert padding(lengths, order, 8) < 0.1 * padding(lengths, drawn, 8)
    # No drift: every stretch of 50 batches is as long on average as the data.
    means = [sum(lengths[row] for row in order[start : start + 400]) / 400 for start in range(0, 4000, 400)]
    assert max(means) < 1.35 * min(means)


def test_padding_masks_by_position_when_pad_is_eos() -> None:
    rows = [{"input_ids": [5, 2, 6, 2], "labels": [-100, 2, 6, 2]}, {"input_ids": [7], "labels": [-100]}]
    batch = PaddedBatches(pad_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 2, 6, 2, 2, 2, 2, 2], [7, 2, 2, 2, 2, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 6, 2, -100, -100, -100, -100], [-100] * 8]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert PaddedBatches(0, multiple=3)(rows)["input_ids"].shape == (2, 6)


def documents() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (5, 1, 9, 7)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def packed(rows: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    whole = {key: [value for row in rows for value in row[key]] for key in ("input_ids", "labels")}
    return {**whole, "document_lengths": [len(row["input_ids"]) for row in rows]}


def test_packed_batch_agrees_with_the_flattening_of_transformers() -> None:
    rows = documents()
    batch = PackedBatches()([packed(rows[:3]), packed(rows[3:])])
    assert batch.pop("use_cache") is False
    reference = DataCollatorWithFlattening()(rows)
    assert batch.keys() == reference.keys()
    for key, tensor in batch.items():
        assert torch.equal(tensor, reference[key]), key


ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_documents_never_see_each_other(model_type: str, attention: str) -> None:
    model = tiny(model_type, attention, **ARCHITECTURES[model_type])
    rows = documents()
    batch = PackedBatches()([packed(rows[:3]), packed(rows[3:])])
    labels = batch.pop("labels")
    assert isinstance(labels, torch.Tensor)
    with torch.no_grad():
        together = model(**batch, labels=labels)
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
        with_cache = model(**{**batch, "use_cache": True}).logits[0]
        padded = model(**PaddedBatches(pad_id=0)(rows))
    torch.testing.assert_close(together.logits[0], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.loss, padded.loss, atol=1e-6, rtol=1e-5)
    # What the collator guards against: with a cache, transformers 5.23 lets the documents see each other.
    assert (with_cache - alone).abs().max() > 1e-3
    assert separates_documents(model)


@pytest.mark.parametrize(
    ("model_type", "extra", "dtype"),
    [
        ("bloom", {}, torch.bfloat16),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, torch.bfloat16),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, torch.float32),
    ],
)
def test_models_that_mix_documents_are_refused(model_type: str, extra: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny(model_type, "eager", **extra).to(dtype).train()
    assert not separates_documents(model)
    assert model.training
    with pytest.raises(ModelError) as raised:
        require_separation(model)
    assert str(raised.value) == (
        f"packed rows would see each other in this model ({model_type}, attention eager): set data.packing to false, "
        "or try model.attention: sdpa"
    )


def test_bfloat16_model_is_accepted() -> None:
    model = tiny("llama", "sdpa").to(torch.bfloat16)
    require_separation(model)
    assert separates_documents(model)
