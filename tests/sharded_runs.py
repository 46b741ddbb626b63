"""Runs of one recipe, one after the other, in every process of a launch; says of each how its base was shared out.

torchrun --nproc-per-node 2 sharded_runs.py RECIPE OUT [KEY=VALUE,KEY=VALUE ...]

Each further argument is one run; its output is OUT/NUMBER, and rank 0 writes what it found to OUT/NUMBER.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.distributed.tensor import DTensor

from abba_cli import training
from abba_cli.preparation import Preparation
from abba_cli.processes import join_crew


def placement(model: PeftModel) -> dict[str, Any]:
    """What is shared out, and how many bytes this process holds of it."""
    frozen = [one for one in model.parameters() if not one.requires_grad]
    shares = [sizes for sizes in map(bytes_of_share, frozen) if sizes is not None]
    return {
        "frozen": len(frozen),
        "shares": len(shares),
        "trained_whole": all(bytes_of_share(one) is None for one in model.parameters() if one.requires_grad),
        "bytes": sum(whole for whole, _ in shares),
        "bytes_here": sum(here for _, here in shares),
    }


def bytes_of_share(parameter: Any) -> tuple[int, int] | None:
    """Bytes of a whole parameter and of the share of it that is here, with what is gathered; None where it is not shared out."""
    if isinstance(parameter, DTensor):
        return parameter.nbytes, parameter.to_local().nbytes
    if hasattr(parameter, "ds_tensor"):
        share = parameter.ds_tensor
        return parameter.ds_numel * share.itemsize, share.nbytes + parameter.nbytes
    return None


def main(recipe: str, out: str, *runs: str) -> None:
    fit = training.fit
    for number, overrides in enumerate(runs):
        found: dict[str, Any] = {}

        def watched(model: PeftModel, ready: Preparation, *others: Any, found: dict[str, Any] = found) -> Any:
            found.update(placement(model), foretold=ready.plan.memory.uses.get("share of the base"))
            return fit(model, ready, *others)

        training.fit = watched
        training.train(recipe, [*overrides.split(";"), f"output={out}/{number}"])
        if join_crew().is_main:
            Path(out, f"{number}.json").write_text(json.dumps(found))
    join_crew().leave()


main(*sys.argv[1:])
