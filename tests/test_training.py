"""`train` on a real tiny model: what it writes, how it resumes, stops, and refuses."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_cli import load_recipe, train
from abba_cli.errors import ModelError, RunError, TrainingDiverged
from abba_cli.events import Evaluated, Event, Finished, Stage, Started, Stepped

RecipeFile = Callable[..., Path]


class Killed(Exception):
    """Stands for a process that ends without a word."""


def kill_after(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return listen


def factors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_run_directory_holds_the_contract(recipe_file: RecipeFile, tmp_path: Path) -> None:
    run = train(recipe_file())
    names = {path.name for path in run.path.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "recipe.yaml",
        "metrics.jsonl",
        "loss.png",
        "provenance.json",
        "README.md",
        "checkpoints",
    } <= names
    assert not [name for name in names if name.startswith(".")]
    assert [path.name for path in sorted((run.path / "checkpoints").iterdir())] == ["checkpoint-4", "checkpoint-6"]
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert run.recipe() == load_recipe(recipe_file())
    record = run.provenance()
    assert record["outcome"]["steps"] == 6
    assert record["versions"]["torch"] == torch.__version__
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_peft_loads_the_run_and_it_has_learned(recipe_file: RecipeFile, tiny_llama: Path) -> None:
    events: list[Event] = []
    run = train(recipe_file(), ["training.max_steps=20", "adapter.dropout=0", "training.learning_rate=0.1"], listen=events.append)
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert losses[-1] < losses[0] - 0.2
    model = AutoPeftModelForCausalLM.from_pretrained(run.path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = AutoTokenizer.from_pretrained(run.path)("What is 2 + 2?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, base(tokens).logits)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize("killed_after", [3, 5])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    recipe_file: RecipeFile, tmp_path: Path, killed_after: int
) -> None:
    whole = train(recipe_file(output=str(tmp_path / "whole")))
    with pytest.raises(Killed):
        train(recipe_file(), listen=kill_after(killed_after))
    events: list[Event] = []
    resumed = train(recipe_file(), listen=events.append)
    started = next(event for event in events if isinstance(event, Started))
    assert started.step == killed_after - 1
    assert same(factors(whole.path), factors(resumed.path))
    strip = [[(row["step"], row["loss"], row["learning_rate"]) for row in run.metrics()] for run in (whole, resumed)]
    assert strip[0] == strip[1]


def test_a_broken_newest_checkpoint_is_passed_over(recipe_file: RecipeFile, tmp_path: Path) -> None:
    whole = train(recipe_file(output=str(tmp_path / "whole")))
    with pytest.raises(Killed):
        train(recipe_file(), listen=kill_after(5))
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    events: list[Event] = []
    resumed = train(recipe_file(), listen=events.append)
    assert next(event for event in events if isinstance(event, Started)).step == 2
    assert same(factors(whole.path), factors(resumed.path))


def test_only_the_end_is_missing(recipe_file: RecipeFile, tmp_path: Path) -> None:
    whole = train(recipe_file())
    before = factors(whole.path)
    for name in ("adapter_model.safetensors", "loss.png"):
        (whole.path / name).unlink()
    whole.provenance_file.write_text(json.dumps({**whole.provenance(), "outcome": None}))
    events: list[Event] = []
    again = train(recipe_file(), listen=events.append)
    assert not [event for event in events if isinstance(event, Stepped)]
    assert same(before, factors(again.path))
    assert again.finished


def test_a_finished_run_is_left_alone_and_can_be_prolonged(recipe_file: RecipeFile) -> None:
    run = train(recipe_file())
    before = factors(run.path)
    events: list[Event] = []
    train(recipe_file(), listen=events.append)
    assert [event.already for event in events if isinstance(event, Finished)] == [True]
    assert len(events) == 1  # nothing is read for it
    assert same(before, factors(run.path))
    events.clear()
    train(recipe_file(), ["training.max_steps=8"], listen=events.append)
    assert [event.step for event in events if isinstance(event, Stepped)] == [7, 8]
    assert not same(before, factors(run.path))


@pytest.mark.parametrize("file", ["rows.jsonl", "more.jsonl", "prompt.jinja"])
def test_a_finished_run_is_told_of_another_input(file: str, recipe_file: RecipeFile, rows: Path, tmp_path: Path) -> None:
    """In the same files, in one more of the folder, and in the template, of which no digest is recorded."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(rows, folder / "rows.jsonl")
    (tmp_path / "prompt.jinja").write_text("{{ prompt }} = ")
    template = tmp_path / "prompt.jinja" if file == "prompt.jinja" else "chat"
    recipe = recipe_file(data=f"{{train: {folder}, template: {template}, max_length_tokens: 64}}", training="{max_steps: 1}")
    train(recipe)
    assert train(recipe).finished
    changed = tmp_path / file if file == "prompt.jinja" else folder / file
    changed.write_text("{{ prompt }}: " if file == "prompt.jinja" else '{"question": "What is 9 + 9?", "answer": "18"}\n')
    with pytest.raises(RunError, match="the data is not what the run"):
        train(recipe)


