"""The real SmolLM2-135M through every export that needs PEFT alone, and back through an import."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_adapters import difference, load_base, logits_of, make_adapter, stock_logits

from abba_cli import load_recipe
from abba_cli.bases import Base, dequantised, find_base
from abba_cli.export.loha import write_loha
from abba_cli.export.lora import write_lora
from abba_cli.export.own import write_abba
from abba_cli.importing import import_adapter

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.slow
def test_lora_loha_and_abba(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABBA_CACHE", str(tmp_path_factory.getbasetemp() / "abba-cache"))
    section = load_recipe(RECIPE).model
    base = Path(dequantised(find_base(section), section).location)
    made = make_adapter(base, tmp_path / "adapter", r1=6, r2=4, alpha=8.0, init_weights="svd")
    targets = {name: tmp_path / name for name in ("lora", "lora-16", "loha", "abba")}
    for folder in targets.values():
        folder.mkdir()
    report = write_lora(made.saved, targets["lora"], made.kinds)
    assert (report.rank, report.error, report.vllm_max_lora_rank, len(report.errors)) == (24, 0.0, 32, 210)
    smaller = write_lora(made.saved, targets["lora-16"], made.kinds, rank=16)
    assert 0.01 < smaller.error < 1
    write_loha(made.saved, targets["loha"], made.kinds)
    write_abba(made.saved, targets["abba"])
    jobs = [(made, targets[name]) for name in ("lora", "lora-16", "loha")]
    lora, approximate, loha = stock_logits(jobs, tmp_path / "logits.pt")
    assert difference(lora, made.logits) < 1e-5
    assert difference(loha, made.logits) < 1e-5
    assert 1e-4 < difference(approximate, made.logits) < difference(made.base_logits, made.logits)
    import_adapter(targets["loha"], Base(str(base)), tmp_path / "imported")
    for folder in (targets["abba"], tmp_path / "imported"):
        again = logits_of(PeftModel.from_pretrained(load_base(base), folder))
        assert torch.equal(again, made.logits) if folder == targets["abba"] else difference(again, made.logits) < 1e-5
