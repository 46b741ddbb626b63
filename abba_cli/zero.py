"""DeepSpeed's ZeRO 2: the optimizer's state and the gradients of the factors shared out, where the factors are what is large.

DeepSpeed trains flat shares of the factors with an optimizer of its own. The Trainer's stays beside it, without state: it has the
learning rate, and stands for the whole state when a checkpoint is written or read. So a checkpoint is the plain one of torch's
AdamW, and a run goes on with any strategy and any number of processes. https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import importlib.util
import math
import os
from typing import Any

import torch
from torch import nn

from abba_cli.errors import RunError
from abba_cli.recipe import Recipe

_BUCKET = 2**24  # elements that are reduced together; DeepSpeed's own 5e8 would be 2 GB on each device
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_deepspeed(recipe: Recipe) -> None:
    """Make sure that the strategy can be had.

    Raises:
        RunError: DeepSpeed is asked for and not installed.
    """
    if recipe.distributed.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise RunError(
            "distributed.strategy: deepspeed is not installed; pip install 'abba-cli[deepspeed]', or set it to fsdp or ddp"
        )


def configuration(recipe: Recipe) -> dict[str, Any]:
    """The recipe in DeepSpeed's terms."""
    training = recipe.training
    zero: dict[str, Any] = {"stage": 2, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    if recipe.distributed.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": training.batch_size,
        # The Trainer counts the passes of a step; a step of DeepSpeed's is one when it is asked for.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # theirs has to be compiled first
    }


def share_out(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Hand a model to DeepSpeed.

    Args:
        model: The model, on its device.
        optimizer: The Trainer's AdamW of it, which is only asked for its settings.
        settings: What `configuration` said.

    Returns:
        DeepSpeed's engine, which is called as the model is.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")  # it writes to stdout otherwise
    import deepspeed

    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups if group["params"]]
    engine, *_ = deepspeed.initialize(model=model, optimizer=type(optimizer)(groups), config=settings)  # type: ignore[call-arg]
    return engine


def is_engine(model: nn.Module) -> bool:
    """Whether `share_out` made it."""
    return hasattr(model, "zero_optimization_stage")


def step(engine: Any, optimizer: torch.optim.Optimizer) -> float:
    """Clip the gradients and make an optimizer step.

    Returns:
        The norm of the gradients before; nan where it is not finite, which DeepSpeed calls -1.
    """
    given = (group for group in optimizer.param_groups if group["params"])
    for own, group in zip(engine.optimizer.param_groups, given, strict=True):
        own["lr"] = group["lr"]
    engine.step()
    norm = float(engine.get_global_grad_norm())
    return norm if norm >= 0 else math.nan


def gather_state(engine: Any, optimizer: torch.optim.Optimizer, keep: bool) -> None:
    """In all processes, bring the whole state of the optimizer together.

    Args:
        engine: DeepSpeed's.
        optimizer: The Trainer's, which gets the state.
        keep: Whether this process wants it; the others only give their shares.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    count = next(iter(engine.basic_optimizer.state.values()))["step"]
    for parameter in _trained(optimizer):
        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        if keep:
            optimizer.state[parameter] = {"step": count.clone()} | {key: one.cpu() for key, one in moments.items()}


def hand_out_state(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Bring the state that the Trainer's optimizer has read to where the shares are."""
    from deepspeed.utils import safe_set_full_optimizer_state

    count = next(iter(optimizer.state.values()))["step"]
    # DeepSpeed finds the state of a parameter only after the first step; so it is shown what that one would have made.
    for group in engine.basic_optimizer.param_groups:
        for flat in group["params"]:
            moments = {key: torch.zeros_like(flat) for key in _MOMENTS}
            engine.basic_optimizer.state[flat] = {"step": count.clone(), **moments}
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    for parameter in _trained(optimizer):
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, optimizer.state[parameter][key], key)
    optimizer.state.clear()


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