@pytest.mark.parametrize("outcome", [{}, [], {"steps": 6}, "planned_steps: x"])
def test_a_damaged_outcome_is_told(outcome: object, recipe_file: RecipeFile) -> None:
    run = train(recipe_file(), ["training.max_steps=1"])
    record = run.provenance()
    record["outcome"] = record["outcome"] | {"planned_steps": "x"} if isinstance(outcome, str) else outcome
    run.provenance_file.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"cannot read .*provenance.json: .* or the file is broken"):
        train(recipe_file(), ["training.max_steps=1"])


def test_another_batch_is_refused_with_what_becomes_of_it(recipe_file: RecipeFile) -> None:
    train(recipe_file())
    reason = (
        r"training\.batch_size: 2 there, 4 now\n.* keeps its 4 rows, shared out over any number of processes: leave the batch"
    )
    with pytest.raises(RunError, match=reason):
        train(recipe_file(), ["training.batch_size=4", "training.max_steps=8"])
    train(recipe_file(), ["training.batch_size=4", "training.gradient_accumulation=1", "training.max_steps=8"])


def test_another_recipe_in_the_same_directory_is_refused_with_the_difference(recipe_file: RecipeFile) -> None:
    run = train(recipe_file())
    before = factors(run.path)
    with pytest.raises(RunError, match=r"adapter\.r1: 4 there, 5 now"):
        train(recipe_file(), ["adapter.r1=5"])
    assert same(before, factors(run.path))
    train(recipe_file(), ["adapter.r1=5"], restart=True)
    assert factors(run.path)["base_model.model.model.layers.0.self_attn.q_proj.abba_A1"].shape[0] == 5


def test_a_project_folder_with_files_of_the_same_names_is_refused_untouched(recipe_file: RecipeFile, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "checkpoints").mkdir(parents=True)
    mine = {"recipe.yaml": "mine", "README.md": "mine", "metrics.jsonl": "mine", "checkpoints/keep.bin": "mine"}
    for name, text in mine.items():
        (project / name).write_text(text)
    for restart in (False, True):
        with pytest.raises(RunError, match="is not empty and not a run"):
            train(recipe_file(output=str(project)), restart=restart)
    assert {name: (project / name).read_text() for name in mine} == mine
    assert len([path for path in project.rglob("*") if path.is_file()]) == len(mine)


