"""The one seam to `TransformerBridge`: its sites, its runs, and what is added to and read from its
residual stream."""

from relp.bridge.basis import Basis, Matrix, Slot, bias, span, weight
from relp.bridge.capture import ROOT
from relp.bridge.features import Features, divisions, features_of, fingerprints
from relp.bridge.memory import (
    PAIR_BYTES,
    ROW_BYTES,
    circuit_bytes,
    circuit_runs,
    pair_bytes,
    pairs_kept,
    prompts_per_run,
    run_bytes,
)
from relp.bridge.quantized import quantization
from relp.bridge.rerun import POINTWISE, Rerun
from relp.bridge.room import Room, as_fits
from relp.bridge.run import (
    answers_only,
    entries,
    observe,
    output_shapes,
    precise_logits,
    skipping,
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
    reader_sites,
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
    "ROW_BYTES",
    "Basis",
    "Block",
    "Edit",
    "Features",
    "Matrix",
    "Place",
    "Reading",
    "Rerun",
    "Room",
    "Sites",
    "Slot",
    "answers_only",
    "as_fits",
    "bias",
    "circuit_bytes",
    "circuit_runs",
    "difference",
    "divisions",
    "editing",
    "entries",
    "exact_changes",
    "features_of",
    "fingerprint",
    "fingerprints",
    "must_match",
    "normed",
    "observe",
    "output_shapes",
    "pairs_of",
    "pair_bytes",
    "pairs_kept",
    "token_at",
    "stream_places",
    "precise_logits",
    "prompts_per_run",
    "run_bytes",
    "provenance",
    "quantization",
    "reader_sites",
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
