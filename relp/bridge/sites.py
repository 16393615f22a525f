"""Where a component of a `TransformerBridge` writes and reads: the only file with hook names.

A site is a hook point of the bridge, used through plain torch hooks, so that the tensors seen are
the ones on the path (`HookPoint.add_hook` converts shapes, and gradients of converted copies are
zero). Names of sites: `L3.resid` (entering block 3), `L3.q` `L3.k` `L3.v` (before rotary and
QK-norm), `L3.z` (the heads' mixed values, before W_O), `L3.heads` (their sum, where a post-norm
reads it), `L3.pattern` (how the heads attend, `[pair, head, query, key]`, where the model computes
it), `L3.attn` and `L3.mlp` (what is added to the residual stream), `L3.mid` (the stream between the
two), `L3.mlp_in`, `L3.up` and, gated, `L3.gate` (each neuron before the activation),
`L3.neurons` (what the MLP's last matrix reads), `L3.mlp_out` (what it gives, where a post-norm
reads it), `final` (the residual stream that the final norm reads), `unembed` (what the unembedding
reads; here positions may be left out, before it some models restore the shape). Where heads cannot
be told apart (multi-head latent attention, state-space models) a block has a mixer: `L3.mixer_in`
and `L3.mixer` take the places of q, k, v and z, attn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import PurePath
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from relp.bridge.basis import Basis, Matrix, Slot, device_of, shape
from relp.bridge.quantized import check_unpacked
from relp.layout import Component, Layout
from relp.protocols import ModelLike

__all__ = ["Block", "Sites", "editing", "reading"]


MIXERS = ("attn", "linear_attn", "mamba", "mixer", "ssm")
"""What the bridge calls the part of a block that moves information between positions."""


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block: what mixes positions, and behind or beside it the MLP."""

    layer: int
    mixer: Basis
    """Attention by its heads, or the whole of a mixer where heads cannot be told apart."""
    mlp: Basis | None
    """None where the mixer is all there is (Mamba)."""
    parallel: bool
    """The MLP reads the block's input, not what the block's heads wrote."""

    def name(self, part: str) -> str:
        """`L3.mlp` for part `mlp`."""
        return f"L{self.layer}.{part}"

    @property
    def heads(self) -> int:
        """How many there are; 0 where they cannot be told apart."""
        return len(self.mixer.parts)

    @property
    def kv_heads(self) -> int:
        """How many heads have keys and values of their own."""
        return self.mixer.slots[-1].through[0].parts if self.heads else 0

    @property
    def neurons(self) -> int:
        """How many the MLP has; 0 where it is no single one (mixture of experts)."""
        return self.mlp.out.parts if self.mlp and self.mlp.out else 0

    @property
    def neuron_names(self) -> tuple[str, ...]:
        """`L3N0`, `L3N1`, …"""
        return tuple(f"L{self.layer}N{n}" for n in range(self.neurons))

    @property
    def modules(self) -> tuple[Basis, ...]:
        """Mixer and MLP, as far as there are."""
        return (self.mixer,) if self.mlp is None else (self.mixer, self.mlp)

    @property
    def components(self) -> tuple[str, ...]:
        """All node-level components of the block but neurons."""
        heads = self.mixer.parts if self.heads else ()
        return (self.name("resid"), *heads, *(m.component for m in self.modules))

    @property
    def readers(self) -> tuple[str, ...]:
        """All readers of the block, in the order of their columns."""
        return tuple(reader for module in self.modules for reader in module.readers)

    @property
    def writers(self) -> tuple[str, ...]:
        """All writers of the block, in the order of their rows."""
        return tuple(writer for module in self.modules for writer in module.writers)

    def splitting(self, numbers: Sequence[int]) -> Block:
        """This block with the neurons of these numbers as writers and readers of their own."""
        if self.mlp is None or not (numbers or self.mlp.parts):
            return self
        names = tuple(f"L{self.layer}N{n}" for n in numbers)
        readers = tuple(f"{name}.in" for name in names)
        slots = tuple(replace(s, readers=readers, numbers=tuple(numbers)) for s in self.mlp.slots)
        mlp = replace(self.mlp, slots=slots, parts=names, numbers=tuple(numbers))
        return replace(self, mlp=mlp)


