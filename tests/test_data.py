"""Real files and real tokenizers through `prepare`: masks, audits, slices, weights, and every message."""

import gzip
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from huggingface_hub.errors import GatedRepoError
from test_prompts import llama_like, smollm2
from transformers import PreTrainedTokenizerBase

from abba_cli.data import PreparedData, prepare
from abba_cli.errors import DataError
from abba_cli.recipe import DataSection

QA = '{"question": "q", "answer": "a"}'
ROWS = [{"question": f"{n} plus {n}?", "answer": f"it is {2 * n}"} for n in range(10)]


def write(folder: Path, name: str, rows: Any = ROWS) -> str:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ready(train: Any, tokenizer: PreTrainedTokenizerBase | None = None, samples: int = 0, **data: Any) -> PreparedData:
    section = DataSection.model_validate({"train": train, "template": "none", **data})
    return prepare(section, tokenizer or llama_like(), seed=1, samples=samples)


def refused(train: Any, **data: Any) -> str:
    with pytest.raises(DataError) as raised:
        ready(train, **data)
    return str(raised.value)


def texts(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The whole and the supervised text of every row."""
    rows = zip(prepared.train["input_ids"], prepared.train["labels"], strict=True)
    return [(tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])) for ids, labels in rows]


def test_completion_is_supervised_with_its_end(tmp_path: Path) -> None:
    prepared = ready(write(tmp_path, "a.jsonl"))
    assert texts(prepared, llama_like())[3] == ("<s>3 plus 3?it is 6</s>", "it is 6</s>")
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert prepared.first_row == ROWS[0]
    assert [(span.text, span.supervised) for span in prepared.first_spans] == [
        ("<s>0 plus 0?", False),
        ("it is 0</s>", True),
    ]


def test_every_token_but_the_first_is_supervised_with_all(tmp_path: Path) -> None:
    prepared = ready(write(tmp_path, "a.jsonl"), supervise="all")
    assert texts(prepared, llama_like())[3] == ("<s>3 plus 3?it is 6</s>", "3 plus 3?it is 6</s>")
    assert prepared.audit["train"].supervised_share == 1 - 10 / prepared.audit["train"].tokens


def test_chat_with_a_real_tokenizer(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    path = write(tmp_path, "a.jsonl", rows)
    [(whole, answer)] = texts(ready(path, smollm2(), template="chat"), smollm2())
    assert whole + "\n" == smollm2().apply_chat_template(rows[0]["messages"], tokenize=False)
    assert answer == "4<|im_end|>"
    [(_, answers)] = texts(ready(path, smollm2(), template="chat", supervise="assistant"), smollm2())
    assert answers == "Hello<|im_end|>4<|im_end|>"


def test_masks_agree_with_trl(tmp_path: Path) -> None:
    """TRL's prompt-completion tokenisation: the prompt alone, then the rest of the whole conversation."""
    prepared = ready(write(tmp_path, "a.jsonl"), smollm2(), template="chat")
    tokenizer = smollm2()
    for row, ids, labels in zip(ROWS, prepared.train["input_ids"], prepared.train["labels"], strict=True):
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)[:-1]  # without the last newline
        assert ids == whole
        assert labels == [-100] * len(prompt) + whole[len(prompt) :]


def test_text_rows(tmp_path: Path) -> None:
    prepared = ready(write(tmp_path, "a.txt", "one\n\ntwo\n"))
    assert texts(prepared, llama_like()) == [("<s>one</s>", "one</s>"), ("<s>two</s>", "two</s>")]


def test_cut_rows_have_no_end_and_are_counted(tmp_path: Path) -> None:
    prepared = ready(write(tmp_path, "a.jsonl", [ROWS[0], {"question": "q", "answer": "x" * 40}]), max_length_tokens=20)
    assert texts(prepared, llama_like())[1] == ("<s>q" + "x" * 18, "x" * 18)
    [source] = prepared.audit["train"].sources
    assert (source.truncated_rows, source.longest_row_tokens) == (1, 43)


