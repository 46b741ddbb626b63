"""YAML as plain values; refused where it is nested too deeply, unfolds to far more than it shows, or holds zero bytes."""

from typing import Any

import yaml

MAX_VALUES = 100_000
"""Values of a file with its aliases written out. Nine lines of nine aliases each make a thousand million."""


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Read a document.

    Returns:
        Its nodes, which know their lines, and its values; None and None for an empty one.

    Raises:
        yaml.YAMLError: It is no YAML, or none that can be taken for settings.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(root)
        return root, yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of a value that is not what its tag says
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def _check_nodes(root: yaml.Node | None) -> None:
    """Walk over the nodes as if aliases were written out, so that one which holds itself never ends."""
    left = [root]
    for _ in range(MAX_VALUES):
        if not left:
            return
        node = left.pop()
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} holds a zero byte")
        if isinstance(node, yaml.MappingNode):
            left += [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
    raise yaml.YAMLError(f"it unfolds to more than {MAX_VALUES:,} values, or an alias holds itself")
