"""`distributed.strategy: fsdp`, with real processes: the base is shared out, and the run is that of `ddp`, bit for bit."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from several_runs import launch

from abba_cli import RunDir, preparation, train
from abba_cli.errors import RecipeError, RunError
from abba_cli.events import Event, Stage
from abba_cli.recipe_file import load_recipe
from abba_cli.ui.forecast import show_plan

RecipeFile = Callable[..., Path]
VARIANTS = {
    "float32": ["training.gradient_accumulation=2"],
    "bfloat16": ["model.dtype=bfloat16", "data.template=alpaca", "distributed.offload=true"],
    # Some of its 4-bit layers are adapted, the others are bitsandbytes' own.
    "nf4": ["model.quantization=nf4", "model.dtype=bfloat16", "adapter.targets=[q_proj, down_proj]"],
    "packed": ["data.packing=true", "training.gradient_checkpointing=true"],
    "trained head": ["adapter.modules_to_save=[lm_head]", "evaluation.every_steps=2", "evaluation.samples=1"],
}
STEPS = 4


def losses(run: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in RunDir(run).metrics() if key in row]


def assert_same(one: Path, other: Path) -> None:
    assert len(losses(one)) == STEPS
    assert losses(one) == losses(other)
    assert losses(one, "eval_loss")[-1] == losses(other, "eval_loss")[-1]
    a, b = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(tensor.abs().max() > 0 for name, tensor in a.items() if "abba_B2" in name)


@pytest.fixture
def recipe(recipe_file: RecipeFile, rows: Path) -> Path:
    return recipe_file(
        data=f"{{train: {rows}, eval: {rows}, template: chat, max_length_tokens: 64}}",
        adapter="{r1: 4, r2: 3, alpha: 4}",
        training=f"{{max_steps: {STEPS}, batch_size: 2, learning_rate: 1e-2}}",
        evaluation="{sample_max_tokens: 4}",
    )


def test_a_shared_out_base_makes_the_run_of_a_whole_one(recipe: Path, tmp_path: Path) -> None:
    sharded, whole = (
        [";".join([*(key for key in overrides if strategy == "fsdp" or "offload" not in key), f"distributed.strategy={strategy}"])
         for overrides in VARIANTS.values()]
        for strategy in ("fsdp", "ddp")
    )  # fmt: skip
    found = launch(recipe, tmp_path / "out", *(override for pair in zip(sharded, whole, strict=True) for override in pair))
    for number, name in enumerate(VARIANTS):
        fsdp, ddp = found[2 * number], found[2 * number + 1]
        assert fsdp["shares"] == fsdp["frozen"] > 0, name
        assert fsdp["trained_whole"], name
        assert fsdp["bytes_here"] == pytest.approx(fsdp["bytes"] / 2, rel=0.02), name
        if name != "nf4":  # whose scales stay whole
            assert fsdp["foretold"] == pytest.approx(fsdp["bytes_here"], rel=0.02), name
        assert (ddp["shares"], ddp["foretold"]) == (0, None), name
        assert_same(tmp_path / "out" / str(2 * number), tmp_path / "out" / str(2 * number + 1))
    record = RunDir(tmp_path / "out" / "0").provenance()
    assert (record["processes"], record["strategy"], record["sharded"]) == (2, "fsdp", True)
    assert RunDir(tmp_path / "out" / "1").provenance()["strategy"] == "ddp"
    samples = [json.loads(line) for line in (tmp_path / "out" / "8" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 2, 4]


def test_a_run_goes_on_with_shares_and_without(recipe: Path, tmp_path: Path) -> None:
    """A checkpoint knows nothing of shares: begun either way and ended the other, the run is the undisturbed one."""
    fsdp, ddp, half = "distributed.strategy=fsdp", "distributed.strategy=ddp", "training.max_steps=2"
    constant = "training.scheduler=constant"
    launch(
        recipe, tmp_path / "out", *(";".join(run) for run in ([fsdp, constant], [fsdp, constant, half], [ddp, constant, half]))
    )
    out = tmp_path / "out"
    shutil.copytree(out / "1", tmp_path / "alone")
    other = tmp_path / "others"
    other.mkdir()
    (out / "1").rename(other / "0")
    (out / "2").rename(other / "1")
    launch(recipe, other, f"{ddp};{constant}", f"{fsdp};{constant}")
    for number in ("0", "1"):
        assert_same(other / number, out / "0")
    train(recipe, [fsdp, constant, f"output={tmp_path / 'alone'}"])  # alone, there is nothing to share out
    assert RunDir(tmp_path / "alone").provenance()["processes"] == 1
    assert losses(tmp_path / "alone") == pytest.approx(losses(out / "0"), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.offload=true"], "set distributed.strategy to fsdp"),
        (["distributed.strategy=fsdp", "model.quantization=int8"], "set model.quantization to nf4 or none"),
        (["distributed.strategy=fsdp", "training.compile=true"], "training.compile does not go with"),
    ],
)
def test_contradictions_are_found_in_the_recipe(overrides: list[str], message: str, recipe: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_offloading_needs_somebody_to_share_with(recipe: Path) -> None:
    events: list[Event] = []
    with pytest.raises(RunError, match="several processes"):
        train(recipe, ["distributed.strategy=fsdp", "distributed.offload=true"], listen=events.append)
    assert Stage("Reading the data") not in events


def test_a_strategy_that_one_process_has_no_use_for_is_told(recipe: Path, abba: Callable[..., tuple[int, str, str]]) -> None:
    told = "distributed.strategy: fsdp has no effect with one process"
    for override, found in (("distributed.strategy=fsdp", True), ("distributed.strategy=ddp", False), ("training.seed=1", False)):
        code, out, _ = abba("train", recipe, "--dry-run", "--set", override)
        assert (code, told in out) == (0, found)


@pytest.mark.parametrize(
    ("overrides", "memory", "strategy", "line"),
    [
        ([], 10**12, "ddp", "ddp; each holds the whole base"),
        ([], 1, "fsdp", "fsdp; each holds a share of the base"),
        (["distributed.strategy=deepspeed"], 1, "deepspeed, ZeRO 2", "deepspeed, ZeRO 2; each holds the whole base"),
        (
            ["distributed.strategy=deepspeed", "distributed.zero_stage=3"],
            1,
            "deepspeed, ZeRO 3",
            "deepspeed, ZeRO 3; each holds a share of the base",
        ),
    ],
)
def test_the_plan_tells_the_strategy(
    overrides: list[str], memory: int, strategy: str, line: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "check_deepspeed", lambda recipe: None)
    monkeypatch.setattr(preparation, "device_memory", lambda: memory)
    plan = preparation.prepare(load_recipe(recipe, overrides), processes=2).plan
    assert plan.strategy == strategy
    stream = io.StringIO()
    show_plan(Console(file=stream, width=120), plan, everything=False)
    assert f"Strategy of the processes: {line}\n" in stream.getvalue()
