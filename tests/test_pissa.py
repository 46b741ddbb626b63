"""PiSSA: what is saved is PEFT's own conversion, stands for the trained model, and is all that training goes on from."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import TARGETS, logits, relative, write_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abba_cli import RunDir, pissa, train
from abba_cli.adapting import attach_adapter
from abba_cli.bases import Base
from abba_cli.errors import ModelError, RecipeError
from abba_cli.exporting import export
from abba_cli.merging import merge
from abba_cli.preparation import prepare
from abba_cli.recipe_adapter import AdapterSection
from abba_cli.recipe_file import load_recipe
from abba_cli.saved_adapter import open_adapter

RecipeFile = Callable[..., Path]
FILE = "adapter_model.safetensors"
SECTION = "{method: pissa, rank: 4}"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def any_base(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of linear layers, and one of Conv1D's, which store weights transposed."""
    return write_model(tmp_path_factory.mktemp("bases") / str(request.param), tiny_llama, request.param)


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers matter in its logits."""
    return write_model(tmp_path_factory.mktemp("bases") / "base", tiny_llama)


def started(base: Path, dtype: torch.dtype = torch.float32, checkpoint: Path | None = None, **section: object) -> PeftModel:
    """The base with PiSSA on it, at its start or where a checkpoint has it."""
    settings = {"method": "pissa", "rank": 4, "targets": TARGETS[base.name if base.name in TARGETS else "llama"]} | section
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    start_from = str(checkpoint) if checkpoint else None
    return attach_adapter(model, AdapterSection.model_validate(settings), Base(str(base)), start_from=start_from).eval()


def train_a_little(adapted: PeftModel) -> PeftModel:
    """Factors that have gone some way from where they started."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
    return adapted


