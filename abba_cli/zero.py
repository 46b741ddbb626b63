"""DeepSpeed's ZeRO 2 and 3: gradients and optimizer's state of the factors shared out, and in stage 3 the frozen base as well.

DeepSpeed trains flat shares of the factors with an optimizer of its own. The Trainer's stays beside it, without state: it has the
learning rate, and stands for the whole state when a checkpoint is written or read. So a checkpoint is the plain one of torch's
AdamW, and a run goes on with any strategy and any number of processes. https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from abba_cli.adapter.layer import AbbaLayer
from abba_cli.errors import RunError
from abba_cli.processes import Crew
from abba_cli.recipe import Recipe
from abba_cli.sharding import blocks, is_partition, is_sharded, share_out

BUCKET = 2**24
"""Elements that are reduced together; DeepSpeed's own 5e8 would be 2 GB on each device."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Engine:
    """A model that DeepSpeed trains.

    Attributes:
        model: DeepSpeed's engine, which is called as the model is.
        optimizer: The Trainer's AdamW, without state.
    """

    model: Any
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """Clip the gradients and make an optimizer step.

        Returns:
            The norm of the gradients before; nan where it is not finite, which DeepSpeed calls -1.
        """
        given = (group for group in self.optimizer.param_groups if group["params"])
        for own, group in zip(self.model.optimizer.param_groups, given, strict=True):
            own["lr"] = group["lr"]
        self.model.step()
        norm = float(self.model.get_global_grad_norm())
        return norm if norm >= 0 else math.nan

    @contextmanager
    def whole_state(self, keep: bool) -> Iterator[None]:
        """Within this, entered by all processes, the Trainer's optimizer has the whole state in those that `keep` it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        count = next(iter(self.model.basic_optimizer.state.values()))["step"]
        for parameter in _trained(self.optimizer):
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if keep:
                self.optimizer.state[parameter] = {"step": count.clone()} | {key: one.cpu() for key, one in moments.items()}
        yield
        self.optimizer.state.clear()

    def hand_out_state(self) -> None:
        """Bring the state that the Trainer's optimizer has read to where the shares are."""
        from deepspeed.utils import safe_set_full_optimizer_state

        zero, own = self.model.optimizer, self.model.basic_optimizer
        third = is_sharded(self.model.module)
        count = next(iter(self.optimizer.state.values()))["step"]
        # There is a state to write into only after the first step; so it is made as that one would.
        for flat in zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups:
            own.state[flat] = {"step": count.to(flat.device, copy=True)} | {key: torch.zeros_like(flat) for key in _MOMENTS}
        if not third:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter in _trained(self.optimizer):
            for key in _MOMENTS:
                safe_set_full_optimizer_state(parameter, self.optimizer.state[parameter][key], key)
        self.optimizer.state.clear()


def check_deepspeed(recipe: Recipe) -> None:
    """Make sure that DeepSpeed can train a recipe that asks for it.

    Raises:
        RunError: It is not installed, or cannot do what the recipe asks for.
    """
    if recipe.distributed.strategy != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise RunError(
            "distributed.strategy: deepspeed is not installed; pip install 'abba-cli[deepspeed]', or set it to fsdp or ddp"
        )
    third = recipe.distributed.zero_stage == 3
    refused = {
        "training.optimizer: adamw_8bit": recipe.training.optimizer == "adamw_8bit",  # its state cannot be put together
        "model.dtype: float16": recipe.model.dtype == "float16",  # would need DeepSpeed's own scaling of the loss
        "adapter.dtype: bfloat16": recipe.adapter.dtype == "bfloat16",  # DeepSpeed would train float32 copies
        # bitsandbytes holds on to each gathered weight until the backward pass, so that no memory would be saved.
        "model.quantization: nf4 with zero_stage: 3": third and recipe.model.quantization == "nf4",
        "data.packing with zero_stage: 3": third and recipe.data.packing,  # the model cannot be asked before training
    }
    for keys in (keys for keys, found in refused.items() if found):
        raise RunError(f"distributed.strategy: deepspeed takes no {keys}; set one of them otherwise, or the strategy to fsdp")


def configuration(recipe: Recipe) -> dict[str, Any]:
    """The recipe in DeepSpeed's terms."""
    training = recipe.training
    zero: dict[str, Any] = {
        "stage": recipe.distributed.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
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


def hand_over(model: PeftModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Engine:
    """Give a model to DeepSpeed to train.

    Args:
        model: The model, on its device; `partition` made it for stage 3.
        optimizer: The Trainer's AdamW of it, which is only asked for its settings.
        settings: What `configuration` said.
    """
    deepspeed = _deepspeed()
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups if group["params"]]
    factors = {
        one: layer for layer in model.modules() if isinstance(layer, AbbaLayer) for one in layer.parameters() if one.requires_grad
    }
    if is_sharded(model):
        settings = settings | {"zero_optimization": settings["zero_optimization"] | _gathering(model, list(factors))}
    engine, *_ = deepspeed.initialize(model=model, optimizer=type(optimizer)(groups), config=settings)  # type: ignore[call-arg]
    if is_sharded(model):
        for factor, layer in factors.items():
            deepspeed.zero.register_external_parameter(layer, factor)  # the modules that hold it are never called
    return Engine(engine, optimizer)


@contextmanager
def whole_factors(model: nn.Module) -> Iterator[None]:
    """Within this, entered by all processes, each of them can read all that is trained."""
    shares = [parameter for parameter in model.parameters() if parameter.requires_grad and is_partition(parameter)]
    if not shares:
        yield
        return
    with _deepspeed().zero.GatheredParameters(shares):
        yield


def take_back(model: nn.Module) -> None:
    """In all processes, make what is trained plain parameters again, when training has ended."""
    with whole_factors(model):
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad and is_partition(parameter):
                    module._parameters[key] = nn.Parameter(parameter.detach().cpu().clone())


def _gathering(model: PeftModel, factors: list[nn.Parameter]) -> dict[str, int]:
    """How much of a model is whole at one time in stage 3, in elements; DeepSpeed's own 1e9 would be 2 GB of bfloat16."""
    largest = max(sum(_size(one) for one in block.parameters()) for block in blocks(model.get_base_model()))
    return {
        # Up to this size, parameters stay whole: each layer would have to ask for its factors again.
        "stage3_param_persistence_threshold": max(factor.numel() for factor in factors),
        "stage3_max_live_parameters": 2 * largest,
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_reuse_distance": 0,
    }


def _size(parameter: Any) -> int:
    size: int = parameter.ds_numel if is_partition(parameter) else parameter.numel()
    return size


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _deepspeed() -> Any:
    import deepspeed

    # On a CPU it would compile a faster all-reduce, which needs a compiler, half a minute and a line on stdout.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
