"""A saved adapter once more in its own form: only the adapter, out of a run or a checkpoint with everything around it."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from abba_cli.export.lora import Dtype, rounded
from abba_cli.rundir import ADAPTER_FILES
from abba_cli.saved_adapter import SavedAdapter


def write_abba(adapter: SavedAdapter, folder: Path, dtype: Dtype | None = None) -> None:
    """Write the adapter's configuration and tensors.

    Args:
        adapter: The adapter.
        folder: A directory.
        dtype: Of the factors; None keeps every tensor bit for bit. Parameters that were trained whole keep theirs either way.

    Raises:
        ModelError: A factor has values that `dtype` cannot hold.
    """
    adapter.config.save_pretrained(str(folder))
    if dtype is None:
        shutil.copyfile(adapter.path / ADAPTER_FILES[1], folder / ADAPTER_FILES[1])
        return
    whole = set(adapter.whole.values())
    tensors = {
        key: one if key in whole else rounded(key.removeprefix("base_model.model."), one, dtype)
        for key, one in load_file(adapter.path / ADAPTER_FILES[1]).items()
    }
    save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
