"""What a run says when its memory does not suffice: the forecast, what is kept, and which setting takes less."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from abba_cli.errors import RunError
from abba_cli.forecast.prediction import Forecast
from abba_cli.recipe import Recipe
from abba_cli.rundir import RunDir

# Of torch's CPU allocator, of CUDA, and of cuBLAS, which wants a workspace of its own.
_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


@contextmanager
def memory_errors(run: RunDir, recipe: Recipe, memory: Forecast) -> Iterator[None]:
    """Turn what torch raises when memory runs out into one clear error.

    Args:
        run: The run directory, whose checkpoints are left as they are.
        recipe: The recipe.
        memory: What the run was forecast to take.

    Raises:
        RunError: In place of it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(word in str(error) for word in _WORDS):
            raise
        about = "more than" if memory.gap else "about"
        raise RunError(
            f"out of memory: {about} {memory.total / 1e9:.2f} GB were forecast, and this device has {_capacity() / 1e9:.2f} GB, "
            f"shared with whatever else runs on it. {_advice(recipe)}; {_kept(run)}"
        ) from error


def _capacity() -> int:
    """Bytes of the device's memory, used or not."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return int(psutil.virtual_memory().total)


def _advice(recipe: Recipe) -> str:
    """Settings with which a run may go on, those first that change nothing else."""
    training, lighter = recipe.training, []
    if training.batch_size > 1 and not training.group_by_length:
        batch = training.batch_size // 2 if training.batch_size % 2 == 0 else 1
        accumulation = training.batch_size // batch * training.gradient_accumulation
        lighter.append(f"--set training.batch_size={batch} --set training.gradient_accumulation={accumulation}")
    if not training.gradient_checkpointing:
        lighter.append("--set training.gradient_checkpointing=true")
    if not lighter:
        return "Start anew with a smaller data.max_length_tokens or model.quantization=nf4; --fit SIZE says what helps most"
    return f"Less is taken, and the same is learned, with {', or with '.join(lighter)}; --fit SIZE says what else helps"


def _kept(run: RunDir) -> str:
    checkpoints = run.complete_checkpoints()
    if not checkpoints:
        return "there was no checkpoint yet"
    return f"{checkpoints[-1]} is kept, and the same command with such a setting goes on from it"
