"""`abba compare` as a user meets it: files, messages, exit codes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from made_results import cells_of, evaluation, scored, written
from matplotlib.image import imread

from abba_cli import cli
from abba_cli.commands.compare import compare

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; returns exit code, stdout and stderr."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(compare)
    app.callback()(lambda: None)  # so that the command has to be named
    monkeypatch.setattr(cli, "app", app)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["abba", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        written(tmp_path / name / "eval", evaluation(scored("boolq", value, name), scored("piqa", value, name))).parent
        for name, value in (("A", 0.5), ("B", 0.75))
    ]


def test_table_markdown_and_picture(run: Run, sources: list[Path], tmp_path: Path) -> None:
    files = tmp_path / "new folder" / "table.md", tmp_path / "chart.PNG"
    code, out, err = run(*sources, "--markdown", files[0], "--png", files[1])
    assert (code, err) == (0, "")
    assert out.splitlines()[3].split() == ["B", "75.00*+/-", "2.00", "75.00*+/-", "2.00"]
    assert out.splitlines()[-2:] == [f"written {file}" for file in files]
    assert cells_of(files[0].read_text())[2] == ["B", "75.00 ± 2.00", "75.00 ± 2.00"]
    assert imread(files[1]).shape[1] == 1350
    assert b"abba compare" in files[1].read_bytes()


def test_only_files_of_ours_are_replaced(run: Run, sources: list[Path], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.md", tmp_path / "README.md"
    picture = tmp_path / "chart.png"
    theirs.write_text("# By hand\n")
    assert run(*sources, "--markdown", ours, "--png", picture)[0] == 0
    first = ours.read_text()
    for file, option in ((ours, "--markdown"), (picture, "--png")):
        code, out, err = run(sources[0], option, file)
        assert (code, out) == (1, "")
        assert err == f"abba: {file} exists; choose another, or give --overwrite to replace it\n"
    assert ours.read_text() == first
    assert run(sources[0], "--markdown", ours, "--png", picture, "--overwrite")[0] == 0
    assert len(cells_of(ours.read_text())) == len(cells_of(first)) - 1
    code, _, err = run(sources[0], "--markdown", theirs, "--overwrite")
    assert (code, err) == (1, f"abba: {theirs} was not written by `abba compare`, so it is not replaced; choose another\n")
    assert theirs.read_text() == "# By hand\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json; `abba eval` writes one into its --output"),
        ("{", "is not a results file of `abba eval`: Expecting property name"),
        ("\xff", "is not a results file of `abba eval`: 'utf-8' codec can't decode"),
        ("[]", "is not a results file of `abba eval`: no schema_version in it"),
        ("{}", "is not a results file of `abba eval`: no schema_version in it"),
        ('{"schema_version": 1}', "is not a results file of `abba eval`: abba: Field required"),
        ('{"schema_version": 2}', "schema_version is 2, this version of abba reads 1"),
    ],
)
def test_sources_that_are_none(run: Run, sources: list[Path], tmp_path: Path, content: str | None, message: str) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    if content is not None:
        (folder / "results.json").write_bytes(content.encode("latin-1"))
    code, out, err = run(sources[0], folder, "--markdown", tmp_path / "table.md")
    assert (code, out) == (1, "")
    assert err.startswith(f"abba: {folder}")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "table.md").exists()


def test_a_path_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "nothing")
    assert (code, err) == (1, f"abba: {tmp_path}/nothing does not exist; expected a run, or a folder that `abba eval` wrote\n")


def test_names_that_end_otherwise(run: Run, sources: list[Path], tmp_path: Path) -> None:
    for option, name, suffix in (("--png", "chart.gif", ".png"), ("--markdown", "table.html", ".md"), ("--markdown", "x", ".md")):
        code, out, err = run(sources[0], option, tmp_path / name)
        assert (code, out) == (1, "")
        assert err == f"abba: cannot write {tmp_path / name}: expected a name that ends in {suffix}\n"


def test_places_that_cannot_be_written(run: Run, sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for place in (tmp_path / "file" / "chart.png", Path("/proc/nothing/chart.png"), tmp_path / "folder.png"):
        code, out, err = run(sources[0], "--png", place, "--markdown", tmp_path / "table.md")
        assert (code, out) == (1, "")
        assert err.startswith(f"abba: cannot write to {place}")
        assert err.count("\n") == 1
        assert not (tmp_path / "table.md").exists(), "a file was written although the other cannot be"


def test_no_source_is_a_usage_error(run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert "Missing argument" in err


def test_as_a_process(sources: list[Path], tmp_path: Path) -> None:
    """With a link and relative paths; torch is not loaded for it."""
    (tmp_path / "link").symlink_to(sources[1])
    code = (
        "import sys, typer; from abba_cli.commands.compare import compare; app = typer.Typer(); app.command()(compare)\n"
        "try:\n    app()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "A", "link", "--markdown", "table.md"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["written table.md", "False"]
    assert len(cells_of((tmp_path / "table.md").read_text())) == 4
