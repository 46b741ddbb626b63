"""Our own adapter again: bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_adapters import Made, load_base, logits_of, make_adapter, make_base

from abba_cli.bases import Base
from abba_cli.export.loha import write_loha
from abba_cli.export.own import write_abba
from abba_cli.importing import import_adapter
from abba_cli.saved_adapter import open_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    settings = {
        "rank_pattern": {"q_proj": [2, 6]},
        "alpha_pattern": {"up_proj": 5.0},
        "modules_to_save": ["lm_head"],
        "bias": "all",
    }
    return make_adapter(make_base("qwen2", folder / "base"), folder / "adapter", **settings)


def test_a_round_trip_is_exact(made: Made, tmp_path: Path) -> None:
    (made.path / "optimizer.pt").write_text("not to be exported")
    write_abba(made.saved, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    same = (tmp_path / "adapter_model.safetensors").read_bytes() == (made.path / "adapter_model.safetensors").read_bytes()
    assert same
    again, saved = open_adapter(tmp_path), made.saved
    assert again.config == saved.config
    assert (again.layers, again.whole) == (saved.layers, saved.whole)
    assert torch.equal(logits_of(PeftModel.from_pretrained(load_base(made.base), tmp_path)), made.logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_dtype_is_that_of_the_factors_alone(made: Made, tmp_path: Path, dtype: str) -> None:
    write_abba(made.saved, tmp_path, dtype=dtype)  # type: ignore[arg-type]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (made.path, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor.to(getattr(torch, dtype)) if ".abba_" in key else tensor)
        assert after[key].dtype == (getattr(torch, dtype) if ".abba_" in key else torch.float32)
    assert open_adapter(tmp_path).layers == made.saved.layers


def test_a_round_trip_through_loha_is_exact(tmp_path: Path) -> None:
    """ABBA -> LoHa -> import -> ABBA: the same factors, the same s."""
    base = make_base("llama", tmp_path / "base")
    made = make_adapter(base, tmp_path / "adapter", r1=4, r2=4, rank_pattern={"v_proj": 3}, alpha_pattern={"o_proj": 6.5})
    (tmp_path / "loha").mkdir()
    write_loha(made.saved, tmp_path / "loha", made.kinds)
    (tmp_path / "again").mkdir()
    write_abba(import_adapter(tmp_path / "loha", Base(str(base)), tmp_path / "imported"), tmp_path / "again")
    again = open_adapter(tmp_path / "again")
    assert again.layers.keys() == made.saved.layers.keys()
    for name, layer in made.saved.layers.items():
        assert all(torch.equal(one, other) for one, other in zip(again.factors(name), made.saved.factors(name), strict=True))
        assert again.layers[name].s == pytest.approx(layer.s, rel=1e-15)
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(load_base(base), tmp_path / "again")), made.logits, rtol=1e-6, atol=1e-6
    )
