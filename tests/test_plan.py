"""The plan's counts against the real model's, and what importing the libraries takes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

from abba_cli import load_recipe, train
from abba_cli.events import Event, Planned
from abba_cli.forecast.prediction import RUNTIME_BYTES
from abba_cli.preparation import prepare

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize("override", ["adapter.targets=all-linear", "adapter.modules_to_save=[norm]", "adapter.layers=[1]"])
def test_parameters_are_those_of_the_trained_model(recipe_file: RecipeFile, override: str) -> None:
    events: list[Event] = []
    run = train(recipe_file(), [override, "training.max_steps=1"], listen=events.append)
    plan = next(event.plan for event in events if isinstance(event, Planned))
    model = AutoPeftModelForCausalLM.from_pretrained(run.path, is_trainable=True)
    assert plan.trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert plan.total == sum(one.numel() for one in model.parameters())
    factors = sum(sum(layer.ranks) * (layer.m + layer.n) for layer in plan.layers)
    assert factors == sum(layer.parameters for layer in plan.layers)
    assert factors == sum(one.numel() for name, one in model.named_parameters() if "abba_" in name)


def test_steps_and_tokens(recipe_file: RecipeFile) -> None:
    overrides = ["training.max_steps=null", "training.epochs=1.5", "training.batch_size=5", "training.gradient_accumulation=2"]
    plan = prepare(load_recipe(recipe_file(), overrides)).plan
    # 24 rows: 5 batches an epoch, 3 steps an epoch, 4.5 steps in all.
    assert plan.steps == 5
    run = train(recipe_file(), overrides)
    assert run.metrics()[-1]["step"] == 5


def test_memory_of_libraries_is_what_importing_them_takes() -> None:
    # Not getrusage: its peak begins with what the parent holds, and this process is the whole suite's.
    script = "import abba_cli.training; from abba_cli.memory import peak_process_memory; print(peak_process_memory())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert 0.5 < int(done.stdout) / RUNTIME_BYTES < 1.5
