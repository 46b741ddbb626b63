"""The protocol `harness`: a model in memory scored by lm-evaluation-harness, in numbers that the field can compare."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from abba_cli.errors import AbbaError, DataError, ModelError
from abba_cli.evaluation.harness.scores import HarnessScore, scores_of
from abba_cli.evaluation.harness.tasks import check_tasks, harness_name, is_file, quiet_harness, task_manager
from abba_cli.events import Event, Note, Stage, ignore
from abba_cli.speakers import Speaker

__all__ = ["HarnessScore", "check_tasks", "harness_name", "score_with_harness"]


def score_with_harness(
    speaker: Speaker,
    tasks: Sequence[str],
    *,
    fingerprint: str,
    cache: Path,
    limit: int | None,
    shots: int | None,
    seed: int,
    batch_size: int | str,
    data_dir: Path | None,
    chat_template: bool,
    notify: Callable[[Event], None],
) -> list[HarnessScore]:
    """Score a model; every process of several returns the same.

    Args:
        speaker: The model, which is left as it was.
        tasks: Our names or the harness's, see `check_tasks`.
        fingerprint: Digest of the model: answers that are kept under it are used again.
        cache: Folder for the answers as they come.
        limit: Documents of each task; None is all.
        shots: Worked examples; None is what each task has by itself, which a task that fixes zero keeps.
        seed: Of the choice of worked examples, and of draws.
        batch_size: Rows at once, or `auto`; halved whenever memory runs out.
        data_dir: Folder of local data in the sources' own columns.
        chat_template: Put the prompts into the tokenizer's chat template.
        notify: Told of every batch, in the main process.

    Returns:
        Scores in the order of the tasks; for a group its own before those of its members.

    Raises:
        ModelError: The harness is not installed, or the model cannot do what a task asks.
        DataError: A task is unknown or refused, its rows cannot be had, or there is no chat template.
    """
    check_tasks(tasks)
    if chat_template and not speaker.template.tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; leave --prompt chat out")
    from abba_cli.evaluation.harness.model import AskedModel

    if not PartialState().is_main_process:
        notify = ignore
    scores: list[HarnessScore] = []
    model = speaker.model
    training = model.training
    with quiet_harness(), model.disable_adapter() if speaker.adapter_off else nullcontext():
        model.eval()
        asked = AskedModel(speaker, fingerprint, cache, seed, batch_size, notify)
        try:
            for task in tasks:
                asked.task = task
                notify(Stage(f"{task}: reading"))
                loaded, came_from = _load(task, shots, seed, limit, data_dir)
                with _telling_of_cuts(asked, notify):
                    found = _evaluate(asked, loaded, limit, chat_template)
                scores += scores_of(task, found, loaded, came_from)
        finally:
            asked.close()
            model.train(training)
    return scores


def _load(
    task: str, shots: int | None, seed: int, limit: int | None, data_dir: Path | None
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """A task of the harness, or the tasks of a group or tag, with their rows."""
    from abba_cli.evaluation.harness.data import check_rows, explain_local, served_data

    came_from: Mapping[str, str] = {}
    with _own_draws(), _no_bars():
        try:
            with served_data(task, data_dir, shots) as came_from:
                name = str(Path(task).expanduser()) if is_file(task) else harness_name(task)
                loaded: dict[str, Any] = task_manager([task]).load([name])
        except AbbaError:
            raise
        except (ImportError, AssertionError) as error:
            raise ModelError(f"task {task} needs what is not installed: {' '.join(str(error).split())}") from error
        except Exception as error:
            if (mine := explain_local(error, task, came_from)) is not None:
                raise mine from error
            raise
        for name, built in loaded["tasks"].items():
            if getattr(built, "UNSAFE_CODE", False):
                raise DataError(f"task {name} runs code that the model writes; it is not scored without a sandbox")
            own = built.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                built.set_config(key="num_fewshot", value=shots or 0)
            built.set_fewshot_seed(seed=seed)
            if Path(came_from.get(name, "")).is_file():
                check_rows(built, came_from[name], limit)
    return loaded, came_from


def _evaluate(asked: Any, loaded: dict[str, Any], limit: int | None, chat_template: bool) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    aggregations = [one for task in loaded["tasks"].values() for one in task.aggregation().values()]
    closed = all(getattr(one, "__name__", "") in ("mean", "acc_all") for one in aggregations)
    with _no_bars(), _own_draws():
        found: dict[str, Any] = evaluate(
            lm=asked,
            task_dict=loaded,
            limit=limit,
            # Above zero asks for standard errors; those that need draws it makes in processes of its own, so they are left out.
            bootstrap_iters=1 if closed else 0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    return found


@contextmanager
def _telling_of_cuts(asked: Any, notify: Callable[[Event], None]) -> Iterator[None]:
    """Pass on, once, that prompts did not fit into the model's positions: the harness only logs it."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    told: list[str] = []

    def watch(record: logging.LogRecord) -> bool:
        if "truncat" in record.getMessage().lower() and not told:
            told.append(record.getMessage())
            notify(
                Note(f"{asked.task}: prompts that are longer than the model's {asked.max_length:,} positions lose their start")
            )
        return record.levelno >= logging.ERROR

    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(watch)
    try:
        yield
    finally:
        logger.removeFilter(watch)
        logger.setLevel(level)


@contextmanager
def _own_draws() -> Iterator[None]:
    """Some tasks shuffle their choices with the global generators, which the harness seeds so by default."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the harness's bar over the prompts of a task, which nothing turns off, and those of `datasets` off the screen."""
    import datasets
    import lm_eval.api.task

    bar = lm_eval.api.task.tqdm
    bars = not datasets.are_progress_bars_disabled()
    lm_eval.api.task.tqdm = lambda items, **settings: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
