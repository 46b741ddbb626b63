"""How the tokens of an evaluation's answers are chosen."""

from dataclasses import dataclass

from abba_cli.evaluation.tasks import Task


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that have this probability together.
        top_k: Draw from so many of the likeliest tokens; 0 is all.
        samples: Answers for each row.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    seed: int = 0

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top_k {self.top_k}"] if self.top_k else []
        parts += [f"{self.samples} samples"] if self.samples > 1 else []
        return ", ".join([*parts, f"seed {self.seed}"])


def paper_decoding(task: Task, samples: int, seed: int) -> Decoding:
    """The settings of the paper's released code for a task: draws for the commonsense tasks, greedy for the others."""
    if (paper := task.paper_sampling) is None:
        return Decoding(samples=samples, seed=seed)
    return Decoding(paper.temperature, paper.top_p, paper.top_k, samples, seed)
