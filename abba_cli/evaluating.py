"""`abba eval` as a function: a model, and perhaps its base beside it, scored on tasks; results in a folder."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import PeftModel

from abba_cli import __version__
from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import DataError, RunError
from abba_cli.evaluation.fingerprint import fingerprint
from abba_cli.evaluation.harness.scoring import check_tasks, score_with_harness
from abba_cli.evaluation.journal import HARNESS_FOLDER, Journal, check_folder, locked
from abba_cli.evaluation.options import EvaluationOptions
from abba_cli.evaluation.paper import score_paper
from abba_cli.evaluation.questions import TaskItems, read_items
from abba_cli.evaluation.reporting.statistics import wilson_interval
from abba_cli.evaluation.reporting.tables import results_markdown
from abba_cli.evaluation.results import RESULTS_FILE, ModelRecord, Results, TaskResult, added_to, read_results, write_results
from abba_cli.evaluation.sandbox import missing_protections
from abba_cli.evaluation.scores import TaskScore, beside_baseline
from abba_cli.evaluation.tasks import GROUPS, find_tasks
from abba_cli.evaluation.vllm import check_vllm, serving
from abba_cli.events import Listener, Note, Stage, ignore
from abba_cli.processes import join_processes
from abba_cli.saved_adapter import SavedAdapter, open_adapter
from abba_cli.speakers import RUNS, Source, Speaker, load_for_generation, named_adapter


def evaluate(source: Source, options: EvaluationOptions, listen: Listener = ignore) -> tuple[Results, Path]:
    """Score a model.

    Args:
        source: The model: an adapter, a hub id or a directory; nothing is the newest finished run under out/.
        options: Tasks and settings.
        listen: Called with each event.

    Returns:
        The results and the folder that holds them. Of several processes only the first one's results are whole.

    Raises:
        DataError: A task is unknown or its data cannot be had.
        ModelError: The model cannot be had, or is too large for the memory.
        RunError: The output cannot be written, or code may not be run here.
    """
    start = time.monotonic()
    state = join_processes()
    notes = listen if state.is_main_process else ignore
    saved = open_adapter(named_adapter(source.adapter)) if source.model is None else None
    folder = options.output.expanduser() if options.output else default_output(source, saved)
    if state.is_main_process:
        check_folder(folder)
    tasks = _read_tasks(options, notes) if options.protocol == "paper" else []
    if options.protocol == "harness":
        _check_harness(options)
    if options.backend == "vllm":
        check_vllm(source.quantization, options.baseline)
    notes(Stage("Loading the model"))
    speakers = load_for_generation(source, options.baseline)
    if source.model is None and speakers[-1].label.rstrip("/") != (source.adapter or "").rstrip("/"):
        notes(Note(f"scoring {speakers[-1].label}, the newest finished run there"))
    with locked(folder) if state.is_main_process else nullcontext():
        journal = Journal(folder, state.process_index)
        if options.fresh and state.is_main_process:
            journal.clear()
        state.wait_for_everyone()
        notes(Stage("Reading the weights"))
        models = [_model_record(one, source, options) for one in speakers]
        _tell_of_others(journal, models, notes)
        scores: list[list[TaskScore]] = []
        for place, model in enumerate(models):
            # The base is scored first: after this its weights hold the update.
            speaker = speakers[place] = merged_in_place(speakers[place], source)
            if options.protocol == "harness":
                scores.append(score_by_harness(speaker, model, options, folder, notes))
            else:
                with serving(speaker) if options.backend == "vllm" else nullcontext() as backend:
                    scores.append(score_paper(speaker, model, tasks, options, journal, notes, backend))
        results = Results(
            abba=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
            settings={**_settings(source, options), "processes": state.num_processes},
            models=tuple(models),
            results=tuple(_with_differences(scores)),
        )
        if state.is_main_process:
            if (folder / RESULTS_FILE).is_file() and not options.fresh:
                results = added_to(read_results(folder), results)
            write_results(folder, results)
            with disk_errors(folder):
                write_atomically(folder / "results.md", results_markdown(results))
    return results, folder


def default_output(source: Source, saved: SavedAdapter | None) -> Path:
    """Where results go when nobody says: into the run, or out/eval/NAME for what is no run of ours.

    Args:
        source: What was named.
        saved: The adapter on disk, if it is one.
    """
    if saved is not None and saved.run is not None:
        run = saved.run.path
        return run / "eval" / saved.path.name if saved.path.absolute() != run.absolute() else run / "eval"
    named = source.model or source.adapter or str(saved.path if saved else "")
    return RUNS / "eval" / named.strip("/.").replace("/", "--")


def merged_in_place(speaker: Speaker, source: Source) -> Speaker:
    """The speaker with its adapter in the weights, where they are no quantised ones: as fast as the base, in the same memory."""
    if speaker.adapter_off or source.quantization != "none" or not isinstance(speaker.model, PeftModel):
        return speaker
    return replace(speaker, model=speaker.model.merge_and_unload())


def score_by_harness(
    speaker: Speaker, model: ModelRecord, options: EvaluationOptions, folder: Path, listen: Listener
) -> list[TaskScore]:
    """Score tasks through lm-evaluation-harness; its answers are kept in the output folder's harness/."""
    found = score_with_harness(
        speaker,
        _expanded(options.tasks),
        fingerprint=model.fingerprint,
        cache=folder / HARNESS_FOLDER,
        limit=options.limit,
        shots=options.shots,
        seed=options.seed,
        batch_size=options.batch_size or "auto",
        data_dir=options.data_dir,
        chat_template=options.harness_chat,
        notify=listen,
    )
    scores = []
    for one in found:
        interval = None if one.stderr is None else (one.value - 1.96 * one.stderr, one.value + 1.96 * one.stderr)
        if one.scores and set(one.scores.values()) <= {0.0, 1.0}:
            interval = wilson_interval(sum(one.scores.values()), len(one.scores))
        result = TaskResult(
            task=one.task,
            model=model.label,
            protocol="harness",
            metric=one.metric,
            primary=one.primary,
            value=one.value,
            n=one.n,
            stderr=one.stderr,
            interval=interval,
            prompt_hash=one.prompt_hash,
            shots=one.shots,
            sampling="the task's own",
            grader="harness",
            extraction_failures=one.extraction_failures,
            unmarked=None,
            disagreements=None,
            unreadable_rows=0,
            data=one.data,
            difference=None,
            examples=one.examples,
        )
        scores.append(TaskScore(result, one.scores))
    return scores


