"""Devices that are not there: ordinary tensors of the CPU that say they are elsewhere.

Under `devices()` a tensor moved to `HERE` or `THERE` becomes one that says so, and keeps its
numbers on the CPU. Whatever is computed of it says the same, and an operation that meets two
devices raises, as a GPU would. They are called `lazy:0` and `lazy:1`, after a kind of device that
torch knows, has no kernels for here, and differentiates on the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["HERE", "THERE", "Pretend", "devices"]

HERE, THERE = "lazy:0", "lazy:1"
CPU = torch.device("cpu")
aten: Any = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default)  # fmt: skip
"""Operations that take indices from the CPU."""


class Pretend(Tensor):
    """A tensor of the CPU, and the device that it says it is on."""

    kept: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: Tensor, device: torch.device) -> Any:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, kept.shape, strides=kept.stride(), storage_offset=kept.storage_offset(),
            dtype=kept.dtype, layout=kept.layout, device=device,
        )  # fmt: skip
        made.kept = kept
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operation, args, kwargs or {})

    # what torch does past any dispatch

    def __getitem__(self, at: Any) -> Any:
        return super().__getitem__(_indices(at))

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(_indices(at), value)

    def tolist(self) -> Any:
        return self.kept.tolist()

    def data_ptr(self) -> int:
        return self.kept.data_ptr()

    def untyped_storage(self) -> Any:
        return self.kept.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"{self.kept} on {self.device}"


@contextmanager
def devices() -> Iterator[None]:
    """Makes the two devices; what is on them can only be used inside."""
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        # torch's own would fill it where there are no kernels
        found = made(data, **options)
        return found if device is None else found.to(device)

    with _Devices(), MonkeyPatch.context() as patched:
        patched.setattr(torch, "tensor", tensor)
        yield


class _Devices(TorchDispatchMode):
    """What has no tensor to see the device by: factories, and moves from the CPU."""

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = torch.device(kwargs.get("device") or CPU)
        there = asked.type == "lazy" or any(isinstance(t, Pretend) for t in tree_leaves(args))
        return _computed(operation, args, kwargs) if there else operation(*args, **kwargs)


def _computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the device of what it was given."""
    asked = kwargs.pop("device", None)
    if operation is aten.copy_.default:
        device = args[0].device  # from anywhere
    elif operation is aten._to_copy.default:
        device = args[0].device if asked is None else torch.device(asked)
    else:
        device = _meeting(operation, args, kwargs)
        device = device if asked is None else torch.device(asked)
    if asked is not None:
        kwargs["device"] = CPU if device.type == "lazy" else device
    given = tree_leaves((args, kwargs))
    own = {id(t.kept): t for t in given if isinstance(t, Pretend)}
    args, kwargs = tree_map(lambda t: t.kept if isinstance(t, Pretend) else t, (args, kwargs))

    def labelled(value: Any) -> Any:
        if not isinstance(value, Tensor) or device.type != "lazy":
            return value
        # what was changed in place is the tensor that it was
        return own[id(value)] if id(value) in own else Pretend(value, device)

    return tree_map(labelled, operation(*args, **kwargs))


def _meeting(operation: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """The one device of an operation's tensors; a single number of the CPU may be anywhere."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if operation in INDEXED:
        tensors = [t for t in tensors if isinstance(t, Pretend) or t.is_floating_point()]
    found = {t.device for t in tensors if t.dim() or t.device != CPU} or {CPU}
    if len(found) > 1:
        raise RuntimeError(
            f"{operation} met tensors on {' and '.join(sorted(map(str, found)))}, not on one device"
        )
    return found.pop()


def _indices(at: Any) -> Any:
    """Torch would move the numbers of a list to the device, which has no kernels."""
    if isinstance(at, tuple):
        return tuple(map(_indices, at))
    return torch.tensor(at) if isinstance(at, list | range) else at
