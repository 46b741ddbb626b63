"""Adapters in other programs' formats, written here from known factors: the update arrives as it was."""

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import difference, load_base, logits_of, make_base
from typer.testing import CliRunner

from abba_cli.bases import Base
from abba_cli.commands.importing import import_
from abba_cli.errors import ModelError, RunError
from abba_cli.foreign import read_foreign
from abba_cli.importing import import_adapter, target_names

Factors = dict[str, torch.Tensor]
Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture
def factors(base: Path) -> Callable[..., dict[str, Factors]]:
    """Random factors for the layers whose name holds one of the words."""

    def draw(*words: str, r1: int = 3, r2: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
        generator = torch.Generator().manual_seed(5)
        found = {}
        for name, module in load_base(base).named_modules():
            if isinstance(module, torch.nn.Linear) and any(word in name for word in words):
                m, n = module.weight.shape
                shapes = {"B1": (m, r1), "A1": (r1, n), "B2": (m, r2), "A2": (r2, n)}
                found[name] = {key: 0.2 * torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
        return found

    return draw


def merged_logits(base: Path, layers: dict[str, Factors], scales: dict[str, float]) -> torch.Tensor:
    """The base with every dense update added by hand."""
    model = load_base(base)
    before = logits_of(model)
    for name, one in layers.items():
        B1, A1, B2, A2 = (one[key].double() for key in ("B1", "A1", "B2", "A2"))
        delta = scales[name] * torch.einsum("ik,kj,il,lj->ij", B1, A1, B2, A2)
        model.get_submodule(name).weight.data += delta.float()
    after = logits_of(model)
    assert difference(after, before) > 0.05
    return after


def imported_logits(base: Path, source: Path, output: Path) -> torch.Tensor:
    import_adapter(source, Base(str(base)), output)
    return logits_of(PeftModel.from_pretrained(load_base(base), output))


def write_authors(
    folder: Path, layers: dict[str, Factors], pickled: bool = True, key: str = "{}.lora_{}.default", **settings: Any
) -> Path:
    """As `save_pretrained` of the released code writes it; its configuration names no base, and no type."""
    folder.mkdir(exist_ok=True)
    tensors = {key.format(name, factor): value for name, one in layers.items() for factor, value in one.items()}
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r1": 3, "r2": 3, "alpha1": 32, "alpha2": 18, "dropout": 0.1, "target_modules": ["q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none", "modules_to_save": None}))
    return folder


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize(
    "key",
    [
        "{}.lora_{}.default",
        "base_model.model.{}.lora_{}.default",
        "model.{}.lora_{}",
        "{}.lora_{}.mine.weight",
        "base_model.model.{}.lora_{}.weight",
    ],
)
def test_the_authors_format(
    base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path, pickled: bool, key: str
) -> None:
    layers = factors("q_proj", "down_proj", dtype=torch.bfloat16)
    source = write_authors(tmp_path / "theirs", layers, pickled, key)
    found = imported_logits(base, source, tmp_path / "ours")
    assert difference(found, merged_logits(base, layers, dict.fromkeys(layers, math.sqrt(32) * math.sqrt(18)))) < 1e-5


def test_names_from_inside_the_wrapped_model(base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    """As saved from `AutoModel`, where the names lack the first `model.`."""
    layers = factors("v_proj")
    inner = {name.removeprefix("model."): one for name, one in layers.items()}
    found = imported_logits(base, write_authors(tmp_path / "theirs", inner), tmp_path / "ours")
    assert difference(found, merged_logits(base, layers, dict.fromkeys(layers, 24.0))) < 1e-5


def test_ranks_are_the_tensors_own(base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    """The released code writes r2 = 8 into the configuration and trains r2 = r1; and it clips ranks on small layers."""
    layers = factors("q_proj", r1=3, r2=3) | factors("up_proj", r1=4, r2=4) | factors("o_proj", r1=2, r2=5)
    source = write_authors(tmp_path / "theirs", layers, r1=4, r2=8)
    adapter = import_adapter(source, Base(str(base)), tmp_path / "ours")
    assert {(name.rpartition(".")[2], one.r1, one.r2) for name, one in adapter.layers.items()} == {
        ("q_proj", 3, 3),
        ("up_proj", 4, 4),
        ("o_proj", 2, 5),
    }
    assert all(one.s == pytest.approx(24.0, rel=1e-14) for one in adapter.layers.values())
    found = logits_of(PeftModel.from_pretrained(load_base(base), tmp_path / "ours"))
    assert difference(found, merged_logits(base, layers, dict.fromkeys(layers, 24.0))) < 1e-5


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_no_factor_changes(
    base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path, dtype: torch.dtype, kept: torch.dtype
) -> None:
    layers = factors("q_proj", dtype=dtype)
    adapter = import_adapter(write_authors(tmp_path / "theirs", layers), Base(str(base)), tmp_path / "ours")
    for name, one in layers.items():
        for factor, value in adapter.factors(name)._asdict().items():
            assert value.dtype == kept
            assert torch.equal(value, one[factor].to(kept))
    assert adapter.config.base_model_name_or_path == str(base)
    assert (adapter.config.task_type, adapter.config.target_modules) == ("CAUSAL_LM", {"q_proj"})
    record = json.loads((tmp_path / "ours" / "abba.json").read_text())
    assert (record["command"], record["format"]) == ("import", "the authors' ABBA")


def test_loha_of_peft(base: Path, tmp_path: Path) -> None:
    """PEFT itself writes the adapter, and is what the import is held against."""
    settings = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 9}, "modules_to_save": ["lm_head"]}
    torch.manual_seed(3)
    config = LoHaConfig(r=4, alpha=6, target_modules=["q_proj", "up_proj"], init_weights=False, **settings)
    model = get_peft_model(load_base(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data *= 3 if "hada" in name else 1.1
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "theirs")
    found = imported_logits(base, tmp_path / "theirs", tmp_path / "ours")
    assert difference(found, logits_of(load_base(base))) > 0.05
    assert difference(found, expected) < 1e-5


def write_lycoris(file: Path, layers: dict[str, Factors], alphas: dict[str, float], **more: torch.Tensor) -> Path:
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    tensors = {}
    for name, one in layers.items():
        flat = "lycoris_" + name.replace(".", "_")
        tensors |= {f"{flat}.{names[factor]}": value for factor, value in one.items()}
        tensors[f"{flat}.alpha"] = torch.tensor(alphas[name])
    file.parent.mkdir(exist_ok=True)
    save_file(tensors | more, file)
    return file


def test_loha_of_lycoris(base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    layers = factors("gate_proj", r1=4, r2=4) | factors("0.self_attn.k_proj", r1=2, r2=2)
    alphas = {name: 40.0 + index for index, name in enumerate(layers)}
    file = write_lycoris(tmp_path / "theirs" / "lycoris.safetensors", layers, alphas)
    expected = merged_logits(base, layers, {name: alphas[name] / len(one["A1"]) for name, one in layers.items()})
    inner = {name.removeprefix("model."): one for name, one in layers.items()}
    inner_file = write_lycoris(tmp_path / "inner.safetensors", inner, {name: alphas[f"model.{name}"] for name in inner})
    for number, source in enumerate((file, file.parent, inner_file)):
        assert difference(imported_logits(base, source, tmp_path / f"ours{number}"), expected) < 1e-5


def test_a_transposed_base(factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    """The factors' shapes are those of W0 (m, n), however the base stores it."""
    base = make_base("gpt2", tmp_path / "gpt2")
    names = {f"transformer.h.{index}.attn.c_attn": (108, 36) for index in (0, 1)}
    layers = {
        name: {"B1": torch.randn(m, 3), "A1": torch.randn(3, n), "B2": torch.randn(m, 3), "A2": torch.randn(3, n)}
        for name, (m, n) in names.items()
    }
    found = imported_logits(base, write_authors(tmp_path / "theirs", layers, alpha1=0.01, alpha2=0.01), tmp_path / "ours")
    model = load_base(base)
    for name, one in layers.items():
        delta = 0.01 * (one["B1"] @ one["A1"]) * (one["B2"] @ one["A2"])
        model.get_submodule(name).weight.data += delta.T
    assert difference(found, logits_of(model)) < 1e-5


class Code:
    """A pickle of this runs code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_refused_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no nowhere; expected the folder of an adapter, or its file of weights"):
        read_foreign(Path("nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no adapter: expected adapter_model\.safetensors or .*, found nothing"):
        read_foreign(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds half an adapter: expected .*, found adapter_config\.json"):
        read_foreign(tmp_path / "empty")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / "empty" / name)
    with pytest.raises(ModelError, match=r"several files of weights: a\.safetensors, b\.safetensors; name the one to import"):
        read_foreign(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"unknown format: found x; expected keys such as MODULE\.lora_A1\.default"):
        read_foreign(tmp_path / "empty" / "a.safetensors")
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ModelError, match="is no pickle of tensors alone; what else it holds could run code, so it is not read"):
        read_foreign(file)
    torch.save({"weights": Code()}, file)
    with pytest.raises(ModelError, match="is no pickle of tensors alone"):
        read_foreign(file)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"x": torch.ones(1)}}, file)
    with pytest.raises(ModelError, match="holds dict of state_dict; expected keys such as"):
        read_foreign(file)
    torch.save([torch.ones(1)], file)
    with pytest.raises(ModelError, match="holds list; expected keys such as"):
        read_foreign(file)
    torch.save({"x": torch.ones(1000)}, file)
    for content in (file.read_bytes()[:1000], b""):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot read .*is the file cut short"):
            read_foreign(file)
    short = tmp_path / "short.safetensors"
    short.write_bytes((tmp_path / "empty" / "a.safetensors").read_bytes()[:-2])
    with pytest.raises(ModelError, match="is the file cut short"):
        read_foreign(short)


def test_refused_settings(factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    source = write_authors(tmp_path / "theirs", factors("q_proj"))
    settings = source / "adapter_config.json"
    for text, message in {
        "{": "cannot read .*adapter_config.json",
        "[]": "holds list; expected the settings of an adapter",
        '{"alpha1": 4}': "alpha2 is missing; expected a positive number",
        '{"alpha1": 4, "alpha2": -4}': "alpha2 is -4; expected a positive number",
        '{"alpha1": "x", "alpha2": 4}': "alpha1 is x; expected a positive number",
        '{"peft_type": "ABBA"}': "is an ABBA adapter of this program already",
    }.items():
        settings.write_text(text)
        with pytest.raises(ModelError, match=message):
            read_foreign(source)
    settings.unlink()
    with pytest.raises(ModelError, match=r"holds half an adapter: adapter_config\.json is missing, and with it the scale"):
        read_foreign(source)


def test_refused_tensors(factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    layers = factors("q_proj")
    first = Q.format(0)

    def refused(message: str, change: dict[str, torch.Tensor | None], key: str = "{}.lora_{}.default") -> None:
        source = write_authors(tmp_path / "theirs", layers, pickled=False, key=key)
        file = source / "adapter_model.safetensors"
        tensors: dict[str, Any] = {**load_file(file), **change}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
        with pytest.raises(ModelError, match=message):
            read_foreign(source)

    refused(rf"holds half an adapter: {first}\.lora_B2 missing", {f"{first}.lora_B2.default": None})
    refused(rf"{first}\.lora_A1\.default holds NaN or infinity", {f"{first}.lora_A1.default": torch.full((3, 36), torch.nan)})
    refused(r"the factors of .* do not fit each other: .*lora_A1 2 x 36", {f"{first}.lora_A1.default": torch.ones(2, 36)})
    refused(r"has the shape \(36,\); expected a matrix", {f"{first}.lora_A1.default": torch.ones(36)})
    refused(r"lm_head\.weight has no place in an ABBA adapter", {"lm_head.weight": torch.ones(2, 2)})
    refused(r"holds several adapters: default, other; expected one", {f"{first}.lora_A1.other": torch.ones(3, 36)})


def test_refused_lohas(base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    layers = factors("q_proj")
    alphas = dict.fromkeys(layers, 2.0)
    flat = "lycoris_" + Q.format(1).replace(".", "_")
    for name, reason in {
        "dora_scale": "DoRA's scales, which have no ABBA form",
        "hada_t1": "a Tucker tensor, which has no ABBA form",
        "lokr_w1": "no part of this format",
    }.items():
        file = write_lycoris(tmp_path / "one.safetensors", layers, alphas, **{f"{flat}.{name}": torch.ones(3, 3)})
        with pytest.raises(ModelError, match=rf"{flat}\.{name} is {reason}; it cannot be imported"):
            read_foreign(file)
    file = write_lycoris(tmp_path / "one.safetensors", layers, alphas)
    tensors = load_file(file)
    del tensors[f"{flat}.alpha"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"holds half an adapter: {flat}\.alpha is missing"):
        read_foreign(file)

    get_peft_model(load_base(base), LoHaConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    settings = tmp_path / "peft" / "adapter_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"r": 5}))
    with pytest.raises(ModelError, match=r"has rank 4, adapter_config.json says 5; the two files do not belong together"):
        read_foreign(tmp_path / "peft")
    settings.write_text(json.dumps(content))
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.lm_head.weight": torch.ones(61, 36)}, weights)
    with pytest.raises(ModelError, match=r"base_model\.model\.lm_head\.weight belongs to no modules_to_save"):
        read_foreign(tmp_path / "peft")


def test_refused_bases(base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    output = tmp_path / "ours"
    source = write_authors(tmp_path / "theirs", factors("q_proj"))
    gpt2 = make_base("gpt2", tmp_path / "gpt2")
    with pytest.raises(ModelError, match=rf"the base has no linear layer {Q.format(0)}; is it of another architecture\?"):
        import_adapter(source, Base(str(gpt2)), output)
    wider = make_base("llama64", tmp_path / "llama64")
    with pytest.raises(ModelError, match=rf"{Q.format(0)} is 64 x 64 there, the adapter is for 36 x 36"):
        import_adapter(source, Base(str(wider)), output)
    twice = factors("0.self_attn.q_proj")
    write_authors(tmp_path / "theirs", twice | {f"model.{name}": one for name, one in twice.items()})
    with pytest.raises(ModelError, match="could be more than one layer"):
        import_adapter(source, Base(str(base)), output)
    assert not output.exists()
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(RunError, match="exists; choose another, or give --overwrite"):
        import_adapter(write_authors(tmp_path / "theirs", factors("q_proj")), Base(str(base)), output)


def test_the_command(base: Path, factors: Callable[..., dict[str, Factors]], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("import")(import_)
    layers = factors("q_proj", r1=3, r2=3) | factors("up_proj", r1=4, r2=2)
    source, output = write_authors(tmp_path / "theirs", layers), tmp_path / "ours"
    arguments = [str(source), "--base", str(base), "--output", str(output)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = " ".join(done.output.split())
    assert "found the authors' ABBA: 4 layers, r1 = 3, r2 = 3 to r1 = 4, r2 = 2, s = 24" in lines
    assert f"written {output}" in lines
    assert f"next abba merge --adapter {output}" in lines
    logits = logits_of(PeftModel.from_pretrained(load_base(base), output))
    assert difference(logits, merged_logits(base, layers, dict.fromkeys(layers, 24.0))) < 1e-5
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RunError)
    assert "give --overwrite" in str(again.exception)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    for missing in (arguments[:3], arguments[:1] + arguments[3:], arguments[1:]):
        assert CliRunner().invoke(app, missing).exit_code == 2


def test_the_shortest_names_that_find_the_targets_alone() -> None:
    modules = [f"model.layers.{index}.{part}.{end}" for index in range(12) for part in ("mlp", "attn") for end in ("up", "down")]
    modules += ["model", "model.layers", "lm_head", "audio_up", "model.layers.0.mlp"]
    assert target_names([name for name in modules if name.endswith(".up")], modules) == ["up"]
    assert target_names([name for name in modules if name.endswith("mlp.up")], modules) == ["mlp.up"]
    assert target_names(["model.layers.1.mlp.up", "model.layers.1.attn.up"], modules) == ["1.attn.up", "1.mlp.up"]
    assert target_names(["lm_head", "model.layers.0.mlp"], modules) == ["lm_head", "mlp"]
    for wanted in ({"model.layers.1.mlp.up", "model.layers.11.mlp.up"}, {"lm_head", "model.layers.3.attn.down"}):
        ends = target_names(wanted, modules)
        assert {name for name in modules if any(name == end or name.endswith(f".{end}") for end in ends)} == wanted
