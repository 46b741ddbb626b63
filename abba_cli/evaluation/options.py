"""What an evaluation is asked to do, apart from the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from abba_cli.evaluation.decoding import Decoding, paper_decoding
from abba_cli.evaluation.grading.judging import Grader
from abba_cli.evaluation.results import Protocol
from abba_cli.evaluation.tasks import Task


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of one evaluation.

    Args:
        tasks: Names, groups or task files.
        protocol: The paper's prompts and extraction, or lm-evaluation-harness.
        baseline: Score the base without the adapter, too.
        limit: Only the first so many rows of each task.
        shots: Worked examples before each question; None is the protocol's own number (none for the paper's).
        seed: Of worked examples and draws.
        split: In place of each task's own.
        data_dir: Folder of local data.
        paper_prompt: The paper's prompt in place of the run's template.
        harness_chat: Put the harness's prompts into the tokenizer's chat template; by default they stand alone.
        sampling: Greedy, or the draws of the paper's released code.
        temperature: Of draws of one's own; None keeps `sampling`.
        top_p: With `temperature`.
        samples: Answers for each row, for pass@k.
        grader: Whose rules judge.
        batch_size: Prompts at a time; None starts with what suits the device.
        backend: What generates.
        fresh: Forget the answers that are in the output folder.
        allow_code_execution: Run programs that the model writes.
        weaker_sandbox: Run them even where protections are missing.
        output: Folder of the results; None is RUN/eval, or out/eval/NAME.
    """

    tasks: tuple[str, ...]
    protocol: Protocol = "paper"
    baseline: bool = False
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    split: str | None = None
    data_dir: Path | None = None
    paper_prompt: bool = False
    harness_chat: bool = False
    sampling: Literal["greedy", "paper"] = "greedy"
    temperature: float | None = None
    top_p: float = 1.0
    samples: int = 1
    grader: Grader = "abba"
    batch_size: int | None = None
    backend: Literal["transformers", "vllm"] = "transformers"
    fresh: bool = False
    allow_code_execution: bool = False
    weaker_sandbox: bool = False
    output: Path | None = None

    def decoding(self, task: Task) -> Decoding:
        """How the tokens of a task's answers are chosen."""
        if self.temperature is not None:
            return Decoding(self.temperature, self.top_p, samples=self.samples, seed=self.seed)
        if self.sampling == "paper":
            return paper_decoding(task, self.samples, self.seed)
        return Decoding(samples=self.samples, seed=self.seed)
