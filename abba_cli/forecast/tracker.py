"""Records when every tensor of a training step comes and goes, without memory for any of them.

The step runs on fake tensors, which have a shape and a dtype and nothing else, through the very code that trains. So attention,
checkpointing, the adapter's kernels and the loss are counted as they are.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRADIENTS = "gradients"
HEAD = "logits and loss"
TEMPORARIES = "temporaries"

# Positions, masks and labels decide shapes and branches, so they are computed for real; not when they are masks of T x T.
_COMPUTED_UP_TO = 4_000_000
# Backward adds into fresh zeros, except where it meets tensors that are not plain ones: then it makes a second tensor.
_IN_PLACE = {torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default}
_IN_PLACE[torch.ops.aten.index_put.default] = torch.ops.aten.index_put_.default
_DEPENDS_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@dataclass
class Segment:
    """A stretch of a step, as changes since its beginning.

    Attributes:
        net: Bytes by use at its end.
        peak: Bytes by use when they were most.
        height: The sum of `peak`.
    """

    net: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    height: int = 0


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered after a FakeTensorMode, records the storages made by every operation until it is left.

    Attributes:
        stretch: Name of the present stretch, see `segments`.
        use: What tensors of the present stretch are for, outside of any `scope`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stretch = "start"
        self.use = "inputs and embeddings"
        self._changes: list[tuple[str, int, int]] = []  # stretch, bytes, number of the storage
        self._uses: list[str] = []
        self._sizes: list[int] = []
        self._scopes: list[int] = []  # in which scope each storage was made
        self._numbers: dict[int, int] = {}  # by address of the storage
        self._next: tuple[str, str] | None = None
        self._scope = 0
        self._scopes_so_far = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._next is not None:
            (self.stretch, self.use), self._next = self._next, None
        made = _execute(func, args, kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def turn_to(self, stretch: str, use: str) -> None:
        """Begin a stretch with the next operation: what the caller still lets go of belongs to the present one."""
        self._next = (stretch, use)

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a tensor that exists before the step: its bytes are counted elsewhere."""
        self._numbers[tensor.untyped_storage()._cdata] = -1

    def relabel(self, tensor: Tensor, use: str) -> None:
        """Say afterwards what a recorded tensor is for."""
        number = self._numbers.get(tensor.untyped_storage()._cdata, -1)
        if number >= 0:
            self._uses[number] = use

    @contextmanager
    def scope(self, use: str) -> Iterator[None]:
        """Within this, tensors are for `use`; those that do not outlive it are temporaries."""
        token = self.enter(use)
        try:
            yield
        finally:
            self.leave(token)

    def enter(self, use: str) -> tuple[str, int]:
        """Begin a scope; returns what `leave` wants."""
        token = (self.use, self._scope)
        self._scopes_so_far += 1
        self.use, self._scope = use, self._scopes_so_far
        return token

    def leave(self, token: tuple[str, int]) -> None:
        """End a scope."""
        self.use, self._scope = token

    def segments(self) -> dict[str, Segment]:
        """What happened in each stretch, in order."""
        found: dict[str, Segment] = {}
        height: Counter[str] = Counter()
        for stretch, size, number in self._changes:
            segment = found.setdefault(stretch, Segment())
            segment.net[self._uses[number]] += size
            height[stretch] += size
            if height[stretch] > segment.height:
                segment.height, segment.peak = height[stretch], segment.net.copy()
        return found

    def largest(self, use: str) -> int:
        """Bytes of the largest tensor of a use."""
        return max((size for size, its in zip(self._sizes, self._uses, strict=True) if its == use), default=0)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return
        number, size = len(self._uses), int(storage.nbytes())
        self._numbers[address] = number
        self._uses.append(self.use)
        self._sizes.append(size)
        self._scopes.append(self._scope)
        self._changes.append((self.stretch, size, number))
        weakref.finalize(storage, self._forget, address, number, size).atexit = False

    def _forget(self, address: int, number: int, size: int) -> None:
        if self._numbers.get(address) == number:
            del self._numbers[address]
        if self._scope and self._scopes[number] == self._scope:
            self._uses[number] = TEMPORARIES
        self._changes.append((self.stretch, -size, number))


def _execute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on fake tensors, or for real where all inputs are real and the result is small and made of integers."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in inputs):
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _positions(args[1]))
        if not torch.is_grad_enabled():
            func = _IN_PLACE.get(func, func)
        return func(*args, **kwargs)
    if not _DEPENDS_ON_VALUES.intersection(func.tags):
        imagined = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(imagined) if isinstance(leaf, Tensor)]
        if any(one.is_floating_point() or one.numel() > _COMPUTED_UP_TO for one in outputs):
            return imagined
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as positions: how many tokens a real mask selects is known, a fake one cannot tell."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
            found.append(index)
        else:
            with unset_fake_temporarily():
                found.extend(index.nonzero().unbind(1))
    return found
