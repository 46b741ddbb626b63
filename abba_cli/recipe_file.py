"""From a YAML file and `--set` overrides to a Recipe, with every problem reported at once and by its line."""

import difflib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from abba_cli.errors import RecipeError
from abba_cli.recipe import Recipe

KeyPath = tuple[str | int, ...]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_BUILT_IN_TEMPLATES = ("none", "alpaca", "chat")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` strings, as given to `--set`; values are YAML, keys may count list items
            (`data.train.0.path`). Relative paths in them start at the current directory, those in the file at its folder.

    Returns:
        The validated recipe, with the paths of local data, templates and models made absolute.

    Raises:
        RecipeError: The file is missing, is not YAML, or does not fit the schema. One message lists all problems, each with
            `file:line`, the key, the value found and what was expected.
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
    tree, lines = _parse(text, str(path))
    _resolve_paths(tree, path.resolve().parent)
    origins = {where: f"{path}:{line}" for where, line in lines.items()}
    for override in overrides:
        where = _apply_override(tree, override)
        origins = {known: origin for known, origin in origins.items() if known[: len(where)] != where}
        origins[where] = f"--set {override}"
    return validate(tree, origins, str(path))


def validate(tree: Any, origins: Mapping[KeyPath, str] | None = None, source: str = "recipe") -> Recipe:
    """Check a tree of plain values against the schema.

    Args:
        tree: What YAML gave.
        origins: Where each key was written, for the messages.
        source: Name of the whole, for keys without an origin.

    Raises:
        RecipeError: With all problems, one a line.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(item, tree, origins or {}, source) for item in error.errors()]
    problems = list(dict.fromkeys(problems))
    heading = f"{source} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
    raise RecipeError("\n".join([heading, *(f"  {problem}" for problem in problems)]))


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


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The tree of a YAML document, and the line (from 1) on which each key stands."""
    lines: dict[KeyPath, int] = {}
    repeated: list[str] = []

    def walk(node: yaml.Node, where: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*where, key.value)
                if here in lines:
                    repeated.append(f"  {name}:{key.start_mark.line + 1}: {_dotted(here)} stands twice; keep one of them")
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*where, index)] = value.start_mark.line + 1
                walk(value, (*where, index))

    try:
        root = yaml.compose(io.StringIO(text), Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise RecipeError(f"{name} holds {found}; expected a mapping with the sections {', '.join(Recipe.model_fields)}")
    assert root is not None
    walk(root, ())
    if repeated:
        raise RecipeError("\n".join([f"{name} has repeated keys:", *repeated]))
    return tree, lines


def _apply_override(tree: dict[str, Any], override: str) -> KeyPath:
    """Set one dotted key in place and return its path."""
    dotted, equals, written = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as --set training.max_steps=30")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not valid YAML; quote it, such as --set 'KEY=\"VALUE\"'") from None
    where: KeyPath = tuple(int(part) if part.isdigit() else part for part in dotted.strip().split("."))
    node: Any = tree
    for depth, key in enumerate(where):
        here = _dotted(where[: depth + 1])
        if isinstance(node, list):
            if not isinstance(key, int) or key > len(node):
                raise RecipeError(f"--set {override}: {here} is not there; the list has {len(node)} items, counted from 0")
            if key == len(node):
                node.append({})
        elif not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {_dotted(where[:depth])} is {node!r}, which has no keys")
        if depth == len(where) - 1:
            node[key] = _resolve_value(where, value, Path.cwd())
        elif isinstance(node, dict) and not isinstance(node.get(str(key)), (dict, list)):
            # A section that the file leaves out, or a list that starts here.
            node[str(key)] = [] if isinstance(where[depth + 1], int) else {}
            node = node[str(key)]
        else:
            node = node[key if isinstance(node, list) else str(key)]
    return where


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the relative local paths of a recipe file absolute, starting at its folder."""
    data, model = tree.get("data"), tree.get("model")
    if isinstance(model, dict) and "name" in model:
        model["name"] = _resolve_value(("model", "name"), model["name"], folder)
    if not isinstance(data, dict):
        return
    for key in ("train", "eval", "template"):
        if key in data:
            data[key] = _resolve_value(("data", key), data[key], folder)


def _resolve_value(where: KeyPath, value: Any, folder: Path) -> Any:
    """The value of a key with the local paths in it made absolute."""
    match where:
        case ("model", "name") if isinstance(value, str):
            return _absolute_if_local(value, folder, suffixes=())
        case ("data", "template") if isinstance(value, str) and value not in _BUILT_IN_TEMPLATES:
            return str((folder / Path(value).expanduser()).resolve())
        case ("data", "train" | "eval"):
            items = value if isinstance(value, list) else [value] if value else []
            return [_resolve_value((*where, index), item, folder) for index, item in enumerate(items)]
        case ("data", "train" | "eval", int()):
            # Written out in full, so that a later override finds the keys it changes.
            source = {"path": value} if isinstance(value, str) else value
            if isinstance(source, dict) and "path" in source:
                return {**source, "path": _resolve_value((*where, "path"), source["path"], folder)}
            return source
        case ("data", "train" | "eval", int(), "path") | ("adapter", "start_from") if isinstance(value, str):
            return _absolute_if_local(value, folder)
    return value


def _absolute_if_local(value: str, folder: Path, suffixes: tuple[str, ...] = DATA_SUFFIXES) -> str:
    """A hub id or `package:` name stays as it is; whatever is, or looks like, a local path becomes absolute."""
    if value.startswith("package:"):
        return value
    looks_local = value.startswith((".", "/", "~", os.sep)) or value.lower().endswith(suffixes or ("\0",))
    candidate = (folder / Path(value).expanduser()).resolve()
    return str(candidate) if looks_local or candidate.exists() else value


def _dotted(where: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in where)


def _explain(item: Any, tree: Any, origins: Mapping[KeyPath, str], source: str) -> str:
    """One line for one pydantic error: where, what was found, what was expected, what to try."""
    where = _known_path(item["loc"], tree)
    origin = next((origins[where[:n]] for n in range(len(where), 0, -1) if where[:n] in origins), source)
    key = _dotted(where) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}{_nearest_key(where)}"
    if item["type"] == "missing":
        return f"{origin}: {key} is missing{_meaning(where)}"
    if item["type"] == "value_error":
        return f"{origin}: {item['ctx']['error']}"
    expected = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        expected = "expected a section of keys"
    return f"{origin}: {key} is {item['input']!r}: {expected.replace('input should be', 'expected').rstrip('.')}"


def _known_path(loc: Sequence[str | int], tree: Any) -> KeyPath:
    """The part of pydantic's location that is in the YAML: union branches such as `list[str]` are left out."""
    where: list[str | int] = []
    node = tree
    for index, part in enumerate(loc):
        if isinstance(node, dict) and (part in node or (index == len(loc) - 1 and not _is_branch(part))):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        else:
            continue
        where.append(part)
    return tuple(where)


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def _section(where: Sequence[str | int]) -> type[BaseModel] | None:
    """The schema class that holds the last key of a path."""
    section: type[BaseModel] = Recipe
    for part in where[:-1]:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        nested = [kind for kind in _types(field.annotation) if issubclass(kind, BaseModel)] if field else []
        if not nested:
            return None
        section = nested[0]
    return section


def _types(annotation: Any) -> list[type]:
    inner = [kind for argument in get_args(annotation) for kind in _types(argument)]
    return [annotation, *inner] if isinstance(annotation, type) else inner


def _nearest_key(where: KeyPath) -> str:
    section, wrong = _section(where), str(where[-1])
    if section is None:
        return ""
    keys = list(section.model_fields)
    if close := difflib.get_close_matches(wrong, keys, n=1, cutoff=0.55):
        return f"; did you mean {close[0]}?"
    for name, field in Recipe.model_fields.items():
        for kind in _types(field.annotation):
            if issubclass(kind, BaseModel) and wrong in kind.model_fields:
                return f"; it belongs in {name}"
    return f"; expected one of {', '.join(keys)}"


def _meaning(where: KeyPath) -> str:
    section = _section(where)
    field = section.model_fields.get(str(where[-1])) if section else None
    return f": {field.description}" if field and field.description else ""