@pytest.mark.parametrize("packing", [False, True])
def test_audit(tmp_path: Path, packing: bool) -> None:
    path = write(tmp_path, "a.jsonl", [{**row, "id": 1} for row in ROWS])
    prepared = ready([{"path": path, "max_rows": 4}], eval=path, max_length_tokens=64, packing=packing)
    audit = prepared.audit["train"]
    [source] = audit.sources
    lengths = [len(f"{row['question']}{row['answer']}") + 2 for row in ROWS[:4]]
    assert (source.path, source.split, source.shape, source.unused_columns) == (
        path,
        "train",
        "question/answer",
        ("id",),
    )
    assert source.sha256 == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert (source.rows_found, source.rows, source.tokens) == (4, 4, sum(lengths))
    assert source.supervised_tokens == sum(len(row["answer"]) + 1 for row in ROWS[:4])
    assert (audit.rows, audit.tokens, audit.truncated_rows, audit.longest_row_tokens) == (
        4,
        sum(lengths),
        0,
        max(lengths),
    )
    assert audit.packed_sequences == (len(prepared.train) if packing else None)
    assert prepared.audit["eval"].rows == 10


def test_packing_keeps_rows_apart_and_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    plain = ready(path, max_length_tokens=64)
    packed = ready(path, eval=path, max_length_tokens=64, packing=True)
    assert len(packed.train) < len(plain.train)
    found = []
    for row in packed.train:
        assert len(row["input_ids"]) == sum(row["document_lengths"]) <= 64
        start = 0
        for length in row["document_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            assert row["labels"][start] == -100
            start += length
    assert sorted(found) == sorted(zip(plain.train["input_ids"], plain.train["labels"], strict=True))
    assert packed.eval is not None
    assert packed.eval[:] == packed.train[:]


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    reference = ready(write(tmp_path, "a.jsonl")).fingerprint
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(Path(tmp_path / "a.jsonl").read_bytes()))
    csv = "question,answer\n" + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in ROWS)
    files = [
        write(tmp_path, "list.json", json.dumps(ROWS, indent=2)),
        write(tmp_path, "lines.json"),
        write(tmp_path, "a.csv", csv),
        str(tmp_path / "a.parquet"),
        str(tmp_path / "a.jsonl.gz"),
    ]
    assert {ready(file).fingerprint for file in files} == {reference}
    assert ready(write(tmp_path, "b.jsonl", ROWS[::-1])).fingerprint != reference


def test_a_line_separator_inside_a_json_line_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"question": "a\u2028b", "answer": "c"}\n')
    assert ready(path).first_row["question"] == "a\u2028b"


def test_columns_that_only_later_rows_have_are_read(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "input": "x", "output": "o"}]
    assert [whole for whole, _ in texts(ready(write(tmp_path, "a.jsonl", rows)), llama_like())] == [
        "<s>io</s>",
        "<s>i\n\nxo</s>",
    ]


def test_a_column_that_a_row_lacks_is_empty_in_its_template(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"q": "1", "a": "2"}, {"q": "1", "a": "2", "hint": "h"}])
    prepared = ready([{"path": path, "prompt": "{{ q }}{{ hint }}", "completion": "{{ a }}"}])
    assert [whole for whole, _ in texts(prepared, llama_like())] == ["<s>12</s>", "<s>1h2</s>"]


def test_a_directory_keeps_its_splits_apart(tmp_path: Path) -> None:
    write(tmp_path, "train-1.jsonl", ROWS[:4])
    write(tmp_path, "train-2.jsonl", ROWS[4:7])
    write(tmp_path, "test.jsonl", ROWS[7:])
    write(tmp_path, "README.md", "not data")
    assert ready(str(tmp_path)).audit["train"].rows == 7
    assert ready([{"path": str(tmp_path), "split": "test[1:]"}]).first_row == ROWS[8]


@pytest.mark.parametrize(
    ("split", "numbers"),
    [("train[:3]", [0, 1, 2]), ("train[80%:]", [8, 9]), ("train[-1:]", [9]), ("train[2:4]", [2, 3])],
)
def test_split_slices(tmp_path: Path, split: str, numbers: list[int]) -> None:
    prepared = ready([{"path": write(tmp_path, "a.jsonl"), "split": split}])
    assert [whole for whole, _ in texts(prepared, llama_like())] == [
        f"<s>{ROWS[n]['question']}{ROWS[n]['answer']}</s>" for n in numbers
    ]


