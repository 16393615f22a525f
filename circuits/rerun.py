"""Running the rest of a model again: from one block on, and from one position on.

What comes before a change is as it was. Blocks before it hand their input on, and the first one
that runs gets the residual stream of the own run. Positions before it, which in a causal model
nothing later can change, are keys and values of the own run and no rows of the batch. Logits are
computed only where a built-in metric reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relp.capture import answers_only, observe
from relp.sites import Edit, Sites, editing, reading

__all__ = ["Rerun", "entries", "output_shapes", "skipping"]


@dataclass(frozen=True, eq=False)
class Rerun:
    """The own run of some pairs of one length, and how to continue it from anywhere."""

    sites: Sites
    task: Any
    side: str
    """`clean` or `corrupt`: whose prompts run."""
    values: Mapping[str, Tensor]
    """Activations of the own run, at least those at `entries`."""
    metric: Float[Tensor, " pair"]
    """The metric of the own run."""
    outputs: Mapping[int, int]
    """How each block returns: 0 for a bare tensor, else the length of the tuple."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Each block's keys and values; empty if the model must run all positions."""

    @classmethod
    def of(cls, sites: Sites, task: Any, names: Iterable[str], *, side: str) -> Rerun:
        """Runs one side, keeps what is at the named sites, and tries to leave positions out."""
        names = tuple(dict.fromkeys([*entries(sites), *names]))
        with output_shapes(sites) as outputs:
            values, metric = observe(sites, task, names, side=side)
        tokens = getattr(task, side).to(sites.device)
        past = _keys_values(sites, task, tokens, values["final"])
        return cls(sites, task, side, values, metric, outputs, past)

    def start(self, first: int) -> int:
        """Where a run must start if nothing before position `first` changes."""
        return first if self.past else 0

    def __call__(
        self, edits: Mapping[str, Edit], *, copies: int, layer: int, start: int
    ) -> Float[Tensor, "copy pair"]:
        """What the edits change in the metric, each copy of the pairs for itself.

        An edit gets `[copy * pair, pos - start, d]`.

        Args:
            edits: what to do at which site.
            copies: how often the pairs are repeated.
            layer: the first block that runs; the number of blocks if only the final norm and the
                unembedding should.
            start: the first position that runs, see `start`.
        """
        tokens = getattr(self.task, self.side)[:, start:].to(self.sites.device)
        entry = entries(self.sites)[layer]
        change = edits.get(entry, lambda x: x)
        stream = self.values[entry][:, start:]
        every = {
            **edits,
            entry: lambda _: change(stream.repeat(copies, 1, 1)),
            **answers_only(self.sites, self.task, copies, start),
        }
        if self.past and layer < len(self.sites.blocks) - 1:
            every |= _last_mlp(self.sites, self.task, copies, start)
        with torch.no_grad(), skipping(self.sites, range(layer), self.outputs):
            with editing(self.sites, every):
                logits = self.sites.model(tokens.repeat(copies, 1), **_cache(self.past, start))
            metric = [self.task.metric(part) for part in logits.split(len(tokens))]
            # a pair that was read out before `start` is as it was
            seen = (self.task.spans["end"] >= start).to(self.metric.device)
            return torch.stack(metric).sub(self.metric) * seen


def entries(sites: Sites) -> tuple[str, ...]:
    """Where a run can begin: each block's input, and behind them all the final norm's."""
    return (*(b.name("resid") for b in sites.blocks), "final")


# -- skipping positions ----------------------------------------------------------------------------


def _cache(past: tuple[tuple[Tensor, Tensor], ...], start: int) -> dict[str, Any]:
    """The argument that makes a model run from `start` on."""
    if not past:
        return {}
    from transformers import Cache

    return {
        "past_key_values": Cache(layers=[_layer(k[:, :, :start], v[:, :, :start]) for k, v in past])
    }


def _layer(
    keys: Float[Tensor, "pair head past d_head"], values: Float[Tensor, "pair head past d_head"]
) -> Any:
    """One block's part of a cache: every copy of the pairs has the same past, and none is kept."""
    from transformers.cache_utils import DynamicLayer

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        copies = (len(new_keys) // len(keys), 1, 1, 1)
        return (
            torch.cat([keys.repeat(copies), new_keys], -2),
            torch.cat([values.repeat(copies), new_values], -2),
        )

    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.update = keys, values, update
    return layer


def _last_mlp(sites: Sites, task: Any, copies: int, start: int) -> dict[str, Edit]:
    """The last MLP gets the answer position alone, and what it adds is broadcast.

    Right at the answer position, the only one that is read. Not in parallel blocks, some of which
    add attention to the MLP's output in place.
    """
    last = sites.blocks[-1]
    pick = answers_only(sites, task, copies, start)["unembed"]
    return {} if last.parallel else {last.name("mlp_in"): pick}


def _keys_values(
    sites: Sites, task: Any, tokens: Tensor, final: Float[Tensor, "pair pos d_model"]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of each block, or nothing if the run cannot be continued from its middle.

    It cannot if the metric reads all positions, in models that read both ways, and in those whose
    state is no keys and values.
    """
    from transformers import DynamicCache

    if not task.metric.reads_answer_only:
        return ()
    cache, middle = DynamicCache(), tokens.shape[1] // 2
    try:
        with torch.no_grad():
            sites.model(tokens, past_key_values=cache)
            past = tuple((layer.keys, layer.values) for layer in cache.layers)
            if len(past) != len(sites.blocks):
                return ()
            edits = _last_mlp(sites, task, 1, middle)
            with editing(sites, edits), reading(sites, ("final",)) as values:
                sites.model(tokens[:, middle:], **_cache(past, middle))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return ()  # the model takes no such cache
    pick = answers_only(sites, task, 1, middle)["unembed"]
    found, expected = pick(values["final"]), pick(final[:, middle:])
    tolerance = max(1e-4, 8 * torch.finfo(final.dtype).eps) * expected.abs().max()
    return past if bool((found - expected).abs().max() <= tolerance) else ()


# -- skipping blocks -------------------------------------------------------------------------------


@contextmanager
def output_shapes(sites: Sites) -> Iterator[dict[int, int]]:
    """Notes how each block returns: 0 for a bare tensor, else the length of the tuple."""
    seen: dict[int, int] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    with ExitStack() as stack:
        for block in sites.blocks:
            module = sites.model.blocks[block.layer]
            stack.callback(module.register_forward_hook(note(block.layer)).remove)
        yield seen


@contextmanager
def skipping(sites: Sites, layers: Iterable[int], outputs: Mapping[int, int]) -> Iterator[None]:
    """Some blocks hand their input on, in the form in which they return (see `output_shapes`)."""

    def hand_on(size: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (size - 1)) if size else hidden

        return forward

    skipped = [(sites.model.blocks[layer], outputs[layer]) for layer in layers]
    try:
        for module, size in skipped:
            # an attribute of the instance hides the method of its class until it is deleted;
            # a bridge's own __setattr__ would set it on the module that it wraps
            object.__setattr__(module, "forward", hand_on(size))
        yield
    finally:
        for module, _ in skipped:
            vars(module).pop("forward", None)
