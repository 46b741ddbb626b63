"""The seconds of a whole run: its steps, and what more devices do not make faster: input, start, checkpoints."""

import math
from dataclasses import dataclass

from abba_cli.adapter.factors import OVERSAMPLE, POWER_ITERATIONS

from .shapes import R1, SEQUENCE
from .steps import BF16, FACTOR, NF4, Device, Fabric, Setting, arithmetic, bandwidth, base_bytes, gather_seconds, step


@dataclass(frozen=True)
class Rates:
    """What the processors and disks of a machine do. Measured: two cores of an AMD EPYC, other work on them; see docs/scale.md.

    Attributes:
        rows: Rows/s that one process tokenises (measured, GSM8K).
        tokens_a_row: Of these rows.
        packing: Bytes/s of packing prepared rows for other processes (measured), and as much again to unpack them.
        network: Bytes/s of the processes' own connections, over which these rows go (assumed: one TCP stream).
        svd: Parameters/s of the SVD start for one thread (measured).
        quantise: Parameters/s of bitsandbytes on a processor for one thread (measured).
        threads: Of the main process (assumed: 64 cores, which the launcher shares out over 8 processes).
        read: Bytes/s of the disk that holds the base (assumed).
        checkpoint: Bytes/s of writing a checkpoint and its checksums (measured).
    """

    rows: float = 1_900.0
    tokens_a_row: int = 215
    packing: float = 0.28e9
    network: float = 1e9
    svd: float = 41e6
    quantise: float = 10e6
    threads: int = 8
    read: float = 2e9
    checkpoint: float = 0.25e9


@dataclass(frozen=True)
class Job:
    """One epoch over some rows, packed into full sequences; held-out rows are not packed.

    Attributes:
        rows: Training rows.
        held_out: Rows of an evaluation.
        eval_batch: Rows of an evaluation in a forward pass of each device.
        every: Steps between evaluations, and between checkpoints.
    """

    rows: int = 1_000_000
    held_out: int = 1_000
    eval_batch: int = 1
    every: int = 200


@dataclass(frozen=True)
class Run:
    """Seconds of a whole run by what they go into."""

    input: float
    start: float
    steps: float
    checkpoints: float
    evaluation: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.input + self.start + self.steps + self.checkpoints + self.evaluation


def run(setting: Setting, job: Job, devices: int, fabric: Fabric, device: Device, rates: Rates) -> Run:
    """Time a whole run."""
    steps = math.ceil(job.rows * rates.tokens_a_row / SEQUENCE / setting.sequences)
    pauses = math.ceil(steps / job.every)
    return Run(
        input=input_seconds(job, devices, rates),
        start=start_seconds(setting, devices, fabric, device, rates),
        steps=steps * step(setting, devices, fabric, device).total,
        checkpoints=pauses * checkpoint_bytes(setting) / rates.checkpoint,
        evaluation=(pauses + 1) * evaluation_seconds(setting, job, devices, fabric, device, rates),
    )


def input_seconds(job: Job, devices: int, rates: Rates) -> float:
    """The main process tokenises all rows and sends them to the others, each of which keeps them."""
    tokenising = job.rows / rates.rows
    if devices == 1:
        return tokenising
    return tokenising + row_bytes(job, rates) * (2 / rates.packing + 1 / rates.network)


def row_bytes(job: Job, rates: Rates) -> float:
    """Bytes of the prepared rows in each process: an id and a label of 4 bytes for every token."""
    return job.rows * rates.tokens_a_row * 8.0


def start_seconds(setting: Setting, devices: int, fabric: Fabric, device: Device, rates: Rates) -> float:
    """Reading the base, quantising it, the SVD of every adapted layer, and sending all to the other devices.

    With ddp every process does it for itself on its device, and a machine reads the base once. With fsdp the main process does it
    on the processor.
    """
    model = setting.model
    reading = (model.in_blocks + model.outside) * BF16 / rates.read
    if not setting.sharded or devices == 1:
        products = 2 * (R1 + OVERSAMPLE) * (2 * POWER_ITERATIONS + 2) * model.in_blocks
        quantising = model.in_blocks * (NF4 + BF16) / device.memory if setting.base == "nf4" else 0.0
        return reading + quantising + products / (0.2 * 60e12)  # thin products in float32, as abba_cli/adapter/cost.py has them
    quantising = model.in_blocks / (rates.quantise * rates.threads) if setting.base == "nf4" else 0.0
    sending = base_bytes(setting) / min(device.bus, bandwidth(devices, fabric))
    return reading + quantising + model.in_blocks / (rates.svd * rates.threads) + sending


def checkpoint_bytes(setting: Setting) -> float:
    """The factors, and AdamW's two values for each of them."""
    return 3 * FACTOR * setting.model.trained


def evaluation_seconds(setting: Setting, job: Job, devices: int, fabric: Fabric, device: Device, rates: Rates) -> float:
    """Forward passes over the held-out rows, shared out evenly; with fsdp each pass needs the whole base."""
    passes = math.ceil(job.held_out / (devices * job.eval_batch))
    forward, _ = arithmetic(setting.model, setting.base, rates.tokens_a_row * job.eval_batch, device)
    return passes * max(forward, gather_seconds(setting, devices, fabric, device))
