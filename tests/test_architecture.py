"""The shape of the code: imports point one way, heavy libraries are loaded late, modules stay small."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "abba_cli"

# A module imports only from those above it; a new one is put where its imports allow.
ORDER = [
    "abba_cli",
    "abba_cli.errors",
    "abba_cli.launching",
    "abba_cli.processes",
    "abba_cli.recipe_section",
    "abba_cli.recipe_adapter",
    "abba_cli.recipe",
    "abba_cli.recipe_reference",
    "abba_cli.plain_yaml",
    "abba_cli.recipe_file",
    "abba_cli.disk",
    "abba_cli.folders",
    "abba_cli.states",
    "abba_cli.sealing",
    "abba_cli.records",
    "abba_cli.rundir",
    "abba_cli.rendering",
    "abba_cli.formats",
    "abba_cli.prompts",
    "abba_cli.batches",
    "abba_cli.prepared",
    "abba_cli.sources",
    "abba_cli.data",
    "abba_cli.adapter.peft_types",
    "abba_cli.adapter.factors",
    "abba_cli.adapter.starts",
    "abba_cli.adapter.config",
    "abba_cli.adapter.cost",
    "abba_cli.adapter.quantised",
    "abba_cli.adapter.triton_tiles",
    "abba_cli.adapter.triton_kernels",
    "abba_cli.adapter.dense",
    "abba_cli.adapter.factored",
    "abba_cli.adapter.passes",
    "abba_cli.adapter.compiled",
    "abba_cli.adapter.kernels",
    "abba_cli.adapter.layer",
    "abba_cli.adapter.decoding",
    "abba_cli.adapter.linear",
    "abba_cli.adapter.conv",
    "abba_cli.adapter.model",
    "abba_cli.adapter",
    "abba_cli.dense_methods",
    "abba_cli.hub",
    "abba_cli.bases",
    "abba_cli.loading",
    "abba_cli.methods",
    "abba_cli.pissa",
    "abba_cli.adapting",
    "abba_cli.head",
    "abba_cli.loss",
    "abba_cli.sharding",
    "abba_cli.zero",
    "abba_cli.forecast",
    "abba_cli.forecast.budget",
    "abba_cli.forecast.tracker",
    "abba_cli.forecast.quantised",
    "abba_cli.forecast.stand_in",
    "abba_cli.forecast.rehearsal",
    "abba_cli.forecast.rows",
    "abba_cli.forecast.prediction",
    "abba_cli.forecast.fitting",
    "abba_cli.plan",
    "abba_cli.memory",
    "abba_cli.events",
    "abba_cli.provenance",
    "abba_cli.sampling",
    "abba_cli.recorder",
    "abba_cli.loop",
    "abba_cli.preparation",
    "abba_cli.out_of_memory",
    "abba_cli.training",
    "abba_cli.outputs",
    "abba_cli.saved_settings",
    "abba_cli.saved_adapter",
    "abba_cli.recorded_base",
    "abba_cli.speakers",
    "abba_cli.generating",
    "abba_cli.checkpoint",
    "abba_cli.merge",
    "abba_cli.merge.dequantising",
    "abba_cli.merge.tensors",
    "abba_cli.merge.plan",
    "abba_cli.merge.verifying",
    "abba_cli.merging",
    "abba_cli.export",
    "abba_cli.export.lora",
    "abba_cli.export.loha",
    "abba_cli.export.own",
    "abba_cli.export.gguf_lora",
    "abba_cli.export.converter",
    "abba_cli.export.gguf",
    "abba_cli.export.modelfile",
    "abba_cli.exporting",
    "abba_cli.foreign",
    "abba_cli.importing",
    "abba_cli.pushing",
    "abba_cli.evaluation",
    "abba_cli.evaluation.tasks",
    "abba_cli.evaluation.decoding",
    "abba_cli.evaluation.results",
    "abba_cli.evaluation.reference",
    "abba_cli.evaluation.rows",
    "abba_cli.evaluation.grading",
    "abba_cli.evaluation.grading.answers",
    "abba_cli.evaluation.grading.numbers",
    "abba_cli.evaluation.grading.formulas",
    "abba_cli.evaluation.grading.symbolic_worker",
    "abba_cli.evaluation.grading.symbolic",
    "abba_cli.evaluation.grading.latex",
    "abba_cli.evaluation.grading.released",
    "abba_cli.evaluation.sandbox.contract",
    "abba_cli.evaluation.sandbox.inside",
    "abba_cli.evaluation.sandbox.inside.kernel",
    "abba_cli.evaluation.sandbox.inside.call_filter",
    "abba_cli.evaluation.sandbox.inside.private_root",
    "abba_cli.evaluation.sandbox.inside.refusals",
    "abba_cli.evaluation.sandbox.inside.codec",
    "abba_cli.evaluation.sandbox.inside.link",
    "abba_cli.evaluation.sandbox.inside.program",
    "abba_cli.evaluation.sandbox.inside.remote",
    "abba_cli.evaluation.sandbox.inside.checking",
    "abba_cli.evaluation.sandbox.inside.jail",
    "abba_cli.evaluation.sandbox.inside.start",
    "abba_cli.evaluation.sandbox.jails",
    "abba_cli.evaluation.sandbox.protections",
    "abba_cli.evaluation.sandbox.running",
    "abba_cli.evaluation.sandbox",
    "abba_cli.evaluation.grading.plus_rules",
    "abba_cli.evaluation.grading.plus",
    "abba_cli.evaluation.grading.code",
    "abba_cli.evaluation.grading.judging",
    "abba_cli.evaluation.questions",
    "abba_cli.evaluation.options",
    "abba_cli.evaluation.engine",
    "abba_cli.evaluation.vllm",
    "abba_cli.evaluation.fingerprint",
    "abba_cli.evaluation.journal",
    "abba_cli.evaluation.reporting",
    "abba_cli.evaluation.reporting.statistics",
    "abba_cli.evaluation.reporting.tables",
    "abba_cli.evaluation.reporting.comparing",
    "abba_cli.evaluation.reporting.side_by_side",
    "abba_cli.evaluation.reporting.chart",
    "abba_cli.evaluation.scores",
    "abba_cli.evaluation.paper",
    "abba_cli.evaluation.harness",
    "abba_cli.evaluation.harness.tasks",
    "abba_cli.evaluation.harness.data",
    "abba_cli.evaluation.harness.scores",
    "abba_cli.evaluation.harness.model",
    "abba_cli.evaluation.harness.scoring",
    "abba_cli.evaluating",
    "abba_cli.sweeping",
    "abba_cli.sweeping.schema",
    "abba_cli.sweeping.planning",
    "abba_cli.sweeping.records",
    "abba_cli.sweeping.summary",
    "abba_cli.sweeping.running",
    "abba_cli.sweeping.reporting",
    "abba_cli.sweeping.charts",
    "abba_cli.reconstruction",
    "abba_cli.reconstruction.solving",
    "abba_cli.reconstruction.starts",
    "abba_cli.reconstruction.matrices",
    "abba_cli.reconstruction.differences",
    "abba_cli.reconstruction.records",
    "abba_cli.reconstruction.experiment",
    "abba_cli.reconstruction.reporting",
    "abba_cli.reconstruction.chart",
    "abba_cli.diagnosis",
    "abba_cli.ui",
    "abba_cli.ui.forecast",
    "abba_cli.ui.training",
    "abba_cli.ui.progress",
    "abba_cli.ui.evaluation",
    "abba_cli.ui.tasks",
    "abba_cli.ui.chat",
    "abba_cli.ui.steps",
    "abba_cli.ui.doctor",
    "abba_cli.ui.reconstruction",
    "abba_cli.ui.sweep",
    "abba_cli.terminal",
    "abba_cli.commands",
    "abba_cli.commands.options",
    "abba_cli.commands.compare",
    "abba_cli.commands.doctor",
    "abba_cli.commands.evaluate",
    "abba_cli.commands.export",
    "abba_cli.commands.generate",
    "abba_cli.commands.importing",
    "abba_cli.commands.merge",
    "abba_cli.commands.push",
    "abba_cli.commands.reconstruct",
    "abba_cli.commands.sweep",
    "abba_cli.commands.train",
    "abba_cli.cli",
    "abba_cli.sweeping.child",
    "abba_cli.__main__",
]
MAX_LINES = 300
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "pandas", "pyarrow", "matplotlib"}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, also inside functions, but not for type checkers alone."""
    tree = ast.parse(MODULES[name].read_text())
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            branch.body = [ast.Pass()]
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source in MODULES:
                inner = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
                yield from inner
                if len(inner) < len(node.names):
                    yield source


