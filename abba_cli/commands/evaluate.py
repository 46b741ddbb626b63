"""`abba eval`."""

import enum
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from abba_cli.commands.options import Dtype, ForceOption, QuantizationName
from abba_cli.terminal import interruptible, open_console, quiet_libraries


class ProtocolName(enum.StrEnum):
    """What `--protocol` takes."""

    paper = "paper"
    harness = "harness"


class SamplingName(enum.StrEnum):
    """What `--sampling` takes."""

    greedy = "greedy"
    paper = "paper"


class GraderName(enum.StrEnum):
    """What `--grader` takes."""

    abba = "abba"
    released = "released"


class BackendName(enum.StrEnum):
    """What `--backend` takes."""

    transformers = "transformers"
    vllm = "vllm"


class SandboxName(enum.StrEnum):
    """What `--sandbox` takes."""

    full = "full"
    weaker = "weaker"


def read_batch_size(text: str) -> int | None:
    """The number of prompts at a time; None for `auto`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no batch size; expected auto or a number of at least 1", param_hint="--batch-size")
    return int(text)


def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run, an adapter directory, a folder of runs, or a hub id; the newest finished run under out/ by default.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names, groups (commonsense, arithmetic, code) or task files, with commas between.", show_default=False
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show all tasks, with their size, metric, protocol and source.")] = False,
    adapter: Annotated[str | None, typer.Option(help="The same as RUN.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or directory of a base or merged model, in place of RUN.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base, in place of the recorded one; with --model, what --baseline scores.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base or of --model.")] = None,
    force: ForceOption = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the untouched base beside it, with a paired test.")] = False,
    protocol: Annotated[
        ProtocolName, typer.Option(help="The paper's prompts and extraction, or lm-evaluation-harness.")
    ] = ProtocolName.paper,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "--template",
            help="paper, none, alpaca, chat, or a Jinja file.",
            show_default="the run's, else the tokenizer's chat template, else none",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each task.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Worked examples before each question.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to score, in place of each task's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of worked examples, and of draws.")] = 0,
    sampling: Annotated[
        SamplingName, typer.Option(help="The likeliest token each time, or draws as the paper's released code makes them.")
    ] = SamplingName.greedy,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Draws with this temperature.")] = None,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --temperature: draw from the likeliest tokens.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers for each row; code tasks then have pass@k.")] = 1,
    grader: Annotated[
        GraderName, typer.Option(help="abba's rules, or those of the paper's released code, to compare with old numbers.")
    ] = GraderName.abba,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local data, as NAME/test.json; what is not there comes from the hub.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights.", show_default="the checkpoint's or the training's")
    ] = None,
    quantization: Annotated[QuantizationName, typer.Option(help="Quantise the weights while loading.")] = QuantizationName.NONE,
    batch_size: Annotated[str, typer.Option(help="Prompts at a time; auto goes down where memory runs out.")] = "auto",
    backend: Annotated[BackendName, typer.Option(help="What generates; vllm has to be installed.")] = BackendName.transformers,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that the model writes, in a sandbox.")
    ] = False,
    sandbox: Annotated[
        SandboxName, typer.Option(help="weaker: run them even where this machine lacks some of the protections.")
    ] = SandboxName.full,
    output: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="RUN/eval, or out/eval/NAME")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the answers that are in the output folder.")] = False,
) -> None:
    """Score a model on benchmarks. Every answer is kept as it comes: the same command goes on where it was stopped."""
    if list_:
        _show_tasks()
        return
    if not tasks:
        raise typer.BadParameter("name some, such as --tasks arc_c,boolq; --list shows them", param_hint="--tasks")
    if sum(one is not None for one in (run, adapter, model)) > 1:
        raise typer.BadParameter("name one of RUN, --adapter and --model")
    if model is not None and base is not None and not baseline:
        raise typer.BadParameter("--base goes with an adapter, or with --model and --baseline")
    if top_p < 1.0 and temperature is None:
        raise typer.BadParameter("--top-p needs a --temperature: without one nothing is drawn")
    if temperature is not None and sampling is SamplingName.paper:
        raise typer.BadParameter("name one of --temperature and --sampling paper")
    if protocol is ProtocolName.harness and prompt not in (None, "chat"):
        raise typer.BadParameter("the harness has prompts of its own; --prompt chat puts them into the tokenizer's chat template")
    size = read_batch_size(batch_size)
    quiet_libraries()
    from abba_cli.evaluating import evaluate as score
    from abba_cli.evaluation.options import EvaluationOptions
    from abba_cli.processes import join_processes
    from abba_cli.speakers import Source
    from abba_cli.ui.evaluation import EvaluationDisplay, show_results

    paper_prompt = prompt == "paper"
    template = "alpaca" if paper_prompt else prompt
    named = adapter or run
    source = Source(named, model, base, revision, force, None if dtype is None else dtype.value, quantization.value, template)
    options = EvaluationOptions(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        protocol=protocol.value,
        baseline=baseline,
        limit=limit,
        shots=shots,
        seed=seed,
        split=split,
        data_dir=data_dir,
        paper_prompt=paper_prompt,
        harness_chat=protocol is ProtocolName.harness and prompt == "chat",
        sampling=sampling.value,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        grader=grader.value,
        batch_size=size,
        backend=backend.value,
        fresh=fresh,
        allow_code_execution=allow_code_execution,
        weaker_sandbox=sandbox is SandboxName.weaker,
        output=output,
    )
    console = open_console()
    first = join_processes().is_main_process
    with (
        interruptible("the same command goes on from here"),
        EvaluationDisplay(console) if first else nullcontext() as display,
    ):
        results, folder = score(source, options, display) if display else score(source, options)
    if display:
        show_results(console, results, folder)


def _show_tasks() -> None:
    quiet_libraries()
    from abba_cli.ui.tasks import show_tasks

    show_tasks(open_console())
