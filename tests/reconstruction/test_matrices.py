"""The matrices: what the paper's must be like, images, and weights of checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_adapters import dense_delta, load_base, make_adapter

from abba_cli.dense_methods import FullConfig
from abba_cli.errors import DataError, ModelError
from abba_cli.reconstruction.differences import find_differences, find_updates
from abba_cli.reconstruction.matrices import SYNTHETIC, find_matrix, synthetic
from abba_cli.reconstruction.solving import lora_errors

PAPER = {"random": (0.243, 0.19), "orthogonal": (0.99, 0.93), "sparse": (0.90, 0.71), "low-rank": (0.94, 0.44)}


@pytest.mark.parametrize("kind", PAPER)
def test_lora_errors_are_the_paper_s(kind: str) -> None:
    found = lora_errors(synthetic(kind, 1024, seed=0), [8, 72])
    for error, printed in zip(found, PAPER[kind], strict=True):
        assert error == pytest.approx(printed, abs=0.0005 if printed == 0.243 else 0.005)


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_made_matrices_depend_on_kind_size_and_seed(kind: str) -> None:
    one = synthetic(kind, 21, seed=4)
    assert one.shape == (21, 21)
    assert torch.equal(one, synthetic(kind, 21, seed=4))
    assert not torch.equal(one, synthetic(kind, 21, seed=5))


def test_structures() -> None:
    Q = synthetic("orthogonal", 30, 0)
    torch.testing.assert_close(Q @ Q.T, torch.eye(30), atol=1e-5, rtol=0)
    sparse = synthetic("sparse", 200, 0)
    assert (sparse != 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    blocks = synthetic("block-diagonal", 21, 0)
    assert not blocks[:3, 3:].any()
    assert blocks[:3, :3].all()
    assert blocks[18:, 18:].all()
    energy = torch.linalg.svdvals(synthetic("low-rank", 160, 0)).square()
    assert energy[19] / energy[0] > 0.9
    assert energy[20] / energy[0] < 0.01


def test_images_are_grey_and_made_smaller(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 30), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 30, 30))
    picture.save(tmp_path / "half.png")
    whole = find_matrix(str(tmp_path / "half.png"), 64, 0).load()
    assert whole.shape == (30, 60)
    assert torch.equal(whole[:, :30], torch.zeros(30, 30))
    assert torch.equal(whole[:, 30:], torch.ones(30, 30))
    target = find_matrix(str(tmp_path / "half.png"), 20, 0)
    small = target.load()
    assert small.shape == (10, 20)
    assert small[:, 0].max() < 0.01
    assert small[:, -1].min() > 0.99


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40], ids=["empty", "text", "png"])
def test_broken_images(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*broken\.png as an image"):
        find_matrix(str(file), 64, 0)


def test_images_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 80).save(file)
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cannot read .*cut\.png as an image: \w+"):
        find_matrix(str(file), 64, 0)


def test_a_weight_of_a_checkpoint(tiny_llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    target = find_matrix(f"{tiny_llama}:{name}", 4, 0)
    assert torch.equal(target.load(), load_file(tiny_llama / "model.safetensors")[name])
    assert target.group == target.name == f"{tiny_llama}:{name}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("orthognal", r"there is no matrix 'orthognal'; expected one of random, .*; did you mean orthogonal\?"),
        ("photo.png", r"there is no matrix 'photo.png'; expected .*an image file, or CHECKPOINT:TENSOR"),
        ("package:name", r"there is no matrix 'package:name'"),
        ("x" * 5000, "there is no matrix"),
    ],
    ids=["misspelt", "no-file", "no-tensor", "long"],
)
def test_unknown_matrices(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_matrix(text, 64, 0)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            "model.layers.0.mlp.up_prj.weight",
            r"no tensor .*up_prj\.weight' among its \d+; the nearest names: .*mlp\.up_proj\.weight",
        ),
        ("zzz", r"some of its names: model\.\S+"),
        ("model.norm.weight", r"the shape \[32\]; expected a matrix"),
    ],
)
def test_unknown_tensors(tensor: str, message: str, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=message):
        find_matrix(f"{tiny_llama}:{tensor}", 64, 0)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a model with safetensors weights"):
        find_matrix(f"{tmp_path}:x", 64, 0)


@pytest.fixture
def tuned(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model, with all q_proj and the first block's down_proj changed."""
    folder = tmp_path / "tuned"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, weight in weights.items():
        if "q_proj" in name or name == "model.layers.0.mlp.down_proj.weight":
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_differences_are_those_of_changed_layers(tiny_llama: Path, tuned: Path) -> None:
    found = find_differences(str(tiny_llama), str(tuned), [])
    assert {(target.name, target.group) for target in found} == {
        ("model.layers.0.self_attn.q_proj", "q_proj"),
        ("model.layers.1.self_attn.q_proj", "q_proj"),
        ("model.layers.0.mlp.down_proj", "down_proj"),
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tuned))
    for target in found:
        assert torch.equal(target.load(), after[f"{target.name}.weight"] - before[f"{target.name}.weight"])


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["model.layers.0.*"], ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]),
        (["down_proj", "*.1.*q_proj"], ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]),
    ],
    ids=["type", "wildcard", "two"],
)
def test_patterns(patterns: list[str], names: list[str], tiny_llama: Path, tuned: Path) -> None:
    assert sorted(target.name for target in find_differences(str(tiny_llama), str(tuned), patterns)) == names


