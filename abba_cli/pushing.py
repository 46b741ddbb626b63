"""`abba push`: a run, adapter, merged model or export to a repository of the hub, private unless asked otherwise."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi

from abba_cli.errors import ModelError
from abba_cli.events import Listener, Stage, ignore
from abba_cli.folders import leads_out
from abba_cli.hub import explain

TOKEN = "HF_TOKEN"
# States to go on from are of no use to anyone else, and many times the adapter's size.
# Samples are rows of other people's data sets.
LEFT_OUT = ["checkpoints/*", "samples.jsonl", "*/samples*.jsonl", "*/harness/*", "abba.json", ".*", "*/.*", "*.partial"]
_UPLOADABLE = ("adapter_config.json", "config.json", "*.gguf")


def check_push(repo: str) -> None:
    """Make sure, before any long work, that a push can be tried at all.

    Raises:
        ModelError: The name is no repository's, or there is no token in the environment.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise ModelError(f"{repo!r} is no name of a repository; expected OWNER/NAME")
    if not os.environ.get(TOKEN, "").strip():
        raise ModelError(
            f"pushing needs a token with write access in the environment variable {TOKEN}; make one at "
            "https://huggingface.co/settings/tokens"
        )


def push(folder: Path, repo: str, *, public: bool = False, listen: Listener = ignore) -> str:
    """Upload a directory that one of our commands wrote, with its model card.

    Args:
        folder: A run, adapter, merged model or export.
        repo: OWNER/NAME; made if it is not there, and left as it is (private or public) if it is.
        public: Make a new repository public.
        listen: Called with events.

    Returns:
        The address of the repository.

    Raises:
        ModelError: The folder holds nothing to upload or a link that leads out of it, there is no token, or the hub refuses.
    """
    check_push(repo)
    if not folder.is_dir():
        raise ModelError(f"there is no directory {folder}; expected a run, an adapter, a merged model or an export")
    if not any(any(folder.glob(pattern)) for pattern in _UPLOADABLE):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"{folder} holds no adapter, model or GGUF to upload; found {found}")
    if not (folder / "README.md").is_file():
        raise ModelError(f"{folder} has no README.md; write a model card before it is uploaded")
    outside = [path for path in sorted(folder.rglob("*")) if path.is_symlink() and leads_out(path, folder)]
    if outside:
        raise ModelError(
            f"{outside[0]} is a link to {outside[0].resolve()}, which is not uploaded with it; put the file itself there"
        )
    listen(Stage(f"Uploading to {repo}"))
    with explain(repo, page=repo, doing="upload to"):
        api = HfApi(token=os.environ[TOKEN].strip())
        url = api.create_repo(repo, private=not public, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=LEFT_OUT, commit_message=f"{folder.name}, uploaded by abba"
        )
    return str(url)
