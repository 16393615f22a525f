"""The one seam to `TransformerBridge`: its sites, its runs, and what is added to and read from its
residual stream."""

from relp.bridge.basis import Basis, Matrix, Slot, bias, span, weight
from relp.bridge.capture import ROOT
from relp.bridge.memory import (
    PAIR_BYTES,
    as_fits,
    circuit_runs,
    pairs_kept,
    prompts_per_run,
)
from relp.bridge.quantized import quantization
from relp.bridge.rerun import POINTWISE, Rerun, entries, output_shapes, skipping
from relp.bridge.run import (
    answers_only,
    observe,
    precise_logits,
    undisturbed,
    warn_caller,
)
from relp.bridge.sites import Block, Edit, Sites, editing, reading
from relp.bridge.source import fingerprint, pairs_of, provenance, versions
from relp.bridge.stream import (
    REBUILT,
    Place,
    Reading,
    difference,
    exact_changes,
    must_match,
    normed,
    readings,
    received,
    stream_places,
    stream_sites,
    what_is_added,
    writer_changes,
)
from relp.scores import span_index, span_places, token_at

__all__ = [
    "PAIR_BYTES",
    "POINTWISE",
    "REBUILT",
    "ROOT",
    "Basis",
    "Block",
    "Edit",
    "Matrix",
    "Place",
    "Reading",
    "Rerun",
    "Sites",
    "Slot",
    "answers_only",
    "as_fits",
    "bias",
    "circuit_runs",
    "difference",
    "editing",
    "entries",
    "exact_changes",
    "fingerprint",
    "must_match",
    "normed",
    "observe",
    "output_shapes",
    "pairs_of",
    "pairs_kept",
    "token_at",
    "stream_places",
    "precise_logits",
    "prompts_per_run",
    "provenance",
    "quantization",
    "reading",
    "readings",
    "received",
    "skipping",
    "span",
    "span_index",
    "span_places",
    "stream_sites",
    "undisturbed",
    "versions",
    "warn_caller",
    "weight",
    "what_is_added",
    "writer_changes",
]