def test_what_is_no_difference(tiny_llama: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'qkv' matches no layer that both models store; their types of layers are: .*q_proj"):
        find_differences(str(tiny_llama), str(tuned), ["qkv"])
    with pytest.raises(ModelError, match=r"14 layers of .* are all equal; expected a tuned model"):
        find_differences(str(tiny_llama), str(tiny_llama), [])
    weights = load_file(tuned / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name][:8].clone()}, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj is \[32, 32\] in .* and \[8, 32\] in .*; is the one the base of the other\?"):
        find_differences(str(tiny_llama), str(tuned), [])
    other = tmp_path / "other"
    other.mkdir()
    save_file({"encoder.0.fc.weight": torch.ones(3, 3)}, other / "model.safetensors")
    with pytest.raises(ModelError, match="shares no linear layer with its base"):
        find_differences(str(tiny_llama), str(other), [])


def test_updates_of_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    made = make_adapter(tiny_llama, tmp_path / "adapter")
    found = {target.name: target for target in find_updates(str(made.path), [])}
    assert found.keys() == made.saved.layers.keys()
    for name, target in found.items():
        torch.testing.assert_close(target.load().double(), dense_delta(made.saved, name), rtol=1e-4, atol=1e-6)
    first = {target.name for target in find_updates(str(made.path), ["*.0.*proj"])}
    assert first == {name for name in found if ".0." in name} != found.keys()
    with pytest.raises(ModelError, match=r"'qkv' matches no layer that .*adapter adapts; their types of layers are: .*q_proj"):
        find_updates(str(made.path), ["qkv"])


def save_adapter(base: Path, folder: Path, config: PeftConfig) -> dict[str, torch.Tensor]:
    model = get_peft_model(load_base(base), config)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for place, parameter in enumerate(trained.values()):
        torch.nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(place))
    model.save_pretrained(folder)
    return {name: one.detach() for name, one in trained.items()}


def test_updates_of_a_full_fine_tuning_are_its_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    trained = save_adapter(tiny_llama, tmp_path / "full", FullConfig(target_modules=["q_proj", "up_proj", "down_proj"]))
    found = find_updates(str(tmp_path / "full"), [])
    assert len(found) == len(trained) == 6
    for target in found:
        delta = trained[f"base_model.model.{target.name}.full_delta.default"]
        assert torch.equal(target.load(), delta)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (HiraConfig(r=2, target_modules=["q_proj"]), "a HiRA"),
        (LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "a DoRA"),
    ],
    ids=["hira", "dora"],
)
def test_updates_that_depend_on_the_base(config: PeftConfig, name: str, tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(tiny_llama, tmp_path / "other", config)
    with pytest.raises(ModelError, match=f"is {name} adapter, whose update depends on the base's weights; merge it"):
        find_updates(str(tmp_path / "other"), [])
