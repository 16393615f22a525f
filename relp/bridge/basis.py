"""How a module of a block meets the residual stream: the parts that read and write by themselves.

A `Basis` splits a module into parts: attention into its heads, an MLP into some of its neurons and
the rest of it; a mixer, and an MLP of which nothing is split off, is one whole. Each part has a
matrix through which it reads, and one through which it writes. What follows from a change of a part
is then the same arithmetic whatever the part is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "Basis",
    "Matrix",
    "Slot",
    "at_hand",
    "bias",
    "device_of",
    "inner",
    "is_plain",
    "shape",
    "span",
    "weight",
]


def span(number: int, parts: int, width: int) -> slice:
    """The entries of one of some equal parts of what has this width."""
    size = width // parts
    return slice(number * size, (number + 1) * size)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear module between the stream (or a norm beside it) and a site of equal parts."""

    site: str
    """Where the parts' values are: `L3.q` and `L3.up` behind it, `L3.z` and `L3.neurons` before."""
    module: Any
    parts: int
    """How many heads or neurons that site holds."""

    def is_all(self, numbers: Sequence[int]) -> bool:
        """True for all parts, each once and in order: nothing need be picked out then."""
        return len(numbers) == self.parts and list(numbers) == list(range(self.parts))

    def read_in(self, numbers: Sequence[int]) -> Float[Tensor, "part d_part d_model"]:
        """What these parts multiply the stream by."""
        w = rearrange(weight(self.module), "(n d) m -> n d m", n=self.parts)
        return w if self.is_all(numbers) else w[list(numbers)]

    def write_out(self, numbers: Sequence[int]) -> Float[Tensor, "part d_part d_model"]:
        """What these parts' values are multiplied by on their way to the stream."""
        w = rearrange(weight(self.module), "m (n d) -> n d m", n=self.parts)
        return w if self.is_all(numbers) else w[list(numbers)]

    def offset(self, numbers: Sequence[int]) -> Float[Tensor, "part 1 1 d_part"] | None:
        """What is added to these parts' values, if anything."""
        b = bias(self.module)
        return None if b is None else rearrange(b, "(n d) -> n 1 1 d", n=self.parts)[list(numbers)]

    def values(
        self, site: Float[Tensor, "pair pos parts_d_part"], numbers: Sequence[int]
    ) -> Float[Tensor, "pair pos part d_part"]:
        """These parts of what the site holds."""
        split = rearrange(site, "p t (n d) -> p t n d", n=self.parts)
        return split if self.is_all(numbers) else split[:, :, list(numbers)]

    def span(self, number: int, width: int) -> slice:
        """The entries of one part in a site of this width."""
        return span(number, self.parts, width)

    def replaced(
        self,
        site: Float[Tensor, "pair pos parts_d_part"],
        numbers: Sequence[int],
        values: Float[Tensor, "part pair pos d_part"],
    ) -> Float[Tensor, "pair pos parts_d_part"]:
        """What the site holds, with other values of these parts."""
        values = rearrange(values, "n p t d -> p t n d")
        if self.is_all(numbers):
            return values.flatten(2)
        site = site.clone()
        site.unflatten(-1, (self.parts, -1))[:, :, list(numbers)] = values
        return site


@dataclass(frozen=True, eq=False)
class Slot:
    """Parts that read alike: all heads' queries, the neurons of an MLP that are split off."""

    readers: tuple[str, ...]
    numbers: tuple[int, ...]
    """Which part of its site each reader is."""
    through: tuple[Matrix, ...]
    """What each of them reads through: one matrix, or two where a neuron is gated."""

    def read_in(self) -> Float[Tensor, "part d_part d_model"]:
        """The matrices of each part, below each other."""
        found = [m.read_in(self.numbers).float() for m in self.through]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def values(self, sites: Mapping[str, Tensor]) -> Float[Tensor, "pair pos part_d_part"]:
        """What stands behind the matrices, in the order of `read_in`."""
        found = [m.values(sites[m.site], self.numbers) for m in self.through]
        return (found[0] if len(found) == 1 else torch.cat(found, -1)).flatten(2).float()

    def project(
        self, x: Float[Tensor, "reader pair pos d_model"], places: Sequence[int]
    ) -> dict[str, Float[Tensor, "reader pair pos d_part"]]:
        """What some of the readers (by their place here) hold at each site if they get `x`."""
        numbers, found = [self.numbers[i] for i in places], {}
        for m in self.through:
            w, offset = m.read_in(numbers), m.offset(numbers)
            y = torch.einsum("rptm,rdm->rptd", x, w.to(x))
            found[m.site] = y if offset is None else y + offset.to(y)
        return found


