"""The paper's protocol: ask every row of a task, keep each answer, judge it, and add the judgements up."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import PartialState

from abba_cli import __version__
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Completion, Request, answer_batches, default_batch_size, plan_batches, within_positions
from abba_cli.evaluation.grading.judging import Grade, grade
from abba_cli.evaluation.journal import Journal, answer_key
from abba_cli.evaluation.options import EvaluationOptions
from abba_cli.evaluation.questions import Question, TaskItems, ask
from abba_cli.evaluation.results import ModelRecord
from abba_cli.evaluation.scores import TaskScore, task_scores
from abba_cli.events import Listener, Note, Scored
from abba_cli.speakers import Speaker

Record = dict[str, Any]


class Backend(Protocol):
    """Something that answers batches of requests, such as `engine.answer_batches`."""

    def __call__(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[list[Completion]]:
        """Answer batches one after the other."""


@dataclass(frozen=True)
class _Asked:
    """One answer to be had: a question, which of its samples, and the digest of all that the answer depends on."""

    question: Question
    sample: int
    request: Request
    key: str


def score_paper(
    speaker: Speaker,
    model: ModelRecord,
    tasks: Sequence[TaskItems],
    options: EvaluationOptions,
    journal: Journal,
    listen: Listener,
    backend: Backend | None = None,
) -> list[TaskScore]:
    """Score tasks under the paper's protocol.

    Several processes share the batches; the first one adds up, the others return nothing.

    Args:
        speaker: Who answers.
        model: What is recorded about it.
        tasks: The rows.
        options: The settings.
        journal: Holds earlier answers, and takes the new ones.
        listen: Called with each event.
        backend: What generates; None is transformers on the speaker's model.

    Raises:
        ModelError: Memory runs out with one prompt at a time.
        RunError: The journal cannot be written, or the sandbox lacks protections.
    """
    state = PartialState()
    known = journal.read()
    asked = [_asked(speaker, model, one, options, listen) for one in tasks]
    for items, wanted in zip(tasks, asked, strict=True):
        _answer_all(speaker, model, items, wanted, known, options, journal, listen, backend)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    if state.num_processes > 1:
        known = journal.read()
    scores: list[TaskScore] = []
    for items, wanted in zip(tasks, asked, strict=True):
        judged = []
        for one in wanted:
            record = known[one.key]
            if record["graded"] != _grading(items, one, options):
                record |= _judge(items, one, record["response"], options)
            judged.append((one.question, record))
        scores += task_scores(items, judged, model, options)
    journal.rewrite(list(known.values()))
    return scores


def _asked(speaker: Speaker, model: ModelRecord, items: TaskItems, options: EvaluationOptions, listen: Listener) -> list[_Asked]:
    decoding = options.decoding(items.task)
    ends = speaker.template.stop_token_ids
    found = []
    cut = 0
    for question in ask(items, speaker.template, options.paper_prompt):
        whole = Request(0, question.ids, question.stop, items.task.max_tokens)
        request = within_positions(whole, speaker.positions)
        cut += request is None
        for sample in range(decoding.samples):
            key = answer_key(
                model.fingerprint, items.task.name, question.item.number, whole, ends, decoding, sample, options.backend
            )
            number = question.item.number * decoding.samples + sample
            found.append(
                _Asked(question, sample, Request(number, question.ids, question.stop, request.max_tokens if request else 0), key)
            )
    if cut:
        listen(
            Note(f"{items.task.name}: {cut} prompts are longer than the {speaker.positions:,} positions of the model; scored 0")
        )
    return found


def _answer_all(
    speaker: Speaker,
    model: ModelRecord,
    items: TaskItems,
    wanted: Sequence[_Asked],
    known: dict[str, Record],
    options: EvaluationOptions,
    journal: Journal,
    listen: Listener,
    backend: Backend | None,
) -> None:
    """Have every answer in the journal that this process is to give."""
    state = PartialState()
    decoding = options.decoding(items.task)
    by_number = {one.request.number: one for one in wanted}
    size = options.batch_size or default_batch_size(state.device)
    # A prompt without room for an answer is never asked.
    batches = plan_batches([one.request for one in wanted if one.request.max_tokens], size)
    mine = batches[state.process_index :: state.num_processes]
    numbers = {request.number for batch in mine for request in batch}
    for one in wanted:
        if not one.request.max_tokens and one.key not in known:
            _keep(_record(model, items, one, Completion(one.request.number, "", 0, False), options), known, journal)
    have = [one for number, one in by_number.items() if number in numbers and one.key in known]
    done, correct = len(have), sum(known[one.key]["score"] for one in have)
    reused = done
    listen(Scored(model.label, items.task.name, done, len(numbers), correct, reused))
    waiting = [[request for request in batch if by_number[request.number].key not in known] for batch in mine]
    if backend is None:
        answers = answer_batches(
            speaker,
            [batch for batch in waiting if batch],
            decoding,
            lambda smaller: listen(Note(f"out of memory; going on with {smaller} prompts at a time")),
            lambda tokens, most: listen(Scored(model.label, items.task.name, done, len(numbers), correct, reused, tokens, most)),
        )
    else:
        answers = backend([batch for batch in waiting if batch], decoding)
    for batch in answers:
        for completion in batch:
            record = _record(model, items, by_number[completion.number], completion, options)
            _keep(record, known, journal)
            done, correct = done + 1, correct + record["score"]
        # By the batch: its rows come all at once, and the time left would jump with each.
        listen(Scored(model.label, items.task.name, done, len(numbers), correct, reused))


def _keep(record: Record, known: dict[str, Record], journal: Journal) -> None:
    known[record["key"]] = record
    journal.add(record)


def _record(model: ModelRecord, items: TaskItems, one: _Asked, completion: Completion, options: EvaluationOptions) -> Record:
    return {
        "key": one.key,
        "model": model.label,
        "fingerprint": model.fingerprint,
        "task": items.task.name,
        "row": one.question.item.number,
        "sample": one.sample,
        "prompt": one.question.text,
        "response": completion.text,
        "tokens": completion.tokens,
        "complete": completion.complete,
        "gold": one.question.item.gold,
        **_judge(items, one, completion.text, options),
    }


def _judge(items: TaskItems, one: _Asked, response: str, options: EvaluationOptions) -> Mapping[str, Any]:
    item = one.question.item
    found: Grade = grade(items.task, item.row, item.answer, response, options.grader, options.weaker_sandbox)
    return {
        "prediction": found.prediction,
        "score": found.score,
        "marked": found.marked,
        "other_grader": found.other,
        "note": found.note,
        "graded": _grading(items, one, options),
    }


def _grading(items: TaskItems, one: _Asked, options: EvaluationOptions) -> str:
    """Digest of what a judgement depends on besides the answer, so that a stored one is not taken for another's."""
    task, item = items.task, one.question.item
    parts = [
        task.metric,
        task.choices,
        task.pattern,
        item.answer,
        item.row if task.runs_code else None,
        options.grader,
        __version__,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]
