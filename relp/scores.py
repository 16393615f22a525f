"""The labelled result: scores of nodes or edges, with everything needed to read them."""

from __future__ import annotations

import html
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from relp.choices import Direction, Level
from relp.files import check_texts, written_whole
from relp.layout import Component, Layout

__all__ = [
    "EdgeEffects",
    "EdgeScores",
    "Effects",
    "NodeEffects",
    "NodeScores",
    "Pairs",
    "Provenance",
    "Scores",
    "token_at",
    "span_index",
    "span_places",
]

S = TypeVar("S", bound="Scores")
N = TypeVar("N", bound="NodeScores")

ALL_POSITIONS = ("all positions",)
"""The `tokens` of effects that are of all positions at once."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where numbers come from; every file that holds them says it.

    >>> scores.provenance.title
    'RELP · ioi-gpt2 · ioi · denoise'
    """

    model: str
    task: str
    metric: str
    direction: Direction
    rules: str
    """Name of the rules, `exact` for measured effects."""
    versions: str = "unknown"
    """Of relp and of the libraries that compute."""
    dtype: str = "unknown"
    """Of the model's weights."""
    weights: str = "unknown"
    """A fingerprint of them."""
    quantization: str = ""
    """How they were stored before they were dequantised, as `Q4_1 (4-bit)`; else empty."""
    compatibility: bool = False
    """Whether the bridge was in TransformerLens' compatibility mode, whose weights are others."""
    dictionaries: str = ""
    """Fingerprints of the dictionaries whose features are components, as `L3.mlp 1f0c…`."""

    @classmethod
    def of(cls, labels: Mapping[str, Any]) -> Provenance:
        """What a file, or a graph, says of itself; labels of other things are left alone.

        Raises:
            ValueError: there is no such direction.
            KeyError, TypeError: a label is missing, or of another type.
        """
        values = {f.name: labels[f.name] for f in fields(cls)}
        return cls(**values | {"direction": Direction(values["direction"])})

    @property
    def title(self) -> str:
        """One line that says where the numbers come from."""
        model = f"{self.model}, {self.quantization}" if self.quantization else self.model
        return f"{self.rules} · {model} · {self.task} · {self.direction}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs:
    """What is known of the pairs of prompts that a result is about.

    >>> scores.pairs.lengths
    tensor([16, 16, 16, 16])
    """

    clean: Float[Tensor, " pair"]
    """The metric on the clean prompts."""
    corrupt: Float[Tensor, " pair"]
    """The metric on the corrupt prompts."""
    lengths: Int[Tensor, " pair"]
    """Tokens of each pair; entries of node scores from there on are 0."""
    spans: Mapping[str, Int[Tensor, " pair"]] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    """What stands at each position (see `relp.bridge.source.token_labels`), or empty."""
    prompt: tuple[str, ...] = ()
    """The tokens of the first clean prompt, as an example, or empty."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", MappingProxyType(dict(self.spans)))

    # a copy, and what another process gets, has spans of its own that are as read-only as these
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "spans": dict(self.spans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spans=MappingProxyType(state["spans"]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(ABC):
    """First-order estimates of what patching each component or edge would do to the metric.

    >>> scores.top(3)                           # the largest, as a table
    >>> heads, table = scores.of_kind("head")   # table [pair, head, pos]
    >>> scores.save("scores.safetensors")
    >>> Scores.load("scores.safetensors")
    NodeScores(nodes[4, 67, 16] [pair, component, pos], model='ioi-gpt2', ...)

    `NodeScores` and `EdgeScores` are the two forms. Unit: that of the metric. Sign: see
    `Direction`: with `"denoise"` positive means that putting the clean value into the corrupt run
    raises the metric, with `"noise"` that putting the corrupt value into the clean run raises it.
    """

    provenance: Provenance
    pairs: Pairs
    places: tuple[str, ...] = ()
    """What the position axis holds instead of tokens: the named spans, and `other` for the rest."""
    resolution: float = 0.0
    """Changes of the metric up to this are rounding, no effect: of measured ones, the last place
    of the metric in the model's precision (mean over pairs); 0 for estimates."""
    strata: Int[Tensor, "*cell"] | None = None
    """Of effects of which some were drawn at random (`circuits.verify`): the number of the stratum
    that each component at a position, or each edge, was drawn from; -1 where there is none. None if
    what is measured stands for itself alone."""
    remainder: Mapping[str, float] = field(default_factory=dict)
    """Module and operation -> what scores cannot explain, because a router (or another choice)
    goes different ways in the two runs; mean over pairs, in the unit of the metric. Only rules that
    compare two runs know it: with it, scores under DEEPLIFT sum to the gap."""

    noun: ClassVar[str] = "score"
    level: ClassVar[Level]
    _other_form: ClassVar[str]
    """What to do for what the other form has alone."""

    # -- where it comes from -------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The model's name."""
        return self.provenance.model

    @property
    def task(self) -> str:
        """The task's name."""
        return self.provenance.task

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.provenance.metric

    @property
    def direction(self) -> Direction:
        """In which run something is changed."""
        return self.provenance.direction

    @property
    def rules(self) -> str:
        """Name of the rules, `exact` for measured effects."""
        return self.provenance.rules

    @property
    def title(self) -> str:
        """One line that says where the numbers come from."""
        return self.provenance.title

    @property
    def clean(self) -> Float[Tensor, " pair"]:
        """The metric on the clean prompts."""
        return self.pairs.clean

    @property
    def corrupt(self) -> Float[Tensor, " pair"]:
        """The metric on the corrupt prompts."""
        return self.pairs.corrupt

    @property
    def lengths(self) -> Int[Tensor, " pair"]:
        """Tokens of each pair."""
        return self.pairs.lengths

    @property
    def spans(self) -> Mapping[str, Int[Tensor, " pair"]]:
        """The position of each named span in each pair."""
        return self.pairs.spans

    @property
    def tokens(self) -> tuple[str, ...]:
        """What stands at each position, or empty."""
        return self.pairs.tokens

    @property
    def place_labels(self) -> tuple[str, ...]:
        """What figures call each entry of the position axis; empty if it is summed over.

        `" Mary"@4` where all pairs have that token, `IO@2` where a span's tokens differ between
        pairs, `@7` else; the name of a span where scores are by span.
        """
        if self.places or self.tokens == ALL_POSITIONS:
            return self.tokens
        labels = []
        for pos in range(self._width()):
            token = self.tokens[pos] if pos < len(self.tokens) else ""
            named = token in self.spans and bool((self.spans[token] == pos).all())
            labels.append(f"{token}@{pos}" if named else token_at(token, pos))
        return tuple(labels)

    @abstractmethod
    def _width(self) -> int:
        """The length of the position axis, 0 if there is none."""

    @property
    def gap(self) -> Float[Tensor, " pair"]:
        """What a complete patch does to the metric: clean - corrupt for `denoise`, else minus."""
        return (self.clean - self.corrupt) * self.direction.sign

    def renamed(self: S, rules: str) -> S:
        """The same under another name: results that are compared are told apart by it.

        >>> scores.renamed("RELP, 64 pairs").rules
        'RELP, 64 pairs'
        """
        return replace(self, provenance=replace(self.provenance, rules=rules))

    if not TYPE_CHECKING:  # else every name would exist

        def __getattr__(self, name: str) -> Any:
            theirs = NodeScores if self.level == "edge" else EdgeScores
            known = hasattr(theirs, name) or name in theirs.__dataclass_fields__
            if name.startswith("_") or not known:
                raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
            raise AttributeError(
                f"{name!r} is of {theirs.level} scores; these are of {self.level}s; "
                f"{self._other_form}"
            )

    # -- reading -------------------------------------------------------------------------------

    @property
    def table(self) -> Tensor:
        """`nodes` or `edges`."""
        return getattr(self, f"{self.level}s")

    def resolved(self: S) -> S:
        """The same with 0 for what is up to `resolution`: before sums, in which it would add up."""
        if not self.resolution:
            return self
        rounded = self.table.masked_fill(self.table.abs() <= self.resolution, 0.0)
        change: dict[str, Any] = {f"{self.level}s": rounded}
        return replace(self, **change)

    @property
    def sampling_weights(self) -> Float[Tensor, "*cell"] | None:
        """How many cells each measured one stands for: of its stratum, all by those measured.

        The inverse of the probability with which it was drawn; 0 for what is not measured. None if
        nothing was drawn. Shape: that of `strata`.
        """
        if self.strata is None:
            return None
        numbers = (self.strata + 1).flatten().cpu()
        measured = self._measured().flatten().cpu() & (numbers > 0)
        seen, last = numbers[measured], int(numbers.max()) + 1
        size = torch.bincount(numbers).double() / torch.bincount(seen, minlength=last)
        found = size.new_zeros(len(numbers))
        found[measured] = size[seen]
        return found.reshape(self.strata.shape)

    @abstractmethod
    def _measured(self) -> Tensor:
        """Where the table, without pairs, holds numbers."""

    def _check_strata(self, shape: torch.Size) -> None:
        if self.strata is not None and self.strata.shape != shape:
            raise ValueError(
                f"`strata` must be {list(shape)}, one number for each cell of the table; got "
                f"{list(self.strata.shape)}; leave it out where cells were summed or left out"
            )

    @property
    def unresolved(self) -> float:
        """Share of the nodes or edges that are up to `resolution`, of those that are not 0.

        Exact zeros do not count: most are where nothing changes (`agreement` can tell).
        """
        sizes = self.table[(self.table != 0) & ~self.table.isnan()].abs()
        return float((sizes <= self.resolution).float().mean()) if len(sizes) else 0.0

    @abstractmethod
    def by_component(self) -> tuple[tuple[str, ...], Float[Tensor, " component"]]:
        """Who is patched, or writes, and the sum of its scores: over positions, and readers."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component and position, or per edge; the mean over pairs.

        Edge rows are those that exist (the writer comes before the reader). A column `span` takes
        the place of `pos` where scores are by span.
        """
        return self._rows(slice(None))

    def top(self, k: int) -> pd.DataFrame:
        """The `k` rows of `to_dataframe` with the largest absolute value, largest first."""
        if k < 1:
            raise ValueError(f"`k` must be at least 1; got {k}; ask for one row or more")
        # NaN, what was not measured, comes last
        return self._rows(np.argsort(-abs(self._values()), kind="stable")[:k])

    @abstractmethod
    def _values(self) -> Float[np.ndarray, " row"]:
        """The last column of `to_dataframe`."""

    @abstractmethod
    def _rows(self, chosen: slice | Int[np.ndarray, " row"]) -> pd.DataFrame:
        """These rows of `to_dataframe`; others cost nothing."""

    @abstractmethod
    def _axes(self) -> str:
        """The axes of the table, for `repr`."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.level}s{list(self.table.shape)} {self._axes()}, "
            f"model={self.model!r}, task={self.task!r}, rules={self.rules!r}, "
            f"direction={str(self.direction)!r}, metric={self.metric!r}"
            + (f", quantization={q!r}" if (q := self.provenance.quantization) else "")
            + (f", remainder={sum(self.remainder.values()):+.4f}" if self.remainder else "")
            + ")"
        )

    def _repr_html_(self) -> str:
        head = (
            f"<b>{type(self).__name__}</b> · {html.escape(self.title)} · {self.level} level<br>"
            f"{html.escape(self.metric)}: clean {float(self.clean.mean()):.3f}, "
            f"corrupt {float(self.corrupt.mean()):.3f}, {len(self.clean)} pairs"
        )
        if self.remainder:
            rest = ", ".join(f"{where} {value:+.4f}" for where, value in self.remainder.items())
            head += f"<br>not explained (the runs branch differently): {html.escape(rest)}"
        if self.unresolved:
            head += f"<br>{self.unresolved:.1%} are rounding (up to {self.resolution:.2g})"
        return head + self.top(10).to_html(index=False, float_format="{:.4f}".format)

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes a .safetensors file (labels as JSON in its header); the file appears whole.

        Raises:
            ValueError: the suffix is not `.safetensors`, or a name or token holds half a surrogate
                pair.
            OSError: the folder does not exist or cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"scores must be saved as .safetensors; got {path.name!r}; change the suffix "
                "(a circuit graph is saved with circuits.save)"
            )
        tensors = {k: getattr(self, k) for k in ("clean", "corrupt", "lengths", f"{self.level}s")}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        # the format refuses tensors that share memory, as spans of one position may
        tensors |= {f"span.{k}": v.cpu().clone() for k, v in self.spans.items()}
        if self.strata is not None:
            tensors["strata"] = self.strata.cpu().contiguous()
        labels = {
            "type": type(self).__name__,
            "provenance": asdict(self.provenance),
            "tokens": self.tokens,
            "prompt": self.pairs.prompt,
            "places": self.places,
            "resolution": self.resolution,
            "remainder": dict(self.remainder),
            **self._names(),
        }
        check_texts("the result", [labels, *self.spans])
        with written_whole(path) as temporary:
            # not save_file: its files can be read by their owner only, whatever the umask
            temporary.write_bytes(to_bytes(tensors, metadata={"relp": json.dumps(labels)}))
        return path

    @abstractmethod
    def _names(self) -> dict[str, Any]:
        """What the table's axes stand for, as JSON."""

    @classmethod
    @abstractmethod
    def _named(cls, labels: dict[str, Any]) -> dict[str, Any]:
        """Takes what `_names` gave out of `labels`."""

    @staticmethod
    def load(path: str | Path) -> NodeScores | EdgeScores:
        """Reads what `save` wrote; gives scores or effects as they were saved.

        Raises:
            ValueError: the file was not written by `save`.
            OSError: the file does not exist or cannot be read.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                labels = json.loads((file.metadata() or {})["relp"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            kind = _FORMS[labels.pop("type")]
            provenance = Provenance.of(labels.pop("provenance"))
            table = {f"{kind.level}s": tensors.pop(f"{kind.level}s")}
            table["strata"] = tensors.pop("strata", None)
            spans = {k[5:]: tensors.pop(k) for k in list(tensors) if k.startswith("span.")}
            tokens, prompt = (tuple(labels.pop(k, ())) for k in ("tokens", "prompt"))
            pairs = Pairs(spans=spans, tokens=tokens, prompt=prompt, **tensors)
            table |= kind._named(labels)
            labels["places"] = tuple(labels["places"])
            return kind(provenance=provenance, pairs=pairs, **table, **labels)
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{str(path)!r} must be a file written by Scores.save; it is not ({error}); "
                "for a circuit graph use circuits.load"
            ) from error


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class NodeScores(Scores):
    """Scores of components, pair by pair and position by position.

    >>> scores.nodes.shape
    torch.Size([4, 67, 16])
    >>> scores.by_span().places
    ('IO', 'S1', 'S2', 'end', 'other')
    """

    components: tuple[str, ...]
    nodes: Float[Tensor, "pair component pos"]

    edges: ClassVar[None] = None
    level = Level.NODE
    _other_form = "call attribute(model, task, level='edge')"

    def __post_init__(self) -> None:
        if self.nodes.dim() != 3 or self.nodes.shape[1] != len(self.components):
            raise ValueError(
                f"`nodes` must be [pair, component, pos] with {len(self.components)} components; "
                f"got {list(self.nodes.shape)}; name each of them once"
            )
        self._check_strata(self.nodes.shape[1:])

    def _width(self) -> int:
        return self.nodes.shape[-1]

    def _measured(self) -> Tensor:
        return ~self.nodes.isnan().all(0)

    @property
    def mean(self) -> Float[Tensor, "component pos"]:
        """The scores at each position, averaged over the pairs that are long enough for it."""
        positions = torch.arange(self.nodes.shape[-1])
        pairs = (positions < self.lengths[:, None]).sum(0).clamp(min=1)
        return self.nodes.sum(0) / pairs

    def kinds(self) -> tuple[str, ...]:
        """The kinds of component present, in order of appearance."""
        return tuple(dict.fromkeys(Component.parse(c).kind for c in self.components))

    def of_kind(self, kind: str) -> tuple[tuple[str, ...], Float[Tensor, "pair component pos"]]:
        """Names and scores of the components of one kind (`resid`, `attn`, `head`, `mlp`, …).

        Raises:
            ValueError: the result has no such kind.
        """
        at = [i for i, c in enumerate(self.components) if Component.parse(c).kind == kind]
        if not at:
            raise ValueError(
                f"`kind` must be one of {self.kinds()}; got {kind!r}; see Scores.kinds()"
            )
        return tuple(self.components[i] for i in at), self.nodes[:, at]

    def by_span(self: N) -> N:
        """The scores summed over the positions of each of the task's spans, and over the others.

        Each pair has its spans where its own prompt has them, so that templates of different
        lengths line up. A position that several spans name goes to the first of them. What is
        rounding is left out. Effects of all positions at once stay as they are.
        """
        if self.places or self.tokens == ALL_POSITIONS:
            return self
        places = span_places(self.spans)
        index = span_index(self.spans, len(self.nodes), self.nodes.shape[-1])
        nodes = self.resolved().nodes
        summed = nodes.new_zeros(*nodes.shape[:2], len(places))
        summed.scatter_add_(2, index[:, None].expand_as(nodes), nodes)
        lengths = torch.full_like(self.lengths, len(places))
        pairs = replace(self.pairs, lengths=lengths, tokens=places)
        return replace(self, nodes=summed, pairs=pairs, places=places, strata=None)

    def together(self: N) -> N:
        """The scores summed over all positions, as effects of all positions at once are."""
        pairs = replace(self.pairs, tokens=ALL_POSITIONS)
        nodes = self.nodes.sum(-1, keepdim=True)
        strata = self.strata if self.is_together else None
        return replace(self, nodes=nodes, pairs=pairs, strata=strata)

    @property
    def is_together(self) -> bool:
        """True if they are of all positions at once."""
        return self.tokens == ALL_POSITIONS

    def by_component(self) -> tuple[tuple[str, ...], Float[Tensor, " component"]]:
        """The components, and the sum of each one's scores over positions; mean over pairs."""
        return self.components, self.nodes.sum(-1).mean(0)

    def _values(self) -> Float[np.ndarray, " row"]:
        return self.mean.detach().flatten().cpu().double().numpy()

    def _rows(self, chosen: slice | Int[np.ndarray, " row"]) -> pd.DataFrame:
        values, width = self._values(), self.nodes.shape[-1]
        numbers = np.arange(len(values))[chosen]
        component, pos = np.divmod(numbers, width)
        parsed = [Component.parse(c) for c in self.components]
        frame = pd.DataFrame(parsed, columns=["component", "kind", "layer", "head"])
        frame = frame.take(component).reset_index(drop=True)
        if self.places:
            frame["span"] = pd.Index(self.places).take(pos)
        else:
            frame["pos"] = pos
            if len(self.tokens) == width and len(self.lengths.unique()) == 1:
                frame["token"] = pd.Index(self.tokens).take(pos)
        frame[self.noun] = values[numbers]
        return frame

    def _axes(self) -> str:
        return "[pair, component, pos]"

    def _names(self) -> dict[str, Any]:
        return {"components": self.components}

    @classmethod
    def _named(cls, labels: dict[str, Any]) -> dict[str, Any]:
        return {"components": tuple(labels.pop("components"))}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EdgeScores(Scores):
    """Scores of edges: what each reader hears of each writer.

    >>> edges.edges[edges.layout.row["embed"], edges.layout.column["L0H0.q"]]
    """

    layout: Layout
    """Which edges there are, and where in `edges`."""
    edges: Float[Tensor, "*pos writer reader"]
    """Mean over pairs, summed over positions unless they were asked for. Entries of a writer
    that does not come before the reader are 0."""

    nodes: ClassVar[None] = None
    level = Level.EDGE
    _other_form = "they are averaged over pairs already; call attribute(model, task, level='node')"

    def __post_init__(self) -> None:
        shape = self.layout.exists.shape
        if self.edges.dim() not in (2, 3) or self.edges.shape[-2:] != shape:
            raise ValueError(
                f"`edges` must end in [writer {shape[0]}, reader {shape[1]}]; got "
                f"{list(self.edges.shape)}; give scores and layout of one model"
            )
        self._check_strata(self.edges.shape)

    def _width(self) -> int:
        return len(self.edges) if self.edges.dim() == 3 else 0

    def _measured(self) -> Tensor:
        return ~self.edges.isnan()

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers, the rows of `edges`."""
        return self.layout.writers

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers, the columns of `edges`."""
        return self.layout.readers

    @property
    def parallel(self) -> bool:
        """True if MLPs do not read what their own block's heads write."""
        return self.layout.parallel

    @property
    def by_position(self) -> Float[Tensor, "pos writer reader"]:
        """`edges` with an axis for positions; of length 1 if they are summed over all."""
        return self.edges if self.edges.dim() == 3 else self.edges[None]

    @property
    def positions(self) -> Sequence[int]:
        """The positions of `by_position`; -1 alone if they are summed over all."""
        return range(len(self.edges)) if self.edges.dim() == 3 else (-1,)

    def by_component(self) -> tuple[tuple[str, ...], Float[Tensor, " writer"]]:
        """The writers, and the sum of each one's scores over readers and positions."""
        return self.writers, self.by_position.sum(-1).sum(0)

    def _values(self) -> Float[np.ndarray, " row"]:
        table = self.by_position.detach().cpu().permute(2, 1, 0)
        return table[self.layout.exists.T].flatten().double().numpy()

    def _rows(self, chosen: slice | Int[np.ndarray, " row"]) -> pd.DataFrame:
        values = self._values()
        numbers = np.arange(len(values))[chosen]
        edge, pos = np.divmod(numbers, len(self.by_position))
        reader, writer = (place[edge].numpy() for place in self.layout.exists.T.nonzero().T)
        slots = [slot for _, slot in self.layout.targets]
        columns = {"writer": (self.writers, writer), "reader": (self.readers, reader),
                   "slot": (slots, reader)}  # fmt: skip
        frame = pd.DataFrame({k: pd.Index(v).take(at) for k, (v, at) in columns.items()})
        if self.places:
            frame["span"] = pd.Index(self.places).take(pos)
        elif self.edges.dim() == 3:
            frame["pos"] = pos
        frame[self.noun] = values[numbers]
        return frame

    def _axes(self) -> str:
        return "[writer, reader]" if self.edges.dim() == 2 else "[pos, writer, reader]"

    def _names(self) -> dict[str, Any]:
        layout = self.layout
        return {"writers": layout.writers, "readers": layout.readers, "parallel": layout.parallel}

    @classmethod
    def _named(cls, labels: dict[str, Any]) -> dict[str, Any]:
        writers, readers = (tuple(labels.pop(names)) for names in ("writers", "readers"))
        return {"layout": Layout.of(writers, readers, labels.pop("parallel"))}


