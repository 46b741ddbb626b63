"""`abba export`: a trained adapter in the formats that others serve, each written whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedConfig

from abba_cli.bases import Base
from abba_cli.disk import write_atomically
from abba_cli.errors import ModelError
from abba_cli.events import Listener, Stage, ignore
from abba_cli.export.converter import Converter, Outtype, check_converter, find_converter
from abba_cli.export.gguf import adds_bos, convert
from abba_cli.export.gguf_lora import check_gguf_lora, write_gguf_lora
from abba_cli.export.loha import write_loha
from abba_cli.export.lora import LoraReport, exact_rank, write_lora
from abba_cli.export.modelfile import ModelfileReport, write_modelfile
from abba_cli.export.own import write_abba
from abba_cli.loading import load_config, load_tokenizer
from abba_cli.merge.plan import plan_merge
from abba_cli.merging import default_output, write_merged
from abba_cli.outputs import check_output, new_directory, place, write_card
from abba_cli.recipe import ModelSection
from abba_cli.recorded_base import LayerKind, fit, resolve_base
from abba_cli.saved_adapter import SavedAdapter, find_adapter, open_adapter
from abba_cli.speakers import run_template

Format = Literal["lora", "loha", "gguf-lora", "gguf", "abba"]
Dtype = Literal["float32", "bfloat16", "float16"]
_OUTTYPES: dict[str, Outtype] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "q8_0": 1.07}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: The directory.
        adapter: The folder of the adapter.
        format: As asked for.
        files: Name and size in bytes of what is in it.
        dtype: Of the numbers.
        rank: Of a LoRA.
        lora: More of a PEFT LoRA.
        converter: What wrote a GGUF model.
        modelfile: The Modelfile beside it.
        template: The prompt template of the training, for a GGUF model, where it is known.
    """

    path: Path
    adapter: str
    format: Format
    files: Mapping[str, int]
    dtype: str | None
    rank: int | None = None
    lora: LoraReport | None = None
    converter: str | None = None
    modelfile: ModelfileReport | None = None
    template: str | None = None


def export(
    adapter: str | Path,
    format: Format,
    *,
    output: Path | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    llama_cpp: Path | None = None,
    overwrite: bool = False,
    force: bool = False,
    listen: Listener = ignore,
) -> Exported:
    """Write a trained adapter in another format.

    Args:
        adapter: A run or adapter directory, a folder of runs (the newest finished run), or a hub id.
        format: lora and loha (PEFT's), gguf-lora and gguf (llama.cpp's), or abba (our own again).
        output: The new directory; None is `<adapter>-<format>`.
        dtype: float32, bfloat16, float16, and for gguf q8_0. None is float32, for gguf float16, for abba what is stored.
        rank: For lora and gguf-lora, the best approximation of this rank instead of the exact rank r1 r2.
        base: A base in place of the recorded one; it needs `force`.
        revision: Of the base.
        llama_cpp: A checkout of llama.cpp whose converter is to be used for gguf.
        overwrite: Replace an earlier export.
        force: Take a base that is not the recorded one.
        listen: Called with events.

    Raises:
        ModelError: Something does not fit, or the format cannot hold the adapter.
        RunError: The output cannot be written.
    """
    _check_options(format, dtype, rank, llama_cpp)
    listen(Stage("Reading adapter and base"))
    folder = find_adapter(str(adapter))
    output = place(output or _default_output(adapter, folder, format))
    check_output(output, overwrite, command="export", sources=[folder])
    saved = open_adapter(folder)
    if (saved.update != "added" or saved.method == "FULL") and format not in ("gguf", "abba"):
        what = "of full rank" if saved.method == "FULL" else f"{saved.update}, not added"
        raise ModelError(
            f"{folder} holds a {saved.method} adapter whose update is {what}, which {format} cannot hold; "
            "export the merged model with --format gguf, or merge it"
        )
    if rank is not None and rank > exact_rank(saved):
        raise ModelError(f"--rank {rank} is above {exact_rank(saved)}, at which the LoRA is exact; leave --rank out")
    if format == "gguf":
        return _export_gguf(saved, output, dtype or "float16", base, revision, llama_cpp, overwrite, force, listen)
    config, kinds = (None, {}) if format == "abba" else _on_base(saved, base, revision, force)
    number: Dtype = "float32" if dtype is None else dtype  # type: ignore[assignment]
    check_output(output, overwrite, _estimate(saved, format, rank, number))
    if format == "gguf-lora":
        assert config is not None
        check_gguf_lora(saved, config, kinds)

    def progress(done: int, total: int) -> None:
        listen(Stage("Converting layers", done, total))

    written = None
    record = {"command": "export", "format": format, "adapter": str(folder)}
    with new_directory(output, overwrite, record, [folder]) as partial:
        if format == "abba":
            write_abba(saved, partial, dtype)  # type: ignore[arg-type]
        elif format == "loha":
            write_loha(saved, partial, kinds, number)
        elif format == "lora":
            written = write_lora(saved, partial, kinds, rank, number, progress)
            if written.error:
                errors = {"overall": written.error, "layers": dict(written.errors)}
                write_atomically(partial / "approximation_errors.json", json.dumps(errors, indent=1) + "\n")
        else:
            assert config is not None
            write_gguf_lora(saved, partial / f"{output.name}.gguf", config, kinds, rank, number, progress)
        _write_card(partial, output.name, saved, format)
    return Exported(
        output,
        str(folder),
        format,
        _sizes(output),
        dtype if format == "abba" else number,
        (rank or exact_rank(saved)) if "lora" in format else None,
        written,
    )


