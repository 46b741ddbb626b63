"""What a finished run records about itself: provenance.json, the model card and the loss curve."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig

from abba_cli import __version__
from abba_cli.bases import Base
from abba_cli.disk import write_atomically
from abba_cli.methods import in_words
from abba_cli.plan import Plan
from abba_cli.prepared import PreparedData
from abba_cli.recipe import Recipe
from abba_cli.recipe_file import dump_recipe
from abba_cli.records import Outcome
from abba_cli.rundir import RunDir

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "safetensors",
    "numpy",
)


def write_provenance(
    run: RunDir,
    recipe: Recipe,
    base: Base,
    config: PreTrainedConfig,
    data: PreparedData,
    plan: Plan,
    outcome: Outcome | None,
) -> None:
    """Write provenance.json: without an outcome when a run starts, and again, last of all its files, when it has finished."""
    sources = [source for audit in data.audit.values() for source in audit.sources]
    files = {file: digest for source in sources for file, digest in source.sha256.items()}
    record: dict[str, Any] = {
        "abba": __version__,
        "base": {
            "name": recipe.model.name,
            "gguf_file": recipe.model.gguf_file,
            "loaded_from": base.location,
            "revision": base.revision,
            "commit": getattr(config, "_commit_hash", None),
            "quantization": recipe.model.quantization,
            "dtype": recipe.model.dtype,
        },
        "data": {"fingerprint": data.fingerprint, "files": files},
        "seed": recipe.training.seed,
        "processes": plan.processes,
        "strategy": plan.strategy,
        "sharded": plan.sharded,
        "rows_per_step": plan.rows_per_step,
        "parameters": {"trainable": plan.trainable, "total": plan.total, "layers": len(plan.layers)},
        "outcome": vars(outcome) if outcome else None,
        "versions": {"python": platform.python_version(), **package_versions()},
        "hardware": hardware(),
    }
    write_atomically(run.provenance_file, json.dumps(record, indent=2) + "\n")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes; those not installed are left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine, in so far as it decides what a run computes and how fast."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpu_threads": torch.get_num_threads(), "gpus": gpus}


_IMPORT = "import {}  # pip install abba-cli; teaches PEFT the method\n"
_KINDS = {
    "abba": "An ABBA adapter ([arXiv 2505.14238](https://arxiv.org/abs/2505.14238))",
    "lora": "A LoRA adapter ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685))",
    "rslora": "An rsLoRA adapter ([arXiv 2312.03732](https://arxiv.org/abs/2312.03732))",
    "dora": "A DoRA adapter ([arXiv 2402.09353](https://arxiv.org/abs/2402.09353))",
    "pissa": "A PiSSA adapter ([arXiv 2404.02948](https://arxiv.org/abs/2404.02948)), saved as a LoRA of twice its rank,",
    "hira": "A HiRA adapter ([ICLR 2025](https://openreview.net/forum?id=TwJrTz9cRS))",
    "loha": "A LoHa adapter ([arXiv 2108.06098](https://arxiv.org/abs/2108.06098))",
    "full": "The weights of fully fine-tuned layers, as differences",
}


def write_card(run: RunDir, recipe: Recipe, base: Base, plan: Plan, outcome: Outcome) -> None:
    """Write README.md, the model card that the hub shows."""
    adapter = recipe.adapter
    local = Path(base.location).is_absolute()
    hub_sets = [source.path for source in recipe.data.train if not source.path.startswith(("/", "package:"))]
    card_data = ModelCardData(
        base_model=None if local else base.location,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[adapter.method, "peft"],
        datasets=hub_sets or None,
    )
    losses = [f"- training loss at the end: {outcome.train_loss:.4f}"] if outcome.train_loss is not None else []
    if outcome.eval_loss is not None:
        before = f" (before training: {outcome.eval_loss_before:.4f})" if outcome.eval_loss_before is not None else ""
        losses.append(f"- evaluation loss: {outcome.eval_loss:.4f}{before}")
    ours = "abba_cli.adapter" if adapter.is_abba else "abba_cli.dense_methods"
    imported = _IMPORT.format(ours) if adapter.is_abba or adapter.method == "full" or adapter.pairs > 2 else ""
    text = f"""---
{card_data.to_yaml()}
---

# {run.path.name}

{_KINDS[adapter.method]} for `{recipe.model.name}`: to every adapted
weight it adds
{in_words(adapter)}.

- trainable parameters: {plan.trainable:,} of {plan.total:,}, in {len(plan.layers)} layers
- steps: {outcome.steps:,}; the adapter is the one after step {outcome.used_step:,}
{chr(10).join(losses)}

![loss](loss.png)

## Use

```python
{imported}from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{run.path.name}")
```

## Recipe

```yaml
{dump_recipe(recipe).rstrip()}
```
"""
    write_atomically(run.path / "README.md", text)


def draw_losses(run: RunDir) -> None:
    """Draw loss.png from metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = run.metrics()
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        window = max(1, len(losses) // 20)
        smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
        axes.plot(
            steps, losses, color="#9bb7d4", linewidth=0.8, marker="." if len(steps) < 20 else "", label="training, each step"
        )
        if window > 1:
            axes.plot(steps, smooth, color="#1f5a99", linewidth=1.8, label=f"training, mean of {window}")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c8501e", marker="o", markersize=4, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", title=run.path.name)
    axes.grid(alpha=0.25)
    if train or held_out:
        axes.legend(frameon=False)
    figure.savefig(run.path / "loss.png", dpi=150)
