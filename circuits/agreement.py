"""How well estimates agree with exact effects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from relp.scores import Scores

__all__ = ["agreement"]

MINIMUM = 3


def agreement(scores: Scores | Sequence[Scores], effect: Scores) -> pd.DataFrame:
    """Per-pair agreement of node scores with exact effects, one row per rules and kind.

    >>> agreement(attribute(model, task), patch(model, task))

    Columns: `rules`, `kind`, `pearson` and `spearman` (correlation over a pair's components and
    positions, mean over pairs), `relative_error` (norm of the difference over the norm of the
    effects, mean over pairs), `pairs` (how many the correlations are over). A pair with fewer than
    three effects other than 0 has no correlation worth the name: if one token differs, the
    embedding has a single effect, and any estimate of the right sign would get 1.

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
            table, errors = [], []
            for i, length in enumerate(effect.lengths.tolist()):
                x = estimated[i, :, :length].flatten().double().numpy()
                y = measured[i, :, :length].flatten().double().numpy()
                size = np.linalg.norm(y)
                errors += [np.linalg.norm(x - y) / size] if size > 0 else []
                if np.ptp(x) > 0 and np.count_nonzero(y) >= MINIMUM:
                    table.append((stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]))
            mean = np.mean(table, axis=0) if table else [np.nan] * 2
            error = np.mean(errors) if errors else np.nan
            rows.append((s.rules, kind, *map(float, mean), float(error), len(table)))
    columns = ["rules", "kind", "pearson", "spearman", "relative_error", "pairs"]
    return pd.DataFrame(rows, columns=columns)


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
    for what in ("lengths", "clean", "corrupt"):
        a, b = getattr(scores, what), getattr(effect, what)
        if a.shape != b.shape or not bool((a - b).abs().max() <= 1e-3 * (1 + b.abs().max())):
            raise ValueError(
                f"scores and effects must be of the same pairs; their {what!r} differ; compute "
                "both with the same task object"
            )
    missing = set(effect.components) - set(scores.components)
    if missing or scores.nodes.shape[0] != effect.nodes.shape[0]:
        raise ValueError(
            "scores and effects must have the same pairs and components; got "
            f"{list(scores.nodes.shape)} and {list(effect.nodes.shape)}, unknown to the scores: "
            f"{sorted(missing)[:3]}; compute both with the same model and task"
        )