@dataclass(frozen=True, eq=False)
class Sites:
    """The sites of one model."""

    model: Any
    points: Mapping[str, nn.Module]
    blocks: tuple[Block, ...]
    model_name: str

    @classmethod
    def of(cls, model: ModelLike) -> Sites:
        """Finds the sites of a `TransformerBridge`.

        Raises:
            TypeError: `model` is not a TransformerBridge with one stack of blocks.
            ValueError: the model is in train mode, its weights are packed, or a block has no part
                that it knows.
        """
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        missing = [p for p in ("blocks", "cfg", "ln_final", "unembed") if not hasattr(model, p)]
        if missing:
            raise TypeError(
                "`model` must be a TransformerBridge with one stack of blocks, a final norm and an "
                f"unembedding; got a {type(model).__name__} without {', '.join(missing)} (as "
                "encoder-decoders and plain modules); load a decoder with "
                "TransformerBridge.boot_transformers(name), or use relp.propagate and "
                "relp.coverage, which work on any module"
            )
        training = [n or "the model" for n, m in model.named_modules() if m.training]
        if training:
            raise ValueError(
                f"the model must be in eval mode, or dropout makes every number noise; "
                f"{training[0]!r} is in train mode; call model.eval()"
            )
        inside: Any = model
        check_unpacked(getattr(inside, "original_model", inside))
        points: dict[str, nn.Module] = {
            "final": model.ln_final.hook_in,
            "unembed": model.unembed.hook_in,
        }
        blocks = []
        for layer, module in enumerate(model.blocks):
            block, found = _block(model.cfg, layer, module)
            blocks.append(block)
            points |= {block.name(part): point for part, point in found.items()}
        name = str(getattr(model.cfg, "model_name", type(model).__name__))
        # a folder's path says where a user keeps files, not which model it is
        name = PurePath(name).name if PurePath(name).is_absolute() else name
        return cls(model, points, tuple(blocks), name)

    def splitting(self, neurons: Sequence[str]) -> Sites:
        """These sites with some neurons as writers and readers of their own.

        Raises:
            ValueError: a name is not that of a neuron, or the matrices of its MLP cannot be told
                apart.
        """
        chosen: dict[int, set[int]] = {}
        for name in [neurons] if isinstance(neurons, str) else neurons:
            _, kind, layer, number = Component.parse(name)
            if kind != "neuron" or layer >= len(self.blocks):
                raise ValueError(
                    f"`neurons` must be names such as 'L0N3' of a model of {len(self.blocks)} "
                    f"blocks; got {name!r}; see Scores.components of attribute(components='neuron')"
                    ", and use circuits on the model they are of"
                )
            chosen.setdefault(layer, set()).add(number)
        for layer, numbers in chosen.items():
            block, last = self.blocks[layer], max(numbers)
            through = [m for slot in (block.mlp.slots if block.mlp else ()) for m in slot.through]
            if {shape(matrix.module)[0] for matrix in through} != {block.neurons}:
                raise ValueError(
                    "neurons with edges of their own need an MLP whose matrices can be told apart; "
                    f"block {layer} has none (but experts, joint matrices or a mixer alone); leave "
                    f"L{layer}N{last} out"
                )
            if last >= block.neurons:
                raise ValueError(
                    f"`neurons` of block {layer} must be below {block.neurons}, as many as it has; "
                    f"got L{layer}N{last}; count from 0"
                )
        blocks = tuple(b.splitting(sorted(chosen.get(b.layer, ()))) for b in self.blocks)
        return replace(self, blocks=blocks)

    @property
    def neurons(self) -> tuple[str, ...]:
        """Names of the neurons that are writers and readers of their own."""
        return tuple(name for b in self.blocks if b.mlp for name in b.mlp.parts)

    def chosen(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Names of node-level components, in the order of the model.

        Args:
            wanted: names (`L3H1`, `L3N17`) or kinds (`head`, `neuron`); all but neurons if None.

        Raises:
            ValueError: there is no such name or kind, or none is asked for.
        """
        if wanted is None:
            return self.components
        asked = {wanted} if isinstance(wanted, str) else set(wanted)
        kinds = {name: Component.parse(name).kind for name in self.components}
        kinds |= {name: "neuron" for b in self.blocks for name in b.neuron_names}
        unknown = asked - kinds.keys() - set(kinds.values())
        if unknown or not asked:
            raise ValueError(
                f"`components` must be names such as {self.components[1]!r} or kinds out of "
                f"{sorted(set(kinds.values()))}; got {min(unknown, default='none')!r}; see "
                "Scores.components"
            )
        return tuple(name for name, kind in kinds.items() if name in asked or kind in asked)

    def part(self, component: str) -> tuple[str, int, int]:
        """Where a component's value is: site, which part of it, of how many equal ones."""
        _, kind, layer, number = Component.parse(component)
        if kind == "embed":
            return self.blocks[0].name("resid"), 0, 1
        if kind in ("feature", "rest"):
            return component.partition("/")[0], 0, 1
        block = self.blocks[layer]
        if kind == "head":
            return block.name("z"), number, block.heads
        if kind == "neuron":
            return block.name("neurons"), number, block.neurons
        return component, 0, 1

    def behind(self, component: str) -> str:
        """Where the residual stream first holds what a component has added: the end of its block.

        The whole stream at one place is there itself.
        """
        _, kind, layer, _ = Component.parse(component)
        if kind in ("embed", "resid"):
            return self.part(component)[0]
        site = component.partition("/")[0]  # of features
        if site == "final" or site.endswith((".resid", ".mid")):
            return site
        return self.blocks[layer + 1].name("resid") if layer + 1 < len(self.blocks) else "final"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the node-level components but neurons, in the order of `Scores.nodes`."""
        return ("embed", *(c for b in self.blocks for c in b.components))

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers, in the order of rows of `Scores.edges`."""
        return ("embed", *(w for b in self.blocks for w in b.writers))

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers, in the order of columns of `Scores.edges`."""
        return (*(r for b in self.blocks for r in b.readers), "logits.in")

    @cached_property
    def layout(self) -> Layout:
        """Which edges the model has, and where in `Scores.edges`."""
        return Layout.of(self.writers, self.readers, self.parallel)

    @property
    def written(self) -> tuple[str, ...]:
        """The sites where blocks write, in the order of a run."""
        return tuple(
            m.out.site if m.out and m.parts and not m.entry else m.component
            for b in self.blocks
            for m in b.modules
        )

    @property
    def parallel(self) -> bool:
        """True if MLPs do not read what their own block's heads write."""
        return any(b.parallel for b in self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go in, and where what was seen of all blocks is put together."""
        first = next(self.model.parameters())
        if not first.is_meta:
            return first.device
        device = device_of(self.model.original_model.get_input_embeddings())
        return first.device if device is None else device  # `meta`: an outline without weights

    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of any blocks, detached, on the one `device`."""
        device = self.device  # once: to find it, a module lists its parameters
        return {name: value.detach().to(device) for name, value in values.items()}


def _block(cfg: Any, layer: int, module: Any) -> tuple[Block, dict[str, nn.Module]]:
    """The parts of one block, and its sites by part."""
    # not getattr: a bridge looks for what it lacks in the module that it wraps
    parts: dict[str, Any] = dict(module.named_children())
    mixer = next((parts[n] for n in MIXERS if n in parts), None)
    if mixer is None:
        raise ValueError(
            f"a block must have one of {', '.join(MIXERS)}; block {layer} is a "
            f"{type(module).__name__} with {[n for n in parts if 'hook' not in n]}; use "
            "relp.propagate and relp.coverage, which work on any module"
        )
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    norm = parts.get("ln1", parts.get("norm"))  # OLMo-2 norms only what it adds
    points: dict[str, Any] = {"resid": module.hook_in}
    inside = dict(mixer.named_children())
    if all(inside.get(p) is not None for p in "qkvo"):
        mixing, found = _attention(cfg, layer, inside, norm, parts.get("ln1_post"))
    else:
        name = f"L{layer}.mixer"
        mixing, found = Basis(name, norm, entry=f"{name}_in"), {"mixer_in": mixer.hook_in}
    added = module.hook_attn_out if "attn" in parts else mixer.hook_out
    points |= found | {mixing.component.partition(".")[2]: added}
    mlp = parts.get("mlp")
    if mlp is None:
        return Block(layer, mixing, None, parallel), points
    # an MLP without a module of its own (OPT) begins where its first layer does
    entry = mlp if mlp.name is not None else getattr(mlp, "in")
    if not parallel:
        # without a norm before it (OLMo-2) the MLP reads the stream itself
        points["mid"] = parts.get("ln2", entry).hook_in
    behind = parts.get("ln2", norm if parallel else None)
    basis, found = _mlp(layer, mlp, behind, parts.get("ln2_post"))
    points |= found | {"mlp_in": entry.hook_in, "mlp": module.hook_mlp_out}
    return Block(layer, mixing, basis, parallel), points


def _attention(
    cfg: Any, layer: int, inside: Mapping[str, Any], norm: Any, post: Any
) -> tuple[Basis, dict[str, Any]]:
    """Attention by its heads, and its sites by part."""
    heads = int(cfg.n_heads)
    sources = int(getattr(cfg, "n_key_value_heads", None) or heads)
    names = tuple(f"L{layer}H{h}" for h in range(heads))
    # with grouped queries the readers of keys and values are nodes of their own
    kv = names if sources == heads else tuple(f"L{layer}KV{h}" for h in range(sources))
    slots = tuple(
        Slot(
            tuple(f"{owner}.{slot}" for owner in owners),
            tuple(range(len(owners))),
            (Matrix(f"L{layer}.{slot}", inside[slot], len(owners)),),
        )
        for slot, owners in (("q", names), ("k", kv), ("v", kv))
    )
    basis = Basis(
        f"L{layer}.attn",
        norm,
        slots,
        Matrix(f"L{layer}.z", inside["o"], heads),
        names,
        tuple(range(heads)),
        post=post,
        behind=f"L{layer}.attn" if post is None else f"L{layer}.heads",
    )
    points = {slot: inside[slot].hook_out for slot in "qkv"} | {"z": inside["o"].hook_in}
    if "hook_pattern" in inside:
        points["pattern"] = inside["hook_pattern"]
    return basis, points if post is None else points | {"heads": post.hook_in}


def _mlp(layer: int, mlp: Any, norm: Any, post: Any) -> tuple[Basis, dict[str, Any]]:
    """An MLP as a whole, of which neurons can be split off, and its sites by part."""
    points: dict[str, Any] = {} if post is None else {"mlp_out": post.hook_in}
    inside, out = dict(mlp.named_children()), None
    slots: tuple[Slot, ...] = ()
    if (down := inside.get("out")) is not None:
        neurons = shape(down)[1]
        # a mixture of experts has a `gate` too, but it is the router
        both = {name: inside[part] for name, part in (("gate", "gate"), ("up", "in"))
                if inside.get(part) is not None}  # fmt: skip
        through = tuple(Matrix(f"L{layer}.{name}", m, neurons) for name, m in both.items())
        out, slots = Matrix(f"L{layer}.neurons", down, neurons), (Slot((), (), through),)
        points |= {"neurons": down.hook_in} | {name: m.hook_out for name, m in both.items()}
    basis = Basis(
        f"L{layer}.mlp",
        norm,
        slots,
        out,
        entry=f"L{layer}.mlp_in",
        post=post,
        behind=f"L{layer}.mlp" if post is None else f"L{layer}.mlp_out",
    )
    return basis, points


Edit = Callable[[Tensor], Tensor]


@contextmanager
def _visiting(sites: Sites, visits: Mapping[str, Edit]) -> Iterator[None]:
    """Shows each function its site's tensor as `[pair, pos, d]`; its result takes that place.

    Attention patterns have axes of their own. Only in this thread: others may run the same model.
    """
    shape: list[int] = []
    here = get_ident()

    def begin(_: nn.Module, __: Any, value: Tensor) -> None:
        if get_ident() == here:
            shape[:] = value.shape[:2]

    def visit(name: str, _: nn.Module, __: Any, value: Tensor) -> Tensor:
        if get_ident() != here:
            return value
        if value.dim() == 2 and len(value) == math.prod(shape):
            # OPT's MLP works on merged pairs and positions
            return visits[name](value.unflatten(0, shape)).flatten(0, 1)
        if value.dim() != (4 if name.endswith(".pattern") else 3):
            raise ValueError(
                f"a site must hold [pair, pos, d]; {name!r} holds {list(value.shape)}; "
                "use relp.propagate on this architecture"
            )
        return visits[name](value)

    with ExitStack() as stack:
        for block in sites.blocks:  # any may be the first that runs
            entry = sites.points[block.name("resid")]
            stack.callback(entry.register_forward_hook(begin).remove)
        for name in visits:
            hook = sites.points[name].register_forward_hook(partial(visit, name))
            stack.callback(hook.remove)
        yield


@contextmanager
def reading(sites: Sites, names: Iterator[str] | tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects the tensors at the named sites while the model runs inside.

    Raises:
        RuntimeError: at the end, if a site was not passed or was passed twice.
    """
    names = tuple(names)
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        if name in seen:
            raise RuntimeError(
                f"site {name!r} must be passed once per run; it was passed again; "
                "run the model once, on one batch"
            )
        seen[name] = value
        return value

    with _visiting(sites, {n: partial(keep, n) for n in names}):
        yield seen
    missing = [n for n in names if n not in seen]
    if missing:
        raise RuntimeError(
            f"every site must be passed when the model runs; {missing[0]!r} was not "
            f"({len(missing)} in all); turn off use_split_qkv_input, use_attn_result and "
            "use_hook_mlp_in, which take other paths"
        )


@contextmanager
def editing(sites: Sites, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replaces the tensor at each named site by what its function returns.

    It gets the tensor on the sites' `device`; what it returns goes back to where the block is.

    Raises:
        RuntimeError: at the end, if an edit never took place.
    """
    done: set[str] = set()
    device = sites.device

    def change(name: str, value: Tensor) -> Tensor:
        done.add(name)
        return edits[name](value.to(device)).to(value.device)

    with _visiting(sites, {n: partial(change, n) for n in edits}):
        yield
    missing = [n for n in edits if n not in done]
    if missing:
        raise RuntimeError(
            f"an edited site must be passed when the model runs; {missing[0]!r} was not; turn off "
            "use_split_qkv_input, use_attn_result and use_hook_mlp_in, which take other paths"
        )
