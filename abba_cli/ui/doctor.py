"""What `abba doctor` shows."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abba_cli.diagnosis import Finding

_MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]no[/]", "broken": "[red]broken[/]"}


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Every finding by topic, with what to do under it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            table.add_row(f"[bold]{topic}[/]")
        table.add_row(f"  {finding.name}", _MARKS[finding.state], escape(finding.found))
        if finding.advice:
            table.add_row("", "", f"[dim]{escape(finding.advice)}[/]")
    console.print(table, highlight=False)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    console.print(f"\nabba cannot work as it is: {', '.join(broken)}" if broken else "\nabba can train here.", highlight=False)
