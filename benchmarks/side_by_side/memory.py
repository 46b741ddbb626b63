"""Memory of one training step: bytes kept for backward, and the peak, both by counting tensors."""

import gc
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def kept_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Returns the bytes that autograd keeps between forward and backward, the model's own tensors not counted.

    Tensors that share memory count once, and a view counts as the memory it keeps alive.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: list[weakref.ref[torch.Tensor]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()  # the tensor itself would make a circle with the node that keeps it
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    # A method may make a graph and let go of it, as DoRA does for its norms: what counts is what is still alive.
    storages = [kept.untyped_storage() for ref in saved if (kept := ref()) is not None]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}.values())
    del loss
    return total


def peak_bytes(model: nn.Module, forward: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Returns the peak of a forward and backward above what is there before: parameters, gradients and optimizer state.

    The gradients are there from the start, as when they are accumulated, so that the peak can be compared between ranks.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            forward().backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        # Every allocation and release of the CPU's allocator is an event of the profiler.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            forward().backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
