"""Checkpoint files that are cut short, have one bit changed, or are empty: the run goes on from the checkpoint before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Faults
from running import goes_on, newest, start, steps_lost

from abba_cli import RunDir

FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content: bytes) -> bytes:
    return b""


DAMAGES = (truncate, flip_a_bit, empty)
SHORT = {("adapter_model.safetensors", flip_a_bit), ("manifest.json", truncate), ("optimizer.pt", empty)}


def damage(file: Path, how: Callable[[bytes], bytes]) -> bytes:
    """Damage a file; returns what it was."""
    content = file.read_bytes()
    file.write_bytes(how(content))
    assert file.read_bytes() != content
    return content


def test_every_damage_to_every_file_is_found(halted: RunDir) -> None:
    checkpoint = halted.checkpoints / "checkpoint-16"
    assert sorted(path.name for path in checkpoint.iterdir()) == list(FILES)
    for name in FILES:
        for how in DAMAGES:
            content = damage(checkpoint / name, how)
            assert newest(halted) == halted.checkpoints / "checkpoint-12", (name, how)
            (checkpoint / name).write_bytes(content)
        (checkpoint / name).rename(checkpoint / "elsewhere")
        assert newest(halted) == halted.checkpoints / "checkpoint-12", name
        (checkpoint / "elsewhere").rename(checkpoint / name)
    assert newest(halted) == checkpoint


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if (name, how) in SHORT else pytest.mark.slow, id=f"{how.__name__}-{name}")
        for name in FILES
        for how in DAMAGES
    ],
)
def test_a_broken_newest_checkpoint(
    recipe: Path, undisturbed: RunDir, halted: RunDir, faults: Faults, name: str, how: Callable[[bytes], bytes]
) -> None:
    with faults.of("newest checkpoint damaged") as tally:
        damage(halted.checkpoints / "checkpoint-16" / name, how)
        tally.add(steps_lost(halted))
        training = goes_on(recipe)
        assert "checkpoint-12,afterstep12of24" in training.said()
        tally.compare(halted, undisturbed)


@pytest.mark.slow
def test_every_checkpoint_broken(recipe: Path, undisturbed: RunDir, halted: RunDir, faults: Faults, tmp_path: Path) -> None:
    """Nothing is deleted, and nothing is begun anew behind the user's back; a good copy is gone on with."""
    with faults.of("every checkpoint damaged") as tally:
        copy = shutil.copytree(halted.checkpoints / "checkpoint-16", tmp_path / "copy")
        names = [checkpoint.name for checkpoint in halted.complete_checkpoints()]
        for name in names:
            damage(halted.checkpoints / name / "optimizer.pt", flip_a_bit)
        training = start(recipe)
        assert training.ended() == 1
        assert f"iswhole(filesdifferfrommanifest.jsonin{','.join(names)})" in training.said()
        assert "bringagoodcopyback,or--restarttostartover" in training.said()
        shutil.rmtree(halted.checkpoints / "checkpoint-16")
        shutil.copytree(copy, halted.checkpoints / "checkpoint-16")
        tally.add(steps_lost(halted))
        goes_on(recipe)
        tally.compare(halted, undisturbed)
