"""The seconds of one optimizer step on N devices: arithmetic, and what travels meanwhile.

Model of the communication
    A ring over N devices moves (N-1)/N of the bytes to each in an all-gather, and 2 (N-1)/N in an all-reduce
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Between machines it passes through the machine's own
    link, which its devices share. Travel and arithmetic run at the same time as far as they can: a pass takes as long as the
    longer of the two, which is the best case.
"""

from dataclasses import dataclass

import torch

from abba_cli.adapter import cost

from .shapes import R1, R2, SEQUENCE, Model

MACHINE = 8  # devices
NF4 = 0.5  # bytes a parameter that are shared out; the scales, 1/31 of it, lie whole on each device
BF16 = 2.0
FACTOR = 4.0


@dataclass(frozen=True)
class Fabric:
    """The links, in bytes/s in one direction that large messages reach.

    Attributes:
        name: What connects the machines.
        within: From each device to the next one in the same machine.
        between: Of a whole machine to the others.
        latency: Seconds that a message takes besides, from one device to the next.
    """

    name: str
    within: float
    between: float
    latency: float = 10e-6


@dataclass(frozen=True)
class Device:
    """What a device sustains.

    Attributes:
        flops: FLOP/s in 16 bits, over a whole step.
        memory: Bytes/s of its own memory.
        bus: Bytes/s between it and the machine's memory.
    """

    flops: float = 400e12
    memory: float = 2e12
    bus: float = 20e9


@dataclass(frozen=True)
class Setting:
    """A run's way of training.

    Attributes:
        model: The model.
        base: bf16 or nf4.
        sharded: fsdp; otherwise each device has the whole base.
        offload: The shares lie in the machine's memory.
        within_machine: The base is shared out over the devices of each machine, not over all. The program has no such setting.
        sequences: Sequences of SEQUENCE tokens in an optimizer step, of all devices together.
    """

    model: Model
    base: str
    sharded: bool
    offload: bool = False
    within_machine: bool = False
    sequences: int = 64

    @property
    def name(self) -> str:
        """As the tables call it."""
        strategy = ("fsdp by machine" if self.within_machine else "fsdp") if self.sharded else "ddp"
        return f"{self.model.name} {self.base} {strategy}{' + offload' if self.offload else ''}"


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step.

    Attributes:
        arithmetic: Of the products.
        gathers: Of bringing the base together.
        reduction: Of the mean of the factors' gradients.
        total: What the step takes, where travel hides behind arithmetic as far as it can.
    """

    arithmetic: float
    gathers: float
    reduction: float
    total: float


def step(setting: Setting, devices: int, fabric: Fabric, device: Device) -> Step:
    """Time an optimizer step.

    Args:
        setting: The run.
        devices: How many; they divide the sequences of a step.
        fabric: Their links.
        device: What each does.
    """
    passes, left = divmod(setting.sequences, devices)
    assert not left, (setting.sequences, devices)
    forward, backward = arithmetic(setting.model, setting.base, SEQUENCE, device)
    gather = gather_seconds(setting, devices, fabric, device)
    reduction = all_reduce_seconds(FACTOR * setting.model.trained, devices, fabric)
    # The gradients travel during the last backward pass, beside the base.
    total = passes * (max(forward, gather) + max(backward, gather)) - max(backward, gather) + max(backward, gather + reduction)
    return Step(passes * (forward + backward), passes * 2 * gather, reduction, total)


def arithmetic(model: Model, base: str, tokens: int, device: Device) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass, which computes each block again before it goes back through it.

    The frozen base takes 2 operations for each parameter and token in each of three passes: forward, forward again, and the
    gradient of the input. What ABBA adds is the program's own account (abba_cli/adapter/cost.py).
    """
    # Causal attention takes half of scores and weighted sums; its backward pass twice a forward pass.
    attention = 2 * model.blocks * tokens * tokens * model.linear[0][0]
    once = (2 * (model.in_blocks + model.outside / 2) * tokens + attention) / device.flops
    again = (2 * model.in_blocks * tokens + attention) / device.flops
    back = once + attention / device.flops
    unpacking = model.in_blocks * (NF4 + BF16) / device.memory if base == "nf4" else 0.0
    alone, both = abba_seconds(model, tokens, device, training=False), abba_seconds(model, tokens, device, training=True)
    return once + alone + unpacking, again + back + both + 2 * unpacking


def abba_seconds(model: Model, tokens: int, device: Device, training: bool) -> float:
    """Seconds that the update takes in a forward pass, or in a forward and a backward pass."""
    figures = cost.GPU._replace(low=device.flops, bandwidth=device.memory)
    shapes = [cost.Shape(tokens, m, n, ((R1, R2),), 2, True, training) for m, n in model.linear]
    kind = torch.device("cuda")
    return model.blocks * sum(cost.seconds(shape, cost.choose(shape, "auto", kind), figures) for shape in shapes)


def base_bytes(setting: Setting) -> float:
    """Bytes of the base that are shared out."""
    return setting.model.in_blocks * (NF4 if setting.base == "nf4" else BF16) + setting.model.outside * BF16


def gather_seconds(setting: Setting, devices: int, fabric: Fabric, device: Device) -> float:
    """Seconds in which every device has been given the whole base once, block by block."""
    if not setting.sharded or devices == 1:
        return 0.0
    size = base_bytes(setting)
    devices = min(devices, MACHINE) if setting.within_machine else devices
    travel = bytes_each(size, devices) / bandwidth(devices, fabric) + setting.model.blocks * (devices - 1) * fabric.latency
    return max(travel, size / devices / device.bus) if setting.offload else travel


def all_reduce_seconds(size: float, devices: int, fabric: Fabric) -> float:
    """Seconds of a ring's all-reduce of `size` bytes."""
    if devices == 1:
        return 0.0
    return 2 * bytes_each(size, devices) / bandwidth(devices, fabric) + 2 * (devices - 1) * fabric.latency


def bytes_each(size: float, devices: int) -> float:
    """Bytes that each device receives, and sends on, until a ring has gathered `size` bytes everywhere."""
    return size * (devices - 1) / devices


def bandwidth(devices: int, fabric: Fabric) -> float:
    """Bytes/s of a ring: of its slowest link."""
    return fabric.within if devices <= MACHINE else min(fabric.within, fabric.between)