def test_the_list_has_every_module_once() -> None:
    assert sorted(ORDER) == sorted(MODULES), "put new modules into ORDER, where their imports allow it"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_up_the_list_only(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    wrong = sorted(set(imported(name)) - set(above))
    assert not wrong, f"{name} imports {', '.join(wrong)}, which stands below it in ORDER"


def test_the_walk_sees_imports() -> None:
    """The tests above would pass on a walk that finds nothing."""
    assert {"abba_cli.errors", "abba_cli.recipe"} <= set(imported("abba_cli.recipe_file"))
    assert {"abba_cli.adapter.config", "abba_cli.adapter.factors"} <= set(imported("abba_cli.adapter.layer"))
    assert "abba_cli.training" in set(imported("abba_cli.commands.train"))
    assert "abba_cli.training" not in set(imported("abba_cli"))


def test_the_adapter_knows_nothing_of_the_rest() -> None:
    for name in (name for name in MODULES if name.startswith("abba_cli.adapter")):
        assert all(other.startswith("abba_cli.adapter") for other in imported(name)), name


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring
    assert len(docstring.splitlines()[0]) > 10


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_long(name: str) -> None:
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines: it does more than one thing"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the code."""
    report = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom abba_cli.cli import app\nsys.argv = ['abba', '--help']\ntry:\n    app()\nexcept SystemExit:\n    pass"
    )
    loaded = loaded_by(code)
    assert "typer" in loaded
    assert not loaded & (HEAVY | {"pydantic", "yaml", "jinja2", "numpy"})


def test_importing_the_package_loads_no_heavy_library() -> None:
    loaded = loaded_by("import abba_cli")
    assert "abba_cli" in loaded
    assert not loaded & (HEAVY | {"pydantic", "typer", "yaml", "numpy"})


def test_reading_a_recipe_loads_no_heavy_library() -> None:
    assert not loaded_by("from abba_cli import load_recipe, Recipe") & HEAVY


def test_help_and_version_are_instant() -> None:
    for option in ("--help", "--version"):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "abba_cli", option], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        # Half a second on a free machine; the bound leaves room for a busy one.
        assert min(times) < 2, times


def test_the_adapter_needs_no_bitsandbytes_and_none_of_the_command_lines_libraries() -> None:
    blocked = ("bitsandbytes", "typer", "pydantic", "rich", "matplotlib")
    block = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}\nimport abba_cli.adapter\nprint(abba_cli.adapter.AbbaConfig(r1=2, r2=3).r2)"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
