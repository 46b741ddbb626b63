"""The loop around the step: the order of the rows, which a resumed run goes on with, and the tokens it counts."""

from pathlib import Path

import pytest
from test_training import Killed, RecipeFile, factors, kill_after, same

from abba_cli import train
from abba_cli.events import Audited, Event


@pytest.mark.parametrize("killed_after", [5, 7])
def test_grouped_by_length_a_resumed_run_goes_on_in_the_same_order(
    recipe_file: RecipeFile, tmp_path: Path, killed_after: int
) -> None:
    # Six steps an epoch: the first run is killed in the first epoch, the second one in the second.
    overrides = ["training.group_by_length=true", "training.max_steps=11", "checkpoints.every_steps=2"]
    whole = train(recipe_file(output=str(tmp_path / "whole")), overrides)
    drawn = train(recipe_file(output=str(tmp_path / "drawn")), [*overrides[1:]])
    with pytest.raises(Killed):
        train(recipe_file(), overrides, listen=kill_after(killed_after))
    resumed = train(recipe_file(), overrides)
    assert same(factors(whole.path), factors(resumed.path))
    losses = [[row["loss"] for row in run.metrics()] for run in (whole, resumed, drawn)]
    assert losses[0] == losses[1] != losses[2]
    tokens = [[row["tokens"] for row in run.metrics()] for run in (whole, resumed)]
    assert tokens[0] == tokens[1]


def test_tokens_are_counted_without_padding(recipe_file: RecipeFile) -> None:
    events: list[Event] = []
    run = train(recipe_file(), ["training.max_steps=6"], listen=events.append)  # 24 rows, 4 a step: an epoch
    tokens = [row["tokens"] for row in run.metrics()]
    assert [tokens[-1]] == [event.data.audit["train"].tokens for event in events if isinstance(event, Audited)]
    assert tokens == sorted(set(tokens))
