"""A comparison to look at: as a table for a terminal, and as Markdown."""

import itertools
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from abba_cli.evaluation.reporting.comparing import AVERAGE, Comparison
from abba_cli.evaluation.reporting.tables import escape_markdown, markdown_row, show_number

MADE_BY = "abba compare"  # stands in every file that is written, which `--overwrite` looks for
_GAP = 2  # columns of a terminal between those of a table


def comparison_table(comparison: Comparison, width: int = 80) -> Group:
    """A table that fits, and its notes: models as rows or, where those are too wide, tasks as rows.

    Args:
        comparison: What to show. The best of each column is bold and starred.
        width: Columns of the terminal. Where there is too little room, models are numbered, then the errors are left out, then
            there are several tables.
    """
    labels = [row.label for row in comparison.rows]
    numbers = [f"[{place}]" for place in range(1, len(labels) + 1)]
    notes = [f"Scores {_units(comparison)}, +/- one standard error; * the best.", *comparison.notes]
    legend = [f"{number} {label}" for number, label in zip(numbers, labels, strict=True)]
    for names, errors, turned in itertools.product((labels, numbers), (True, False), (False, True)):
        if names is labels and not errors:
            continue  # the errors are worth more than the labels
        grid = _grid(comparison, names, errors)
        grid = _turned(grid) if turned else grid
        if _width(grid, _GAP) <= width:
            return Group(_table(grid, _GAP), *map(Text, [*(legend if names is numbers else []), *notes]))
    blocks = [_table(_turned(block), 1) for block in _blocks(_grid(comparison, numbers, False), width)]
    return Group(*blocks, *map(Text, [*legend, *notes]))


def comparison_markdown(comparison: Comparison) -> str:
    """A row for each model; the best of each column in bold, notes as a list below."""
    columns = comparison.columns
    lines = [f"<!-- {MADE_BY} -->", "", markdown_row(["model", *(escape_markdown(column.marked) for column in columns)])]
    lines.append("|" + "|".join([" --- ", *[" ---: "] * len(columns)]) + "|")
    for place, row in enumerate(comparison.rows):
        cells = []
        for column, cell, best in zip(columns, row.cells, comparison.best, strict=True):
            text = show_number(None if cell is None else cell.value, column.share)
            text = f"**{text}**" if place in best else text
            error = show_number(None if cell is None else cell.stderr, column.share)
            cells.append(text if error == "-" else f"{text} ± {error}")
        lines.append(markdown_row([escape_markdown(row.label), *cells]))
    lines.append(markdown_row(["n", *(_rows_scored(comparison, place) for place in range(len(columns)))]))
    notes = [f"Scores {_units(comparison)}, ± one standard error; the best of each column is bold.", *comparison.notes]
    return "\n".join([*lines, "", *(f"- {escape_markdown(note)}" for note in notes)]) + "\n"


def _grid(comparison: Comparison, names: Sequence[str], errors: bool) -> list[list[str]]:
    """Headings, rows scored and a line for each model."""
    grid = [
        ["", *(column.marked for column in comparison.columns)],
        ["n", *(_rows_scored(comparison, place) for place in range(len(comparison.columns)))],
    ]
    for place, (name, row) in enumerate(zip(names, comparison.rows, strict=True)):
        line = [name]
        for column, cell, best in zip(comparison.columns, row.cells, comparison.best, strict=True):
            text = show_number(None if cell is None else cell.value, column.share)
            error = show_number(None if cell is None else cell.stderr, column.share)
            # One character after the number in any case, so that the digits of a column stand under each other.
            text = f"{text}{'*' if place in best else ' '}"
            line.append(f"{text}{'' if error == '-' else f'+/- {error}'}" if errors else text)
        grid.append(line)
    return grid


def _rows_scored(comparison: Comparison, place: int) -> str:
    counts = [cell.n for row in comparison.rows if (cell := row.cells[place]) is not None and cell.n is not None]
    if not counts:
        return ""
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,}-{max(counts):,}"


def _units(comparison: Comparison) -> str:
    others = [column.heading for column in comparison.columns if not column.share]
    return "in percent" if not others else f"in percent (but {', '.join(others)} as they are)"


def _turned(grid: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(line) for line in zip(*grid, strict=True)]


def _blocks(grid: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """The models of a grid in parts that fit when turned, each with the headings and rows scored."""
    headings, counts, *models = grid
    blocks = [[headings, counts]]
    for model in models:
        if len(blocks[-1]) > 2 and _width(_turned([*blocks[-1], model]), 1) > width:
            blocks.append([headings, counts])
        blocks[-1].append(model)
    return blocks


def _width(grid: Sequence[Sequence[str]], gap: int) -> int:
    return sum(max(map(cell_len, column)) for column in zip(*grid, strict=True)) + gap * (len(grid[0]) - 1)


def _table(grid: Sequence[Sequence[str]], gap: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for place, heading in enumerate(grid[0]):
        table.add_column(Text(heading), justify="right" if place else "left", no_wrap=True)
    for line in grid[1:]:
        cells = (Text(cell, style="bold" if place and "*" in cell else "") for place, cell in enumerate(line))
        table.add_row(*cells, style="dim" if line[0] == "n" else "bold" if line[0].startswith(AVERAGE) else None)
    return table
