"""`abba doctor`."""

import typer

from abba_cli.terminal import open_console, quiet_libraries


def doctor() -> None:
    """Show versions, devices, kernels, disks and hub login, and what to install for what is missing. Reaches no network."""
    quiet_libraries()
    from abba_cli.diagnosis import examine
    from abba_cli.ui.doctor import show_findings

    findings = examine()
    show_findings(open_console(), findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
