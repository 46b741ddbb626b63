"""ABBA inside real models, through PEFT's own functions."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, ModelMaker
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from abba_cli.adapter import AbbaConfig, AbbaLayer, delta_weight, factors, svd_progress
from abba_cli.adapter.dense import effective_weight

ALL_LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


def config(**kwargs: Any) -> AbbaConfig:
    return AbbaConfig(**{"r1": 3, "r2": 5, "alpha": 4.0, "target_modules": "all-linear", **kwargs})


def abba_layers(model: nn.Module) -> dict[str, AbbaLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, AbbaLayer)}
    assert found
    return found


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def train(model: nn.Module, ids: torch.Tensor, steps: int = 3, lr: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def trained(base: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> PeftModel:
    model = get_peft_model(base, config(**kwargs))
    train(model, ids)
    return model


# --- a fresh adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init_weights", [True, "svd", "random"])
def test_a_fresh_adapter_changes_no_bit(
    tiny: ModelMaker, ids: torch.Tensor, architecture: str, dtype: torch.dtype, init_weights: Any
) -> None:
    expected = logits(tiny(architecture, dtype), ids)
    model = get_peft_model(tiny(architecture, dtype), config(init_weights=init_weights))
    assert torch.equal(logits(model, ids), expected)  # evaluation
    model.train()
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.eval()
    assert torch.equal(logits(model, ids[:1, :1]), logits(tiny(architecture, dtype), ids[:1, :1]))  # a single token
    assert torch.equal(logits(model.merge_and_unload(), ids), expected)


def test_init_weights_false_does_change_the_model(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = get_peft_model(tiny(), config(init_weights=False))
    assert not torch.allclose(logits(model, ids), logits(tiny(), ids), atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_pair_starts_from_the_svd_of_the_base_weight(tiny: ModelMaker, architecture: str) -> None:
    model = get_peft_model(tiny(architecture), config())
    for layer in abba_layers(model).values():
        B1, A1, B2, A2 = layer.factors("default")
        weight = layer.get_base_layer().weight
        weight = weight.T if layer.transposed else weight
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(B1 @ A1, U[:, :3] * S[:3] @ Vh[:3], atol=1e-4, rtol=0)
        assert not B2.any()
        assert A2.abs().max() <= (6 / A2.shape[1]) ** 0.5
        assert not layer.pending_svd


def test_the_start_depends_on_the_seed_only(tiny: ModelMaker) -> None:
    def start(names: list[str], draws: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        torch.rand(draws)
        model = get_peft_model(tiny(), config(target_modules=names))
        return {name: p.clone() for name, p in model.named_parameters() if "abba_B1" in name or "abba_A1" in name}

    every, one = start(["q_proj", "o_proj", "down_proj"], 0), start(["down_proj"], 11)
    assert len(one) == 4
    assert all(torch.equal(every[name], one[name]) for name in one)


def test_factors_are_float32_parameters_on_any_base(tiny: ModelMaker) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = get_peft_model(tiny(dtype=dtype), config())
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(".abba_" in name and p.dtype == torch.float32 for name, p in trainable.items())
        assert len(trainable) == 4 * len(abba_layers(model))
    low = get_peft_model(tiny(dtype=torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    double = get_peft_model(tiny(dtype=torch.float64), config())
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_the_svd_of_a_bfloat16_base_is_not_rounded_to_bfloat16(tiny: ModelMaker) -> None:
    model = get_peft_model(tiny(dtype=torch.bfloat16), config())
    for layer in abba_layers(model).values():
        B1 = layer.abba_B1["default"]
        assert not torch.equal(B1, B1.bfloat16().float())


def test_number_of_trainable_parameters(tiny: ModelMaker) -> None:
    model = get_peft_model(tiny(), config())
    expected = sum((3 + 5) * (layer.out_features + layer.in_features) for layer in abba_layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == expected


def test_svd_progress_counts_layers(tiny: ModelMaker) -> None:
    seen: list[tuple[int, int]] = []
    with svd_progress(lambda done, total: seen.append((done, total))):
        get_peft_model(tiny(), config())
        get_peft_model(tiny(), config(init_weights="random"))
    assert seen == [(done, 14) for done in range(15)]
    get_peft_model(tiny(), config())
    assert len(seen) == 15


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(tiny: ModelMaker, ids: torch.Tensor, architecture: str, dtype: torch.dtype) -> None:
    model = get_peft_model(tiny(architecture, dtype), config())
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = train(model, ids, steps=8, lr=2e-2)
    assert losses[-1] < losses[0] - 0.1
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in base.items())
    assert not any(torch.equal(after[name], p) for name, p in before.items())


def test_gradients_equal_those_of_the_plain_formula(tiny: ModelMaker, ids: torch.Tensor) -> None:
    """The whole model in float64, once with ABBA layers and once with dW written out in autograd."""
    model = get_peft_model(tiny(dtype=torch.float64), config(init_weights=False, target_modules=["q_proj", "up_proj"]))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = tiny(dtype=torch.float64)
    leaves: dict[str, torch.Tensor] = {}
    weights = {}
    for name, layer in abba_layers(model.base_model.model).items():
        copies = factors.Factors(*(f.detach().clone().requires_grad_() for f in layer.factors("default")))
        leaves |= {f"{name}.{letter}": leaf for letter, leaf in zip(copies._fields, copies, strict=True)}
        weights[f"{name}.weight"] = layer.weight.detach() + delta_weight(copies, 16 / 15**0.5)
    out = torch.func.functional_call(plain, weights, kwargs={"input_ids": ids, "labels": ids})
    out.loss.backward()
    for name, layer in abba_layers(model.base_model.model).items():
        for letter, factor in zip(["B1", "A1", "B2", "A2"], layer.factors("default"), strict=True):
            torch.testing.assert_close(factor.grad, leaves[f"{name}.{letter}"].grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny: ModelMaker, ids: torch.Tensor, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(tiny(), config(init_weights=False))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_dropout_is_applied_to_the_update_in_training_only(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = get_peft_model(tiny(), config(init_weights=False, dropout=0.5, target_modules=["q_proj"]))
    plain = get_peft_model(tiny(), config(init_weights=False, target_modules=["q_proj"]))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(model.eval(), ids), logits(plain.eval(), ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))
    # One layer against the definition: base(x) + dropout(x) dW^T with the same random numbers.
    name, layer = next(iter(abba_layers(model).items()))
    x = torch.randn(4, layer.in_features)
    torch.manual_seed(1)
    actual = layer(x)
    torch.manual_seed(1)
    expected = layer.base_layer(x) + nn.functional.dropout(x, 0.5) @ layer.get_delta_weight("default").T
    torch.testing.assert_close(actual, expected, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_inside_autocast(tiny: ModelMaker, ids: torch.Tensor, dtype: torch.dtype, amp_dtype: torch.dtype) -> None:
    model = get_peft_model(tiny(dtype=dtype), config(init_weights=False, dropout=0.1))
    model.train()
    with torch.autocast("cpu", amp_dtype):
        base_dtype = tiny(dtype=dtype)(input_ids=ids).logits.dtype
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == base_dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_deepcopy_is_independent(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(), ids)
    twin = copy.deepcopy(model)
    before = logits(model, ids)
    assert torch.equal(logits(twin, ids), before)
    train(twin, ids)
    assert not torch.equal(logits(twin, ids), before)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.slow
def test_torch_compile_in_one_graph(tiny: ModelMaker, ids: torch.Tensor) -> None:
    torch._dynamo.reset()
    model = get_peft_model(tiny(), config(init_weights=False))
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's and transformers' own
        compiled = torch.compile(model, fullgraph=True)
        actual = compiled(input_ids=ids, labels=ids)
        actual.loss.backward()
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-3)


# --- which modules, which ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_linear(tiny: ModelMaker, architecture: str) -> None:
    model = get_peft_model(tiny(architecture), config(target_modules="all-linear"))
    assert {name.rsplit(".", 1)[1] for name in abba_layers(model)} == ALL_LINEAR[architecture]


@pytest.mark.parametrize(("architecture", "names"), [("llama", {"q_proj", "v_proj"}), ("gpt2", {"c_attn"})])
def test_default_targets_are_pefts(tiny: ModelMaker, architecture: str, names: set[str]) -> None:
    model = get_peft_model(tiny(architecture), config(target_modules=None))
    assert {name.rsplit(".", 1)[1] for name in abba_layers(model)} == names


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"target_modules": r".*layers\.1\..*(q_proj|up_proj)"}, {"1.self_attn.q_proj", "1.mlp.up_proj"}),
        ({"target_modules": ["o_proj"], "layers_to_transform": [1]}, {"1.self_attn.o_proj"}),
        (
            {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"0.self_attn.o_proj"},
        ),
        ({"target_modules": ["o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]}, {"1.self_attn.o_proj"}),
        # A name is not matched inside another one, as the authors' code does.
        ({"target_modules": ["proj", "layers.0.mlp.down_proj"]}, {"0.mlp.down_proj"}),
    ],
)
def test_target_selection(tiny: ModelMaker, kwargs: dict[str, Any], expected: set[str]) -> None:
    model = get_peft_model(tiny(), config(**kwargs))
    assert {name.split("layers.")[1] for name in abba_layers(model)} == expected


def test_rank_and_alpha_patterns(tiny: ModelMaker) -> None:
    model = get_peft_model(
        tiny(),
        config(
            rank_pattern={"o_proj": 2, r".*layers\.1\.mlp\.up_proj": [7, 1], "k_proj": [1, 50]},
            alpha_pattern={"o_proj": 6.0},
        ),
    )
    for name, layer in abba_layers(model).items():
        r1, r2, alpha = 3, 5, 4.0
        if name.endswith("o_proj"):
            r1, r2, alpha = 2, 2, 6.0
        elif name.endswith("layers.1.mlp.up_proj"):
            r1, r2 = 7, 1
        elif name.endswith("k_proj"):
            r1, r2 = 1, 50  # above the layer's 12 rows
        B1, A1, B2, A2 = layer.factors("default")
        m, n = layer.out_features, layer.in_features
        assert (B1.shape, A1.shape, B2.shape, A2.shape) == ((m, r1), (r1, n), (m, r2), (r2, n))
        assert layer.scaling["default"] == pytest.approx(alpha**2 / (r1 * r2) ** 0.5)


def test_a_rank_above_the_size_of_the_layer_is_honoured_and_trains(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = get_peft_model(tiny(), config(r1=45, r2=47, target_modules=["k_proj"], alpha=10.0))
    assert torch.equal(logits(model, ids), logits(tiny(), ids))
    layer = next(iter(abba_layers(model).values()))
    assert layer.abba_B1["default"].shape == (12, 45)
    before = [factor.clone() for factor in layer.factors("default")]
    train(model, ids, steps=4)
    B1, A1, _, _ = layer.factors("default")
    assert (before[0] != B1).any(dim=0).all()  # every column, also those without a singular vector
    assert (before[1] != A1).any(dim=1).all()


def test_bias_and_modules_to_save(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = get_peft_model(tiny("gpt2"), config(bias="abba_only", target_modules=["c_attn"], modules_to_save=["ln_f"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and ".abba_" not in name}
    assert trainable == {
        "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias",
        "base_model.model.transformer.h.1.attn.c_attn.base_layer.bias",
        "base_model.model.transformer.ln_f.modules_to_save.default.weight",
        "base_model.model.transformer.ln_f.modules_to_save.default.bias",
    }
    model(input_ids=ids, labels=ids).loss.backward()
    plain = tiny("gpt2")
    plain(input_ids=ids, labels=ids).loss.backward()
    for i in range(2):
        layer = model.base_model.model.transformer.h[i].attn.c_attn
        torch.testing.assert_close(layer.base_layer.bias.grad, plain.transformer.h[i].attn.c_attn.bias.grad)

    everything = get_peft_model(tiny("gpt2"), config(bias="all", target_modules=["c_fc"]))
    assert all(p.requires_grad for name, p in everything.named_parameters() if name.endswith(".bias"))
    assert train(everything, ids)[-1] > 0


def test_a_base_weight_that_trains_gets_its_gradient(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = get_peft_model(tiny(), config(target_modules=["q_proj"]))
    layer = next(iter(abba_layers(model).values()))
    layer.base_layer.weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    plain = tiny()
    plain(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, plain.model.layers[0].self_attn.q_proj.weight.grad)


def test_hooks_of_the_base_layer_run(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(), ids, target_modules=["q_proj"])
    expected = logits(model, ids)
    layers = abba_layers(model)
    seen: list[str] = []
    for name, layer in layers.items():
        layer.base_layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert seen == list(layers)


def test_unsupported_modules_are_named(tiny: ModelMaker) -> None:
    with pytest.raises(ValueError, match=r"not supported\. ABBA adapts `torch\.nn\.Linear`"):
        get_peft_model(tiny(), config(target_modules=["embed_tokens"]))


def test_conv1d_reads_its_weight_as_a_matrix() -> None:
    class Net(nn.Module):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 8, 3, stride=2, padding=1, **kwargs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    x = torch.randn(2, 6, 11)
    for kwargs in ({}, {"groups": 2}, {"dilation": 2, "bias": False}, {"padding_mode": "circular"}):
        net = Net(**kwargs)
        fresh, base = get_peft_model(copy.deepcopy(net), config(target_modules=["conv"])), net(x)
        assert torch.equal(fresh(x), base)
        model = get_peft_model(copy.deepcopy(net), config(target_modules=["conv"], init_weights=False))
        layer = model.base_model.model.conv
        reference = copy.deepcopy(net)
        delta = delta_weight(layer.factors("default"), layer.scaling["default"])
        reference.conv.weight.data += delta.detach().view_as(net.conv.weight)
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(x), reference(x), atol=1e-5, rtol=1e-5)


# --- several adapters, merging -----------------------------------------------------------------------------------


def test_several_adapters(tiny: ModelMaker, ids: torch.Tensor) -> None:
    base = logits(tiny(), ids)
    model = trained(tiny(), ids)
    first = logits(model, ids)
    model.add_adapter("second", config(r1=2, r2=4, init_weights=False, target_modules=["v_proj", "down_proj"]))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    second = logits(model, ids)
    assert not torch.allclose(second, first, atol=1e-3)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), second)

    model.base_model.set_adapter(["default", "second"])
    both = logits(model, ids)
    reference = tiny()
    for name, layer in abba_layers(model.base_model.model).items():
        weight = reference.get_submodule(name).weight
        weight.data += sum(layer.get_delta_weight(a).detach() for a in ("default", "second") if a in layer.abba_A1)
    torch.testing.assert_close(both, logits(reference, ids), atol=1e-4, rtol=1e-4)

    model.base_model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, ids), first)
    assert not any("second" in name for name in model.state_dict())
    assert not any("second" in layer.scaling or "second" in layer.r1 for layer in abba_layers(model).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("safe_merge", [True, False])
def test_merge_and_unmerge(tiny: ModelMaker, ids: torch.Tensor, architecture: str, safe_merge: bool) -> None:
    model = trained(tiny(architecture), ids)
    expected = logits(model, ids)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    for name, layer in abba_layers(model.base_model.model).items():
        weight = tiny(architecture).get_submodule(name).weight
        torch.testing.assert_close(layer.base_layer.weight, weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, AbbaLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-4)


def test_a_bfloat16_merge_is_the_weight_of_an_evaluation(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(dtype=torch.bfloat16), ids).eval()
    layers = abba_layers(model.base_model.model)
    exact = {
        name: (layer.weight.double() + layer.get_delta_weight("default").double()).bfloat16() for name, layer in layers.items()
    }
    ids = ids.repeat(8, 1)  # enough tokens for the effective weight
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), expected)
    for name, weight in exact.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, atol=0, rtol=2**-7)


def test_training_in_bfloat16_uses_the_merged_weight_up_to_a_last_bit(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(dtype=torch.bfloat16), ids)
    for layer in abba_layers(model.base_model.model).values():
        merged = effective_weight(layer.weight, [(layer.factors("default"), layer.scaling["default"])])
        # The layer's own weight, read off its answers to the unit vectors, which are exact.
        used = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).detach().T
        torch.testing.assert_close(used, merged, atol=2e-5, rtol=2**-7)
        assert not torch.equal(merged, layer.weight)


def test_unload_returns_the_base(tiny: ModelMaker, ids: torch.Tensor) -> None:
    assert torch.equal(logits(trained(tiny(), ids).unload(), ids), logits(tiny(), ids))


def test_safe_merge_refuses_nan_and_leaves_the_layer_alone(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(), ids, target_modules=["q_proj"])
    model.add_adapter("broken", config(target_modules=["q_proj"], init_weights=False))
    layer = next(iter(abba_layers(model).values()))
    layer.abba_B2["broken"].data[0, 0] = torch.nan
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected.*adapter broken seems"):
        model.merge_adapter(["default", "broken"], safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_merging_several_and_warnings(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(), ids)
    model.add_adapter("second", config(init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


def test_disabling_a_merged_adapter_unmerges_it(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = trained(tiny(), ids)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(tiny(), ids), atol=1e-5, rtol=1e-5)


def test_scaling(tiny: ModelMaker) -> None:
    model = get_peft_model(tiny(), config(init_weights=False, target_modules=["q_proj"]))
    layer = next(iter(abba_layers(model).values()))
    delta = layer.get_delta_weight("default").detach()
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * delta)
    layer.unscale_layer(2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * delta)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    layer.set_scale("absent", 0.5)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_repr_names_the_method(tiny: ModelMaker) -> None:
    assert "abba.AbbaLinear(" in repr(get_peft_model(tiny(), config()))
