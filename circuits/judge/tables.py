"""Tables for papers: rounded, with intervals in brackets, as Markdown or LaTeX.

circuits.to_markdown(agreement(many, effect))
circuits.to_latex(agreement_tests(many, effect))
circuits.to_latex(evaluation)                      # CPR and CMD
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from circuits.judge.entries import Bench
    from circuits.judge.evaluation import Evaluation

__all__ = ["latex", "markdown", "rounded", "to_latex", "to_markdown"]

_LABELS = (
    "rules", "size", "kind", "layer", "one", "other", "measure", "group", "case", "method",
    "baseline",
)  # fmt: skip
"""Columns that say what a row is about."""
_USUAL = ("pearson", "spearman", "signs", "relative_error", "pairs")
"""What is shown of a table of `agreement` if nothing else is asked for: no measure alone."""
_NAMES = {
    "pearson": "Pearson r", "spearman": "Spearman ρ", "signs": "right signs", "p_value": "p",
    "p_holm": "p (Holm)",
}  # fmt: skip
_HANGS = "*: one cell decides r"
_SYMBOLS = {
    "ρ": r"$\rho$", "×": r"$\times$", "−": "$-$", "·": r"$\cdot$", "<": "$<$", ">": "$>$",
    "|": "$|$",
}  # fmt: skip
"""What LaTeX's text fonts lack, or print as something else."""


def to_markdown(
    what: pd.DataFrame | Evaluation | Bench,
    *,
    columns: Sequence[str] | None = None,
    digits: int = 2,
) -> str:
    """A table of results as Markdown, rounded, with its intervals: `0.83 [0.79, 0.87]`.

    >>> print(to_markdown(agreement([scores], effect)))
    >>> print(to_markdown(agreement([scores], effect), columns=["pearson", "overlap"], digits=3))

    Args:
        what: a table of `agreement`, `agreement_tests`, `compare`, of an `Evaluation` or of a
            `Bench`; or an `Evaluation` (its CPR and CMD), or a `Bench` (all that it says).
        columns: which measures; the names of rows are always there. By default all, of
            `agreement` r, ρ, signs and error.
        digits: behind the point.

    Raises:
        TypeError: `what` is something else.
        ValueError: the table has no such column, or no rows.
    """
    from circuits.judge.entries import Bench

    if isinstance(what, Bench):
        return what.to_markdown()
    table, note = rounded(_table(what), columns, digits)
    return markdown(table) + (f"\n\n{_escaped(note)}" if note else "") + "\n"


def to_latex(
    what: pd.DataFrame | Evaluation, *, columns: Sequence[str] | None = None, digits: int = 2
) -> str:
    r"""A table of results as LaTeX, for the package `booktabs`; see `to_markdown`.

    >>> print(to_latex(agreement([scores], effect)))

    It is a `tabular`, to be put into a `table` with a caption. All text is escaped.

    Args:
        what: as for `to_markdown`; of a `Bench` one of its tables, as `found.overview(group)`.
        columns: as for `to_markdown`, and so is `digits`.

    Raises:
        TypeError: `what` is something else.
        ValueError: the table has no such column, or no rows.
    """
    return latex(*rounded(_table(what), columns, digits))


def _table(what: Any) -> pd.DataFrame:
    from circuits.judge.evaluation import Evaluation

    if isinstance(what, Evaluation):
        return what.areas()
    if not isinstance(what, pd.DataFrame):
        raise TypeError(
            "a table for a paper must be made of a table of agreement, agreement_tests or compare, "
            f"or of an Evaluation; got {type(what).__name__}; of a Bench take found.summary() or "
            "found.overview(group)"
        )
    if what.empty:
        raise ValueError("a table for a paper must have rows; this one has none; look at it itself")
    return what


def rounded(
    table: pd.DataFrame, columns: Sequence[str] | None = None, digits: int = 2
) -> tuple[pd.DataFrame, str]:
    """The table as text, an interval behind each value that has one; and what its marks mean.

    Raises:
        ValueError: the table has no such column.
    """
    if table.index.name is not None:
        table = table.reset_index()
    ends = {name: _ends(table, name) for name in table}
    taken = {end for both in ends.values() for end in both}
    values = [n for n in table if n not in taken and n not in _LABELS and n != "hangs"]
    if columns is None:
        columns = [n for n in values if n in _USUAL] if "hangs" in table else values
    if unknown := [n for n in columns if n not in values]:
        raise ValueError(
            f"`columns` must be some of {tuple(values)}; got {unknown[0]!r}; rows have their names "
            "anyway"
        )
    shown = {
        name: [
            _text(name, row, ends[name], digits)
            + ("*" if name == "pearson" and row.get("hangs") is True else "")
            for row in table.to_dict("records")
        ]
        for name in [*(n for n in table if n in _LABELS), *columns]
    }
    marked = "pearson" in columns and "hangs" in table and bool(table["hangs"].any())
    return pd.DataFrame({_name(n): texts for n, texts in shown.items()}), _HANGS if marked else ""


def _name(column: Any) -> str:
    return _NAMES.get(column, str(column).replace("_", " "))


def _ends(table: pd.DataFrame, name: Any) -> tuple[str, ...]:
    """The columns that hold the interval of one, if there are any."""
    own = (f"{name}_low", f"{name}_high")
    if set(own) <= set(table):
        return own
    plain = name in ("value", "difference", "faithfulness") and {"low", "high"} <= set(table)
    return ("low", "high") if plain else ()


def _text(name: str, row: dict[str, Any], ends: tuple[str, ...], digits: int) -> str:
    value = row[name]
    if name == "measure":
        return _name(value)
    if value != value:
        return "-"
    if name == "size":
        return f"{100 * value:.3g}%"
    if isinstance(value, float) and name == "layer":  # so are they all, if one is NaN
        return f"{value:g}"
    if isinstance(value, (bool, str)) or name in _LABELS:
        return str(value)
    if name.startswith("p_"):
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    low, high = (_number(row[end], digits) for end in ends) if ends else ("", "")
    known = bool(ends) and row[ends[0]] == row[ends[0]]
    return _number(value, digits) + (f" [{low}, {high}]" if known else "")


def _number(value: float, digits: int) -> str:
    """With a real minus, and none before 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def markdown(table: pd.DataFrame) -> str:
    """A table of texts as Markdown."""
    names, *rows = (
        [_escaped(str(cell)) for cell in row] for row in [table.columns, *table.to_numpy()]
    )
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*|<])", r"\\\1", " ".join(text.split("\n")))


def latex(table: pd.DataFrame, note: str = "") -> str:
    """A table of texts as LaTeX, with a note below it."""
    text = table.to_latex(index=False, escape=True, column_format="l" * len(table.columns))
    text = "".join(_SYMBOLS.get(letter, letter) for letter in text)
    text = re.sub(r"(?m)^(?=[\[*])", "{}", text)  # behind \\ these would be its arguments
    if note:
        last = rf"\multicolumn{{{len(table.columns)}}}{{l}}{{\footnotesize {note}}} \\"
        text = text.replace(r"\end{tabular}", f"{last}\n\\end{{tabular}}")
    return text