def on_the_base(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The saved adapter on the untouched base, by stock PEFT."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(folder)).eval()


@pytest.mark.parametrize("section", [{}, {"init": "niter_16", "alpha": 7.0}, {"modules_to_save": ["ln_f", "norm"]}])
def test_the_saved_adapter_answers_as_the_trained_model(section: dict[str, object], any_base: Path, tmp_path: Path) -> None:
    adapted = started(any_base, **section)
    plain = logits(AutoModelForCausalLM.from_pretrained(any_base, dtype=torch.float32), any_base)
    assert relative(logits(adapted, any_base), plain) < 1e-5
    name, layer = next(iter(pissa.factor_layers(adapted.get_base_model())))
    W0 = load_file(any_base / "model.safetensors")
    rest, whole = layer.get_base_layer().weight, next(one for key, one in W0.items() if f"{name}.weight".endswith(key))
    values = torch.linalg.svdvals(whole)
    # The top 4 singular values are out of the frozen weight, and B0 and A0 share them evenly.
    assert torch.linalg.svdvals(rest)[0] == pytest.approx(values[4].item(), rel=2e-2)
    A0 = layer.pissa_start[1].float()
    assert torch.allclose((A0 @ A0.T).diagonal() * layer.scaling["default"], values[:4], rtol=2e-2)

    pissa.save(adapted, tmp_path / "start")
    assert relative(logits(on_the_base(any_base, tmp_path / "start"), any_base), plain) < 1e-5
    pissa.save(train_a_little(adapted), tmp_path / "end")
    answers = logits(adapted, any_base)
    assert relative(answers, plain) > 1e-2
    assert relative(logits(on_the_base(any_base, tmp_path / "end"), any_base), answers) < 1e-5

    again = started(any_base, checkpoint=tmp_path / "end", **section)
    for (key, one), (_, other) in zip(adapted.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), key


def test_it_is_what_pefts_own_conversion_makes(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        init_lora_weights="pissa",
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"down_proj": 6.0},
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    train_a_little(theirs).save_pretrained(
        str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours = started(base, targets=["q_proj", "down_proj"], rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 6.0})
    pissa.save(train_a_little(ours), tmp_path / "ours")
    expected, found = (load_file(tmp_path / one / FILE) for one in ("theirs", "ours"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "inference_mode"):
        settings = [open_adapter(tmp_path / one).config for one in ("theirs", "ours")]
        assert getattr(settings[0], key) == getattr(settings[1], key), key


def test_what_is_saved_past_the_conversion_is_refused(base: Path, tmp_path: Path) -> None:
    started(base).save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(ModelError, match="init_lora_weights is 'pissa'"):
        merge([tmp_path / "raw"], output=tmp_path / "merged")


def test_the_rounding_of_a_bfloat16_base(base: Path, tmp_path: Path) -> None:
    """The residual is rounded to the base's type; computed in float32, nothing but that parts the two."""
    adapted = train_a_little(started(base, torch.bfloat16))
    pissa.save(adapted, tmp_path / "end")
    found = logits(on_the_base(base, tmp_path / "end", torch.bfloat16).float(), base)
    answers = logits(adapted.float(), base)
    assert 1e-4 < (found - answers).norm() / answers.norm() < 1e-2


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_it_goes_on_with_the_same_bits(dtypes: tuple[str, str], base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    section = f"{{method: pissa, rank: 4, init: niter_16, dropout: 0.1, dtype: {dtypes[1]}, modules_to_save: [embed_tokens]}}"
    recipe = recipe_file(model=f"{{name: {base}, dtype: {dtypes[0]}}}", adapter=section)
    whole = train(recipe, [f"output={tmp_path / 'whole'}"])
    halted = tmp_path / "halted"
    shutil.copytree(whole.path, halted)
    for name in ("adapter_config.json", FILE):
        (halted / name).unlink()
    shutil.rmtree(halted / "checkpoints" / "checkpoint-6")
    train(recipe, [f"output={halted}"])
    expected, found = (load_file(one / FILE) for one in (whole.path, halted))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    losses = [[(row["step"], row.get("loss")) for row in run.metrics()] for run in (whole, RunDir(halted))]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_kept(base: Path, rows: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"  # what is learned makes this less likely
    other.write_text('{"question": "Why?", "answer": "Green zebras never sing."}\n' * 4)
    run = train(
        recipe_file(
            model=f"{{name: {base}, dtype: float32}}",
            adapter=SECTION,
            data=f"{{train: {rows}, eval: {other}, template: chat, max_length_tokens: 64}}",
            training="{max_steps: 6, batch_size: 8, learning_rate: 0.1, warmup_ratio: 0, scheduler: constant}",
            evaluation="{every_steps: 1}",
            checkpoints="{every_steps: 1, keep: 6}",
        )
    )
    best = run.provenance()["outcome"]["used_step"]
    assert best < 6
    used, kept = load_file(run.path / FILE), load_file(run.checkpoints / f"checkpoint-{best}" / FILE)
    assert all(torch.equal(used[key], kept[key]) for key in kept)
    assert not torch.equal(*(load_file(one / FILE)[next(iter(kept))] for one in (run.path, run.checkpoints / "checkpoint-6")))
    merged = merge([run.checkpoints / "checkpoint-2"], output=tmp_path / "merged")
    assert merged.verification is not None
    assert export(run.checkpoints / "checkpoint-2", format="gguf-lora", output=tmp_path / "gguf").files


def test_a_dry_run_decomposes_nothing(base: Path, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    recipe = recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter=SECTION)
    assert prepare(load_recipe(recipe)).plan.memory.gap == ""
    with pytest.raises(AssertionError, match="decomposed"):
        train(recipe)


def test_two_processes_train_it(base: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = recipe_file(model=f"{{name: {base}, dtype: float32}}", adapter="{method: pissa, rank: 4, init: niter_16}")
    one = train(recipe, ["training.batch_size=2", "training.gradient_accumulation=1", f"output={tmp_path / 'one'}"])
    command = [sys.executable, "-m", "abba_cli", "train", str(recipe), "--num-processes", "2"]
    for setting in ("training.batch_size=1", "training.gradient_accumulation=1", f"output={tmp_path / 'two'}"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in run.metrics() if "loss" in row] for run in (one, RunDir(tmp_path / "two"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    found, expected = (load_file(tmp_path / name / FILE) for name in ("two", "one"))
    assert all(torch.equal(found[key][4:], expected[key][4:]) for key in found if key.endswith("lora_A.weight"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": "{name: x, quantization: nf4}"}, "pissa takes no nf4 base"),
        ({"model": "{name: x, quantization: int8}"}, "pissa takes no int8 base"),
        ({"adapter": "{method: pissa, start_from: out/run}"}, "start_from does not go with method pissa"),
        ({"adapter": "{method: pissa, init: ones}"}, "init: ones is a start of method abba; pissa has svd and niter_16"),
        ({"adapter": "{init: niter_16}"}, "init: niter_16 is a start of method pissa"),
        ({"adapter": "{method: lora, init: svd}"}, "init does not go with method lora"),
    ],
)
def test_what_does_not_go_together(sections: dict[str, str], message: str, recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError) as error:
        train(recipe_file(**{"adapter": SECTION} | sections))
    assert message in str(error.value)
