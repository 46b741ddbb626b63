"""What every key of a recipe accepts, in words: for error messages, the reference page and the JSON schema in docs/.

`python -m abba_cli.recipe_reference` writes both files; `--check` only tells whether they are out of date.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from abba_cli.recipe import Recipe

Schema = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]

_INTRODUCTION = """\
# Recipe reference

<!-- Generated from abba_cli/recipe.py by `make docs`; change it there. -->

A recipe is one YAML file with everything that a training run depends on. `model`, `data` and `output` are required;
every other key has a default.

```yaml
{example}```

- **Paths.** Relative paths of data, templates and models start at the recipe's folder. `output`, `adapter.start_from`
  and paths given with `--set` start at the current directory.
- **Overrides.** `abba train RECIPE --set training.max_steps=30 --set data.train.0.path=FILE` replaces single keys; the
  value is YAML, and list items are counted from 0.
- **Numbers.** `1e-3` and `2e-5` are numbers.
- **Mistakes.** Unknown keys are errors. All problems of a recipe are reported at once, each with its line.
- **Editors.** `abba schema` prints the JSON schema of recipes. An editor with a YAML language server checks a recipe
  that begins with `# yaml-language-server: $schema=PATH/docs/recipe.schema.json`.
"""


_NOUNS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "boolean": ("true or false", "true or false"),
}


def accepted(schema: Schema, several: bool = False) -> str:
    """Say in plain words which values a key accepts, from its JSON schema; `several` says it in the plural."""
    match schema:
        case {"anyOf": [*branches]}:
            return _either(branches, schema)
        case {"enum": [*values]}:
            return _joined([str(value) for value in values])
        case {"const": value}:
            return str(value)
        case {"type": "array", "prefixItems": [first, *_]}:
            return f"a list of {schema['maxItems']} {accepted(first, several=True)}"
        case {"type": "array", "items": items}:
            return f"a {_filled(schema)}list of {accepted(items, several=True)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"a section of names, each with {accepted(values)}"
        case {"type": str(kind)} if kind in _NOUNS:
            return _filled(schema) + _NOUNS[kind][several] + _bounds(schema)
    return "a section of keys"


def schema_of(where: Sequence[str | int]) -> Schema:
    """Return the schema of the key at a path; empty if there is no such key."""
    found = _whole()
    for part in where:
        inner = []
        for branch in _branches(found):
            named = branch.get("properties", {}).get(part) or branch.get("additionalProperties") or {}
            inner.append(branch.get("items", {}) if isinstance(part, int) else named)
        found = next(filter(None, inner), {})
    return found


def keys_of(where: Sequence[str | int]) -> dict[str, Schema]:
    """Return the keys of the section at a path, with their schemas; none if no section is there."""
    return {name: schema for branch in _branches(schema_of(where)) for name, schema in branch.get("properties", {}).items()}


def main(*arguments: str) -> str | None:
    """Write the page and the schema to docs/, or with `--check` only return what is out of date."""
    introduction = _INTRODUCTION.format(example=(ROOT / "recipes" / "gsm8k-llama.yaml").read_text(encoding="utf-8"))
    files = {
        ROOT / "docs" / "recipe-reference.md": "\n".join([introduction, *_tables()]),
        ROOT / "docs" / "recipe.schema.json": json.dumps(_whole(), indent=2) + "\n",
    }
    stale = [file for file, text in files.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        names = " and ".join(f"docs/{file.name}" for file in stale)
        return f"{names} out of date; run `make docs`" if stale else None
    for file in stale:
        file.parent.mkdir(exist_ok=True)
        file.write_text(files[file], encoding="utf-8")
    return None


def _tables() -> Iterator[str]:
    """Yield one table for each section, in the schema's order, and one for the items of its lists."""
    for name, schema in keys_of(()).items():
        section = keys_of((name,))
        yield from _table(name, {f"{name}.{key}": one for key, one in section.items()} or {name: schema})
        lists = [key for key in section if keys_of((name, key, 0))]
        if lists:
            items = keys_of((name, lists[0], 0)).items()
            title = f"Items of {' and '.join(f'{name}.{key}' for key in lists)}"
            yield from _table(title, {f"{name}.{lists[0]}.N.{key}": one for key, one in items})


def _table(title: str, keys: dict[str, Schema]) -> Iterator[str]:
    yield f"## {title}\n\n| key | accepts | default | meaning |\n|---|---|---|---|"
    for key, schema in keys.items():
        default = f"`{json.dumps(schema['default'])}`" if "default" in schema else "required"
        yield f"| `{key}` | {accepted(schema)} | {default} | {schema['description']} |"
    yield ""


def _branches(schema: Schema) -> list[Schema]:
    """Return the alternatives of a schema, with references followed."""
    if "$ref" in schema:
        return [_whole()["$defs"][schema["$ref"].rpartition("/")[2]]]
    return [inner for one in schema.get("anyOf", []) for inner in _branches(one)] or [schema]


@cache
def _whole() -> Schema:
    return Recipe.model_json_schema()


def _either(branches: list[Schema], whole: Schema) -> str:
    """Join alternatives; a list of the other alternatives is said in short."""
    others = [one for one in branches if "items" not in one and one.get("type") != "null"]
    words = [accepted(one) for one in others]
    for one in (one for one in branches if "items" in one):
        same = one["items"] in ({"anyOf": others}, *others)
        words.append(f"a {_filled(whole | one)}list of them" if same else accepted(one))
    return _joined(words + ["null"] * ({"type": "null"} in branches))


def _joined(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]])


def _filled(schema: Schema) -> str:
    return "non-empty " if schema.get("minItems") or schema.get("minLength") else ""


def _bounds(schema: Schema) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    return " and".join(f" {word} {schema[key]:g}" for key, word in words.items() if key in schema)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
