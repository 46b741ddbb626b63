"""Score the quickstart's adapter: exact answers to held-out word problems, with the adapter switched off and on.

    python recipes/quickstart/score.py out/quickstart [--limit N]

Both passes see the same prompts, decode greedily and are graded by the same rule (see `extract_answer`), which asks for
the number only: an answer in words of its own counts as well as one in the wording of the training data.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from peft import PeftModel

    from abba_cli.prompts import Template

HELDOUT_FILE = Path(__file__).parent.parent / "data" / "word_problems_heldout.jsonl"
MAX_NEW_TOKENS = 96
"""The longest worked answer of the data has about 60."""

ANSWER_MARKER = re.compile(r"the answer is:?", re.IGNORECASE)
# A minus belongs to the number unless it follows a number, word or bracket, where it is a subtraction. Commas are only
# read between groups of three digits.
NUMBER = re.compile(r"((?<![\w).])-)?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Scored:
    """One pass over the questions.

    Attributes:
        texts: The model's answer to each question.
        correct: Whether each is right.
    """

    texts: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(self.correct) / len(self.correct)


def extract_answer(text: str) -> Decimal | None:
    """Return the number that a text gives as its answer.

    Args:
        text: What the model wrote.

    Returns:
        The first number after the last "The answer is:" (in any case, the colon optional), or, in a text without these
        words, the last number. None if there is no such number.
    """
    _, marker, tail = _partition_last(text)
    numbers = NUMBER.findall(tail)
    if not numbers:
        return None
    sign, digits = numbers[0] if marker else numbers[-1]
    return Decimal(sign + digits.replace(",", ""))


def is_correct(text: str, reference: str) -> bool:
    """Return whether a text gives exactly the reference's number; nothing is rounded.

    Args:
        text: What the model wrote.
        reference: A worked answer of the data set.
    """
    expected = extract_answer(reference)
    assert expected is not None, f"reference without an answer: {reference!r}"
    return extract_answer(text) == expected


def main() -> None:
    """Read the command line, answer the questions twice, and print the comparison."""
    parser = argparse.ArgumentParser(description="Held-out accuracy of the quickstart's adapter, before and after training.")
    parser.add_argument("run", type=Path, help="run directory written by `abba train recipes/quickstart.yaml`")
    parser.add_argument("--limit", type=int, default=100, help="held-out questions to ask (default: 100)")
    parser.add_argument("--batch-size", type=int, default=50, help="questions answered at once (default: 50)")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer (default: %(default)s)")
    options = parser.parse_args()
    if min(options.limit, options.batch_size, options.max_new_tokens) < 1:
        parser.error("--limit, --batch-size and --max-new-tokens have to be at least 1")
    if not (options.run / "adapter_config.json").is_file():
        parser.error(f"{options.run} holds no trained adapter: run `abba train recipes/quickstart.yaml` first")

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its notice of an optional CPU package
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft 0.21.2 uses a name that transformers 6 will drop
    console = Console()
    with HELDOUT_FILE.open(encoding="utf-8") as lines:
        rows: list[dict[str, str]] = [json.loads(line) for line in lines][: options.limit]
    with console.status("Loading the model"):
        model, template = load_run(options.run)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def score(title: str) -> Scored:
            bar = progress.add_task(title, total=len(rows))
            texts = answer_all(
                model,
                template,
                [row["question"] for row in rows],
                options.batch_size,
                options.max_new_tokens,
                lambda count: progress.advance(bar, count),
            )
            return Scored(texts, [is_correct(text, row["answer"]) for text, row in zip(texts, rows, strict=True)])

        with model.disable_adapter():
            before = score("Before training")
        model.merge_adapter()  # only to write faster
        after = score("After training")
    report(console, rows, before, after)


def load_run(folder: Path) -> tuple[PeftModel, Template]:
    """Load a trained run with the prompt template that it was trained with.

    Args:
        folder: A finished run directory.

    Returns:
        The adapted model, bfloat16 and ready for inference, and its template.
    """
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    import abba_cli.adapter  # noqa: F401  (tells PEFT what an ABBA adapter is)
    from abba_cli.prompts import load_template
    from abba_cli.rundir import RunDir

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, load_template(RunDir(folder).recipe().data.template, tokenizer)


def answer_all(
    model: PeftModel,
    template: Template,
    questions: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> list[str]:
    """Answer questions greedily, in batches of similar length.

    Args:
        model: The model, in inference mode.
        template: The prompt template.
        questions: The questions.
        batch_size: Questions answered at once.
        max_new_tokens: Where an answer that has not ended is cut off.
        advance: Called with the number of questions answered, after each batch.

    Returns:
        The answers, in the order of the questions.
    """
    import torch
    from transformers import GenerationConfig

    from abba_cli.formats import Example, Message
    from abba_cli.prompts import encode_prompt

    tokenizer = template.tokenizer
    tokenizer.padding_side = "left"
    prompts = [encode_prompt(template.prompt_text(Example((Message("user", question),))), tokenizer) for question in questions]
    # Fresh, so that no sampling setting of the base model's own generation_config.json applies.
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(template.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[index] for index in indices]}, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**batch, generation_config=greedy)  # type: ignore[no-untyped-call]
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text.strip()
        advance(len(indices))
    return answers


def report(console: Console, rows: Sequence[dict[str, str]], before: Scored, after: Scored) -> None:
    """Print one question with both answers, and both accuracies."""
    # The first question that training turned from wrong to right; the first of all if there is none.
    shown = next((i for i, was in enumerate(before.correct) if not was and after.correct[i]), 0)
    console.print(f"\n[bold]Question[/]  {escape(rows[shown]['question'])}")
    for title, scored in (("Before", before), ("After", after)):
        verdict = "[green]right[/]" if scored.correct[shown] else "[red]wrong[/]"
        console.print(f"[bold]{title}[/] ({verdict})  {escape(scored.texts[shown])}")
    console.print(f"\n[bold]Held-out accuracy[/], exact answers, n = {len(rows)}")
    table = Table()
    for heading in ("", "right", "accuracy"):
        table.add_column(heading, justify="right" if heading else "left")
    for title, scored in (("before training", before), ("after training", after)):
        table.add_row(title, str(sum(scored.correct)), f"{scored.accuracy:.0%}")
    console.print(table)


def _partition_last(text: str) -> tuple[str, str, str]:
    """Split at the last answer marker; without one, the whole text is the tail."""
    markers = list(ANSWER_MARKER.finditer(text))
    if not markers:
        return "", "", text
    return text[: markers[-1].start()], markers[-1].group(), text[markers[-1].end() :]


if __name__ == "__main__":
    main()
