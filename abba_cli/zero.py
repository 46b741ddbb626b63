"""DeepSpeed's ZeRO 2 and 3: gradients and optimizer's state of the factors shared out, and in stage 3 the frozen base as well.

DeepSpeed trains flat shares of the factors with an optimizer of its own. The Trainer's stays beside it, without state: it has the
learning rate, and stands for the whole state when a checkpoint is written or read. So a checkpoint is the plain one of torch's
AdamW, and a run goes on with any strategy and any number of processes. https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from abba_cli.adapter.layer import AbbaLayer
from abba_cli.errors import RunError
from abba_cli.processes import Crew
from abba_cli.recipe import Recipe
from abba_cli.sharding import is_partition, is_sharded, share_out

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
    zero: dict[str, Any] = {
        "stage": recipe.distributed.zero_stage,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if recipe.distributed.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if zero["stage"] == 3:
            zero["offload_param"] = zero["offload_optimizer"]
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


def partition(
    whole: Callable[[], PeftModel], empty: Callable[[], PeftModel], crew: Crew, device: torch.device, settings: dict[str, Any]
) -> PeftModel:
    """Build the adapted model with its base shared out for stage 3; all but `settings` as of `sharding.share_out`."""
    deepspeed = _deepspeed()

    def keep_share(unit: nn.Module, trained: set[nn.Parameter]) -> None:
        frozen = [one for one in unit.parameters() if one not in trained and not is_partition(one)]
        deepspeed.zero.Init(module=nn.ParameterList(frozen), config_dict_or_path=settings)

    return share_out(whole, empty, crew, device, keep_share)


def hand_over(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Give a model to DeepSpeed to train.

    Args:
        model: The model, on its device; `partition` made it for stage 3.
        optimizer: The Trainer's AdamW of it, which is only asked for its settings.
        settings: What `configuration` said.

    Returns:
        DeepSpeed's engine, which is called as the model is.
    """
    deepspeed = _deepspeed()
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups if group["params"]]
    # In stage 3, parameters up to this size stay whole in every process: so the factors can be saved by one of them.
    kept_whole = {"stage3_param_persistence_threshold": max(parameter.numel() for parameter in _trained(optimizer))}
    settings = settings | {"zero_optimization": settings["zero_optimization"] | kept_whole}
    engine, *_ = deepspeed.initialize(model=model, optimizer=type(optimizer)(groups), config=settings)  # type: ignore[call-arg]
    if is_sharded(model):
        for layer in model.modules():
            if isinstance(layer, AbbaLayer):
                for factor in (one for one in layer.parameters() if one.requires_grad):
                    deepspeed.zero.register_external_parameter(layer, factor)  # the modules that hold them are never called
        factors = engine.optimizer.persistent_parameters
        factors[0].all_gather(factors)
    return engine


def is_engine(model: nn.Module) -> bool:
    """Whether `hand_over` made it."""
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
    zero = engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat if is_sharded(engine.module) else zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(flat) for key in _MOMENTS}
        engine.basic_optimizer.state[flat] = {"step": count.clone(), **moments}
    if not is_sharded(engine.module):
        zero._lazy_init_hp_params_optimizer_state()
    for parameter in _trained(optimizer):
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, optimizer.state[parameter][key], key)
    optimizer.state.clear()


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _deepspeed() -> Any:
    import deepspeed

    # On a CPU it would compile a faster all-reduce, which needs a compiler, half a minute and a line on stdout.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
