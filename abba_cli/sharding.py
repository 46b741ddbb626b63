"""The frozen base shared out over the processes by FSDP2, each gathering one block at a time; the factors whole in every one.

Nearly all of the memory is the base's. The factors, their gradients and the optimizer's state are small, and torch's
DistributedDataParallel keeps them the same everywhere: so checkpoints, the saved adapter and going on with another number of
processes are those of a run that shares nothing out. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

Only the main process reads the base, into its own memory, and starts the factors; the others get one block after the other and
keep their share of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig

from abba_cli.adapter.linear import AbbaLinear
from abba_cli.errors import ModelError
from abba_cli.processes import Crew


@dataclass(frozen=True)
class _Sent:
    """A parameter on its way: its shape and type, and for 4 bits those of the tensors that tell what the values stand for."""

    shape: torch.Size
    dtype: torch.dtype
    scales: dict[str, tuple[torch.Size, torch.dtype]]


def shard(
    whole: Callable[[], PeftModel], empty: Callable[[], PeftModel], crew: Crew, device: torch.device, offload: bool
) -> PeftModel:
    """Build the adapted model with its base shared out; all but `offload` as of `share_out`.

    Args:
        whole: Makes the model.
        empty: Makes it without weights.
        crew: The processes.
        device: This one's.
        offload: Keep the shares in the memory of the CPU, and bring a block to the device when its turn comes.
    """
    mesh = init_device_mesh(device.type, (crew.count,))
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()

    def keep_share(unit: nn.Module, trained: set[nn.Parameter]) -> None:
        fully_shard(unit, mesh=mesh, offload_policy=policy, ignored_params=trained)

    adapted = share_out(whole, empty, crew, device, keep_share)
    register_fsdp_forward_method(adapted, "generate")
    return adapted


def share_out(
    whole: Callable[[], PeftModel],
    empty: Callable[[], PeftModel],
    crew: Crew,
    device: torch.device,
    keep_share: Callable[[nn.Module, set[nn.Parameter]], None],
) -> PeftModel:
    """Build the adapted model, of whose base each process has a share.

    Args:
        whole: Makes the model with its weights and started factors, on the CPU; called in the main process.
        empty: Makes the same modules without weights; called in the others.
        crew: The processes.
        device: This one's.
        keep_share: Called with each block, then with the model, whole on the device, and with the trained parameters: has to
            leave a share of what it gets, without those that are trained.

    Raises:
        ModelError: What `whole` raised, or the model does not name its blocks.
    """
    made: list[PeftModel] = []

    def describe() -> tuple[dict[str, _Sent], dict[str, Any]]:
        made.append(whole())
        generation: GenerationConfig | None = getattr(made[0].get_base_model(), "generation_config", None)
        return _description(made[0]), generation.to_dict() if generation else {}

    described, generation = crew.from_main(describe)
    adapted = made.pop() if crew.is_main else empty()
    base: Any = adapted.get_base_model()
    vars(base).pop("hf_device_map", None)  # it tells where the whole model was
    if not crew.is_main:
        base.generation_config = GenerationConfig.from_dict(generation)  # samples are answered by all processes together
    courier = _Courier(described, device, crew.is_main)
    courier.bring(adapted, lambda parameter: parameter.requires_grad)
    _bring_buffers(adapted, device)
    for unit in [*blocks(base), adapted]:
        courier.bring(unit, lambda parameter: not parameter.requires_grad)
        keep_share(unit, {parameter for parameter in adapted.parameters() if parameter.requires_grad})
    for module in adapted.modules():
        if isinstance(module, AbbaLinear):
            module.keeps_weight = False  # a whole base in each process is what sharding is to avoid
    return adapted


def blocks(base: nn.Module) -> list[nn.Module]:
    """The blocks of a model that are gathered one at a time: those that transformers does not split over devices either.

    Raises:
        ModelError: The model does not name them.
    """
    names: set[str] = set(getattr(base, "_no_split_modules", None) or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        raise ModelError(
            f"distributed.strategy: {type(base).__name__} does not say which of its modules are blocks (_no_split_modules), "
            "so that it cannot be shared out; set it to ddp"
        )
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a share of the model only."""
    return isinstance(model, FSDPModule) or any(is_partition(parameter) for parameter in model.parameters())


def is_partition(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO 3 has shared the parameter out."""
    return hasattr(parameter, "ds_id")


def put_away(model: nn.Module) -> None:
    """In all processes, let go of what is still gathered after a forward pass.

    Before one of them alone reads the parameters: FSDP then lets go of it there, and the next pass would find the processes in
    disagreement about who has to gather it.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def replicate(adapted: PeftModel, device: torch.device) -> DistributedDataParallel:
    """Wrap a sharded model so that the gradients of its factors are averaged over the processes."""
    ignored = [name for name, parameter in adapted.named_parameters() if not parameter.requires_grad]
    ignored += [name for name, _ in adapted.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(adapted, ignored)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(adapted, device_ids=None if device.type == "cpu" else [device])


def _description(adapted: PeftModel) -> dict[str, _Sent]:
    """What the other processes have to expect, by the parameter's name; a shared one stands under its first name."""
    return {
        name: _Sent(parameter.shape, parameter.dtype, {key: (one.shape, one.dtype) for key, one in _scales(parameter).items()})
        for name, parameter in adapted.named_parameters()
    }


def _scales(parameter: Any) -> dict[str, torch.Tensor]:
    """The tensors that belong to a 4-bit weight, as bitsandbytes writes them into a checkpoint."""
    state = getattr(parameter, "quant_state", None)
    return {} if state is None else dict(state.as_dict(packed=True))


@dataclass
class _Courier:
    """Brings parameters from the main process to the device of each.

    Attributes:
        described: All parameters of the model.
        device: This process's.
        is_main: Whether it has them.
    """

    described: dict[str, _Sent]
    device: torch.device
    is_main: bool

    def __post_init__(self) -> None:
        self._names: dict[nn.Module, str] = {}
        self._brought: dict[int, nn.Parameter] = {}

    def bring(self, unit: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> None:
        """Bring the wanted parameters of a module, those apart that have been shared out already."""
        if not self._names:
            self._names = {module: name for name, module in unit.named_modules()}
        for module, key, parameter in list(_places(unit)):
            if isinstance(parameter, DTensor) or is_partition(parameter) or not wanted(parameter):
                continue
            before = id(parameter)
            if before not in self._brought:
                name = f"{self._names[module]}.{key}" if self._names[module] else key
                self._brought[before] = self._receive(module, parameter, self.described[name])
                self._brought[id(self._brought[before])] = self._brought[before]
            module._parameters[key] = self._brought[before]

    def _receive(self, module: Any, parameter: nn.Parameter, sent: _Sent) -> nn.Parameter:
        data = self._broadcast(parameter.data if self.is_main else None, sent.shape, sent.dtype)
        if not sent.scales:
            return nn.Parameter(data, requires_grad=parameter.requires_grad)
        from bitsandbytes.nn.modules import Params4bit

        own = _scales(parameter) if self.is_main else {}
        scales = {key: self._broadcast(own.get(key), *kind) for key, kind in sent.scales.items()}
        restored: nn.Parameter = Params4bit.from_prequantized(data, scales, device=self.device, module=module)
        return restored

    def _broadcast(self, own: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device) if own is None else own.to(self.device).contiguous()
        torch.distributed.broadcast(tensor, src=0)
        return tensor


def _places(unit: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in unit.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, parameter


def _bring_buffers(adapted: PeftModel, device: torch.device) -> None:
    for module in adapted.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = moved = buffer.to(device)
                torch.distributed.broadcast(moved, src=0)