@dataclass(frozen=True, eq=False)
class Basis:
    """One module of a block, split into parts."""

    component: str
    """`L3.attn`, `L3.mixer` or `L3.mlp`: the whole, and the site of all that it adds."""
    norm: nn.Module | None
    """What it reads through."""
    slots: tuple[Slot, ...] = ()
    """How its parts read."""
    out: Matrix | None = None
    """How its parts write."""
    parts: tuple[str, ...] = ()
    """The parts that are writers of their own."""
    numbers: tuple[int, ...] = ()
    """Which part of the site of `out` each of them is."""
    entry: str = ""
    """The site of what is read by the whole, or by the rest of it; empty for attention, whose heads
    are all there is."""
    post: nn.Module | None = None
    """The norm through which it adds to the stream (Gemma-2, OLMo-2)."""
    behind: str = ""
    """The site of the sum of what all its parts write: what that norm reads, if there is one."""

    @property
    def writers(self) -> tuple[str, ...]:
        """Those who write, in the order of their rows: parts, then the whole or the rest."""
        return (*self.parts, self.component) if self.entry else self.parts

    @property
    def readers(self) -> tuple[str, ...]:
        """Those who read, in the order of their columns."""
        rest = (f"{self.component}.in",) if self.entry else ()
        return (*(reader for slot in self.slots for reader in slot.readers), *rest)

    @property
    def reading(self) -> tuple[str, ...]:
        """The sites of what its readers get."""
        through = (m.site for slot in self.slots if slot.readers for m in slot.through)
        return (*through, *([self.entry] if self.entry else []))

    @property
    def holding(self) -> tuple[str, ...]:
        """The sites of what its writers hold: of its parts, and of the whole."""
        parts = (self.out.site,) if self.out and self.parts else ()
        return (*parts, *([self.component] if self.entry else []))

    @property
    def writing(self) -> tuple[str, ...]:
        """The sites of what its writers add, with that of the sum behind parts."""
        if not self.parts or not (self.entry or self.post):
            return self.holding
        return tuple(dict.fromkeys((*self.holding, self.behind, self.component)))

    def added(
        self, step: Float[Tensor, "pair pos parts_d_part"], into: Tensor | None = None
    ) -> Float[Tensor, "part pair pos d_model"]:
        """What each part adds (to the norm behind it, if there is one) if the parts' site holds
        `step`; without the bias, which is no part's."""
        assert self.out is not None
        values = rearrange(self.out.values(step, self.numbers).float(), "p t n d -> n (p t) d")
        flat = None if into is None else into.flatten(1, 2)
        w = self.out.write_out(self.numbers).to(values)
        return torch.bmm(values, w, out=flat).unflatten(1, step.shape[:2])

    def together(
        self, step: Float[Tensor, "pair pos parts_d_part"], added: Float[Tensor, "part pair pos d"]
    ) -> Float[Tensor, "pair pos d_model"]:
        """What all parts add, those too that have no name; `added`: what those with a name do."""
        if not self.entry:
            return added.sum(0)
        assert self.out is not None
        step = step.float()
        return step @ weight(self.out.module).to(step).T


# -- linear modules --------------------------------------------------------------------------------


def weight(projection: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The matrix that a linear module multiplies by, whichever way round its class stores it.

    Where its `weight` is not what it computes with (an adapter beside it, offloaded weights) the
    matrix is read off the module, run on unit vectors.

    Raises:
        RuntimeError: the module is no linear map.
    """
    module = inner(projection)
    if not is_plain(module):
        return _measured(module)[0]
    matrix = at_hand(module, "weight").detach()
    return matrix.T if _is_transposed(module) else matrix


def bias(projection: nn.Module) -> Float[Tensor, " d_out"] | None:
    """What a linear module adds, if anything. Errors are those of `weight`."""
    module = inner(projection)
    if not is_plain(module):
        return _measured(module)[1]
    offset = at_hand(module, "bias")
    return None if offset is None else offset.detach()


def shape(projection: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear module, without its weights."""
    module = inner(projection)
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        # what wraps a layer (an adapter) may have no weight of its own
        return int(module.out_features), int(module.in_features)
    d_out, d_in = module.weight.shape
    return (d_in, d_out) if _is_transposed(module) else (d_out, d_in)


def is_plain(module: Any) -> bool:
    """True if a module computes with its own `weight` and `bias`, wherever they are."""
    forward = type(module).forward
    # accelerate keeps the module's own forward beside the one that fetches offloaded weights
    own = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
    if getattr(own, "__func__", forward if own is None else own) is not forward:
        return False
    return forward is nn.Linear.forward or _is_transposed(module)


def at_hand(module: Any, parameter: str) -> Any:
    """A module's parameter, fetched if it is offloaded; None if it has none."""
    from accelerate.utils import align_module_device  # not at the top: it takes a second

    with align_module_device(module):
        return getattr(module, parameter, None)


def device_of(module: Any) -> torch.device | None:
    """Where a module computes, also if its weights are offloaded; None if it has none."""
    for part in inner(module).modules():
        # accelerate's hook knows, where a parameter may be on `meta` between two runs
        hook = getattr(part, "_hf_hook", None)
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return None


def inner(projection: Any) -> Any:
    """The module of the model itself: a bridge wraps it."""
    return getattr(projection, "original_component", None) or projection


def _is_transposed(module: Any) -> bool:
    """transformers' Conv1D (GPT-2) holds `[d_in, d_out]`."""
    return type(module).__name__ == "Conv1D"


def _measured(module: Any) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """Matrix and bias of a module that gives them away by what it computes only."""
    _, d_in = shape(module)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    units = torch.eye(d_in, dtype=like.dtype, device=device_of(module))
    probe = torch.linspace(-1, 1, d_in).cos().to(units) * units.new_tensor([[1.0], [-2.0]])
    with torch.no_grad():
        offset, *rows = module(torch.cat([torch.zeros_like(units[:1]), units, probe])[None])[0]
        matrix = (torch.stack(rows[:d_in]) - offset).T
        expected, found = probe @ matrix.T + offset, torch.stack(rows[d_in:])
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= max(1e-3, 8 * torch.finfo(units.dtype).eps) * max(size, 1e-6):
        raise RuntimeError(
            f"a projection must be a linear map to have edges; a {type(module).__name__} differs "
            f"from the matrix that it shows by {error:.2g} of {size:.2g}; merge the adapter, or "
            "use level='node'"
        )
    return matrix, offset
