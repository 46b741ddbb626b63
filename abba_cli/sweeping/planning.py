"""From a sweep file to its runs: each a recipe of its own, with a name and a digest by which it is known again."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from abba_cli.errors import DataError, RecipeError
from abba_cli.plain_yaml import parse_yaml
from abba_cli.recipe import Recipe, SourceSection
from abba_cli.recipe_file import load_recipe
from abba_cli.sources import digests
from abba_cli.sweeping.schema import SweepFile, VariantSection

Kind = Literal["tuning", "run"]


@dataclass(frozen=True)
class Point:
    """A variant at a point of the grid: what one line of the report is about.

    Args:
        variant: Its name; empty where only a grid is given.
        values: The grid's values, by dotted key.
        settings: All keys that make it, in order.
        tune: Values to choose from, by dotted key; empty where nothing is tuned.
    """

    variant: str
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    tune: Mapping[str, Sequence[Any]]

    @property
    def label(self) -> str:
        """For people."""
        return " ".join([self.variant, *(f"{short(key)}={show(value)}" for key, value in self.values.items())]).strip()

    @property
    def slug(self) -> str:
        """As the name of a folder."""
        return slug(self.label)


@dataclass(frozen=True)
class Run:
    """One training run, and the evaluation of its adapter.

    Args:
        name: Its folder below the output.
        kind: Whether it serves to tune, or counts.
        point: What it is a run of.
        seed: Of the training.
        tuned: The values that it tries, or that were chosen.
        recipe: All of it.
        digest: Of all that its result depends on; wherever files lie.
    """

    name: str
    kind: Kind
    point: Point
    seed: int
    tuned: Mapping[str, Any]
    recipe: Recipe
    digest: str


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read.

    Args:
        path: Of the file.
        file: What stands in it.
        output: Where its runs go.
        data_dir: Local data, absolute.
        overrides: `--set` of the command line, for all runs.
    """

    path: Path
    file: SweepFile
    output: Path
    data_dir: Path | None
    overrides: Sequence[str] = ()

    @property
    def points(self) -> list[Point]:
        """All lines of the report, in the file's order."""
        return list(self._points())

    @property
    def reference(self) -> str:
        """The variant that others are compared with."""
        return self.file.reference or next(iter(self.file.variants), "")

    def _points(self) -> Iterator[Point]:
        tune = self.file.tune
        for name, variant in (self.file.variants or {"": VariantSection()}).items():
            for combination in combinations(self.file.grid):
                settings = {**self.file.set, **variant.set, **combination}
                choices = (tune.values if variant.tune is None else variant.tune) if tune else {}
                yield Point(name, combination, settings, choices)

    def tuning_runs(self) -> list[Run]:
        """Runs that choose values; those of one point stand together."""
        tune = self.file.tune
        if tune is None:
            return []
        seed = self.file.seeds[0] if tune.seed is None else tune.seed
        return [
            self._run(f"tuning/{point.slug}/{slug(_said(values))}", "tuning", point, seed, values, tune.set)
            for point in self.points
            for values in combinations(point.tune)
        ]

    def runs(self, chosen: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """Runs that count: seed by seed, so that what is there after some time is fair to all.

        Args:
            chosen: The tuned values by the point's label; points that are not in it are left out.
        """
        return [
            self._run(f"runs/{point.slug}/seed-{seed}", "run", point, seed, chosen[point.label], {})
            for seed in self.file.seeds
            for point in self.points
            if point.label in chosen
        ]

    def _run(self, name: str, kind: Kind, point: Point, seed: int, tuned: Mapping[str, Any], more: Mapping[str, Any]) -> Run:
        settings = {**point.settings, **more, "training.seed": seed, **tuned}
        written = [f"{key}={self._written(value)}" for key, value in settings.items()]
        written += [*self.overrides, f"output={json.dumps(str(self.output / name))}"]
        base = self.path.parent / Path(self.file.base).expanduser()
        try:
            recipe = load_recipe(base, written)
        except RecipeError as error:
            raise RecipeError(f"{self.path}, {point.label or 'its recipe'}: {error}") from None
        try:
            digest = self._digest(recipe, kind)
        except DataError as error:
            advice = f"; data_dir is {self.data_dir}, another folder is given by --data-dir" if self.data_dir else ""
            raise DataError(f"{self.path}: {error}{advice}") from None
        return Run(name, kind, point, seed, tuned, recipe, digest)

    def _written(self, value: Any) -> str:
        text = json.dumps(value)
        if "{data_dir}" not in text:
            return text
        if self.data_dir is None:
            raise RecipeError(f"{self.path} needs a folder of data for {{data_dir}}: give --data-dir, or set data_dir in it")
        return text.replace("{data_dir}", json.dumps(str(self.data_dir))[1:-1])

    def _digest(self, recipe: Recipe, kind: Kind) -> str:
        tree = recipe.model_dump(mode="json", exclude={"output", "checkpoints"})
        for part in ("train", "eval"):
            for written, source in zip(tree["data"][part], getattr(recipe.data, part), strict=True):
                written["path"] = _content(source)
        evaluate = self.file.evaluate.model_dump(mode="json") if self.file.evaluate and kind == "run" else None
        return hashlib.sha256(json.dumps([tree, evaluate], sort_keys=True).encode()).hexdigest()[:20]


def load_sweep(path: Path, overrides: Sequence[str] = (), data_dir: Path | None = None, output: Path | None = None) -> Sweep:
    """Read a sweep file.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` strings for the recipes of all runs.
        data_dir: In place of the file's.
        output: In place of the file's.

    Raises:
        RecipeError: It cannot be read, or does not fit the schema.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))[1]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"cannot read the sweep {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no keys; expected {', '.join(SweepFile.model_fields)}")
    try:
        file = SweepFile.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        lines = [f"{path} has {len(problems)} problems:", *problems] if len(problems) > 1 else [f"{path}: {problems[0]}"]
        raise RecipeError("\n  ".join(lines)) from None
    folder = data_dir or (Path(file.data_dir) if file.data_dir else None)
    place = output or Path(file.output)
    return Sweep(path, file, place.expanduser(), folder.expanduser().absolute() if folder else None, tuple(overrides))


def _problem(item: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        known = ", ".join(SweepFile.model_fields) if len(item["loc"]) == 1 else "those of docs/sweep.md"
        return f"unknown key {where}; expected {known}"
    if item["type"] == "value_error":
        return f"{where + ': ' if where else ''}{item['ctx']['error']}"
    if item["type"] == "missing":
        return f"{where} is missing: {SweepFile.model_fields[where].description if where in SweepFile.model_fields else ''}"
    return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, found {json.dumps(item['input'], default=str)[:60]}"


def combinations(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of some keys; one empty one of no keys."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def short(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]


def show(value: Any) -> str:
    """A value in a label."""
    if isinstance(value, dict):
        return ",".join(f"{key}={show(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def slug(text: str) -> str:
    """A name for a folder: letters, digits, and a few signs."""
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", text).strip("-.") or "all"


def _said(values: Mapping[str, Any]) -> str:
    return " ".join(f"{short(key)} {show(value)}" for key, value in values.items())


def _content(source: SourceSection) -> Any:
    """What a source reads, wherever it lies: the digests of its files, or the name of a hub data set."""
    files = digests(source)
    return source.path if files is None else sorted(files.values())
