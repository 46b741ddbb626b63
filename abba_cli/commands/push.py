"""`abba push`."""

from pathlib import Path
from typing import Annotated

import typer

from abba_cli.terminal import interruptible, open_console, quiet_libraries


def push(
    directory: Annotated[Path, typer.Argument(help="A run, adapter, merged model or export.", metavar="DIR", show_default=False)],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; it is private otherwise.")] = False,
) -> None:
    """Upload a directory to the hub. The token is taken from the environment variable HF_TOKEN."""
    quiet_libraries()
    from abba_cli.pushing import push as run
    from abba_cli.ui.steps import StepsDisplay, show_pushed

    console = open_console()
    with interruptible("the upload is not complete; run the same command again"), StepsDisplay(console) as display:
        url = run(directory, repo, public=public, listen=display)
    show_pushed(console, url)
