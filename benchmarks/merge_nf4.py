"""Which base to merge a 4-bit run into: held-out loss of the run as trained, merged with the original and the dequantised base.

    python benchmarks/merge_nf4.py RUN

RUN is a finished run of `abba train` with model.quantization nf4 and evaluation data. Appends to results/merge-nf4.jsonl.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from abba_cli.bases import Base
from abba_cli.batches import PaddedBatches
from abba_cli.data import prepare
from abba_cli.loading import load_tokenizer
from abba_cli.loss import SupervisedBatches, row_losses
from abba_cli.merging import merge
from abba_cli.prepared import PreparedData
from abba_cli.rundir import RunDir

RESULTS = Path(__file__).parent / "results" / "merge-nf4.jsonl"


def loss_of(model: PreTrainedModel, data: PreparedData, pad_id: int, batch: int = 8) -> float:
    """Mean loss of the supervised tokens of the evaluation rows."""
    collate = SupervisedBatches(PaddedBatches(pad_id))
    assert data.eval is not None
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(data.eval), batch):
            rows = [data.eval[index] for index in range(start, min(start + batch, len(data.eval)))]
            losses, tokens = row_losses(model, collate(rows), None)
            total, count = total + float(losses.sum()), count + float(tokens.sum())
    return total / count


def main() -> None:
    """Merge both ways and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    run = RunDir(options.run)
    recipe, outcome = run.recipe(), run.provenance()["outcome"]
    tokenizer = load_tokenizer(Base(str(run.path)), recipe.model)
    data = prepare(recipe.data, tokenizer, recipe.training.seed)
    row = {"before": outcome["eval_loss_before"], "nf4 base + adapter": outcome["eval_loss"]}
    for precision in ("original", "dequantized"):
        output = run.path.with_name(f"{run.path.name}-merged-{precision}")
        merged = merge([run.path], base_precision=precision, output=output, overwrite=True)
        model = AutoModelForCausalLM.from_pretrained(merged.path)
        assert isinstance(tokenizer.pad_token_id, int)
        row[f"merged, {precision} base"] = round(loss_of(model, data, tokenizer.pad_token_id), 4)
        print(precision, merged.verification, row, flush=True)
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
