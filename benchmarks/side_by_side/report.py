"""The report of a run in Markdown: the machine, the targets, and every method of every row."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from .grids import EFFECTIVE, FACTORED, OURS, REFERENCE, Row

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio that the project has promised.

    Args:
        label: What is compared.
        what: "seconds", "kept_bytes" or "peak_bytes".
        other: The method in the denominator; None for ABBA itself at R = 16.
        limits: The largest ratio promised, by device and precision ("cpu bf16"); other rows are not judged.
    """

    label: str
    what: str
    other: str | None
    limits: dict[str, float]


TARGETS = (
    Target("step time, ABBA / LoRA as PEFT makes it", "seconds", "LoRA", {"cpu bf16": 0.9, "cpu fp32": 1.05, "cuda bf16": 1.0}),
    Target("step time, ABBA / authors' layer", "seconds", REFERENCE, {"cpu bf16": 0.9, "cpu fp32": 0.8, "cuda bf16": 0.85}),
    Target("step time, ABBA / LoHa", "seconds", "LoHa", {"cpu bf16": 0.5, "cpu fp32": 0.5, "cuda bf16": 0.6}),
    Target("step time, ABBA / floor", "seconds", "floor", {"cpu bf16": 1.25, "cpu fp32": 1.25, "cuda bf16": 1.25}),
    Target("kept for backward, ABBA / LoRA", "kept_bytes", "LoRA", {"cpu bf16": 1.0, "cpu fp32": 1.0, "cuda bf16": 1.0}),
    Target("peak memory, ABBA at R = 1024 / R = 16", "peak_bytes", None, {"cpu bf16": 1.05, "cuda bf16": 1.05}),
    Target("step time, ABBA / QLoRA", "seconds", "LoRA", {"cpu nf4": 1.0, "cuda nf4": 1.0}),
)


def report(records: list[Record], notes: list[str], command: str) -> str:
    """Returns the whole table as Markdown.

    Args:
        records: What `measure` returned, row by row.
        notes: Rows that were skipped or failed, a sentence each.
        command: The command line that made them.
    """
    parts = [
        _head(records, command),
        _targets(records),
        _ways(records),
        _methods(records),
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ratio(record: Record, what: str, method: str, other: str) -> float | None:
    """Returns method / other: the median of the rounds' ratios for seconds. None where one of them was not measured."""
    methods = record["methods"]
    if method not in methods or other not in methods:
        return None
    above, below = methods[method][what], methods[other][what]
    if what == "seconds":
        return float(median(one / two for one, two in zip(above, below, strict=True)))
    return float(above / below) if above and below else None


def ways_within(records: list[Record], tolerance: float = 1.1) -> tuple[list[str], int]:
    """Returns the rows whose automatic choice took longer than `tolerance` x the better way, and how many rows were compared."""
    missed, compared = [], 0
    for record in records:
        ratios = [ratio(record, "seconds", OURS, way) for way in (FACTORED, EFFECTIVE)]
        if None not in ratios:
            compared += 1
            worst = max(one for one in ratios if one is not None)
            if worst > tolerance:
                missed.append(f"{title(record)}: {worst:.2f}")
    return missed, compared


def title(record: Record) -> str:
    """The row of a record in words."""
    row = Row(**record["row"])
    cut = f", {record['layers']} of {row.layers} layers" if record["layers"] != row.layers else ""
    return row.title + cut


def _head(records: list[Record], command: str) -> str:
    settings = records[0]["settings"]
    step = "forward, loss, backward" + (" and fused AdamW" if settings["optimizer"] else "")
    # More than one where a run went on with other versions, or with another number of threads.
    machines = "\n".join(dict.fromkeys(_machine(record["environment"]) for record in records))
    return (
        f"# Step time and memory, side by side\n\n`{command}`\n\n{machines}\n\n"
        f"A step is {step}. Medians of {settings['rounds']} rounds, in which all methods of a row take turns; a ratio of times "
        "is the median of the rounds' ratios. The adapters of a row have equally many parameters, but for DoRA's magnitudes."
    )


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)} on {environment['cores']} cores"
    return f"{environment['device']}, {threads}; {versions}."


def _targets(records: list[Record]) -> str:
    whole = [record for record in records if record["row"]["whole"] and record["row"]["shape"] != "tiny"]
    columns = [record for record in whole if len(record["row"]["methods"]) > 1]
    if not columns:
        return ""
    lines = ["| ratio | " + " | ".join(title(record) for record in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for target in TARGETS:
        cells = [_cell(target, record, whole) for record in columns]
        lines.append(f"| {target.label} | " + " | ".join(cells) + " |")
    return "## Targets\n\n" + "\n".join(lines)


def _cell(target: Target, record: Record, whole: list[Record]) -> str:
    row = record["row"]
    limit = target.limits.get(f"{record['settings']['device']} {row['precision']}")
    if limit is None:
        return ""
    measured = ratio(record, target.what, OURS, target.other) if target.other else _growth(row, whole)
    if measured is None:
        # The growth with the rank is measured at one size.
        return "not measured" if target.other else ""
    return f"**{measured:.3f}**, target <= {limit:g}: {'met' if measured <= limit else 'not met'}"


def _growth(row: dict[str, Any], whole: list[Record]) -> float | None:
    """Peak of ABBA at R = 1024 over that at R = 16, at a row's size."""
    size = ("shape", "batch", "length", "precision", "checkpointing")
    same = [record for record in whole if all(record["row"][key] == row[key] for key in size) and OURS in record["methods"]]
    peaks = {record["row"]["rank"] ** 2: record["methods"][OURS]["peak_bytes"] for record in same}
    return peaks[1024] / peaks[16] if peaks.get(1024) and peaks.get(16) else None


def _ways(records: list[Record]) -> str:
    missed, compared = ways_within(records)
    if not compared:
        return ""
    lines = [
        f"The automatic choice was within 10% of the better way in {compared - len(missed)} of {compared} rows.",
        *(f"- {line}" for line in missed),
    ]
    return "## Choice of the way of computing\n\n" + "\n".join(lines)


def _methods(records: list[Record]) -> str:
    head = "| method | trained | step (s) | / LoRA | / floor | tokens/s | kept (MB) | peak (MB) | spread |\n" + "|---" * 9 + "|"
    parts = [f"### {title(record)}\n\n{head}\n" + "\n".join(_lines(record)) for record in records]
    legend = (
        "Kept: what autograd keeps between forward and backward. Peak: of a step, above parameters, gradients and optimizer "
        "state. Spread: slowest less fastest step, as a part of the median."
    )
    return f"## Every method\n\n{legend}\n\n" + "\n\n".join(parts)


def _lines(record: Record) -> Iterable[str]:
    row = Row(**record["row"])
    for name, found in record["methods"].items():
        seconds = median(found["seconds"])
        ratios = [_number(ratio(record, "seconds", name, other), "{:.2f}") for other in ("LoRA", "floor")]
        sizes = [_number(found[what] and found[what] / 1e6, "{:,.1f}") for what in ("kept_bytes", "peak_bytes")]
        spread = (max(found["seconds"]) - min(found["seconds"])) / seconds
        cells = [
            name,
            f"{found['trained']:,}",
            f"{seconds:.3f}",
            *ratios,
            f"{row.tokens / seconds:,.0f}",
            *sizes,
            f"{spread:.0%}",
        ]
        yield "| " + " | ".join(cells) + " |"
    for name, reason in record["left_out"].items():
        yield f"| {name} | {reason} |" + " |" * 7


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
