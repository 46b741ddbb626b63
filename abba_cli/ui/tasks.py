"""What `abba eval --list` shows."""

from rich.console import Console
from rich.table import Table

from abba_cli.evaluation.tasks import GROUPS, built_in


def show_tasks(console: Console) -> None:
    """Every built-in task with its size, metric, length of answer and source, by group."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("task", "rows", "metric", "tokens", "source", "also called"):
        table.add_column(heading, justify="right" if heading in ("rows", "tokens") else "left", no_wrap=heading == "task")
    for group, names in GROUPS.items():
        table.add_row(f"[bold]{group}[/]")
        for name in names:
            task = built_in()[name]
            metric = "pass@k" if task.runs_code else "accuracy"
            source = task.data.path + (f", {task.data.split}" if task.data.split != "test" else "")
            table.add_row(f"  {name}", f"{task.rows:,}", metric, str(task.max_tokens), source, ", ".join(task.aliases))
    console.print(table)
    console.print(
        "\nBoth protocols know these names: paper (greedy answers, read as the paper does) and harness (log-likelihood where "
        "lm-evaluation-harness does so; any of its own task names works there; not for code).\n"
        "A task of your own is a .yaml file: see docs/evaluation.md.",
        highlight=False,
        soft_wrap=not console.is_terminal,
    )