def test_weights(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    whole = ready(path).train["input_ids"][:]
    assert ready([{"path": path, "weight": 2}]).train["input_ids"][:] == [*whole, *whole]
    half = ready([{"path": path, "weight": 0.5}]).train["input_ids"][:]
    assert len(half) == 5
    assert half == [row for row in whole if row in half]
    assert ready([{"path": path, "weight": 0.5}]).train["input_ids"][:] == half
    section = DataSection.model_validate({"train": [{"path": path, "weight": 0.5}], "template": "none"})
    assert prepare(section, llama_like(), seed=3).train["input_ids"][:] != half
    mixed = ready([{"path": path, "weight": 1.5}, {"path": path, "max_rows": 1}])
    assert [source.rows for source in mixed.audit["train"].sources] == [15, 1]


def test_held_out_prompts_are_spread_over_the_sources(tmp_path: Path) -> None:
    path, more = write(tmp_path, "a.jsonl"), write(tmp_path, "b.jsonl", ROWS[:2])
    text = write(tmp_path, "c.txt", "no prompt here")
    prompts = ready(path, eval=[text, path, more], samples=4).held_out
    assert [(prompt.source, prompt.row) for prompt in prompts] == [(path, 0), (path, 3), (path, 6), (path, 9)]
    assert (prompts[1].text, prompts[1].reference) == (ROWS[3]["question"], ROWS[3]["answer"])
    assert llama_like().decode(prompts[1].input_ids) == "<s>" + ROWS[3]["question"]
    assert len(ready(path, eval=more, samples=5).held_out) == 2


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = write(tmp_path, "a.jsonl", ROWS * 150)
    section = DataSection.model_validate({"train": path, "eval": path, "template": "none"})
    prepare(section, llama_like(), seed=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1000, 3000), (1500, 3000), (2500, 3000), (3000, 3000)]


def test_package_path() -> None:
    assert refused("package:no_such_package_here/a.jsonl") == (
        "package:no_such_package_here/a.jsonl: no Python package `no_such_package_here` is installed here; install it with pip"
    )
    assert re.fullmatch(r"/.*/json/nothing\.jsonl does not exist", refused("package:json/nothing.jsonl"))


def test_rows_without_an_answer(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [*ROWS, {"question": "q", "answer": None}])
    assert refused(path) == (
        f"1 of 11 rows of {path} have an empty answer (row 10): fill it in, or drop such rows with "
        "data.allow_unsupervised_rows: true"
    )
    prepared = ready(path, allow_unsupervised_rows=True)
    [source] = prepared.audit["train"].sources
    assert (source.rows_found, source.rows, source.unsupervised_rows) == (11, 10, 1)


def test_rows_cut_before_their_answer(tmp_path: Path) -> None:
    rows = [{"question": "q" * n, "answer": "a"} for n in (5, 20, 30)]
    path = write(tmp_path, "a.jsonl", rows)
    assert refused(path, max_length_tokens=10) == (
        f"2 of 3 rows of {path} are cut before their answer begins: data.max_length_tokens is 10, row 2 needs at least "
        "32, the shortest at least 22: raise it, or drop such rows with data.allow_unsupervised_rows: true"
    )
    assert ready(path, max_length_tokens=32).audit["train"].rows == 3
    assert refused([{"path": path, "split": "train[1:2]"}], max_length_tokens=10, allow_unsupervised_rows=True) == (
        f"all 1 rows of {path} are cut before their answer begins: data.max_length_tokens is 10, row 0 needs at least "
        "22: raise it"
    )


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("a.jsonl", "", {}, "{path} is empty"),
        ("a.json", "[]", {}, "{path} has no rows in split `train`"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": \n',
            {},
            "{path}:2: not valid JSON (Expecting value): expected a list of objects, or one object a line",
        ),
        (
            "a.json",
            '[{"a": 1},\n\n{"a" 2}]',
            {},
            "{path}:3: not valid JSON (Expecting ':' delimiter): expected a list of objects, or one object a line",
        ),
        ("a.jsonl", '{"a": 1}\n7\n', {}, "{path}: row 1 is '7', expected an object with named columns"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", {}, "{path}:3: not valid CSV: expected 2 fields as in the first line"),
        ("a.csv", "a,b\n1\n", {}, "{path}:2: not valid CSV: expected 2 fields as in the first line"),
        ("a.parquet", "nonsense, not parquet", {}, "{path} cannot be read: "),
        ("a.jsonl.gz", "not gzip", {}, "{path} cannot be read: Not a gzipped file (b'no')"),
        ("a.jsonl", '{"foo": 1}', {}, "{path}: columns `foo` are of no known shape"),
        (
            "a.jsonl",
            QA,
            {"split": "test"},
            "{path} has no split `test`: expected train, with an optional slice such as train[:1000] or train[10%:]",
        ),
        ("a.jsonl", QA, {"split": "train[:"}, "{path} has no split `train[:`: "),
        ("a.jsonl", QA, {"split": "train[5:]"}, "{path} has no rows in split `train[5:]`"),
        ("a.jsonl", QA, {"weight": 0.1}, "weight 0.1 leaves none of the 1 rows of {path}: raise it"),
        (
            "a.jsonl",
            QA + '\n{"question": {"b": 1}, "answer": "a"}',
            {},
            "{path}, row 1: column `question` must be text, found {{'b': 1}}",
        ),
        (
            "a.jsonl",
            QA,
            {"completion": "{{ anser }}"},
            "{path}, row 0: the completion template '{{{{ anser }}}}' uses `anser`, which is not there: found "
            "`question`, `answer`; did you mean `answer`?",
        ),
    ],
)
def test_messages_for_files(tmp_path: Path, name: str, content: str, source: dict[str, Any], message: str) -> None:
    path = write(tmp_path, name, content)
    found = refused([{"path": path, **source}])
    assert found.startswith(message.format(path=path))
    assert "\n" not in found


