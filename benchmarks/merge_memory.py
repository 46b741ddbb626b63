"""Peak memory of `abba merge` on a model of 4.4 GB of random weights in files of 500 MB.

    python benchmarks/merge_memory.py [--folder DIR] [--layers N]

Makes the model and an adapter for all its linear layers, merges in a process of its own, and compares the peak of that process
with the peak of one that only imports the same modules. Appends a row to benchmarks/results/merge-memory.jsonl.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from abba_cli.adapter import AbbaConfig
from abba_cli.checkpoint import arrange, planned

RESULTS = Path(__file__).parent / "results" / "merge-memory.jsonl"
# The shapes of Llama-3.2-3B with a smaller vocabulary: 151 MB a layer in bfloat16.
CONFIG: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def make_model(folder: Path, layers: int, shard_bytes: int = 500_000_000) -> int:
    """Write a random Llama in bfloat16, a file at a time, and return its size in bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], **CONFIG)
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    shards = arrange([planned(name, torch.bfloat16, shape) for name, shape in shapes.items()], shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {one.name: torch.randn(one.shape, dtype=torch.bfloat16).mul_(0.02) for one in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    size = sum(one.size for shard in shards for one in shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def make_adapter(folder: Path, base: Path, layers: int) -> None:
    """Write an ABBA adapter with random factors for every linear layer of that model."""
    folder.mkdir(parents=True)
    AbbaConfig(
        r1=RANK, r2=RANK, target_modules=TARGETS, base_model_name_or_path=str(base), task_type="CAUSAL_LM", inference_mode=True
    ).save_pretrained(str(folder))
    save_file(dict(factors(layers)), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def factors(layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Random factors by their names in an adapter's file."""
    config = LlamaConfig(num_hidden_layers=1, **CONFIG)
    with init_empty_weights():
        block = LlamaForCausalLM(config).model.layers[0]
    for index in range(layers):
        for name, module in block.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                m, n = module.weight.shape
                for factor, shape in (("B1", (m, RANK)), ("A1", (RANK, n)), ("B2", (m, RANK)), ("A2", (RANK, n))):
                    yield f"base_model.model.model.layers.{index}.{name}.abba_{factor}", torch.randn(shape) * 0.05


def peak_of(program: str, *arguments: str) -> tuple[int, float]:
    """Peak resident memory in bytes and seconds of a process of this interpreter."""
    start = time.perf_counter()
    report = "from abba_cli.memory import peak_process_memory; print('PEAK', peak_process_memory())"
    code = f"import sys; arguments = sys.argv[1:]\n{program}\n{report}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{program} failed:\n{done.stdout}{done.stderr}")
    return int(done.stdout.rpartition("PEAK ")[2]), time.perf_counter() - start


def main() -> None:
    """Make the model, merge, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/bench-merge"), help="needs 10 GB; removed at the end")
    parser.add_argument("--layers", type=int, default=20)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    base, adapter, output = options.folder / "base", options.folder / "adapter", options.folder / "merged"
    try:
        size = make_model(base, options.layers)
        make_adapter(adapter, base, options.layers)
        idle, _ = peak_of("import abba_cli.merging, abba_cli.ui.steps, bitsandbytes")
        call = (
            "from abba_cli.merging import merge; from pathlib import Path; "
            "merge([arguments[0]], output=Path(arguments[1]), verify=False)"
        )
        peak, seconds = peak_of(call, str(adapter), str(output))
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    row = {
        "model_bytes": size,
        "shard_bytes": 500_000_000,
        "layers": options.layers,
        "idle_bytes": idle,
        "peak_bytes": peak,
        "above_idle_bytes": peak - idle,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