def _check_options(format: Format, dtype: str | None, rank: int | None, llama_cpp: Path | None) -> None:
    if rank is not None and "lora" not in format:
        raise ModelError(f"--rank goes with lora and gguf-lora, not with {format}")
    if rank is not None and rank < 1:
        raise ModelError(f"--rank is {rank}; expected 1 or more")
    if llama_cpp is not None and format != "gguf":
        raise ModelError(f"--llama-cpp goes with gguf, not with {format}")
    if dtype == "q8_0" and format != "gguf":
        raise ModelError(f"--dtype q8_0 goes with gguf, not with {format}; expected {', '.join(get_args(Dtype))}")


def _default_output(adapter: str | Path, folder: Path, format: Format) -> Path:
    merged = default_output([adapter], [folder])
    return merged.with_name(f"{merged.name.removesuffix('-merged')}-{format}")


def _on_base(
    saved: SavedAdapter, base: str | None, revision: str | None, force: bool
) -> tuple[PreTrainedConfig, Mapping[str, LayerKind]]:
    found = resolve_base([saved], base, revision, force)
    config = load_config(found, ModelSection(name=found.location))
    return config, fit(saved, config)


def _estimate(saved: SavedAdapter, format: Format, rank: int | None, dtype: str) -> int:
    """Bytes of the adapter that will be written, with a little room."""
    if "lora" in format:
        numbers = sum((rank or exact_rank(saved)) * (layer.m + layer.n) for layer in saved.layers.values())
    else:
        numbers = sum(2 * max(layer.r1, layer.r2) * (layer.m + layer.n) for layer in saved.layers.values())
    return int(numbers * _BYTES[dtype]) + 20_000_000


def _export_gguf(
    saved: SavedAdapter,
    output: Path,
    dtype: str,
    base: str | None,
    revision: str | None,
    llama_cpp: Path | None,
    overwrite: bool,
    force: bool,
    listen: Listener,
) -> Exported:
    """Merge into a temporary checkpoint, and have llama.cpp's converter turn that into one file."""
    converter = find_converter(llama_cpp)
    # In bfloat16 the merge's one rounding is that of the file; every other type is rounded by the converter, from float32.
    plan = plan_merge([saved.path], None, base, revision, "bfloat16" if dtype == "bfloat16" else "float32", force=force)
    parameters = plan.parameters
    check_output(output, overwrite, plan.size + int(parameters * _BYTES[dtype]) + 50_000_000)
    listen(Stage(f"Trying the converter ({converter.version or converter.place})"))
    architecture = next(iter(plan.config.architectures or []), type(plan.config).__name__)
    check_converter(converter, plan.checkpoint.folder, architecture, _OUTTYPES[dtype])
    section = ModelSection(name=plan.base.location)
    tokenizer = load_tokenizer(Base(str(plan.checkpoint.folder)), section)
    template = run_template(saved, tokenizer)
    record = {"command": "export", "format": "gguf", "adapter": str(saved.path), "base": plan.base.location}
    with new_directory(output, overwrite, record, [saved.path, plan.checkpoint.folder]) as partial:
        merged = partial / ".merged"
        merged.mkdir()
        write_merged(plan, merged, listen)
        file = partial / f"{output.name}.gguf"
        listen(Stage("Converting to GGUF"))
        _convert(merged, file, _OUTTYPES[dtype], converter, output.name, listen)
        shutil.rmtree(merged)
        modelfile = write_modelfile(partial, file.name, template, adds_bos(file))
        _write_card(partial, output.name, saved, "gguf")
    found = _sizes(output)
    return Exported(
        output, str(saved.path), "gguf", found, dtype, converter=str(converter), modelfile=modelfile, template=saved.template
    )


def _convert(merged: Path, file: Path, outtype: Outtype, converter: Converter, name: str, listen: Listener) -> None:
    convert(merged, file, outtype, converter, lambda done, total: listen(Stage("Converting to GGUF", done, total)), name)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file() and file.name != "abba.json"}


def _write_card(folder: Path, name: str, saved: SavedAdapter, format: Format) -> None:
    base = saved.config.base_model_name_or_path
    known = Path(base).name if base and Path(base).is_absolute() else base or "its base"
    text = f"`{saved.path.name}`, a trained {saved.method} adapter for `{known}`, exported as {format} by `abba export`."
    write_card(folder, name, base, "gguf" if format.startswith("gguf") else "peft", ["abba", format], text)
