"""What README and docs tell people to type exists: recipes, options, make targets, links."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from abba_cli.cli import app
from abba_cli.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_shell_commands_are_real() -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for page in PAGES:
        for words in commands(page):
            name = Path(words[0]).name
            if name == "abba":
                options = {option for parameter in known[words[1]].params for option in parameter.opts}
                assert {word for word in words[2:] if word.startswith("--")} <= options, words
                if words[2].startswith("recipes/"):
                    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
                    load_recipe(ROOT / words[2], overrides)
                seen += 1
            elif name == "make":
                assert set(words[1:]) <= set(targets), words
                seen += 1
            elif name == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), words
                seen += 1
    assert seen >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_yaml_examples_are_recipes(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.yaml"
        file.write_text(example)
        load_recipe(file)
