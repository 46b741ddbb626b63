"""What a model that knows nothing but the form and the frequencies of the answers would reach in sweeps/commonsense-small.yaml.

    python benchmarks/answer_floor.py DATA

DATA holds boolq, openbookqa, ARC-Easy and ARC-Challenge. Prints the evaluation loss per supervised token of a model that is
certain of every token but the choice itself, and gives each choice the share that it has among that set's training answers.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from abba_cli.bases import find_base
from abba_cli.loading import load_tokenizer
from abba_cli.recipe_file import load_recipe

SETS = ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")
HELD_OUT, TESTED = 50, 100  # rows, as in the sweep
RECIPE = Path(__file__).parents[1] / "recipes" / "commonsense-smollm2.yaml"


def main() -> None:
    """Print one line for each set, and the floor of all together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    folder = parser.parse_args().data
    model = load_recipe(RECIPE).model
    tokenizer = load_tokenizer(find_base(model), model)
    nats = tokens = 0.0
    for name in SETS:
        train, test = (json.loads((folder / name / f"{part}.json").read_text()) for part in ("train", "test"))
        answers = Counter(row["answer"] for row in train[HELD_OUT:])
        rows = test[:TESTED]
        surprise = sum(-math.log(answers[row["answer"]] / answers.total()) for row in rows)
        learned = sum(len(tokenizer(row["output"].strip(), add_special_tokens=False).input_ids) + 1 for row in rows)  # and EOS
        print(f"{name}: {surprise / len(rows):.4f} nats a choice, {learned / len(rows):.1f} supervised tokens a row")
        nats, tokens = nats + surprise, tokens + learned
    print(f"floor: {nats / tokens:.4f} per supervised token")


if __name__ == "__main__":
    main()
