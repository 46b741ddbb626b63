"""Decoding with an unmerged adapter: the merged model's bits, for as long as nothing has changed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from abba_cli.adapter import AbbaConfig, AbbaLinear, decoding
from abba_cli.adapter import linear as linear_module

CASES = [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32), ("gpt2", torch.bfloat16)]


def config(**kwargs: Any) -> AbbaConfig:
    # Random factors on all four sides: the update is far from zero without any training.
    return AbbaConfig(**{"r1": 3, "r2": 5, "alpha": 4.0, "target_modules": "all-linear", "init_weights": False, **kwargs})


def adapted(tiny: ModelMaker, architecture: str = "llama", dtype: torch.dtype = torch.float32, **kwargs: Any) -> PeftModel:
    return get_peft_model(tiny(architecture, dtype), config(**kwargs)).eval()


def layers(model: nn.Module) -> list[AbbaLinear]:
    found = [module for module in model.modules() if isinstance(module, AbbaLinear)]
    assert found
    return found


def keeping(model: nn.Module) -> set[bool]:
    return {layer._kept is not None and layer._kept.weight is not None for layer in layers(model)}


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> Any:
    return model(input_ids=ids[:, :-3], use_cache=True).past_key_values


@torch.no_grad()
def steps(model: Any, ids: torch.Tensor, past: Any, count: int = 3) -> torch.Tensor:
    """Logits of the last `count` tokens, fed one at a time on top of a copy of `past`."""
    past = copy.deepcopy(past)
    return torch.stack(
        [
            model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True).logits
            for i in range(ids.shape[1] - 3, ids.shape[1] - 3 + count)
        ]
    )


@torch.no_grad()
def merged_steps(model: PeftModel, ids: torch.Tensor, past: Any) -> torch.Tensor:
    """The reference: a copy that has never decoded, merged by PEFT."""
    return steps(copy.deepcopy(model).merge_and_unload(), ids, past)


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_the_merged_models_bits(tiny: ModelMaker, ids: torch.Tensor, architecture: str, dtype: torch.dtype) -> None:
    model = adapted(tiny, architecture, dtype)
    past = prefill(model, ids)
    assert keeping(model) == {False}  # a prompt alone costs no memory
    expected = merged_steps(model, ids, past)
    assert not torch.allclose(expected, steps(tiny(architecture, dtype), ids, past), atol=1e-2)
    assert torch.equal(steps(model, ids, past), expected)
    assert keeping(model) == {True}
    assert torch.equal(steps(model, ids, past), expected)  # from what is kept
    for layer in layers(model):
        assert layer._kept is not None
        assert layer._kept.weight.dtype == dtype
        assert layer._kept.weight.shape == layer.get_base_layer().weight.shape


def test_two_active_adapters(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    model.add_adapter("second", config(r1=2, r2=2, target_modules=["q_proj", "down_proj"]))
    past = prefill(model, ids)
    steps(model, ids, past)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    assert keeping(model) == {False}
    both = steps(model, ids, past)
    # merge_and_unload by itself merges the active adapters, both
    assert torch.equal(both, merged_steps(model, ids, past))
    model.base_model.set_adapter(["default"])
    assert not torch.equal(steps(model, ids, past), both)


def factor(layer: AbbaLinear, name: str = "abba_B2") -> nn.Parameter:
    return getattr(layer, name)["default"]  # type: ignore[no-any-return]


def replace(layer: AbbaLinear) -> None:
    layer.abba_A1["default"] = nn.Parameter(factor(layer, "abba_A1").detach() * 1.5)


def load(layer: AbbaLinear) -> None:
    layer.load_state_dict({name: 1.1 * value for name, value in layer.state_dict().items()})


def in_inference_mode(layer: AbbaLinear) -> None:
    with torch.inference_mode():
        factor(layer).mul_(1.3)


def optimize(layer: AbbaLinear) -> None:
    parameter = factor(layer).requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1).step()
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


def swap_base(layer: AbbaLinear) -> None:
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.mul_(1.2)


SEEN_AT_ONCE: dict[str, Callable[[AbbaLinear], object]] = {
    "factor in place": lambda layer: factor(layer).detach().mul_(1.3),
    "factor in place, other three": lambda layer: [factor(layer, f"abba_{n}").detach().mul_(1.1) for n in ("A1", "B1", "A2")],
    "factor in inference mode": in_inference_mode,
    "factor replaced": replace,
    "factor's data replaced": lambda layer: setattr(factor(layer), "data", factor(layer).data * 1.3),
    "state loaded": load,
    "optimizer": optimize,
    "scaling": lambda layer: layer.scaling.update(default=0.7),
    "set_scale": lambda layer: layer.set_scale("default", 2.0),
    "scale_layer": lambda layer: layer.scale_layer(0.5),
    "base in place": lambda layer: layer.base_layer.weight.detach().mul_(1.2),
    "base's data replaced": lambda layer: setattr(layer.base_layer.weight, "data", layer.base_layer.weight.data * 1.2),
    "base layer replaced": swap_base,
    "adapter updated": lambda layer: layer.update_layer("default", config(), r1=2, r2=3, alpha=3.0),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "deleted": lambda layer: layer.delete_adapter("default"),
    "another adapter": lambda layer: (layer.update_layer("other", config(), 2, 3, 3.0), layer.set_adapter("other")),
    "active list changed in place": lambda layer: layer._active_adapter.clear(),
}


@pytest.mark.parametrize("change", SEEN_AT_ONCE)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_change_is_seen_at_the_next_step(tiny: ModelMaker, ids: torch.Tensor, architecture: str, change: str) -> None:
    model = adapted(tiny, architecture)
    past = prefill(model, ids)
    before = steps(model, ids, past)
    layer = layers(model)[0]
    SEEN_AT_ONCE[change](layer)
    after = steps(model, ids, past)
    fresh = copy.deepcopy(model)  # copies start without
    assert torch.equal(after, steps(fresh, ids, past))
    changes_nothing = change == "merged"
    assert torch.equal(after, before) == changes_nothing


DATA_WRITES: dict[str, Callable[[AbbaLinear], nn.Parameter]] = {
    "B1": lambda layer: factor(layer, "abba_B1"),
    "A1": lambda layer: factor(layer, "abba_A1"),
    "B2": lambda layer: factor(layer, "abba_B2"),
    "A2": lambda layer: factor(layer, "abba_A2"),
    "base": lambda layer: layer.get_base_layer().weight,  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("written", DATA_WRITES)
@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_a_write_through_data_is_seen_after_the_next_prompt(
    tiny: ModelMaker, ids: torch.Tensor, architecture: str, dtype: torch.dtype, written: str
) -> None:
    model = adapted(tiny, architecture, dtype)
    before = steps(model, ids, prefill(model, ids))
    for layer in layers(model):
        parameter = DATA_WRITES[written](layer)
        version = parameter._version
        parameter.data.view(-1)[7] += 3.0  # one number
        assert parameter._version == version  # no trace: this is what the comparison is for
    past = prefill(model, ids)
    after = steps(model, ids, past)
    assert torch.equal(after, merged_steps(model, ids, past))
    assert not torch.equal(after, before)


def test_an_unchanged_weight_survives_the_next_prompt(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    steps(model, ids, prefill(model, ids))
    kept = [layer._kept for layer in layers(model)]
    past = prefill(model, ids)
    assert not any(one.verified for one in kept if one is not None)
    steps(model, ids, past)
    assert all(layer._kept is one for layer, one in zip(layers(model), kept, strict=True))


LETS_GO: dict[str, Callable[[PeftModel], object]] = {
    "train": lambda model: model.train(),
    "merge": lambda model: model.merge_adapter(),
    "set_adapter": lambda model: model.set_adapter("default"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "to": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "to_empty": lambda model: model.to_empty(device="meta"),
    "delete": lambda model: model.delete_adapter("default"),
}


@pytest.mark.parametrize("call", LETS_GO)
def test_the_memory_is_let_go(tiny: ModelMaker, ids: torch.Tensor, call: str) -> None:
    model = adapted(tiny)
    steps(model, ids, prefill(model, ids))
    assert keeping(model) == {True}
    LETS_GO[call](model)
    assert all(layer._kept is None for layer in layers(model))


def test_unmerge_lets_go_and_gives_the_adapter_back(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny, dtype=torch.float64)
    past = prefill(model, ids)
    before = steps(model, ids, past)
    model.merge_adapter()
    assert torch.equal(steps(model, ids, past), before)
    assert keeping(model) == {False}
    model.unmerge_adapter()
    torch.testing.assert_close(steps(model, ids, past), before, rtol=1e-9, atol=1e-9)
    assert keeping(model) == {True}


def test_another_dtype_on_the_same_layer(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    steps(model, ids, prefill(model, ids))
    model.to(torch.bfloat16)
    past = prefill(model, ids)
    assert torch.equal(steps(model, ids, past), merged_steps(model, ids, past))


def test_it_is_no_part_of_the_model(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    names, parameters, buffers = set(model.state_dict()), len(list(model.parameters())), len(list(model.buffers()))
    past = prefill(model, ids)
    expected = steps(model, ids, past)
    assert keeping(model) == {True}
    assert set(model.state_dict()) == names
    assert (len(list(model.parameters())), len(list(model.buffers()))) == (parameters, buffers)
    copied = copy.deepcopy(model)
    unpickled = pickle.loads(pickle.dumps(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copied, unpickled, torch.load(stream, weights_only=False)):
        assert all(layer._kept is None for layer in layers(other))
        assert torch.equal(steps(other, ids, past), expected)
        assert keeping(other) == {True}
    factor(layers(copied)[0]).detach().mul_(2)  # the copy's own
    assert torch.equal(steps(model, ids, past), expected)


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_generate_gives_the_same_text(
    tiny: ModelMaker, ids: torch.Tensor, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny, architecture, dtype)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept = model.generate(**asked, **settings, output_logits=True, return_dict_in_generate=True)
    assert keeping(model) == {True}
    beams = model.generate(**asked, **settings, num_beams=3)
    bare = copy.deepcopy(model)
    monkeypatch.setattr(linear_module, "is_decoding_step", lambda x: False)
    plain = bare.generate(**asked, **settings, output_logits=True, return_dict_in_generate=True)
    assert keeping(bare) == {False}
    torch.testing.assert_close(torch.stack(kept.logits), torch.stack(plain.logits), atol=0.1, rtol=0.05)
    if dtype == torch.float32:
        assert torch.equal(kept.sequences, plain.sequences)
        assert torch.equal(beams, bare.generate(**asked, **settings, num_beams=3))


def test_when_nothing_is_kept(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    one = ids[:, :1]
    model(input_ids=one)  # a gradient may be asked for
    assert keeping(model) == {False}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=one)
    assert keeping(model) == {False}
    with torch.no_grad():
        model(input_ids=ids)
        assert keeping(model) == {False}
        model.train()
        model(input_ids=one)
        assert keeping(model) == {False}
    with torch.inference_mode():
        model.eval()(input_ids=one)
        assert keeping(model) == {True}
    model.train()
    hooked = model.base_model.model.model.layers[0].mlp.up_proj
    hooked.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    model.eval()
    with torch.no_grad():
        model(input_ids=one)
    assert {layer._kept is None for layer in layers(model) if layer is not hooked} == {False}
    assert hooked._kept is None


def test_a_hook_put_on_the_base_layer_later_runs(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model = adapted(tiny)
    past = prefill(model, ids)
    before = steps(model, ids, past)
    calls: list[int] = []
    handle = layers(model)[0].base_layer.register_forward_pre_hook(lambda module, args: calls.append(1))
    steps(model, ids, past, count=2)
    assert len(calls) == 2
    handle.remove()
    assert torch.equal(steps(model, ids, past), before)


def test_gradients_do_not_come_from_what_is_kept(tiny: ModelMaker, ids: torch.Tensor) -> None:
    model, reference = adapted(tiny), adapted(tiny)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        model(input_ids=ids[:, :1])
    assert keeping(model) == {True}
    for one in (model, reference):
        one(input_ids=ids[:, :1], labels=ids[:, :1]).logits.square().sum().backward()
    for a, b in zip(layers(model), layers(reference), strict=True):
        assert factor(a).grad.any()
        assert torch.equal(factor(a).grad, factor(b).grad)


@pytest.mark.parametrize("training", [True, False])
def test_reentrant_checkpointing_of_one_position(tiny: ModelMaker, training: bool) -> None:
    """Its first forward asks for no gradient, as decoding does."""
    model = adapted(tiny)
    layer = layers(model)[0].train(training)
    x = torch.randn(2, 1, layer.in_features, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=True)
    assert (layer._kept is None) == training
    y.square().sum().backward()
    got = [x.grad.clone(), factor(layer).grad.clone()]
    x.grad = factor(layer).grad = None
    layer(x).square().sum().backward()
    for a, b in zip(got, [x.grad, factor(layer).grad], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tensors_made_in_inference_mode_are_not_trusted(tiny: ModelMaker, ids: torch.Tensor) -> None:
    """They count no versions, so a change could not be seen."""
    with torch.inference_mode():
        model = adapted(tiny)
        past = prefill(model, ids)
        before = steps(model, ids, past)
        assert keeping(model) == {False}
        for layer in layers(model):
            factor(layer).mul_(1.5)
        assert not torch.equal(steps(model, ids, past), before)


def test_factors_given_for_one_call(tiny: ModelMaker) -> None:
    layer = layers(adapted(tiny))[0]
    x = torch.randn(2, 1, layer.in_features)
    with torch.no_grad():
        own = layer(x)
        assert layer._kept is not None
        other = {name: 2 * value for name, value in layer.named_parameters() if "abba_" in name}
        given = torch.func.functional_call(layer, other, (x,))
        base = layer.base_layer(x)
        torch.testing.assert_close(given - base, 16 * (own - base), rtol=1e-3, atol=1e-4)
        assert layer._kept is None  # not worth keeping
        assert torch.equal(layer(x), own)


def test_a_base_layer_with_the_same_weight_but_another_bias(tiny: ModelMaker) -> None:
    layer = layers(adapted(tiny, "gpt2"))[0]
    x = torch.randn(2, 1, layer.in_features)
    with torch.no_grad():
        own = layer(x)
        other = copy.copy(layer.base_layer)
        other._parameters = {"weight": layer.base_layer.weight, "bias": nn.Parameter(layer.base_layer.bias + 1)}
        layer.base_layer = other
        torch.testing.assert_close(layer(x), own + 1)


def test_a_compiled_layer_uses_the_factors(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers(adapted(tiny))[0]
    x = torch.randn(2, 1, layer.in_features)
    with torch.no_grad():
        layer(x)
        kept = layer._kept
        assert kept is not None
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        kept.weight.fill_(float("nan"))  # would show
        assert layer(x).isfinite().all()


@pytest.mark.parametrize(("free", "fits"), [(11, True), (10, False)])
def test_a_full_cuda_device_does_without(free: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 1 MB on a device of 100 MB, 4 MB of which torch holds in reserve and 3 MB of these in use."""

    class Weight:
        device = torch.device("cuda", 0)
        nbytes = 1_000_000

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((free - 1) * 1_000_000, 100_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3_000_000)
    assert decoding._fits(Weight()) == fits  # type: ignore[arg-type]


def test_doing_without_is_decided_anew_after_the_next_prompt(
    tiny: ModelMaker, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny)
    past = prefill(model, ids)
    asked: list[int] = []
    monkeypatch.setattr(decoding, "_fits", lambda weight: bool(asked.append(1)))
    without = steps(model, ids, past)
    assert keeping(model) == {False}
    assert len(asked) == len(layers(model))  # once a prompt, not once a step
    torch.testing.assert_close(without, merged_steps(model, ids, past), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(decoding, "_fits", lambda weight: True)
    steps(model, ids, prefill(model, ids))
    assert keeping(model) == {True}
