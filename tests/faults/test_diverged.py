"""Losses that are no number: training stops before a checkpoint takes them in, and the one before is gone on from."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from breaking import spoil_losses
from conftest import Faults
from running import goes_on, newest, start, steps_lost
from safetensors.torch import load_file, save_file

from abba_cli import RunDir


@pytest.mark.parametrize("factor", [pytest.param(float("nan"), marks=pytest.mark.slow), float("inf")])
def test_a_loss_that_is_no_number_once(recipe: Path, undisturbed: RunDir, faults: Faults, factor: float) -> None:
    """Step 16 would be saved: a bit flips in memory, say, and the same step computed again is a good one."""
    with faults.of("a loss that is no number") as tally:
        training = start(recipe, before=partial(spoil_losses, 16, factor))
        assert training.ended() == 1
        assert f"thelossis{factor}atstep16;trainingstopped," in training.said()
        assert "checkpoint-12iskept" in training.said()
        tally.add(steps_lost(training.run))
        goes_on(recipe)
        tally.compare(training.run, undisturbed)


@pytest.mark.slow
def test_a_learning_rate_that_breaks_the_weights(recipe: Path, faults: Faults) -> None:
    """Each start comes to the same end, and none of them saves it."""
    overrides = ["training.learning_rate=1e30", "training.warmup_ratio=0.5", "training.max_grad_norm=0"]
    with faults.of("a learning rate that breaks the weights") as tally:
        for _ in range(2):
            training = start(recipe, *overrides, "checkpoints.every_steps=1")
            assert training.ended() == 1
            assert "trainingstopped," in training.said()
            assert "Lowertraining.learning_rate(1e+30)" in training.said()
        checkpoint = newest(training.run)
        assert checkpoint is not None
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "adapter_model.safetensors").values())
        tally.add()


@pytest.mark.parametrize(
    "weight", ["model.norm.weight", pytest.param("model.layers.1.mlp.down_proj.weight", marks=pytest.mark.slow)]
)
def test_a_base_with_an_infinite_weight(recipe: Path, tiny_llama: Path, faults: Faults, tmp_path: Path, weight: str) -> None:
    with faults.of("a base with an infinite weight") as tally:
        base = shutil.copytree(tiny_llama, tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        weights[weight].view(-1)[5] = torch.inf
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        training = start(recipe, f"model.name={base}")
        assert training.ended() == 1
        assert "atstep1;trainingstopped,therewasnocheckpointyet." in training.said()
        assert "lookatthefilesofthebase" in training.said()
        tally.add()
