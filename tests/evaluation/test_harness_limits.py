"""The harness renders chat templates within our limits, too."""

from pathlib import Path

import pytest
from harness_rows import gsm8k_rows, load_speaker, settings, write_rows, write_tokenizer
from models import write_model

pytest.importorskip("lm_eval")

from abba_cli import rendering
from abba_cli.errors import DataError
from abba_cli.evaluation.harness.scoring import score_with_harness


def test_a_chat_template_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    model = write_model(tmp_path / "llama", write_tokenizer(tmp_path / "tokenizer"))
    write_rows(tmp_path / "gsm8k", "test", gsm8k_rows(1))
    write_rows(tmp_path / "gsm8k", "train", gsm8k_rows(6, seed=1))
    speaker = load_speaker(model)
    speaker.template.tokenizer.chat_template = "{% for i in range(99999) %}" * 5 + "{% endfor %}" * 5
    with pytest.raises(DataError, match=f"the chat template of {model} computed for more than"):
        score_with_harness(speaker, ["gsm8k"], **settings(tmp_path / "cache", tmp_path, chat_template=True))
