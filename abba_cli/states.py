"""The pickled states of a checkpoint (optimizer, random numbers): read as numbers alone, refused where they hold more."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abba_cli.errors import RunError


@contextmanager
def state_errors(checkpoints: Path) -> Iterator[None]:
    """Turn what PyTorch raises for a pickle that it does not read (`weights_only`) into one clear error.

    Args:
        checkpoints: The folder of the run's checkpoints, for the message.

    Raises:
        RunError: In place of it.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise RunError(
            f"the newest checkpoint in {checkpoints} holds a state that is more than numbers (optimizer.pt, scheduler.pt or a "
            "rng_state); what else it holds could run code, so it was not read. Somebody has changed it: bring a good copy back, "
            "or remove that checkpoint to go on from the one before it"
        ) from error
