"""The loss of a head that is left out: the plain loss's values and gradients, without its logits; and which models allow it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_batches import TINY
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from abba_cli import head as head_module
from abba_cli.head import Head, head_losses, left_out, separable_head

V, H = 101, 13

# What each architecture does after its head, by its settings here.
SEPARABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": None},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "phi": {},  # its head has a bias
    "mixtral": {"num_local_experts": 4},
    "bloom": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **{**TINY, **SEPARABLE.get(name, {})})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        # Logits that are large enough to be bent, and a bias that is not zero.
        nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(False)
    return model


class Settings:
    def __init__(self, cap: float | None) -> None:
        self.final_logit_softcapping = cap


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions at a time, so that a handful of positions is several chunks and a rest."""
    monkeypatch.setattr(head_module, "_CHUNK", {"cpu": (7 * V, 1), "other": (7 * V, 1)})


@pytest.mark.parametrize("size", [1, 7, 20, 21])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_values_and_gradients_are_those_of_the_plain_loss(
    dtype: torch.dtype, rtol: float, bias: bool, cap: float | None, size: int
) -> None:
    torch.manual_seed(size)
    linear = nn.Linear(H, V, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = (2 * torch.randn(size, H)).to(dtype).requires_grad_()
    targets = torch.randint(V, (size,))
    weights = torch.rand(size, dtype=torch.float64) / size
    exact = hidden.detach().double().requires_grad_()
    logits = functional.linear(exact, linear.weight.double(), linear.bias.double() if bias else None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()

    losses = head_losses(hidden, targets, Head(linear, Settings(cap)))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (losses * weights.to(losses.dtype)).sum().backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=rtol, atol=rtol * float(exact.grad.abs().max()))


def test_a_certain_and_a_hopeless_answer_have_exact_losses() -> None:
    linear = nn.Linear(1, V, bias=False).requires_grad_(False)
    linear.weight.zero_()[5] = 1.0
    hidden = torch.tensor([[90.0], [90.0], [12.0]])
    losses = head_losses(hidden, torch.tensor([5, 6, 5]), Head(linear, Settings(None)))
    logits = torch.zeros(3, V, dtype=torch.float64)
    logits[:, 5] = hidden[:, 0].double()
    expected = functional.cross_entropy(logits, torch.tensor([5, 6, 5]), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-7)


def test_no_position_at_all() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    losses = head_losses(hidden, torch.zeros(0, dtype=torch.long), Head(nn.Linear(H, V).requires_grad_(False), Settings(None)))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_has_the_size_of_all_logits() -> None:
    linear, targets = nn.Linear(H, V, bias=False).requires_grad_(False), torch.randint(V, (300,))
    hidden = torch.randn(300, H, requires_grad=True)
    with Largest() as ours:
        head_losses(hidden, targets, Head(linear, Settings(None))).sum().backward()
    with Largest() as plain:
        functional.cross_entropy(linear(hidden), targets).backward()
    assert plain.elements == 300 * V
    assert ours.elements == max(7 * V, 300 * H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SEPARABLE)
def test_hidden_states_of_real_models(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype).train()
    head = separable_head(model)
    assert head is not None
    assert model.training
    model.eval()
    ids, targets = torch.randint(97, (2, 9)), torch.randint(97, (18,))
    logits = model(input_ids=ids).logits
    with left_out(head):
        hidden = model(input_ids=ids).logits
    assert hidden.shape == (2, 9, 32)
    expected = functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(head_losses(hidden.flatten(0, 1), targets, head), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(model(input_ids=ids).logits, logits)  # all is as it was


class Bent(LlamaForCausalLM):
    """Does something unknown after its head, which small logits hardly show."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 40 * torch.tanh(outputs.logits / 40)
        return outputs


class Functional(LlamaForCausalLM):
    """Multiplies with its head's weight, without calling the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        hidden = self.model(kwargs["input_ids"]).last_hidden_state
        outputs.logits = functional.linear(hidden, self.lm_head.weight)
        return outputs


@pytest.mark.parametrize("kind", [Bent, Functional])
def test_models_that_do_something_else_are_found_out(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    model = kind(AutoConfig.for_model("llama", **TINY)).requires_grad_(False)
    assert separable_head(model) is None


def trained(model: PreTrainedModel) -> None:
    model.lm_head.weight.requires_grad_(True)


def hooked(model: PreTrainedModel) -> None:
    model.lm_head._hf_hook = object()


def wrapped(model: PreTrainedModel) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


@pytest.mark.parametrize("change", [trained, hooked, wrapped])
def test_heads_that_are_more_than_a_frozen_layer_stay_in(change: Any) -> None:
    model = model_of("llama")
    assert separable_head(model) is not None
    change(model)
    assert separable_head(model) is None


def test_a_skeleton_is_taken_at_its_word() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).requires_grad_(False)
    assert separable_head(model) is not None


def test_the_head_is_put_back_after_an_error() -> None:
    model = model_of("gemma2")
    head = separable_head(model)
    assert head is not None

    def fail() -> Iterator[None]:
        with left_out(head):
            assert model.config.final_logit_softcapping is None
            raise KeyError
        yield

    with pytest.raises(KeyError):
        next(fail())
    assert model.config.final_logit_softcapping == 5.0
    assert "forward" not in vars(model.lm_head)
