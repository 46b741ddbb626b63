"""`abba merge`: adapters and their base -> a plain Hugging Face checkpoint, streamed tensor by tensor."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from abba_cli.bases import Base
from abba_cli.checkpoint import copy_small_files, write_header
from abba_cli.disk import write_atomically
from abba_cli.events import Listener, Stage, Wrote, ignore
from abba_cli.memory import peak_process_memory
from abba_cli.merge.plan import BasePrecision, MergePlan, plan_merge
from abba_cli.merge.verifying import Verification, verify_merge
from abba_cli.outputs import check_output, new_directory, place, write_card
from abba_cli.saved_adapter import find_adapter


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        path: The checkpoint.
        adapters: Their folders and weights.
        base: Where the base was read from.
        quantization: What the base was rounded to and back; None for the original.
        template: The prompt template of the first adapter's training, where it is known.
        layers: Adapted layers.
        tensors: Tensors written; `copied` of them byte for byte.
        size: Bytes written.
        seconds: Time, without the verification.
        peak_memory_bytes: Peak of the process when the last tensor was written.
        verification: What the comparison with base + adapter found; None if there was none.
        unverified: Why there was none.
    """

    path: Path
    adapters: Sequence[tuple[str, float]]
    base: str
    quantization: str | None
    template: str | None
    layers: int
    tensors: int
    copied: int
    size: int
    seconds: float
    peak_memory_bytes: int
    verification: Verification | None = None
    unverified: str = ""


def merge(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    revision: str | None = None,
    output: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    base_precision: BasePrecision = "original",
    shard_bytes: int | None = None,
    verify: bool | None = None,
    overwrite: bool = False,
    force: bool = False,
    listen: Listener = ignore,
) -> Merged:
    """Merge adapters into their base and write a plain checkpoint: W0 + sum of weight * s (B1 A1) * (B2 A2).

    Args:
        adapters: Run or adapter directories, folders of runs (the newest finished run), or hub ids.
        weights: One for each adapter; None is 1 for each.
        base: A base in place of the recorded one; it needs `force`.
        revision: Of the base.
        output: The new directory; None is `<adapter>-merged`.
        dtype: Of all tensors; None keeps each tensor's own.
        base_precision: The base as stored, or quantised and back as training saw it.
        shard_bytes: Largest file; None keeps the base's own files.
        verify: Compare with base + adapter afterwards; None does so when both fit into memory.
        overwrite: Replace an earlier merge.
        force: Take a base that is not the recorded one.
        listen: Called with events.

    Raises:
        ModelError: Something does not fit, or the verification failed.
        RunError: The output cannot be written.
    """
    listen(Stage("Reading adapter and base"))
    folders = [find_adapter(str(adapter)) for adapter in adapters]
    output = place(output or default_output(adapters, folders))
    check_output(output, overwrite, command="merge", sources=folders)
    plan = plan_merge(folders, weights, base, revision, dtype, base_precision, shard_bytes, force)
    check_output(output, overwrite, plan.size + 50_000_000)
    sources = [*folders, plan.checkpoint.folder]
    with new_directory(output, overwrite, describe(plan), sources) as partial:
        report = write_merged(plan, partial, listen)
        _write_card(plan, partial, output.name)
        if verify is not False:
            verification, reason = verify_merge(
                plan.adapters,
                Base(str(plan.checkpoint.folder)),
                partial,
                plan.dtypes,
                plan.parameters,
                plan.quantised,
                verify,
                listen,
            )
        else:
            verification, reason = None, "switched off"
    return replace(report, path=output, verification=verification, unverified=reason)


def default_output(adapters: Sequence[str | Path], folders: Sequence[Path]) -> Path:
    """`<adapter>-merged`: beside a local adapter, here for one from the hub."""
    if not Path(adapters[0]).expanduser().is_dir():
        return Path(str(adapters[0]).rpartition("/")[2] + "-merged")
    folder = folders[0].absolute()
    return Path(os.path.relpath(folder.parent / f"{folder.name}-merged"))


