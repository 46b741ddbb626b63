"""The run directory: the one contract between `abba train` and every other command.

out/my-run/
  adapter_config.json, adapter_model.safetensors   the trained adapter, as PEFT loads it (written at the end)
  tokenizer*.json, chat_template.jinja             the tokenizer that it was trained with
  recipe.yaml          the recipe as resolved, every key written out
  metrics.jsonl        one line for each logged step and each evaluation
  loss.png             the losses drawn
  samples.jsonl        sample answers, where the recipe asks for them
  provenance.json      versions, base, data fingerprints, hardware, time and memory
  README.md            the model card
  checkpoints/checkpoint-N/   a state to go on from; complete when its manifest.json fits its files
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from abba_cli.disk import disk_errors, sync, take_lock, write_atomically
from abba_cli.errors import RecipeError, RunError
from abba_cli.recipe import Recipe
from abba_cli.recipe_file import differences, dump_recipe, load_recipe
from abba_cli.records import is_record
from abba_cli.sealing import is_complete, is_sealed, remove_checkpoint

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_LEFT_BY_A_START = {".lock", ".provenance.json.partial"}  # that was killed before its first file
_BATCH = ("training.batch_size", "training.gradient_accumulation")
# A run may be continued with other values of these: they set how long it runs, what is reported, and how much memory a step
# takes, not what it computes.
# The data's content is held by its fingerprint, so that a folder may be moved.
_MAY_CHANGE = (
    "output",
    "training.max_steps",
    "training.epochs",
    "training.gradient_checkpointing",
    "checkpoints.",
    "logging.",
    "evaluation.",
    "distributed.",
)


@dataclass(frozen=True)
class RunDir:
    """A run directory on disk.

    Args:
        path: The folder, which need not exist yet.
    """

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def is_run(self) -> bool:
        """Whether this is a directory of ours: its provenance.json, the first file written, names abba."""
        try:
            return "abba" in self.provenance()
        except RunError:
            return False

    @property
    def finished(self) -> bool:
        """Whether the adapter stands at the top and the provenance, written last, tells how the run ended."""
        if not all((self.path / name).is_file() for name in (*ADAPTER_FILES, self.provenance_file.name)):
            return False
        return self.provenance().get("outcome") is not None

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return load_recipe(self.recipe_file)

    def provenance(self) -> dict[str, Any]:
        """What `provenance.json` records.

        Raises:
            RunError: The file is missing or broken.
        """
        try:
            loaded = json.loads(self.provenance_file.read_text(encoding="utf-8"))
            if not is_record(loaded):
                raise ValueError("it holds no record of a run")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"cannot read {self.provenance_file}: {error}; the run has not finished, or the file is broken"
            ) from None
        return cast(dict[str, Any], loaded)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged metrics, in order; a last line cut short by a kill is left out."""
        if not self.metrics_file.exists():
            return []
        return _rows(self.metrics_file)

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints whose manifest fits their files, oldest first."""
        return [path for path in self._checkpoint_folders() if is_complete(path)]

    def _checkpoint_folders(self) -> list[Path]:
        folders = [path for path in self.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(folders, key=checkpoint_step)

    def forget_after(self, step: int) -> None:
        """Drop what a killed run wrote after the checkpoint it goes on from: later metrics, samples and checkpoints."""
        for file in (self.metrics_file, self.samples_file):
            if file.exists():
                kept = [json.dumps(row) + "\n" for row in _rows(file) if row["step"] <= step]
                write_atomically(file, "".join(kept))
        for folder in self._checkpoint_folders():
            if checkpoint_step(folder) > step:
                remove_checkpoint(folder)

    def sync_logs(self) -> None:
        """Bring metrics and samples to the disk: a checkpoint that is to outlive a power cut must not outlive its own metrics."""
        for file in (self.metrics_file, self.samples_file):
            if file.exists():
                sync(file)

    def clear(self) -> None:
        """Remove what an earlier run left that the next one would not overwrite, so that it can start over."""
        for folder in self._checkpoint_folders():
            remove_checkpoint(folder)
        # Not provenance.json, by which the folder is known as a run; it is written over.
        for name in (*ADAPTER_FILES, "recipe.yaml", "metrics.jsonl", "loss.png", "samples.jsonl", "README.md"):
            (self.path / name).unlink(missing_ok=True)
        for partial in self.path.glob(".*.partial"):
            partial.unlink()


def open_run(recipe: Recipe, restart: bool = False, processes: int = 1) -> tuple[RunDir, Path | None]:
    """Decide what the output directory means for this recipe, without writing to it.

    Args:
        recipe: The recipe; `output` is the directory.
        restart: Start over in a directory that holds a run.
        processes: Processes that train together.

    Returns:
        The run directory and the checkpoint to go on from (None starts from the beginning).

    Raises:
        RunError: The directory is not a run, belongs to another recipe, or its checkpoints are all broken.
    """
    run = RunDir(Path(recipe.output).expanduser())
    try:
        run.path.exists()
    except OSError as error:  # a name that is too long
        raise RunError(f"output {run.path} cannot be used: {error.strerror}; choose another output") from None
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"output {run.path} is a file; expected a run directory or a name that is free")
    nearest = next(folder for folder in (run.path.absolute(), *run.path.absolute().parents) if folder.is_dir())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to {nearest}; choose another output")
    if not run.path.exists() or {path.name for path in run.path.iterdir()} <= _LEFT_BY_A_START:
        return run, None
    if not run.is_run:
        if run.provenance_file.is_file():
            run.provenance()  # tells what is wrong with it
        raise RunError(f"output {run.path} is not empty and not a run (no provenance.json of abba in it); choose another output")
    if restart:
        return run, None
    checkpoints = run.complete_checkpoints()
    damaged = [path.name for path in run._checkpoint_folders() if is_sealed(path)]
    if not checkpoints and damaged:
        raise RunError(
            f"no checkpoint in {run.checkpoints} is whole (files differ from manifest.json in {', '.join(damaged)}); "
            "bring a good copy back, or --restart to start over"
        )
    if not checkpoints and not run.finished:
        return run, None  # a start that died before its first checkpoint
    try:
        before = run.recipe()
    except RecipeError as error:
        raise RunError(
            f"the run in {run.path} cannot be continued, its recipe is not readable (--restart starts over): {error}"
        ) from None
    rows = run.provenance().get("rows_per_step")
    # The same rows, in smaller or larger parts; as they are in the recipe, or shared out over the processes already.
    same = not recipe.training.group_by_length and (_rows_of(recipe) == _rows_of(before) or _rows_of(recipe) * processes == rows)
    may = (*_MAY_CHANGE, *_BATCH) if same else _MAY_CHANGE
    changed = {key: values for key, values in differences(before, recipe).items() if not (key.startswith(may) or _is_place(key))}
    if changed:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
        if rows and not changed.keys().isdisjoint(_BATCH):
            lines.append(
                f"An optimizer step keeps its {rows} rows, shared out over any number of processes: leave the batch as it was."
            )
        advice = "Choose another output, or --restart to start over and lose what is there."
        raise RunError("\n".join([f"output {run.path} holds a run of another recipe:", *lines, advice]))
    if not checkpoints:
        raise RunError(
            f"the run in {run.path} has finished, but no complete checkpoint is left to go on from; --restart starts over"
        )
    if "fingerprint" not in run.provenance().get("data", {}):
        raise RunError(f"{run.provenance_file} does not tell of the data; bring a good copy back, or --restart to start over")
    return run, checkpoints[-1]


def _rows_of(recipe: Recipe) -> int:
    """Rows of an optimizer step, of one process."""
    return recipe.training.batch_size * recipe.training.gradient_accumulation


def _is_place(key: str) -> bool:
    """Whether a key only tells where rows are found."""
    return key.startswith(("data.train", "data.eval")) and key.endswith(".path")


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_old_checkpoints(run: RunDir, keep: int, best: Path | None) -> None:
    """Keep the newest `keep` complete checkpoints and the best one; broken ones go too."""
    complete = run.complete_checkpoints()
    kept = {path.name for path in complete[-keep:]} | ({best.name} if best else set())
    for path in run._checkpoint_folders():
        if path.name not in kept:
            remove_checkpoint(path)
    sync(run.checkpoints)


@contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """Create the folder and keep other processes from training in it; the lock dies with the process.

    Folders that were made for it go again if nothing comes into them.

    Raises:
        RunError: Another process is training in the folder, or there can be none.
    """
    new = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        sync(run.path.parent)
        stream = take_lock(run.path / ".lock")
    if stream is None:
        raise RunError(f"another process is training in {run.path}; wait for it, or choose another output")
    try:
        yield
    finally:
        (run.path / ".lock").unlink(missing_ok=True)
        stream.close()
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


def check_still_newest(run: RunDir, checkpoint: Path | None) -> None:
    """Make sure, once the folder is locked, that the answer of `open_run` still holds.

    Raises:
        RunError: Another process has trained in the folder since then.
    """
    if run.complete_checkpoints()[-1:] != ([checkpoint] if checkpoint else []):
        raise RunError(f"another process has trained in {run.path} meanwhile; run the same command again to go on from there")


def write_recipe(run: RunDir, recipe: Recipe) -> None:
    """Write the resolved recipe into the run directory."""
    with disk_errors(run.path):
        write_atomically(run.recipe_file, dump_recipe(recipe))


def _rows(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that tell of a step."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