class Effects(Scores):
    """What patching was measured to do: the ground truth, in the layout of scores.

    >>> effect = patch(model, task, components=["mlp"])
    >>> effect.top(3)
    >>> effect.rules
    'exact'
    """

    noun = "effect"


class NodeEffects(NodeScores, Effects):
    """What patching each component was measured to do.

    >>> effect.resolution            # smaller effects are rounding
    """


class EdgeEffects(EdgeScores, Effects):
    """What patching what a reader hears of a writer was measured to do.

    >>> effect = patch(model, task, level="edge", edges=[("L1H1", "L3H5.q")])
    >>> effect.top(1)
    """


_FORMS: dict[str, Any] = {
    kind.__name__: kind for kind in (NodeScores, EdgeScores, NodeEffects, EdgeEffects)
}


def token_at(token: str, pos: int) -> str:
    """What figures call a token at its position; the position alone if the token is empty.

    It is in quotes, so that spaces are seen, and in one line.

    >>> from relp.bridge import token_at
    >>> token_at(" Mary", 4)
    '" Mary"@4'
    """
    return f"{json.dumps(token, ensure_ascii=False) if token else ''}@{pos}"


def span_places(spans: Iterable[str]) -> tuple[str, ...]:
    """The names of spans, and behind them that of all other positions: one that no span has."""
    names, rest = tuple(spans), "other"
    while rest in names:
        rest = f"{rest} positions"
    return (*names, rest)


def span_index(
    spans: Mapping[str, Int[Tensor, " pair"]], pairs: int, width: int
) -> Int[Tensor, "pair pos"]:
    """The number of the span at each position, the number of spans where there is none."""
    index = torch.full((pairs, width), len(spans))
    for number, at in reversed(list(enumerate(spans.values()))):  # the first name stays
        index[torch.arange(pairs), at.cpu()] = number
    return index
