"""`distributed.strategy: deepspeed`, with real processes: ZeRO 2 makes the steps of ddp bit for bit, ZeRO 3 but for rounding."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_runs import DEEPSPEED, launch

from abba_cli import RunDir, preparation
from abba_cli.errors import RecipeError, RunError
from abba_cli.forecast.prediction import OPTIMIZER
from abba_cli.recipe_file import load_recipe
from abba_cli.zero import check_deepspeed

RecipeFile = Callable[..., Path]
STEPS = 4
DDP, SECOND = "distributed.strategy=ddp", "distributed.strategy=deepspeed"
THIRD = f"{SECOND};distributed.zero_stage=3"
CONSTANT, HALF = "training.scheduler=constant", "training.max_steps=2"
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED.is_dir(), reason=f"DeepSpeed is not in {DEEPSPEED}")
# Runs that ZeRO 2 makes as ddp does; where gradients are accumulated or clipped, the sums are taken in another order.
CLIPPED = "training.gradient_accumulation=2;training.max_grad_norm=1e-3"
SAME = {
    "nf4": "model.quantization=nf4;model.dtype=bfloat16;adapter.targets=[q_proj, down_proj];distributed.offload=true",
    "packed": "data.packing=true;training.gradient_checkpointing=true",
}
NEAR = {
    "float32": f"{CLIPPED};evaluation.every_steps=1;evaluation.samples=1",
    "trained head": "adapter.modules_to_save=[lm_head];training.gradient_checkpointing=true;distributed.offload=true",
}


def pairs(variants: dict[str, str], strategy: str) -> list[str]:
    """Each variant with the strategy and then with ddp."""
    whole = [variant.replace(";distributed.offload=true", "") for variant in variants.values()]
    return [run for one, other in zip(variants.values(), whole, strict=True) for run in (f"{strategy};{one}", f"{DDP};{other}")]


def column(run: Path, key: str) -> list[float]:
    return [row[key] for row in RunDir(run).metrics() if key in row]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def apart(one: Path, other: Path) -> float:
    """The largest difference of any element of what two runs have trained."""
    a, b = trained(one), trained(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def assert_near(one: Path, other: Path) -> None:
    for key in ("loss", "eval_loss"):
        assert column(one, key) == pytest.approx(column(other, key), rel=1e-6)
    assert column(one, "gradient_norm") == pytest.approx(column(other, "gradient_norm"), rel=1e-4)
    assert len(column(one, "loss")) == STEPS
    assert apart(one, other) < 1e-5
    assert max(float(tensor.abs().max()) for name, tensor in trained(one).items() if "abba_B2" in name) > 1e-2


@pytest.fixture
def recipe(recipe_file: RecipeFile, rows: Path) -> Path:
    return recipe_file(
        data=f"{{train: {rows}, eval: {rows}, template: chat, max_length_tokens: 64}}",
        adapter="{r1: 4, r2: 3, alpha: 4}",
        training=f"{{max_steps: {STEPS}, batch_size: 2, learning_rate: 1e-2}}",
        evaluation="{sample_max_tokens: 4}",
    )


@needs_deepspeed
def test_zero_2_makes_the_run_of_ddp(recipe: Path, tmp_path: Path) -> None:
    found = launch(recipe, tmp_path / "out", *pairs(SAME | {"clipped": CLIPPED}, SECOND))
    for number in range(0, len(found), 2):
        one, other = (tmp_path / "out" / str(index) for index in (number, number + 1))
        assert_near(one, other)
        assert found[number]["shares"] == 0
        if number < 2 * len(SAME):
            assert apart(one, other) == 0
            assert column(one, "loss") == column(other, "loss")


@needs_deepspeed
def test_zero_3_shares_the_base_out_and_makes_the_run_of_ddp(recipe: Path, tmp_path: Path) -> None:
    found = launch(recipe, tmp_path / "out", *pairs(NEAR, THIRD))
    for number in range(0, len(found), 2):
        assert_near(tmp_path / "out" / str(number), tmp_path / "out" / str(number + 1))
        assert found[number]["shares"] == found[number]["frozen"] > 0
        assert found[number]["trained_whole"]
        assert found[number]["bytes_here"] == pytest.approx(found[number]["bytes"] / 2, rel=0.02)
    samples = [(tmp_path / "out" / number / "samples.jsonl").read_text() for number in ("0", "1")]
    assert samples[0] == samples[1]
    # A checkpoint that is written after an evaluation finds the factors gathered too.
    checkpoint = tmp_path / "out" / "0" / "checkpoints" / f"checkpoint-{STEPS}"
    assert all(torch.equal(trained(checkpoint)[name], tensor) for name, tensor in trained(tmp_path / "out" / "0").items())


@needs_deepspeed
def test_a_run_goes_on_with_deepspeed_and_without(recipe: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "others"
    starts = [DDP, f"{SECOND};{HALF}", f"{THIRD};{HALF}", f"{DDP};{HALF}", f"{DDP};{HALF}"]
    launch(recipe, out, *(f"{start};{CONSTANT}" for start in starts))
    shutil.copytree(out / "1", tmp_path / "alone" / "0")
    for number in range(4):
        shutil.copytree(out / str(number + 1), other / str(number))
    launch(recipe, other, *(f"{end};{CONSTANT}" for end in (THIRD, DDP, SECOND, THIRD)))
    for number in range(4):
        assert_near_end(other / str(number), out / "0")
    launch(recipe, tmp_path / "alone", f"{SECOND};{CONSTANT}", processes=1)  # there is nothing to share out
    assert_near_end(tmp_path / "alone" / "0", out / "0")


def assert_near_end(one: Path, undisturbed: Path) -> None:
    assert column(one, "loss") == pytest.approx(column(undisturbed, "loss"), rel=1e-6)
    assert apart(one, undisturbed) < 1e-5
    states = [torch.load(run / f"checkpoints/checkpoint-{STEPS}/optimizer.pt", weights_only=True) for run in (one, undisturbed)]
    assert states[0]["param_groups"][0]["params"] == states[1]["param_groups"][0]["params"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[1]["state"].items():
        assert states[0]["state"][index].keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(states[0]["state"][index][key], tensor, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.optimizer=adamw_8bit"], "takes no training.optimizer: adamw_8bit"),
        (["model.dtype=float16"], "takes no model.dtype: float16"),
        (["adapter.dtype=bfloat16"], "takes no adapter.dtype: bfloat16"),
        (["distributed.zero_stage=3", "model.quantization=nf4"], "takes no model.quantization: nf4 with zero_stage: 3"),
        (["distributed.zero_stage=3", "data.packing=true"], "takes no data.packing with zero_stage: 3"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(
    overrides: list[str], message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RunError, match=message):
        check_deepspeed(load_recipe(recipe, [SECOND, *overrides]))


def test_the_forecast_knows_the_shares(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "check_deepspeed", lambda recipe: None)  # a forecast needs none
    whole, second, third = (
        preparation.prepare(load_recipe(recipe, ["training.gradient_accumulation=2", *strategy.split(";")]), processes=4).plan
        for strategy in (DDP, SECOND, THIRD)
    )
    copy = 4 * whole.trainable  # DeepSpeed's own, in float32
    ddp, two, three = (plan.memory.uses for plan in (whole, second, third))
    assert two[OPTIMIZER] == three[OPTIMIZER] == pytest.approx((ddp[OPTIMIZER] + copy) / 4, abs=1)
    assert two["gradients"] == pytest.approx(ddp["gradients"] / 4, abs=1)
    assert two["base weights"] == ddp["base weights"]
    assert three["share of the base"] == pytest.approx(ddp["base weights"] / 4, rel=0.01)
    assert [plan.sharded for plan in (whole, second, third)] == [False, False, True]


def test_contradictions_are_found_in_the_recipe(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="deepspeed takes no int8 base"):
        load_recipe(recipe, [SECOND, "model.quantization=int8"])
    with pytest.raises(RecipeError, match="zero_stage is DeepSpeed's"):
        load_recipe(recipe, ["distributed.zero_stage=3"])


def test_deepspeed_has_to_be_installed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_deepspeed(load_recipe(recipe, [DDP]))
    with pytest.raises(RunError, match=r"pip install 'abba-cli\[deepspeed\]'"):
        check_deepspeed(load_recipe(recipe, [SECOND]))
