"""From a YAML file and `--set` overrides to a Recipe, with every problem reported at once and by its line."""

import difflib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from abba_cli.errors import RecipeError
from abba_cli.plain_yaml import parse_yaml
from abba_cli.recipe import Recipe
from abba_cli.recipe_reference import accepted, keys_of, schema_of

KeyPath = tuple[str | int, ...]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
BUILT_IN_TEMPLATES = ("none", "alpaca", "chat")
_SOURCE_LISTS = (("data", "train"), ("data", "eval"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` strings, as given to `--set`; values are YAML, keys may count list items
            (`data.train.0.path`). Relative paths in them start at the current directory, those in the file at its
            folder (but `adapter.start_from`, a run directory as `output` is, always at the current one).

    Returns:
        The validated recipe, with the paths of local data, templates and models made absolute.

    Raises:
        RecipeError: The file is missing, is not YAML, or does not fit the schema. One message lists all problems, each
            with `file:line`, the key, the value found and what was expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise RecipeError(f"{path} is a directory; expected a recipe file (.yaml){_recipes_nearby(path / 'x')}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error.reason}); expected a YAML recipe") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}{_recipes_nearby(path)}") from None
    tree, lines, problems = _parse(text, str(path))
    tree = _with_absolute_paths((), tree, path.resolve().parent)
    origins = {where: f"{path}:{line}" for where, line in lines.items()}
    for override in overrides:
        try:
            where = _apply_override(tree, override)
        except RecipeError as error:
            problems["--set", override] = str(error)
            continue
        origins = {known: origin for known, origin in origins.items() if known[: len(where)] != where}
        origins[where] = f"--set {override}"
    return validate(tree, origins, str(path), problems)


def validate(
    tree: Any, origins: Mapping[KeyPath, str] | None = None, source: str = "recipe", problems: Mapping[KeyPath, str] | None = None
) -> Recipe:
    """Check a tree of plain values against the schema.

    Args:
        tree: What YAML gave.
        origins: Where each key was written, for the messages.
        source: Name of the whole, for keys without an origin.
        problems: What was found wrong before, by key, to be reported with the rest; nothing more is looked for in these.

    Raises:
        RecipeError: With all problems, one a line.
    """
    found = list((problems or {}).values())
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found += _explain(error.errors(), tree, origins or {}, source, problems or {})
    if not found:
        return recipe
    raise RecipeError("\n  ".join([f"{source} has {len(found)} problems:", *found] if len(found) > 1 else found))


def dump_recipe(recipe: Recipe) -> str:
    """YAML of a recipe with every key written out; reading it back gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two recipes differ, with both values."""
    flat_old, flat_new = dict(_flatten(old.model_dump(mode="json"))), dict(_flatten(new.model_dump(mode="json")))
    keys = dict.fromkeys([*flat_old, *flat_new])
    return {key: (flat_old.get(key), flat_new.get(key)) for key in keys if flat_old.get(key) != flat_new.get(key)}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _recipes_nearby(path: Path) -> str:
    folders = (path.parent, path.parent / "recipes", Path("recipes"))
    found = {candidate.name: str(candidate) for folder in folders for candidate in sorted(folder.glob("*.yaml"))}
    close = difflib.get_close_matches(path.with_suffix(".yaml").name, list(found), n=1) or list(found)[:3]
    return f"; did you mean {', '.join(found[name] for name in close)}?" if close else ""


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[KeyPath, int], dict[KeyPath, str]]:
    """The tree of a YAML document, the line (from 1) on which each key stands, and the keys that stand twice."""
    lines: dict[KeyPath, int] = {}
    repeated: dict[KeyPath, str] = {}

    def walk(node: yaml.Node, where: KeyPath) -> None:
        if where in _SOURCE_LISTS and not isinstance(node, yaml.SequenceNode):
            # A single source may be written without the dash.
            where = (*where, 0)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*where, key.value)
                if here in lines and not _within(here, repeated):
                    repeated[here] = f"{name}:{key.start_mark.line + 1}: {_dotted(here)} stands twice; keep one of them"
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*where, index)] = value.start_mark.line + 1
                walk(value, (*where, index))

    try:
        root, tree = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        shown = text.splitlines()[line - 1 : line]  # none where the end of the file is what is wrong
        hint = "; a value that begins with {{ needs quotes" if shown and ": {{" in shown[0] else ""
        raise RecipeError(f"{name}:{line}: not valid YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {_shown(tree)}"
        raise RecipeError(f"{name} {found}; expected the sections {', '.join(Recipe.model_fields)}")
    assert root is not None
    walk(root, ())
    return tree, lines, repeated


def _apply_override(tree: dict[str, Any], override: str) -> KeyPath:
    """Set one dotted key in place and return its path."""
    dotted, equals, written = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as --set training.max_steps=30")
    try:
        # A template on the command line is text, without quotes inside the shell's quotes.
        value = written if written.startswith(("{{", "{%")) else parse_yaml(written)[1]
    except yaml.YAMLError:
        raise RecipeError(
            f"--set {override[:80]}: the value is not valid YAML; quote it, such as --set 'KEY=\"VALUE\"'"
        ) from None
    parts = dotted.strip().split(".")
    where: list[str | int] = []
    node: Any = tree
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) > len(node):
                raise RecipeError(
                    f"--set {override}: {_dotted([*where, part])} is not there; "
                    f"the list has {len(node)} item{'' if len(node) == 1 else 's'}, counted from 0"
                )
            where.append(int(part))
            node.extend([None] if int(part) == len(node) else [])
        elif isinstance(node, dict):
            where.append(part)
            node.setdefault(part, None)
        else:
            raise RecipeError(f"--set {override}: {_dotted(where)} is {_shown(node)}, which has no keys")
        if depth == len(parts) - 1:
            node[where[-1]] = _with_absolute_paths(tuple(where), value, Path.cwd())
        elif node[where[-1]] is None:
            # A section that the file leaves out, or a list that starts here.
            node[where[-1]] = [] if parts[depth + 1].isdecimal() else {}
        node = node[where[-1]]
    return tuple(where)


def _with_absolute_paths(where: KeyPath, value: Any, folder: Path) -> Any:
    """The value of a key with the relative local paths in it made absolute."""
    match where:
        case () | ("data" | "model" | "adapter",) if isinstance(value, dict):
            return {key: _with_absolute_paths((*where, key), item, folder) for key, item in value.items()}
        case ("model", "name") if isinstance(value, str):
            return _absolute_if_local(value, folder, suffixes=())
        case ("adapter", "start_from") if isinstance(value, str):
            return _absolute_if_local(value, Path.cwd(), suffixes=())
        case ("data", "template") if isinstance(value, str) and value and value not in BUILT_IN_TEMPLATES:
            return str((folder / Path(value).expanduser()).resolve())
        case ("data", "train" | "eval"):
            items = value if isinstance(value, list) else [] if value is None else [value]
            return [_with_absolute_paths((*where, index), item, folder) for index, item in enumerate(items)]
        case ("data", "train" | "eval", int()):
            # Written out in full, so that a later override finds the keys it changes.
            source = {"path": value} if isinstance(value, str) else value
            if isinstance(source, dict) and "path" in source:
                return {**source, "path": _with_absolute_paths((*where, "path"), source["path"], folder)}
            return source
        case ("data", "train" | "eval", *_, "path") if isinstance(value, str):
            return _absolute_if_local(value, folder)
    return value


def _absolute_if_local(value: str, folder: Path, suffixes: tuple[str, ...] = DATA_SUFFIXES) -> str:
    """A hub id or `package:` name stays as it is; whatever is, or looks like, a local path becomes absolute."""
    if not value or value.startswith("package:"):
        return value
    looks_local = value.startswith((".", "/", "~", os.sep)) or value.lower().endswith(suffixes)
    candidate = (folder / Path(value).expanduser()).resolve()
    # Not Path.exists(), which raises where a name is too long.
    return str(candidate) if looks_local or os.path.exists(candidate) else value


def _dotted(where: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in where)


def _shown(value: Any) -> str:
    """A short form of a value, as YAML writes it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain(errors: list[Any], tree: Any, origins: Mapping[KeyPath, str], source: str, told: Collection[KeyPath]) -> list[str]:
    """One line for each key with a problem: where it stands, what was found, what was expected, what to try."""
    problems: dict[KeyPath, tuple[int, str]] = {}
    order = {known: place for place, known in enumerate(origins)}
    for item in errors:
        where = _place(item, tree)
        if _within(where, told):
            continue
        key = _dotted(where)
        if item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            # A check across sections names its key first.
            where = where or tuple(message.split()[0].split("."))
            problem = f"{key}: {message}" if key else message
        elif item["type"] in ("extra_forbidden", "invalid_key"):
            problem = f"unknown key {key}{_nearest_key(where)}"
        elif where == item["loc"] and item["type"] == "missing":
            schema = schema_of(where)
            problem = f"{key} is missing: expected {accepted(schema)}. {schema.get('description', '')}".rstrip()
        else:
            problem = f"{key} is {_shown(reduce(getitem, where, tree))}: expected {accepted(schema_of(where))}"
        known = _nearest_known(where, origins)
        # The branches of a union complain one by one; a check that was reached knows best.
        if where not in problems or item["type"] == "value_error":
            problems[where] = order.get(known, -1), f"{origins.get(known, source)}: {problem}"
    return [problem for _, problem in sorted(problems.values(), key=lambda numbered: numbered[0])]


def _place(item: Mapping[str, Any], tree: Any) -> KeyPath:
    """The part of pydantic's location that is in the YAML: it goes on with union branches such as `list[str]`."""
    loc, missing = item["loc"], item["type"] == "missing"
    if item["type"] == "invalid_key":  # one that is no text, such as null, for which pydantic has a name of its own
        return (*loc[:-1], _shown(item["input"]).strip('"'))
    node = tree
    for depth, part in enumerate(loc):
        if isinstance(node, dict) and (part in node or (missing and depth == len(loc) - 1)):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            return tuple(loc[:depth])
    return tuple(loc)


def _nearest_known(where: KeyPath, origins: Mapping[KeyPath, str]) -> KeyPath:
    """The key whose place in the file stands for this one: itself, what an override put below it, or what holds it."""
    below = (known for known in origins if known[: len(where)] == where)
    above = (where[:n] for n in range(len(where), 0, -1) if where[:n] in origins)
    return where if where in origins else next(below, next(above, ()))


def _within(where: KeyPath, keys: Collection[KeyPath]) -> bool:
    return any(where[:depth] in keys for depth in range(1, len(where) + 1))


def _nearest_key(where: KeyPath) -> str:
    """What an unknown key was probably meant to be."""
    wrong, here = str(where[-1]), keys_of(where[:-1])
    elsewhere = [f"{section}.{wrong}" for section in keys_of(()) if wrong in keys_of((section,))]
    likeness = {key: difflib.SequenceMatcher(None, wrong, key).ratio() for key in here}
    close = [key for key, ratio in likeness.items() if ratio == max(likeness.values()) and ratio >= 0.55]
    meant = elsewhere or close
    return f"; did you mean {' or '.join(meant)}?" if meant else f"; expected one of {', '.join(here)}"
