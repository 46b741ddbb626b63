"""The tables, the record and the picture of the simulation."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .plots import plot
from .runs import Job, Rates, Run, checkpoint_bytes, run
from .shapes import MODELS
from .steps import FACTOR, Device, Fabric, Setting, base_bytes, step

RESULTS = Path(__file__).parents[1] / "results"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
PRINTED = (1, 8, 16, 64)

# Nine tenths of the nominal bandwidth; NVLink 4 by its data sheet's 450 GB/s in one direction, of which rings reach about 350.
NVLINK, PCIE = 350e9, 20e9
FABRICS = (
    Fabric("NVLink, 400 Gb/s for each card", NVLINK, 8 * 45e9),
    Fabric("NVLink, 400 Gb/s for a machine", NVLINK, 45e9),
    Fabric("NVLink, 100 Gb/s for a machine", NVLINK, 11.2e9),
    Fabric("PCIe, 25 Gb/s for a machine", PCIE, 2.8e9),
)
DRAWN = FABRICS[1:]

SMALL, MIDDLE, LARGE = MODELS
SETTINGS = (
    Setting(SMALL, "bf16", sharded=False),
    Setting(MIDDLE, "nf4", sharded=True),
    Setting(MIDDLE, "bf16", sharded=True),
    Setting(LARGE, "nf4", sharded=True),
    Setting(MIDDLE, "nf4", sharded=True, within_machine=True),
)


def main(description: str) -> None:
    """Simulate, print, draw, record."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=Device.flops / 1e12, help="that a device sustains in 16 bits")
    parser.add_argument("--threads", type=int, default=Rates.threads, help="of the main process")
    parser.add_argument("--rows", type=int, default=Job.rows, help="that the run trains on, once")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of scale-sim.json and scale-sim.png")
    options = parser.parse_args()
    device, rates, job = Device(options.tflops * 1e12), Rates(threads=options.threads), Job(options.rows)
    print(travelling())
    steps = [
        {"setting": setting.name, "fabric": fabric.name, "devices": devices, **asdict(step(setting, devices, fabric, device))}
        for setting in SETTINGS
        for fabric in FABRICS
        for devices in DEVICES
    ]
    print(step_table(steps))
    runs = {
        fabric.name: {
            setting.name: [run(setting, job, devices, fabric, device, rates) for devices in DEVICES] for setting in SETTINGS
        }
        for fabric in FABRICS
    }
    print(run_table(runs[FABRICS[0].name]))
    used = {
        fabric.name: {
            setting.name: [one["arithmetic"] / one["total"] for one in steps if of(one, setting, fabric)]
            for setting in (*SETTINGS[:3], SETTINGS[4])
        }
        for fabric in DRAWN
    }
    drawn = {setting.name: runs[FABRICS[0].name][setting.name] for setting in (SETTINGS[0], SETTINGS[1], SETTINGS[3])}
    plot(DEVICES, used, drawn, options.out / "scale-sim.png")
    record = {
        "what": "simulated, not run; seconds",
        "assumed": {"device": asdict(device), "fabrics": [asdict(fabric) for fabric in FABRICS]},
        "rates": asdict(rates),
        "job": asdict(job),
        "steps": steps,
        "runs": [
            {"setting": setting, "fabric": fabric, "devices": devices, **asdict(one)}
            for fabric, by_setting in runs.items()
            for setting, each in by_setting.items()
            for devices, one in zip(DEVICES, each, strict=True)
        ],
    }
    (options.out / "scale-sim.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def of(row: dict[str, Any], setting: Setting, fabric: Fabric) -> bool:
    """Whether a row is about these."""
    return bool(row["setting"] == setting.name and row["fabric"] == fabric.name)


def travelling() -> str:
    """What an optimizer step sends, in GB: the factors' gradients, the whole model's for comparison, and the base."""
    lines = ["| | gradients of the factors | gradients of all weights | base, once | checkpoint |", "|---|---|---|---|---|"]
    for setting in SETTINGS[:4]:
        model = setting.model
        sizes = (FACTOR * model.trained, 2.0 * (model.in_blocks + model.outside), base_bytes(setting), checkpoint_bytes(setting))
        gathered = [f"{size / 1e9:.2f}" for size in sizes]
        lines.append(
            f"| {setting.name} | " + " | ".join(gathered if setting.sharded else [*gathered[:2], "", gathered[3]]) + " |"
        )
    return "\n".join(lines) + "\n"


def step_table(steps: list[dict[str, Any]]) -> str:
    """Seconds of an optimizer step by setting, fabric and number of devices."""
    lines = ["| | links | " + " | ".join(str(one) for one in PRINTED) + " |", "|---|---|" + "---|" * len(PRINTED)]
    for setting in SETTINGS:
        for fabric in FABRICS:
            totals = [f"{one['total']:.2f}" for one in steps if of(one, setting, fabric) and one["devices"] in PRINTED]
            lines.append(f"| {setting.name} | {fabric.name} | " + " | ".join(totals) + " |")
    return "\n".join(lines) + "\n"


def run_table(runs: dict[str, list[Run]]) -> str:
    """Minutes of a whole run by part."""
    parts = ("start", "input", "steps", "checkpoints", "evaluation", "total")
    lines = ["| | devices | " + " | ".join(parts) + " |", "|---|---|" + "---|" * len(parts)]
    for setting in SETTINGS[:4]:
        for devices, one in zip(DEVICES, runs[setting.name], strict=True):
            if devices in (8, 64):
                minutes = " | ".join(f"{getattr(one, part) / 60:.1f}" for part in parts)
                lines.append(f"| {setting.name} | {devices} | {minutes} |")
    return "\n".join(lines) + "\n"
