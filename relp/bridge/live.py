"""How many bytes of tensors are alive: counted as they come and go, on any device.

Also on `meta` tensors, which have shapes and no numbers: what a run of a model would hold is known
without its weights. Where such a run asks for a number, it is told 0, and that nothing differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Live"]


class Live(TorchDispatchMode):
    """Counts while it is active; what is `known` is there anyway.

    >>> from relp.bridge.live import Live
    >>> with Live() as live:
    ...     a = torch.zeros(10) + 1
    ...     b = a * a
    ...     del a
    >>> live.now, live.peak
    (40, 80)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every operation, with what it makes."""
        given = args[0] if args else None
        if isinstance(given, Tensor) and given.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return given.dtype == torch.bool or 0
            if func is torch.ops.aten.equal.default:
                return True
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def begin(self) -> int:
        """From now on the peak is that of what follows; gives what is alive now."""
        self.peak = self.now
        return self.now

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, self._freed(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        return freed
