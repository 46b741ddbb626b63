"""The program's own forecast of memory for one model under every strategy, and what the machine's own memory has to hold."""

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import transformers
from datasets import Dataset

from abba_cli import adapting
from abba_cli.bases import Base
from abba_cli.forecast.prediction import forecast
from abba_cli.forecast.rows import heavy_rows
from abba_cli.recipe import Recipe

from .shapes import MODELS, R1, R2, SEQUENCE, Model

RESULTS = Path(__file__).parents[1] / "results"
DEVICES_OF_A_MACHINE = 8
# Strategy, offload, devices. With ddp a further device changes nothing.
LAYOUTS = (("ddp", False, 1), ("ddp", False, 8), ("fsdp", False, 8), ("fsdp", False, 16), ("fsdp", True, 8), ("fsdp", True, 16))
# A card says more than it leaves to a program, and its allocator wastes some.
USABLE = 0.9
CARDS = ((24, 8), (24, 16), (48, 8), (48, 16), (80, 8))  # GB, how many


@dataclass(frozen=True)
class Need:
    """What a run of one model needs.

    Attributes:
        model: Its name.
        base: bf16 or nf4.
        strategy: ddp or fsdp.
        offload: Whether the shares lie in the machine's memory.
        devices: How many.
        device_bytes: On each device, at the peak.
        uses: The same by use.
        start_bytes: What the main process reads into its machine's memory before it sends it on.
        host_bytes: What lies in the memory of the fullest machine while it trains, 8 devices to a machine, without the processes.
    """

    model: str
    base: str
    strategy: str
    offload: bool
    devices: int
    device_bytes: int
    uses: dict[str, int]
    start_bytes: int
    host_bytes: int


def needs(model: Model, base: str) -> Iterator[Need]:
    """Forecast every layout: seven linear layers of each block adapted, one full row, gradient checkpointing.

    Raises:
        RuntimeError: The model's step cannot be simulated.
    """
    tokens = list(range(SEQUENCE))
    rows = heavy_rows(Dataset.from_list([{"input_ids": tokens, "labels": tokens}]))
    skeleton = adapting.check_adapter(model.config, recipe(base).model, recipe(base).adapter, Base(model.source))
    weights = 0
    for strategy, offload, devices in LAYOUTS:
        # Where there is no card the forecast takes the machine's memory for the device's, and offload for no relief.
        with mock.patch("torch.cuda.is_available", return_value=True):
            found = forecast(recipe(base, strategy, offload), skeleton, rows, devices)
        if found.gap:
            raise RuntimeError(found.gap)
        weights = found.uses.get("base weights", weights)
        shares = weights * min(devices, DEVICES_OF_A_MACHINE) // devices
        yield Need(
            model=model.name,
            base=base,
            strategy=strategy,
            offload=offload,
            devices=devices,
            device_bytes=found.total,
            uses=found.uses,
            start_bytes=weights if strategy == "fsdp" else 0,
            host_bytes=shares if offload else 0,
        )


def recipe(base: str, strategy: str = "ddp", offload: bool = False) -> Recipe:
    """The recipe that is forecast."""
    return Recipe.model_validate(
        {
            "model": {"name": "unused", "dtype": "bfloat16", "quantization": "nf4" if base == "nf4" else "none"},
            "adapter": {"r1": R1, "r2": R2},
            "data": {"train": "unused", "max_length_tokens": SEQUENCE},
            "training": {"batch_size": 1, "gradient_checkpointing": True},
            "distributed": {"strategy": strategy, "offload": offload},
            "output": "unused",
        }
    )


def choice(found: list[Need], card: int, devices: int) -> str:
    """The simplest strategy for one model and base that fits into this many cards of this many GB."""
    for need in found:
        fits = need.device_bytes <= USABLE * card * 1e9
        # A further device changes nothing with ddp.
        if fits and (need.devices == devices or (need.strategy == "ddp" and need.devices > 1)):
            return f"{need.strategy}{' + offload' if need.offload else ''}"
    return "too large"


def main(description: str) -> None:
    """Forecast, print, record."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of forecast-table.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    groups = [list(needs(model, base)) for model in MODELS for base in ("bf16", "nf4")]
    print(memory_table(groups))
    print(choice_table(groups))
    record = {
        "what": "forecast on paper, not run; bytes",
        "models": {model.name: model.source for model in MODELS},
        "usable_share_of_a_card": USABLE,
        "versions": {one.__name__: one.__version__ for one in (torch, transformers)},
        "rows": [asdict(need) for group in groups for need in group],
    }
    (options.out / "forecast-table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def memory_table(groups: list[list[Need]]) -> str:
    """GB on each device, and in the memory of the machine."""
    lines = ["| | one card | ddp | fsdp on 8 | fsdp on 16 | fsdp + offload | read at the start | kept with offload |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for group in groups:
        one, ddp, eight, sixteen, offloaded, _ = group
        figures = [f"{need.device_bytes / 1e9:.1f}" for need in (one, ddp, eight, sixteen, offloaded)]
        figures += [f"{eight.start_bytes / 1e9:.0f}", f"{offloaded.host_bytes / 1e9:.0f}"]
        lines.append(f"| {one.model}, {one.base} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def choice_table(groups: list[list[Need]]) -> str:
    """The strategy to choose, by cards."""
    lines = ["| | " + " | ".join(f"{devices} x {card} GB" for card, devices in CARDS) + " |", "|---|" + "---|" * len(CARDS)]
    for group in groups:
        names = [choice(group, card, devices) for card, devices in CARDS]
        lines.append(f"| {group[0].model}, {group[0].base} | " + " | ".join(names) + " |")
    return "\n".join(lines) + "\n"