def _counts(plan: MergePlan) -> tuple[int, int, int]:
    tensors = [tensor for shard in plan.shards.values() for tensor in shard]
    return plan.layers, len(tensors), sum(tensor.copied for tensor in tensors)


def write_merged(plan: MergePlan, folder: Path, listen: Listener = ignore) -> Merged:
    """Write the merged weights and what belongs to them into a folder.

    Raises:
        ModelError: A merged value is not finite in its type, or a file of the base is broken.
    """
    start, done, size = time.monotonic(), 0, 0
    device = PartialState().device
    layers, total, copied = _counts(plan)
    weight_map = {}
    for name, shard in plan.shards.items():
        metadata = plan.checkpoint.metadata.get(name) or {"format": "pt"}
        with (folder / name).open("wb") as stream:
            write_header(stream, [tensor.planned for tensor in shard], metadata)
            for tensor in shard:
                tensor.write(stream, device)
                weight_map[tensor.name] = name
                done, size = done + 1, size + tensor.planned.size
                listen(Wrote(done, total, size, plan.size))
            stream.flush()
            os.fsync(stream.fileno())
    if len(plan.shards) > 1 or SAFE_WEIGHTS_NAME not in plan.shards:
        index = {"metadata": {**(plan.checkpoint.index or {}), "total_size": size}, "weight_map": weight_map}
        write_atomically(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")
    copy_small_files(plan.checkpoint.folder, folder)
    _adjust_config(plan, folder / "config.json")
    return Merged(
        path=folder,
        adapters=[(str(adapter.path), weight) for adapter, weight in plan.adapters],
        base=plan.base.location,
        quantization=None if plan.quantised is None else plan.quantised.quantization,
        template=plan.adapters[0][0].template,
        layers=layers,
        tensors=total,
        copied=copied,
        size=size,
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_process_memory(),
    )


def _adjust_config(plan: MergePlan, file: Path) -> None:
    """Change what the merge has changed in config.json; everything else stays as the base has it."""
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    before = json.dumps(config)
    for part in (config, config.get("text_config", {})):
        if plan.dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = str(plan.dtype).removeprefix("torch.")
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if plan.dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    if json.dumps(config) != before:
        write_atomically(file, json.dumps(config, indent=2) + "\n")


def describe(plan: MergePlan) -> dict[str, Any]:
    """What made the checkpoint, for abba.json."""
    return {
        "command": "merge",
        "base": plan.base.location,
        "revision": plan.base.revision,
        "base_precision": "original" if plan.quantised is None else "dequantized",
        "template": plan.adapters[0][0].template,
        "adapters": [{"path": str(adapter.path), "weight": weight} for adapter, weight in plan.adapters],
    }


_KINDS = {
    "ABBA": "ABBA, [arXiv 2505.14238](https://arxiv.org/abs/2505.14238)",
    "LORA": "LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)",
    "HIRA": "HiRA, [ICLR 2025](https://openreview.net/forum?id=TwJrTz9cRS)",
    "LOHA": "LoHa, [arXiv 2108.06098](https://arxiv.org/abs/2108.06098)",
    "FULL": "full fine-tuning",
    "CHAIN": "a chain of Hadamard products",
}


def _write_card(plan: MergePlan, folder: Path, name: str) -> None:
    base = plan.base.location
    kinds = " and ".join(dict.fromkeys(_KINDS[adapter.method] for adapter, _ in plan.adapters))
    merged = " + ".join(f"{weight:g} * `{adapter.path.name}`" for adapter, weight in plan.adapters)
    text = (
        f"`{Path(base).name if Path(base).is_absolute() else base}` with {merged} merged into its weights ({kinds}). A "
        "plain checkpoint: `AutoModelForCausalLM.from_pretrained` needs nothing else."
    )
    write_card(folder, name, base, "transformers", ["abba", "merge"], text)
