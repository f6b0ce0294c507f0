"""Peak memory without noise: the bytes of all tensors alive, counted operator by operator, on any device."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any, Dict, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """While on, counts every storage that an operator returns, from then until nothing refers to it any more.

    Weights, gradients, optimizer state and what autograd saves are all storages; make them while it is on. What an
    operator allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once since the last restart."""
        self._alive: Dict[int, Tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def restart(self) -> None:
        """Count the peak anew from what is alive."""
        gc.collect()
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        known = self._alive.get(key)
        if known is None:
            self._alive[key] = (size, weakref.ref(storage, partial(self._dropped, key)))
        else:
            self._alive[key] = (size, known[1])  # a storage may have been resized
        self.now += size - (known[0] if known else 0)
        self.peak = max(self.peak, self.now)

    def _dropped(self, key: int, _: object) -> None:
        self.now -= self._alive.pop(key)[0]