def test_damaged_checkpoints_are_named_and_kept(recipe_file: RecipeFile, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe_file(), listen=kill_after(5))
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for folder in folders:
        (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole .*checkpoint-2, checkpoint-4"):
        train(recipe_file())
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == folders


def test_restart_loses_nothing_before_the_base_is_loaded(recipe_file: RecipeFile, tiny_llama: Path, tmp_path: Path) -> None:
    run = train(recipe_file())
    before = factors(run.path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for output in (run.path, tmp_path / "fresh"):
        with pytest.raises(ModelError, match="cannot load model"):
            train(recipe_file(), [f"model.name={broken}", f"output={output}"], restart=True)
    assert same(before, factors(run.path))
    assert not (tmp_path / "fresh").exists()


def test_a_second_process_in_the_same_directory_is_refused(recipe_file: RecipeFile) -> None:
    refused: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            with pytest.raises(RunError, match="another process is training in") as caught:
                train(recipe_file())
            refused.append(str(caught.value))

    run = train(recipe_file(), listen=listen)
    assert refused
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_fewer_steps_than_made_are_refused(recipe_file: RecipeFile) -> None:
    train(recipe_file())
    with pytest.raises(RunError, match="has made 6 steps already, the recipe asks for 4"):
        train(recipe_file(), ["training.max_steps=4"])


def test_a_prolonged_run_goes_on_with_the_new_schedule(recipe_file: RecipeFile) -> None:
    run = train(recipe_file(), ["training.scheduler=linear", "training.warmup_ratio=0"])
    train(recipe_file(), ["training.scheduler=linear", "training.warmup_ratio=0", "training.max_steps=12"])
    rates = [row["learning_rate"] for row in run.metrics()]
    assert rates[6:] == pytest.approx([1e-2 * (12 - step) / 12 for step in range(6, 12)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "float16"])
def test_factors_have_the_recipes_dtype(recipe_file: RecipeFile, base: str, dtype: str) -> None:
    run = train(recipe_file(), [f"model.dtype={base}", f"adapter.dtype={dtype}", "training.max_steps=1"])
    assert {tensor.dtype for tensor in factors(run.path).values()} == {getattr(torch, dtype)}


def test_the_api_refuses_what_it_would_ignore_and_runs_in_any_thread(recipe_file: RecipeFile) -> None:
    with pytest.raises(TypeError, match="overrides go with a recipe file"):
        train(load_recipe(recipe_file()), ["training.max_steps=1"])
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(train(recipe_file()).path))
    thread.start()
    thread.join()
    assert done


def test_changed_data_is_refused(recipe_file: RecipeFile, rows: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved.jsonl", tmp_path / "changed.jsonl"
    shutil.copy(rows, moved)
    changed.write_text(rows.read_text().replace("It is 3", "It is 4"))
    train(recipe_file())
    train(recipe_file(), [f"data.train.0.path={moved}", "training.max_steps=7"])
    with pytest.raises(RunError, match="the data is not what the run"):
        train(recipe_file(), [f"data.train.0.path={changed}", "training.max_steps=8"])


def test_a_start_that_died_before_its_first_checkpoint_is_started_again(recipe_file: RecipeFile) -> None:
    with pytest.raises(Killed):
        train(recipe_file(), listen=kill_after(1))
    events: list[Event] = []
    run = train(recipe_file(), ["adapter.r1=5"], listen=events.append)
    assert next(event for event in events if isinstance(event, Started)).step == 0
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_directory_that_is_not_a_run_is_refused_untouched(recipe_file: RecipeFile, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("precious")
    for restart in (False, True):
        with pytest.raises(RunError, match="is not empty and not a run"):
            train(recipe_file(output=str(folder)), restart=restart)
    assert [path.name for path in folder.iterdir()] == ["chapter1.tex"]


def test_one_by_four_equals_two_by_two_and_four_by_one(recipe_file: RecipeFile, tmp_path: Path) -> None:
    losses, weights = [], []
    for batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        overrides = [
            f"training.batch_size={batch}",
            f"training.gradient_accumulation={accumulation}",
            "adapter.dropout=0",
            f"output={tmp_path / f'{batch}x{accumulation}'}",
        ]
        run = train(recipe_file(), overrides)
        losses.append(torch.tensor([row["loss"] for row in run.metrics()]))
        weights.append(factors(run.path))
    for other, others in zip(losses[1:], weights[1:], strict=True):
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-5)
        for name, tensor in others.items():
            torch.testing.assert_close(tensor, weights[0][name], rtol=1e-3, atol=1e-4)


def test_evaluation_loss_is_the_mean_over_supervised_tokens(recipe_file: RecipeFile, rows: Path, tiny_llama: Path) -> None:
    events: list[Event] = []
    train(
        recipe_file(),
        [f"data.eval={rows}", "data.eval.0.max_rows=5", "evaluation.batch_size=2", "training.max_steps=1"],
        listen=events.append,
    )
    before = next(event.loss for event in events if isinstance(event, Evaluated))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines()[:5]:
        row = json.loads(line)
        asked = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        text = prompt + row["answer"] + tokenizer.eos_token
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)
        total -= sum(logprobs[0, at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))
        count += ids.shape[1] - start
    assert before == pytest.approx(total / count, rel=1e-4)


def test_the_best_adapter_is_kept_and_training_stops_early(recipe_file: RecipeFile, rows: Path) -> None:
    # A rate this high makes the evaluation loss rise after the first steps.
    overrides = [
        f"data.eval={rows}",
        "evaluation.every_steps=1",
        "evaluation.patience=2",
        "training.learning_rate=0.5",
        "training.max_steps=20",
        "training.max_grad_norm=0",
        "checkpoints.keep=1",
    ]
    events: list[Event] = []
    run = train(recipe_file(), overrides, listen=events.append)
    outcome = next(event.outcome for event in events if isinstance(event, Finished))
    evaluated = {event.step: event.loss for event in events if isinstance(event, Evaluated) and event.step}
    assert outcome.steps < 20
    assert outcome.used_step == min(evaluated, key=lambda step: evaluated[step]) < outcome.steps
    best = factors(run.path / "checkpoints" / f"checkpoint-{outcome.used_step}")
    assert same(factors(run.path), best)


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(recipe_file: RecipeFile, tmp_path: Path) -> None:
    overrides = ["training.learning_rate=1e30", "training.warmup_ratio=0.5", "training.max_grad_norm=0", "training.max_steps=8"]
    with pytest.raises(TrainingDiverged, match=r"is (nan|inf) at step .*learning_rate"):
        train(recipe_file(), [*overrides, "checkpoints.every_steps=1"])
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept
    for tensor in factors(kept[-1]).values():
        assert tensor.isfinite().all()


def test_start_from_goes_on_with_new_data_and_runs_no_svd(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(recipe_file())
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "qr", None)
    overrides = [f"adapter.start_from={first.path}", f"output={tmp_path / 'second'}", "training.learning_rate=1e-12"]
    second = train(recipe_file(), overrides)
    for name, tensor in factors(second.path).items():
        torch.testing.assert_close(tensor, factors(first.path)[name], rtol=0, atol=1e-8)
    with pytest.raises(ModelError, match="was trained with r1 = 4, the recipe has 5"):
        train(recipe_file(), [*overrides, "adapter.r1=5", f"output={tmp_path / 'third'}"])


@pytest.mark.parametrize("packing", [True, False])
def test_packing_learns_too(recipe_file: RecipeFile, packing: bool) -> None:
    run = train(
        recipe_file(), [f"data.packing={packing}", "training.max_steps=15", "adapter.dropout=0", "training.learning_rate=0.1"]
    )
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    "override",
    [
        "training.gradient_checkpointing=true",
        "training.scheduler=constant",
        "training.scheduler=linear",
        "training.optimizer=adamw_8bit",
        "model.attention=eager",
        "adapter.dtype=bfloat16",
        "adapter.init=random",
        "adapter.targets=all-linear",
        "adapter.targets=.*layers.0.*proj",
        "adapter.modules_to_save=[norm]",
        "data.supervise=all",
        "model.quantization=nf4",
        "model.quantization=int8",
        "model.dtype=bfloat16",
        # torch 2.13's own compiler warns of what it does itself.
        pytest.param("training.compile=true", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
    ],
)
def test_options_train(recipe_file: RecipeFile, override: str) -> None:
    run = train(recipe_file(), [override, "training.max_steps=8", "adapter.dropout=0"])
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < losses[0]


def test_samples_are_written(recipe_file: RecipeFile, rows: Path) -> None:
    run = train(recipe_file(), [f"data.eval={rows}", "evaluation.samples=2", "evaluation.sample_max_tokens=5"])
    samples = [json.loads(line) for line in run.samples_file.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 6, 6]
    assert samples[0]["reference"].startswith("It is 0.")


def test_full_disk_is_found_before_the_first_step(recipe_file: RecipeFile) -> None:
    """A device that is always full: /dev/full behind the recipe's own folder is not possible, so a tiny tmpfs is mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = Path("/tmp") / f"abba-small-{os.getpid()}"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {folder} 2>/dev/null") != 0:
        folder.rmdir()
        pytest.skip("this machine does not let the test mount a tmpfs")
    events: list[Event] = []
    try:
        with pytest.raises(RunError, match=r"(no space left|No space left|MB free)"):
            train(recipe_file(output=str(folder / "run")), listen=events.append)
        assert not list(folder.iterdir())
    finally:
        os.system(f"umount {folder}")
        folder.rmdir()
    assert Stage("Loading the base model") not in events


@pytest.mark.parametrize("place", ["/proc/run", "/dev/full/run"])
def test_an_impossible_output_is_found_before_the_base_is_loaded(place: str, recipe_file: RecipeFile) -> None:
    """Root may write anywhere, until it tries."""
    events: list[Event] = []
    with pytest.raises(RunError, match=r"cannot write to /.*; choose another output"):
        train(recipe_file(output=place), listen=events.append)
    assert Stage("Loading the base model") not in events


def test_a_run_that_is_refused_leaves_no_folder(recipe_file: RecipeFile, tmp_path: Path) -> None:
    output = tmp_path / "new" / "run"
    with pytest.raises(RunError, match="interrupted"):
        train(recipe_file(output=str(output)), listen=_refuse_to_load)
    assert not output.parent.exists()


def _refuse_to_load(event: Event) -> None:
    if event == Stage("Loading the base model"):
        raise RunError("interrupted")


def test_intervals_may_change_when_a_run_goes_on(recipe_file: RecipeFile, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe_file(), listen=kill_after(3))
    run = train(recipe_file(), ["checkpoints.every_steps=1", "checkpoints.keep=9"])
    assert [path.name for path in run.complete_checkpoints()] == [f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)]


def test_patience_is_remembered_by_a_resumed_run(recipe_file: RecipeFile, rows: Path, tmp_path: Path) -> None:
    """A learning rate too small to move W0 + dW: no evaluation is better than the one before, on any processor."""
    overrides = [
        f"data.eval={rows}",
        "evaluation.every_steps=1",
        "evaluation.patience=3",
        "training.learning_rate=1e-20",
        "training.max_steps=30",
        "checkpoints.every_steps=1",
    ]
    whole = train(recipe_file(), [*overrides, f"output={tmp_path / 'whole'}"])
    end = whole.provenance()["outcome"]["steps"]
    assert end < 30
    with pytest.raises(Killed):
        train(recipe_file(), overrides, listen=kill_after(end - 1))
    resumed = train(recipe_file(), overrides)
    assert resumed.provenance()["outcome"]["steps"] == end
    assert same(factors(whole.path), factors(resumed.path))
