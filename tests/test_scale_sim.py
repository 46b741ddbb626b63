"""The simulation of many devices: what travels is conserved, and the counts are those of the real modules."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for `python benchmarks/scale_sim.py`

from scaling import memory, runs, simulation, steps  # noqa: E402
from scaling.shapes import MODELS, Model  # noqa: E402

from abba_cli import adapting  # noqa: E402
from abba_cli.bases import Base  # noqa: E402

# No latency, and figures that can be followed by hand.
FABRIC = steps.Fabric("a link", within=100.0, between=10.0, latency=0.0)
DEVICE = steps.Device()
SHARDED = steps.Setting(MODELS[1], "nf4", sharded=True)
WHOLE = steps.Setting(MODELS[0], "bf16", sharded=False)


def small(model: Model) -> Model:
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 2})
    return replace(model, config=config)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_are_those_of_the_real_modules(model: Model) -> None:
    model = small(model)
    recipe = memory.recipe("bf16")
    skeleton = adapting.check_adapter(model.config, recipe.model, recipe.adapter, Base(model.source))
    norms = (2 * model.blocks + 1) * model.config.hidden_size
    assert sum(one.numel() for one in skeleton.parameters() if one.requires_grad) == model.trained
    assert sum(one.numel() for one in skeleton.parameters()) == model.in_blocks + model.outside + model.trained + norms


def test_the_models_have_the_size_in_their_names() -> None:
    for model in MODELS:
        assert (model.in_blocks + model.outside) / 1e9 == pytest.approx(float(model.name.removesuffix("B")), rel=0.02)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_ring_delivers_every_byte_once(devices: int) -> None:
    """Simulated message by message: N pieces, each passed on N - 1 times."""
    pieces = [[rank == piece for piece in range(devices)] for rank in range(devices)]
    received = [0.0] * devices
    for turn in range(devices - 1):
        for rank in range(devices):
            piece = (rank - 1 - turn) % devices
            assert pieces[(rank - 1) % devices][piece]
            assert not pieces[rank][piece]
            received[rank] += 600 / devices
            pieces[rank][piece] = True
    assert all(all(row) for row in pieces)
    assert received == pytest.approx([steps.bytes_each(600, devices)] * devices)
    # An all-reduce adds up in one round and hands out in another.
    assert steps.all_reduce_seconds(600, devices, FABRIC) == pytest.approx(2 * received[0] / FABRIC.within)


def test_one_device_sends_nothing() -> None:
    for setting in (WHOLE, SHARDED):
        one = steps.step(setting, 1, FABRIC, DEVICE)
        assert (one.gathers, one.reduction) == (0, 0)
        assert one.total == one.arithmetic
    assert steps.all_reduce_seconds(1e12, 1, FABRIC) == 0


def test_a_whole_base_does_not_travel() -> None:
    assert steps.step(WHOLE, 16, FABRIC, DEVICE).gathers == 0
    assert steps.step(SHARDED, 16, FABRIC, DEVICE).gathers > 0


def test_machines_are_joined_by_the_slower_link() -> None:
    inside, across = (steps.gather_seconds(SHARDED, devices, FABRIC, DEVICE) for devices in (8, 16))
    size = steps.base_bytes(SHARDED)
    assert (inside, across) == pytest.approx((size * 7 / 8 / 100, size * 15 / 16 / 10))
    by_machine = replace(SHARDED, within_machine=True)
    assert steps.gather_seconds(by_machine, 16, FABRIC, DEVICE) == pytest.approx(inside)


def test_four_bits_travel_in_a_quarter_of_the_bytes() -> None:
    outside = 2 * SHARDED.model.outside
    bf16 = steps.base_bytes(replace(SHARDED, base="bf16"))
    assert steps.base_bytes(SHARDED) - outside == (bf16 - outside) / 4


def test_a_step_takes_at_least_its_arithmetic_and_its_travel_and_at_most_both() -> None:
    fabric = steps.Fabric("a link", within=300e9, between=12e9)
    for setting in (WHOLE, SHARDED, replace(SHARDED, offload=True)):
        for devices in (2, 8, 16, 64):
            one = steps.step(setting, devices, fabric, DEVICE)
            assert max(one.arithmetic, one.gathers + one.reduction if setting.sharded else 0) <= one.total * (1 + 1e-12)
            assert one.total <= one.arithmetic + one.gathers + one.reduction
    # The same sequences, on ever more devices.
    halves = [steps.step(WHOLE, devices, fabric, DEVICE).arithmetic for devices in (1, 2, 4)]
    assert halves == pytest.approx([halves[0], halves[0] / 2, halves[0] / 4])
    with pytest.raises(AssertionError):
        steps.step(WHOLE, 3, fabric, DEVICE)


def test_the_arithmetic_is_six_operations_for_each_parameter_and_token_and_what_the_update_adds() -> None:
    forward, backward = steps.arithmetic(WHOLE.model, "bf16", 2048, DEVICE)
    update = sum(steps.abba_seconds(WHOLE.model, 2048, DEVICE, training) for training in (False, True))
    least = 6 * (WHOLE.model.in_blocks + WHOLE.model.outside / 2) * 2048 / DEVICE.flops
    assert 0.98 * least <= forward + backward - update <= 1.05 * least
    assert sum(steps.arithmetic(WHOLE.model, "nf4", 2048, DEVICE)) > forward + backward


def test_only_steps_and_evaluation_shrink_with_devices() -> None:
    fabric = steps.Fabric("a link", within=300e9, between=300e9)
    few, many = (runs.run(SHARDED, runs.Job(), devices, fabric, DEVICE, runs.Rates()) for devices in (8, 64))
    assert few.steps / many.steps == pytest.approx(8)
    assert few.evaluation / many.evaluation == pytest.approx(8, rel=0.1)
    assert few.checkpoints == many.checkpoints
    assert few.input == many.input
    assert few.start == pytest.approx(many.start)
    assert few.total == pytest.approx(sum((few.input, few.start, few.steps, few.checkpoints, few.evaluation)))


def test_the_simplest_strategy_that_fits_is_chosen() -> None:
    sizes = [60e9, 61e9, 30e9, 25e9, 20e9, 20e9]
    found = [
        memory.Need("m", "nf4", strategy, offload, devices, int(size), {}, 0, 0)
        for (strategy, offload, devices), size in zip(memory.LAYOUTS, sizes, strict=True)
    ]
    chosen = [memory.choice(found, card, devices) for card, devices in ((80, 8), (80, 16), (48, 8), (28, 16), (24, 8), (16, 16))]
    assert chosen == ["ddp", "ddp", "fsdp", "fsdp", "fsdp + offload", "too large"]


def test_the_table_is_the_programs_forecast() -> None:
    one, ddp, eight, sixteen, offloaded, _ = memory.needs(small(MODELS[0]), "nf4")
    assert one.uses["base weights"] == ddp.uses["base weights"] == eight.start_bytes
    assert ddp.device_bytes - one.device_bytes == ddp.uses["buckets of gradients"] == 4 * small(MODELS[0]).trained
    assert eight.uses["share of the base"] > sixteen.uses["share of the base"] > offloaded.uses["share of the base"]
    assert offloaded.host_bytes == offloaded.start_bytes


def test_tables_record_and_picture_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["scale_sim.py", "--out", str(tmp_path), "--tflops", "200"])
    simulation.main("")
    assert "| 70B nf4 fsdp | 64 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "scale-sim.json").read_text())
    assert record["assumed"]["device"]["flops"] == 200e12
    assert len(record["steps"]) == len(simulation.SETTINGS) * len(simulation.FABRICS) * len(simulation.DEVICES)
    assert (tmp_path / "scale-sim.png").stat().st_size > 20_000
