"""The labelled result: scores of nodes or edges, with everything needed to read them."""

from __future__ import annotations

import html
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from relp.layout import Component, Layout

__all__ = ["Effects", "Scores"]

ALL_POSITIONS = ("all positions",)
"""The `tokens` of effects that are of all positions at once."""


@dataclass(frozen=True, eq=False)
class Scores:
    """First-order estimates of what patching each component or edge would do to the metric.

    >>> scores.top(3)                           # the largest, as a table
    >>> heads, table = scores.of_kind("head")   # table [pair, head, pos]
    >>> scores.save("scores.safetensors")
    >>> Scores.load("scores.safetensors")
    Scores(nodes[4, 67, 16] [pair, component, pos], model='ioi-gpt2', ...)

    Unit: that of the metric. Sign: with `direction="denoise"` positive means that putting the
    clean value into the corrupt run raises the metric; with `"noise"` that putting the corrupt
    value into the clean run raises it.
    """

    model: str
    task: str
    rules: str
    """Name of the rules, `exact` for measured effects."""
    direction: str
    metric: str
    clean: Float[Tensor, " pair"]
    """The metric on the clean prompts."""
    corrupt: Float[Tensor, " pair"]
    """The metric on the corrupt prompts."""
    lengths: Int[Tensor, " pair"]
    """Tokens of each pair; entries of `nodes` from there on are 0."""
    parallel: bool = False
    """MLPs do not read what their own block's heads write (GPT-J, GPT-NeoX, Falcon, Phi)."""
    spans: Mapping[str, Int[Tensor, " pair"]] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    """What stands at each position (see `relp.attribution.token_labels`), or empty."""
    places: tuple[str, ...] = ()
    """What the position axis holds instead of tokens: the named spans, and `other` for the rest."""
    resolution: float = 0.0
    """Changes of the metric up to this are rounding, no effect: of measured ones, the last place
    of the metric in the model's precision (mean over pairs); 0 for estimates."""
    components: tuple[str, ...] = ()
    nodes: Float[Tensor, "pair component pos"] | None = None
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    edges: Float[Tensor, "*pos writer reader"] | None = None
    """Mean over pairs, summed over positions unless they were asked for. Entries of a writer
    that does not come before the reader are 0."""

    remainder: Mapping[str, float] = field(default_factory=dict)
    """Module and operation -> what scores cannot explain, because a router (or another choice)
    goes different ways in the two runs; mean over pairs, in the unit of the metric. Only rules that
    compare two runs know it: with it, their scores sum to the gap."""

    noun = "score"

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", MappingProxyType(dict(self.spans)))
        if (self.nodes is None) == (self.edges is None):
            raise ValueError("Scores must hold either nodes or edges; got both or neither")
        if self.nodes is not None and self.nodes.shape[1] != len(self.components):
            raise ValueError(
                f"`nodes` must be [pair, component, pos] with {len(self.components)} components; "
                f"got {list(self.nodes.shape)}"
            )
        if self.edges is not None and self.edges.shape[-2:] != (
            len(self.writers),
            len(self.readers),
        ):
            raise ValueError(
                f"`edges` must end in [writer {len(self.writers)}, reader {len(self.readers)}]; "
                f"got {list(self.edges.shape)}"
            )

    # a copy, and what another process gets, has spans of its own that are as read-only as these
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "spans": dict(self.spans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spans=MappingProxyType(state["spans"]))

    # -- reading -------------------------------------------------------------------------------

    @property
    def level(self) -> str:
        """`"node"` or `"edge"`."""
        return "node" if self.nodes is not None else "edge"

    @property
    def layout(self) -> Layout:
        """Which edges there are, and where in `edges`; node scores have none."""
        return Layout.of(self.writers, self.readers, self.parallel)

    @property
    def gap(self) -> Float[Tensor, " pair"]:
        """What a complete patch does to the metric: clean - corrupt for `denoise`, else minus."""
        gap = self.clean - self.corrupt
        return gap if self.direction == "denoise" else -gap

    @property
    def title(self) -> str:
        """One line that says where the numbers come from."""
        return f"{self.rules} · {self.model} · {self.task} · {self.direction}"

    @property
    def mean(self) -> Float[Tensor, "component pos"]:
        """Node scores, at each position averaged over the pairs that are long enough for it."""
        if self.nodes is None:
            raise ValueError("mean is of node scores; these are edge scores, averaged already")
        positions = torch.arange(self.nodes.shape[-1])
        pairs = (positions < self.lengths[:, None]).sum(0).clamp(min=1)
        return self.nodes.sum(0) / pairs

    def kinds(self) -> tuple[str, ...]:
        """The kinds of component present, in order of appearance."""
        return tuple(dict.fromkeys(Component.parse(c).kind for c in self.components))

    def of_kind(self, kind: str) -> tuple[tuple[str, ...], Float[Tensor, "pair component pos"]]:
        """Names and scores of the components of one kind (`resid`, `attn`, `head`, `mlp`, …).

        Raises:
            ValueError: the result is edge-level or has no such kind.
        """
        if self.nodes is None:
            raise ValueError(
                "of_kind reads node scores; these are edge scores; call attribute(level='node')"
            )
        at = [i for i, c in enumerate(self.components) if Component.parse(c).kind == kind]
        if not at:
            raise ValueError(
                f"`kind` must be one of {self.kinds()}; got {kind!r}; see Scores.kinds()"
            )
        return tuple(self.components[i] for i in at), self.nodes[:, at]

    def resolved(self) -> Scores:
        """The same with 0 for what is up to `resolution`: before sums, in which it would add up."""
        if not self.resolution:
            return self

        def rounded(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.masked_fill(table.abs() <= self.resolution, 0.0)

        return replace(self, nodes=rounded(self.nodes), edges=rounded(self.edges))

    @property
    def unresolved(self) -> float:
        """Share of the nodes or edges that are up to `resolution`, of those that are not 0.

        Exact zeros do not count: most are where nothing changes (`agreement` can tell).
        """
        table = self.nodes if self.nodes is not None else self.edges
        assert table is not None
        sizes = table[table != 0].abs()
        return float((sizes <= self.resolution).float().mean()) if len(sizes) else 0.0

    def by_span(self) -> Scores:
        """Node scores summed over the positions of each of the task's spans, and over the others.

        Each pair has its spans where its own prompt has them, so that templates of different
        lengths line up. A position that several spans name goes to the first of them. What is
        rounding is left out. Effects of all positions at once stay as they are.

        Raises:
            ValueError: the scores are of edges, which are averages over pairs already.
        """
        if self.nodes is None:
            raise ValueError(
                "by_span sums node scores; these are edge scores, averaged over pairs; call "
                "attribute(level='edge', positions='spans')"
            )
        if self.places or self.tokens == ALL_POSITIONS:
            return self
        places = (*self.spans, "other")
        index = span_index(self.spans, len(self.nodes), self.nodes.shape[-1])
        nodes = self.resolved().nodes
        assert nodes is not None
        summed = nodes.new_zeros(*nodes.shape[:2], len(places))
        summed.scatter_add_(2, index[:, None].expand_as(nodes), nodes)
        lengths = torch.full_like(self.lengths, len(places))
        return replace(self, nodes=summed, lengths=lengths, places=places, tokens=places)

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

    def _values(self) -> Float[np.ndarray, " row"]:
        """The last column of `to_dataframe`."""
        if self.nodes is not None:
            return self.mean.detach().flatten().cpu().double().numpy()
        assert self.edges is not None
        table = self.edges.detach().cpu()
        table = (table if table.dim() == 3 else table[None]).permute(2, 1, 0)
        return table[self.layout.exists.T].flatten().double().numpy()

    def _rows(self, chosen: slice | Int[np.ndarray, " row"]) -> pd.DataFrame:
        """These rows of `to_dataframe`; others cost nothing."""
        values = self._values()
        numbers = np.arange(len(values))[chosen]
        if self.nodes is not None:
            by_position, width = True, self.nodes.shape[-1]
            component, pos = np.divmod(numbers, width)
            parsed = [Component.parse(c) for c in self.components]
            frame = pd.DataFrame(parsed, columns=["component", "kind", "layer", "head"])
            frame = frame.take(component).reset_index(drop=True)
        else:
            assert self.edges is not None
            by_position = self.edges.dim() == 3
            width = len(self.edges) if by_position else 1
            edge, pos = np.divmod(numbers, width)
            reader, writer = (place[edge].numpy() for place in self.layout.exists.T.nonzero().T)
            slots = [slot for _, slot in self.layout.targets]
            columns = {"writer": (self.writers, writer), "reader": (self.readers, reader),
                       "slot": (slots, reader)}  # fmt: skip
            frame = pd.DataFrame({k: pd.Index(v).take(at) for k, (v, at) in columns.items()})
        if by_position and self.places:
            frame["span"] = pd.Index(self.places).take(pos)
        elif by_position:
            frame["pos"] = pos
            alike = len(self.tokens) == width and len(self.lengths.unique()) == 1
            if self.nodes is not None and alike:
                frame["token"] = pd.Index(self.tokens).take(pos)
        frame[self.noun] = values[numbers]
        return frame

    def __repr__(self) -> str:
        if self.nodes is not None:
            what = f"nodes{list(self.nodes.shape)} [pair, component, pos]"
        else:
            assert self.edges is not None
            axes = "[writer, reader]" if self.edges.dim() == 2 else "[pos, writer, reader]"
            what = f"edges{list(self.edges.shape)} {axes}"
        return (
            f"{type(self).__name__}({what}, model={self.model!r}, task={self.task!r}, "
            f"rules={self.rules!r}, direction={self.direction!r}, metric={self.metric!r}"
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
        tensors = {
            k: v.detach().cpu().contiguous()
            for k in ("clean", "corrupt", "lengths", "nodes", "edges")
            if (v := getattr(self, k)) is not None
        }
        # the format refuses tensors that share memory, as spans of one position may
        tensors |= {f"span.{k}": v.cpu().clone() for k, v in self.spans.items()}
        labels = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        labels = {k: v for k, v in labels.items() if k not in ("spans", "nodes", "edges")}
        labels["remainder"] = dict(self.remainder)
        labels["type"] = type(self).__name__
        check_texts("the result", [labels, *self.spans])
        with written_whole(path) as temporary:
            # not save_file: its files can be read by their owner only, whatever the umask
            temporary.write_bytes(to_bytes(tensors, metadata={"relp": json.dumps(labels)}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads what `save` wrote; gives `Scores` or `Effects` as it was saved.

        Raises:
            ValueError: the file was not written by `save`.
            OSError: the file does not exist or cannot be read.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                labels = json.loads((file.metadata() or {})["relp"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            kind = {"Scores": Scores, "Effects": Effects}[labels.pop("type")]
            spans = {k[5:]: v for k, v in tensors.items() if k.startswith("span.")}
            arrays = {k: v for k, v in tensors.items() if not k.startswith("span.")}
            names: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in labels.items()
            }
            return kind(spans=spans, **arrays, **names)
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{str(path)!r} must be a file written by Scores.save; it is not ({error}); "
                "for a circuit graph use circuits.load"
            ) from error


class Effects(Scores):
    """What patching each component was measured to do: the ground truth, in the same layout.

    >>> effect = patch(model, task, components=["mlp"])
    >>> effect.top(3)
    >>> effect.rules
    'exact'
    """

    noun = "effect"


def span_index(
    spans: Mapping[str, Int[Tensor, " pair"]], pairs: int, width: int
) -> Int[Tensor, "pair pos"]:
    """The number of the span at each position, the number of spans where there is none."""
    index = torch.full((pairs, width), len(spans))
    for number, at in reversed(list(enumerate(spans.values()))):  # the first name stays
        index[torch.arange(pairs), at.cpu()] = number
    return index


def check_texts(owner: str, value: object) -> None:
    """Refuses half a surrogate pair in any text of `value`, keys included: UTF-8 has none.

    Raises:
        ValueError: a text holds one; `owner` tells whose it is.
    """
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(
                f"text must be whole characters, as files are UTF-8; {owner} has half a surrogate "
                f"pair in {value!r}; replace it with text.encode('utf-8', 'replace').decode()"
            )
    elif isinstance(value, Mapping):
        check_texts(owner, [*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            check_texts(owner, item)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        check_texts(owner, value.tolist())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it at the end: nobody ever sees half a file.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the folder cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must lie in an existing folder; {str(path.parent)!r} is none; create it first"
        )
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
