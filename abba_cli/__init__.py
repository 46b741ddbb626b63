"""abba: fine-tune language models with ABBA adapters (arXiv 2505.14238).

    from abba_cli import Recipe, load_recipe, train

The names are loaded when first used, so that `abba --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AbbaError", "Recipe", "RunDir", "__version__", "load_recipe", "train"]

if TYPE_CHECKING:
    from abba_cli.errors import AbbaError
    from abba_cli.recipe import Recipe
    from abba_cli.recipe_file import load_recipe
    from abba_cli.rundir import RunDir
    from abba_cli.training import train

_HOMES = {
    "AbbaError": "abba_cli.errors",
    "Recipe": "abba_cli.recipe",
    "RunDir": "abba_cli.rundir",
    "load_recipe": "abba_cli.recipe_file",
    "train": "abba_cli.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
