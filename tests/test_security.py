"""The rules of SECURITY.md that the source shows by itself: no pickles, no shells, no code from elsewhere."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "abba_cli"
PICKLING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
# What runs inside the sandbox: there, running the programs of models is the work itself.
INSIDE = ("evaluation/sandbox/inside/", "evaluation/grading/plus_rules.py")
FILES = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call: what is called, and its keyword arguments, as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}


def wrong(source: str) -> list[str]:
    """What a source file does that none of ours may."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.partition(".")[0] in PICKLING]
        if isinstance(node, ast.ClassDef):
            unsafe = [base for base in map(ast.unparse, node.bases) if base.endswith((".Loader", "UnsafeLoader"))]
            found += [f"{node.name} is an unsafe {base}" for base in unsafe]
    for called, words in calls(tree):
        last = called.rpartition(".")[2]
        if last == "load" and "torch" in called and words.get("weights_only") != "True":
            found.append(f"{called} without weights_only=True")
        if called in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"):
            found.append(f"{called}; expected yaml.safe_load")
        if last in ("system", "popen", "getoutput", "getstatusoutput") or words.get("shell", "False") != "False":
            found.append(f"{called} starts a shell")
        if called in ("eval", "exec", "__import__"):
            found.append(f"{called} runs text as code")
        if words.get("trust_remote_code", "model.trust_remote_code") not in ("model.trust_remote_code", "False"):
            found.append(f"{called} decides itself to trust remote code")
        if words.get("use_safetensors", "True") != "True" or words.get("safe_serialization", "True") != "True":
            found.append(f"{called} reads or writes pickled weights")
    return found


# What a rule above forbids and a file does all the same, with the reason why it is safe.
ALLOWED = {
    # For its error's name alone: torch.load with weights_only raises it.
    "foreign.py": ["imports pickle"],
    "states.py": ["imports pickle"],
    # Its loader is a SafeLoader that takes tags for nothing.
    "evaluation/harness/tasks.py": ["yaml.load; expected yaml.safe_load"],
}


@pytest.mark.parametrize("name", FILES)
def test_source(name: str) -> None:
    found = [one for one in wrong(FILES[name].read_text()) if not (name.startswith(INSIDE) and "runs text as code" in one)]
    assert found == ALLOWED.get(name, [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "class Mine(yaml.Loader): pass",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "model.save_pretrained(folder, safe_serialization=False)",
    ],
)
def test_the_rules_can_fail(source: str) -> None:
    assert len(wrong(source)) == 1


@pytest.mark.parametrize("name", ["foreign.py", "states.py"])
def test_pickle_is_imported_for_its_error_only(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {one for one in attributes if one.startswith("pickle.")} == {"pickle.UnpicklingError"}


def test_the_harness_loader_is_a_safe_one() -> None:
    pytest.importorskip("lm_eval")
    import yaml

    from abba_cli.evaluation.harness.tasks import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert yaml.load("a: !function os.getcwd", _Loader) == {"a": None}
    with pytest.raises(yaml.YAMLError):
        yaml.load("a: !!python/object/apply:os.getcwd []", _Loader)
