"""Names of tasks as lm-evaluation-harness knows them: ours to theirs, checked before any model is loaded."""

import difflib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from abba_cli.errors import DataError, ModelError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Known:
    """One of abba's tasks in the harness.

    Attributes:
        theirs: Its name there.
        folders: Names of its folder under `--data-dir`.
        primary: The metric for tables; None is the first that the task lists.
        homes: Folders of the harness's task files that hold it, where they are not called like it.
    """

    theirs: str
    folders: tuple[str, ...]
    primary: str | None = None
    homes: tuple[str, ...] = ()


KNOWN = {
    "boolq": Known("boolq", ("boolq", "commonsense/boolq"), homes=("super_glue/boolq",)),
    "piqa": Known("piqa", ("piqa", "commonsense/piqa"), "acc_norm"),
    "siqa": Known("social_iqa", ("social_i_qa", "siqa", "commonsense/social_i_qa"), homes=("siqa",)),
    "hellaswag": Known("hellaswag", ("hellaswag", "commonsense/hellaswag"), "acc_norm"),
    "winogrande": Known("winogrande", ("winogrande", "commonsense/winogrande")),
    "arc_e": Known("arc_easy", ("ARC-Easy", "arc_e", "commonsense/ARC-Easy"), "acc"),
    "arc_c": Known("arc_challenge", ("ARC-Challenge", "arc_c", "commonsense/ARC-Challenge"), "acc_norm"),
    "obqa": Known("openbookqa", ("openbookqa", "obqa", "commonsense/openbookqa"), "acc_norm"),
    "gsm8k": Known("gsm8k", ("gsm8k", "arithmetic/gsm8k")),
    # The harness has hendrycks_math, too: without examples, and right only where the whole answer is the bare result.
    "math": Known("minerva_math", ("math", "arithmetic/math"), homes=("benchmarks", "minerva_math")),
    "math500": Known("minerva_math500", ("math500", "arithmetic/math500"), homes=("minerva_math",)),
}
_CODE = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus")
_INSTALL = "the protocol `harness` needs lm-evaluation-harness; install it with `pip install 'abba-cli[harness]'`"


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what the harness cannot score, or must not.

    Args:
        tasks: Our names, or names of the harness's tasks, groups and tags, or paths of its YAML files.

    Raises:
        ModelError: The harness is not installed.
        DataError: A name is unknown, a file cannot be read, or the task runs code that the model writes.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModelError(_INSTALL)
    for task in tasks:
        if task in _CODE:
            _refuse_code(task)
        if is_file(task):
            config = _read_file(Path(task).expanduser())
            if config.get("unsafe_code"):
                _refuse_code(task)
            if "group" in config:  # the harness fails on them: it takes the list of members for the name
                raise DataError(f"{task} is the file of a group; name its tasks, or their files, one by one")
            if not isinstance(config.get("task"), str):
                raise DataError(f"{task} is no task file of the harness: expected the key `task` with its name")
            continue
        index = task_manager([task]).task_index
        if harness_name(task) not in index:
            near = difflib.get_close_matches(task, [*KNOWN, *index], n=3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise DataError(f"the harness has no task, group or tag {task}; {hint}A task file of its kind is given by its path")
        if any((index[leaf].cfg or {}).get("unsafe_code") for leaf in leaves(index, harness_name(task))):
            _refuse_code(task)


def harness_name(task: str) -> str:
    """Their name for one of our tasks; any other name stays as it is."""
    return KNOWN[task].theirs if task in KNOWN else task


def is_file(task: str) -> bool:
    """Whether a task is given by the path of its file."""
    return task.endswith((".yaml", ".yml"))


def primary_metric(theirs: str) -> str | None:
    """The metric for tables of one of our tasks; None is the first that the task lists."""
    return next((known.primary for known in KNOWN.values() if known.theirs == theirs), None)


def task_manager(tasks: Sequence[str]) -> "TaskManager":
    """The harness's own list of tasks: all of it takes many seconds to read, so only what these need where that can be told."""
    names = [harness_name(task) for task in tasks if not is_file(task)]
    homes = dict.fromkeys(home for name in names for home in _homes(name))
    part = _manager(tuple(homes))
    return part if all(_complete(part.task_index, name) for name in names) else _manager(None)


def leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """The single tasks that a task, group or tag of the harness stands for."""
    entry = index.get(name)
    if entry is None:  # a group may define a task on the spot
        return []
    if entry.kind.name == "TAG":
        return sorted(one for one in entry.tags if one in index)
    if entry.kind.name != "GROUP":
        return [name]
    return [leaf for one in _members(entry.cfg) if one != name for leaf in leaves(index, one)]


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep what the harness and the libraries under it would print to themselves; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Some of the harness's task files have escapes that Python warns of.
            warnings.filterwarnings("ignore", message=".*invalid escape sequence")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _members(config: Mapping[str, Any]) -> list[str]:
    """The names under `task` of a group's file; none for a task's."""
    listed = config.get("task")
    if not isinstance(listed, list):
        return []
    return [str(one.get("task", one.get("group")) if isinstance(one, dict) else one) for one in listed]


def _homes(name: str) -> tuple[str, ...]:
    """Folders of task files that are likely to hold a task or group: arc_easy is in arc."""
    if known := next((one for one in KNOWN.values() if one.theirs == name and one.homes), None):
        return known.homes
    words = name.split("_")
    beginnings = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return tuple(one for one in beginnings if (_root() / one).is_dir())[:1]


def _complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether a part of the list has all of a task or group; of a tag that cannot be known."""
    entry = index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return False
    return entry.kind.name != "GROUP" or all(one != name and _complete(index, one) for one in _members(entry.cfg))


def _root() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _manager(homes: tuple[str, ...] | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        if homes is None:
            return TaskManager()
        folders = [str(_root() / home) for home in homes if (_root() / home).is_dir()]
        return TaskManager(include_defaults=False, include_path=folders)


class _Loader(yaml.SafeLoader):
    """YAML in which `!function` and the like stand for nothing: looking at a file must not run it."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read_file(path: Path) -> dict[str, Any]:
    """A task file with the files that it includes."""
    try:
        config: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot read the task file {path}: {reason}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is no task file of the harness: expected keys such as `task` and `doc_to_text`")
    included = config.get("include", [])
    for other in [included] if isinstance(included, str) else included:
        config = _read_file(path.parent / other) | config
    return dict(config)


def _refuse_code(task: str) -> None:
    raise DataError(
        f"task {task} runs code that the model writes, and the harness runs it without protection; "
        "abba's own protocol runs it in a sandbox: --protocol paper --allow-code-execution"
    )
