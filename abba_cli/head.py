"""The loss of a frozen head, over chunks of positions: the whole logits never exist, not even for the gradient.

A frozen head needs no gradient of its own, so all that backward wants is the gradient of the hidden states. It is made in
forward, chunk by chunk, while a chunk's logits are there: the arithmetic of the plain loss, without its tensors of S x V.

Shapes: B rows, T tokens, S supervised tokens, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

# Logits in a chunk, and its fewest positions. A chunk's matrices must be large enough to keep the device at work: on the CPU
# measured, 128 positions bring its matrix multiplication close to full speed (benchmarks/LOG.md).
_CHUNK = {"cpu": (2**23, 128), "other": (2**26, 256)}


@dataclass(frozen=True)
class Head:
    """A frozen output layer, and how its model's logits come from it.

    Attributes:
        linear: The output layer.
        config: The text model's configuration, which holds `final_logit_softcapping` where a model has it.
    """

    linear: nn.Linear
    config: Any

    @property
    def cap(self) -> float | None:
        """The c of logits = c tanh(z / c), as in Gemma 2; None for logits = z."""
        return getattr(self.config, "final_logit_softcapping", None)


def separable_head(model: PreTrainedModel | PeftModel) -> Head | None:
    """Find a head that can be left out of a forward pass and applied to the hidden states afterwards.

    Models differ in what they do after the head: so the model is asked, once. A factor (Granite, Cohere) may stand before the
    head as well, and soft capping is known; whatever else a model does shows in its logits.

    Args:
        model: A causal language model with at least 16 tokens, with or without an adapter, on its device; one that is shared
            out over processes has to be asked by all of them. A skeleton without weights, which can answer nothing, is taken
            at its word.

    Returns:
        None where the head is trained, adapted, quantised, placed elsewhere, or not all that makes the logits.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or hasattr(linear, "_hf_hook"):
        return None
    # A share is the whole weight again when the model has been called, until the next backward pass has ended.
    if any(type(parameter) not in (nn.Parameter, DTensor) or parameter.requires_grad for parameter in linear.parameters()):
        return None
    head = Head(linear, model.config.get_text_config())
    if linear.weight.is_meta or isinstance(linear.weight, FakeTensor):
        return head
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            return head if _agrees(model, head) else None
    finally:
        model.train(training)


@contextlib.contextmanager
def left_out(head: Head) -> Iterator[None]:
    """Within this, the model's `logits` are the hidden states that the head would get."""
    cap = head.cap
    with _answering(head.linear, lambda hidden: hidden):
        if cap is not None:
            head.config.final_logit_softcapping = None
        try:
            yield
        finally:
            if cap is not None:
                head.config.final_logit_softcapping = cap


def head_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Cross-entropy of every position, without the logits of all of them.

    Args:
        hidden: [S, H], as the model returns it with the head left out.
        targets: int64 [S].
        head: The head.

    Returns:
        [S] in nats; float32, or float64 from a float64 head.
    """
    # The forecast rehearses a GPU's step on tensors that pretend to be on the CPU.
    forecast_of_gpu = isinstance(hidden, FakeTensor) and torch.cuda.is_available()
    logits, fewest = _CHUNK["cpu" if hidden.device.type == "cpu" and not forecast_of_gpu else "other"]
    with _whole(head.linear):
        chunk = max(fewest, logits // len(head.linear.weight))
        losses: Tensor = _HeadLosses.apply(hidden, targets, head.linear.weight, head.linear.bias, head.cap, chunk)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    """Losses [S] of hidden states [S, H]; keeps the gradient of each loss to its own hidden state, [S, H], for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, chunk: int
    ) -> Tensor:
        size, vocabulary = len(hidden), weight.shape[0]
        exact = torch.promote_types(weight.dtype, torch.float32)
        losses = hidden.new_empty(size, dtype=exact)
        inputs = hidden.detach().to(weight.dtype)
        gradient = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        # Made once: fresh memory for every chunk would cost a CPU a page fault for every 4 KB of it.
        rows = min(chunk, size)
        z_buffer = weight.new_empty(rows, vocabulary)
        exact_buffer = z_buffer if weight.dtype == exact else weight.new_empty(rows, vocabulary, dtype=exact)
        p_buffer = weight.new_empty(rows, vocabulary, dtype=exact)
        for start in range(0, size, max(rows, 1)):
            part = slice(start, min(start + rows, size))
            count = part.stop - start
            low, z, p = z_buffer[:count], exact_buffer[:count], p_buffer[:count]
            target = targets[part, None]
            torch.mm(inputs[part], weight.t(), out=low)
            if bias is not None:
                low += bias
            if cap is not None:
                low.div_(cap).tanh_().mul_(cap)
            if z is not low:
                z.copy_(low)
            torch.softmax(z, -1, out=p)
            # log(sum(exp(z))) from the largest one: its probability is at least 1 / V, so that its logarithm is exact.
            losses[part] = z.amax(-1) - p.amax(-1).log() - z.gather(1, target)[:, 0]
            if gradient is None:
                continue
            p.scatter_add_(1, target, p.new_full((count, 1), -1.0))
            if cap is not None:
                p.mul_(z.div_(cap).square_().neg_().add_(1.0))
            torch.mm(low.copy_(p) if z is not low else p, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The product is taken in float32: 1 / items, rounded to bfloat16, would be off by up to 0.4%.
        return (gradient * d_losses[:, None]).to(ctx.dtype), None, None, None, None, None


def _agrees(model: PreTrainedModel | PeftModel, head: Head) -> bool:
    """Whether the model's logits are those of the head on its hidden states; asked with large logits, which show a bend."""
    ids = torch.arange(16, device=model.device)[None]
    with left_out(head):
        hidden = model(input_ids=ids, use_cache=False).logits
    if hidden.shape[-1] != head.linear.in_features:
        return False
    with _whole(head.linear):
        z = functional.linear(hidden.to(head.linear.weight.dtype), head.linear.weight, head.linear.bias)
    gain = 100 / z.float().std()
    with _answering(head.linear, lambda hidden: gain * functional.linear(hidden, head.linear.weight, head.linear.bias)):
        found = model(input_ids=ids, use_cache=False).logits.float()
    expected = gain * z.float()
    if head.cap is not None:
        expected = head.cap * torch.tanh(expected / head.cap)
    margin = min(0.02, 100 * torch.finfo(head.linear.weight.dtype).eps)
    return bool((found - expected).abs().max() <= margin * expected.abs().max())


def _whole(linear: nn.Linear) -> contextlib.AbstractContextManager[Any]:
    """Within this, the layer's weight is there; DeepSpeed's ZeRO 3 lets go of it when the model's forward pass has ended."""
    if not hasattr(linear.weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(linear.parameters()))
    return gathered


@contextlib.contextmanager
def _answering(linear: nn.Linear, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this, the layer returns `answer(x)`."""
    linear.forward = answer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del linear.forward
