"""What `abba eval --list` shows."""

from rich.console import Console
from rich.table import Table

from abba_cli.evaluation.tasks import GROUPS, built_in


def show_tasks(console: Console) -> None:
    """Every built-in task with its size, metric, length of answer and source, by group."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("task", "rows", "metric", "tokens", "protocols", "source", "also called"):
        table.add_column(heading, justify="right" if heading in ("rows", "tokens") else "left", no_wrap=heading == "task")
    for group, names in GROUPS.items():
        table.add_row(f"[bold]{group}[/]")
        for name in names:
            task = built_in()[name]
            metric, protocols = ("pass@k", "paper") if task.runs_code else ("accuracy", "paper, harness")
            source = task.data.path + (f", {task.data.split}" if task.data.split != "test" else "")
            others = ", ".join(task.aliases)
            table.add_row(f"  {name}", f"{task.rows:,}", metric, str(task.max_tokens), protocols, source, others)
    console.print(table)
    console.print(
        "\npaper: greedy answers of at most so many tokens, read as the paper does. harness: lm-evaluation-harness, by "
        "log-likelihood where it does so; any of its own task names works there.\n"
        "A task of your own is a .yaml file: see docs/evaluation.md.",
        highlight=False,
        soft_wrap=not console.is_terminal,
    )