def test_messages_for_missing_paths(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl")
    (tmp_path / "empty").mkdir()
    assert refused(f"{tmp_path}/trian.jsonl") == f"{tmp_path}/trian.jsonl does not exist; did you mean train.jsonl?"
    assert refused("nowhere/at/all.csv") == "nowhere/at/all.csv does not exist"
    assert refused(f"{tmp_path}/empty") == (
        f"the directory {tmp_path}/empty holds no data file: expected .json, .jsonl, .csv, .parquet, .txt"
    )
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    assert refused(f"{tmp_path}/latin.jsonl").startswith(f"{tmp_path}/latin.jsonl cannot be read: 'utf-8' codec can't decode")


PAGE = "https://huggingface.co/datasets/me/set"


class Response:
    status_code, headers, request = 403, {}, None


GATED = GatedRepoError.__new__(GatedRepoError)
GATED.response = Response()


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'me/set' is a gated dataset on the Hub."),
            GATED,
            f"me/set is gated: ask for access at {PAGE}, then log in with `hf auth login`",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("no answer"),
            GATED,
            f"me/set is gated: ask for access at {PAGE}, then log in with `hf auth login`",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'me/set' doesn't exist on the Hub or cannot be accessed."),
            None,
            "me/set is neither a local file nor a data set of the hub that you can see "
            "(https://huggingface.co/datasets/me/set): "
            "Dataset 'me/set' doesn't exist on the Hub or cannot be accessed.",
        ),
        (
            ConnectionError("Couldn't reach 'me/set' on the Hub (OfflineModeIsEnabled)"),
            None,
            "me/set is no local file, and the hub cannot be reached to look for it there: Couldn't reach 'me/set' "
            "on the Hub (OfflineModeIsEnabled)",
        ),
        (
            ValueError("Unknown split \"trian\". Should be one of ['train', 'test'].\nmore"),
            None,
            "me/set (subset main, split trian) cannot be loaded: Unknown split \"trian\". Should be one of ['train', 'test'].",
        ),
    ],
)
def test_messages_for_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None, message: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error from cause

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refused([{"path": "me/set", "subset": "main", "split": "trian"}]) == message


def test_hub_rows_are_read_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(*args: Any, **keys: Any) -> datasets.Dataset:
        seen.append((args, keys, datasets.are_progress_bars_disabled()))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bars, level = datasets.are_progress_bars_disabled(), logging.getLogger("huggingface_hub").level
    prepared = ready([{"path": "me/set", "subset": "main", "split": "train[:10]", "max_rows": 3}])
    assert prepared.audit["train"].rows == 3
    assert prepared.audit["train"].sources[0].sha256 == {}
    assert seen == [(("me/set", "main"), {"split": "train[:10]"}, True)]
    assert (datasets.are_progress_bars_disabled(), logging.getLogger("huggingface_hub").level) == (bars, level)


GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real data is not beside this checkout")
def test_gsm8k(capfd: pytest.CaptureFixture[str]) -> None:
    source = {
        "path": str(GSM8K),
        "split": "train[:1000]",
        "completion": "{{ answer | replace('#### ', 'The answer is: ') }}",
    }
    prepared = ready([source], smollm2(), eval=[{**source, "split": "test[:20]"}], template="alpaca")
    supervised = [answer for _, answer in texts(prepared, smollm2())]
    with (GSM8K / "train.jsonl").open() as lines:
        rows = [json.loads(next(lines)) for _ in range(1000)]
    assert supervised == [row["answer"].replace("#### ", "The answer is: ") + "<|im_end|>" for row in rows]
    assert capfd.readouterr() == ("", "")
