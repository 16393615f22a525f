"""How well estimates agree with exact effects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from relp.scores import Scores

__all__ = ["agreement", "pearson_per_pair"]


def agreement(scores: Scores | Sequence[Scores], effect: Scores) -> pd.DataFrame:
    """Per-pair agreement of node scores with exact effects, one row per rules and kind.

    >>> agreement(attribute(model, task), patch(model, task))

    Columns: `rules`, `kind`, `pearson` and `spearman` (correlation over a pair's components and
    positions, mean over pairs), `relative_error` (norm of the difference over the norm of the
    effects, mean over pairs), `pairs` (those where all of it is defined: not all values equal).

    Raises:
        ValueError: the two are not about the same components, pairs, task or direction.
    """
    many = [scores] if isinstance(scores, Scores) else list(scores)
    rows = []
    for s in many:
        _must_correspond(s, effect)
        for kind in [k for k in s.kinds() if k in effect.kinds()]:
            names, measured = effect.of_kind(kind)
            assert s.nodes is not None
            estimated = s.nodes[:, [s.components.index(n) for n in names]]
            table = []
            for i, length in enumerate(effect.lengths.tolist()):
                x = estimated[i, :, :length].flatten().double().numpy()
                y = measured[i, :, :length].flatten().double().numpy()
                if np.ptp(x) > 0 and np.ptp(y) > 0:
                    error = np.linalg.norm(x - y) / np.linalg.norm(y)
                    table.append((stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0], error))
            mean = np.mean(table, axis=0) if table else [np.nan] * 3
            rows.append((s.rules, kind, *map(float, mean), len(table)))
    columns = ["rules", "kind", "pearson", "spearman", "relative_error", "pairs"]
    return pd.DataFrame(rows, columns=columns)


def pearson_per_pair(scores: Scores, effect: Scores, kind: str) -> float:
    """Mean over pairs of the Pearson correlation within each pair, for one kind of component."""
    table = agreement(scores, effect).set_index("kind")
    return float(table.loc[kind, "pearson"])


def _must_correspond(scores: Scores, effect: Scores) -> None:
    if scores.nodes is None or effect.nodes is None:
        raise ValueError(
            "agreement compares node scores with node effects; one of the two holds edges; "
            "call attribute(level='node') and patch(model, task)"
        )
    for what in ("task", "direction", "metric", "model"):
        a, b = getattr(scores, what), getattr(effect, what)
        if a != b:
            raise ValueError(
                f"scores and effects must be of the same {what}; got {a!r} and {b!r}; "
                "compute both with the same model, task and direction"
            )
    missing = set(effect.components) - set(scores.components)
    if missing or scores.nodes.shape[0] != effect.nodes.shape[0]:
        raise ValueError(
            "scores and effects must have the same pairs and components; got "
            f"{list(scores.nodes.shape)} and {list(effect.nodes.shape)}, unknown to the scores: "
            f"{sorted(missing)[:3]}; compute both with the same model and task"
        )