def _expanded(names: Sequence[str]) -> list[str]:
    """Our groups as their tasks; everything else as it is."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name.lower(), (name,))))


def _check_harness(options: EvaluationOptions) -> None:
    """Refuse what the harness cannot do, before a model is loaded."""
    check_tasks(_expanded(options.tasks))
    own = EvaluationOptions(options.tasks)
    asked = {
        "--split": options.split != own.split,
        "--samples": options.samples != own.samples,
        "--sampling": options.sampling != own.sampling,
        "--temperature": options.temperature != own.temperature,
        "--grader": options.grader != own.grader,
        "--backend": options.backend != own.backend,
    }
    if refused := [name for name, given in asked.items() if given]:
        raise DataError(f"{', '.join(refused)} goes with --protocol paper; the harness's tasks have their own")


def _read_tasks(options: EvaluationOptions, listen: Listener) -> list[TaskItems]:
    """The rows of all tasks, and all that can be refused before a model is loaded."""
    tasks = find_tasks(options.tasks)
    code = [task.name for task in tasks if task.runs_code]
    if code and not options.allow_code_execution:
        raise RunError(
            f"{', '.join(code)} runs programs that the model has written; give --allow-code-execution to run them in a sandbox"
        )
    if options.samples > 1 and any(options.decoding(task).temperature == 0 for task in tasks):
        raise DataError("--samples above 1 needs draws: all greedy answers to a row are the same; give --temperature 0.8, say")
    if code and (missing := missing_protections()):
        if not options.weaker_sandbox:
            raise RunError(
                "the sandbox lacks protections on this machine; --sandbox weaker runs without them:\n  " + "\n  ".join(missing)
            )
        for one in missing:
            listen(Note(f"sandbox without {one}"))
    found = []
    for task in tasks:
        listen(Stage(f"Reading {task.name}"))
        items = read_items(
            task,
            split=options.split,
            data_dir=options.data_dir,
            limit=options.limit,
            shots=options.shots or 0,
            seed=options.seed,
        )
        for line in items.unreadable[:5]:
            listen(Note(f"not scored: {line}"))
        if len(items.unreadable) > 5:
            listen(Note(f"not scored: {len(items.unreadable) - 5} more rows of {task.name} that cannot be read"))
        found.append(items)
    return found


def _model_record(speaker: Speaker, source: Source, options: EvaluationOptions) -> ModelRecord:
    return ModelRecord(
        label=speaker.label,
        role="model" if speaker.saved is not None or speaker.label == source.model else "baseline",
        base=speaker.base,
        adapter=str(speaker.saved.path) if speaker.saved else None,
        fingerprint=fingerprint(speaker.model, speaker.adapter_off),
        template="paper" if options.paper_prompt else speaker.template.name,
        dtype=str(next(speaker.model.parameters()).dtype).removeprefix("torch."),
        quantization=source.quantization,
    )


def _tell_of_others(journal: Journal, models: Sequence[ModelRecord], listen: Listener) -> None:
    here = {model.fingerprint for model in models}
    others = [record for record in journal.read().values() if record.get("fingerprint") not in here]
    if others:
        names = sorted({str(record.get("model")) for record in others})
        listen(
            Note(
                f"{journal.folder} also holds {len(others)} answers of other weights ({', '.join(names)}); they are kept and not "
                "used (--fresh removes them)"
            )
        )


def _with_differences(scores: Sequence[Sequence[TaskScore]]) -> list[Any]:
    if len(scores) == 1:
        return [one.result for one in scores[0]]
    baseline, own = scores
    return [*(one.result for one in baseline), *(beside_baseline(one, baseline) for one in own)]


def _settings(source: Source, options: EvaluationOptions) -> dict[str, Any]:
    """The options, as JSON holds them."""
    named = {key: value for key, value in asdict(source).items() if value is not None}
    settings: dict[str, Any] = json.loads(json.dumps({**named, **asdict(options)}, default=str))
    return settings
