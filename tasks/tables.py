"""Tables of prompts: CSV and JSON-lines files and data frames, whose columns become a task's lists.

Three layouts are known by their columns:

* our own: `clean, corrupt, answer, foil` (or `answers`, `foils`; several in a cell as a JSON list),
  and `span:NAME` for each named position;
* EAP-IG's: `clean, corrupted` and two columns of token ids, as in the files of `data/` of
  https://github.com/hannamw/eap-ig-faithfulness (`dataset.py` says which columns are read):
  `correct_idx, incorrect_idx`, or those of `EAP_IG`;
* MIB's, of `mib-bench/ioi`, `copycolors_mcqa`, `arc_easy` and `arithmetic_addition`: `prompt`,
  `choices`, `answerKey` (or `label`), and for each counterfactual a column of the same, such as
  `s2_io_flip_counterfactual`. Answers and foils are those that
  `MIB_circuit_track/dataset.py` of https://github.com/hannamw/MIB-circuit-track compares.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".jsonl")
"""Files that are tables of prompts."""
SPAN = "span:"
OWN = {
    "clean": ("clean",),
    "corrupt": ("corrupt", "corrupted"),
    "answers": ("answer", "answers"),
    "foils": ("foil", "foils"),
}
"""What a task needs, and the columns that hold it."""
EAP_IG = (
    ("correct_idx", "incorrect_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
    ("answers_idx", "corrupted_answers_idx"),
)
"""Columns of token ids: of the answers and of the foils."""
IDS = ("_idx", "_id", "_ids")
"""How the name of a column of token ids ends."""
COUNTERFACTUAL = "_counterfactual"
MIB = tuple(f"{name}{COUNTERFACTUAL}" for name in ("s2_io_flip", "symbol", "random"))
"""The counterfactuals that MIB takes where nobody names one."""


@dataclass(frozen=True)
class Table:
    """Columns by name, each with one cell for every row, and where they come from."""

    columns: Mapping[str, Sequence[Any]]
    source: str
    """What messages call it."""
    lines: Sequence[int] = ()
    """The line of each row, if it is a file."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def row(self, i: int) -> str:
        """What messages call a row, counted from 0 as pairs are."""
        line = f" (line {self.lines[i]})" if self.lines else ""
        return f"row {i} of {self.source}{line}"

    def select(self, rows: Sequence[int]) -> Table:
        """Some of the rows, in that order."""
        return Table(
            {name: [cells[i] for i in rows] for name, cells in self.columns.items()},
            self.source,
            [self.lines[i] for i in rows] if self.lines else (),
        )


@dataclass(frozen=True)
class Columns:
    """What a table says of its pairs: texts, and for each an answer and a foil or lists of them."""

    clean: list[str]
    corrupt: list[str]
    answers: list[Any]
    foils: list[Any] | None
    spans: dict[str, list[str]]
    ids: bool
    """Whether answers and foils are token ids."""


# -- files -----------------------------------------------------------------------------------------


def read_table(path: str | PathLike[str]) -> Table:
    """The table in a file, by its suffix.

    Raises:
        ValueError: it has another suffix, or is no such table.
        OSError: there is no such file, or it cannot be read.
    """
    suffix = Path(fspath(path)).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"a file of prompts must end in {' or '.join(SUFFIXES)}; got {Path(path).name!r}; save "
            "it as one of these, in UTF-8"
        )
    return read_csv(path) if suffix == ".csv" else read_jsonl(path)


def read_csv(path: str | PathLike[str]) -> Table:
    """A table of texts, which stay as they are: nothing is stripped, no word becomes a number.

    Raises:
        ValueError: it is empty or not UTF-8, or a row has not as many cells as the first.
        OSError: it cannot be read.
    """
    source = repr(Path(path).name)
    reader = csv.reader(_lines(path), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        header = next(reader, [])
        for row in reader:
            if not row:  # an empty line
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"each row of {source} must have {len(header)} cells, as its first line; row "
                    f"{len(rows)} (line {reader.line_num}) has {len(row)}; put texts that hold a "
                    'comma in double quotes: "…"'
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(
            f"{source} must be a table of comma-separated values; row {len(rows)} (line "
            f"{reader.line_num}) is none ({error}); write it with a library, such as pandas"
        ) from error
    _must_have_rows(header, len(rows), source)
    cells = list(map(list, zip(*rows, strict=True)))
    _must_differ(header, source)
    return Table(dict(zip(header, cells, strict=True)), source, lines)


def read_jsonl(path: str | PathLike[str]) -> Table:
    """A table with one JSON object a line; keys are columns.

    Raises:
        ValueError: it is empty or not UTF-8, or a line is no object.
        OSError: it cannot be read.
    """
    source = repr(Path(path).name)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=partial(_object, source))
            got = type(row).__name__
        except json.JSONDecodeError as error:
            row, got = None, f"no JSON ({error.msg} at character {error.pos})"
        if not isinstance(row, dict):
            raise ValueError(
                f"each line of {source} must be one JSON object; row {len(rows)} (line {number}) "
                f'is {got}; write lines such as {{"clean": "…", "corrupt": "…", "answer": " …", '
                '"foil": " …"}'
            )
        rows.append(row)
        lines.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    _must_have_rows(names, len(rows), source)
    return Table({name: [row.get(name) for row in rows] for name in names}, source, lines)


def _object(source: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys is there twice."""
    _must_differ([name for name, _ in pairs], source)
    return dict(pairs)


def _lines(path: str | PathLike[str]) -> Iterator[str]:
    """The lines of a file in UTF-8, with or without a mark that says so.

    Raises:
        ValueError: it is in another encoding.
    """
    source = repr(Path(path).name)
    with open(path, "rb") as file:
        at = 0
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                bad = text.find("\0")  # every other byte of UTF-16
            except UnicodeDecodeError as error:
                bad = error.start
            if bad >= 0:
                raise ValueError(
                    f"{source} must be in UTF-8; line {number} is not (byte {at + bad} of the "
                    f"file is 0x{line[bad]:02x}); save it anew in UTF-8"
                )
            at += len(line)
            yield text


def _must_have_rows(header: Sequence[str], rows: int, source: str) -> None:
    """Refuses a table without columns or rows."""
    if not header or not rows:
        got = "it has a first line alone" if header else "it is empty"
        raise ValueError(
            f"{source} must hold at least one row of prompts; {got}; give the columns "
            f"{', '.join(names[0] for names in OWN.values())}"
        )


def _must_differ(header: Sequence[str], source: str) -> None:
    """Refuses two columns of one name, of which one would be lost."""
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise ValueError(
            f"each column of {source} must have a name of its own; {twice[0]!r} is there twice; "
            "rename one"
        )


# -- data frames -----------------------------------------------------------------------------------


def read_frame(frame: Any) -> Table:
    """A pandas DataFrame, or what has `columns` and gives each by its name.

    Raises:
        TypeError: it has no columns.
        ValueError: it has no rows, or two columns of one name.
    """
    if not hasattr(frame, "columns") or not hasattr(frame, "__getitem__"):
        raise TypeError(
            f"`frame` must be a pandas DataFrame; got {type(frame).__name__}; use Task.from_csv or "
            "Task.from_jsonl for files, and Task.from_prompts for lists"
        )
    names = list(frame.columns)
    _must_have_rows(names, len(frame), "the table")
    _must_differ(names, "the table")
    return Table({str(name): list(frame[name]) for name in names}, "the table")


# -- layouts ---------------------------------------------------------------------------------------


def columns_of(
    table: Table, columns: Mapping[str, str] | None = None, *, foils: bool = True
) -> Columns:
    """The lists that a task is made of, out of a table in any of the layouts.

    Args:
        table: what was read.
        columns: which column holds what, where it is not one that is known:
            `{"clean": "sentence_good"}`. In MIB's layout `{"corrupt": "abc_counterfactual"}`
            chooses among the counterfactuals.
        foils: whether there must be any.

    Raises:
        ValueError: a column is missing, or a cell is empty or of another kind.
    """
    chosen = _singular(columns or {})
    mib = "prompt" in table.columns and any(n.endswith(COUNTERFACTUAL) for n in table.columns)
    if mib and "answers" not in chosen:
        table = _from_mib(table, chosen)
        chosen = {role: name for role, name in chosen.items() if role.startswith(SPAN)}
    names = _names(table, chosen, foils=foils)
    ids = {role: names[role].endswith(IDS) for role in ("answers", "foils") if role in names}
    if len(set(ids.values())) > 1:
        raise ValueError(
            "answers and foils must both be texts or both token ids; the columns are "
            f"{names['answers']!r} and {names['foils']!r} of {table.source} (those that end in "
            "_idx are of ids); give two of one kind"
        )
    spans = {role.removeprefix(SPAN): name for role, name in names.items() if role.startswith(SPAN)}
    sets = {
        role: _cells(table, names[role], _ids if of_ids else _texts) for role, of_ids in ids.items()
    }
    for role, cells in sets.items():
        if all(len(cell) == 1 for cell in cells):
            sets[role] = [cell[0] for cell in cells]
    return Columns(
        clean=_cells(table, names["clean"], _text),
        corrupt=_cells(table, names["corrupt"], _text),
        answers=sets["answers"],
        foils=sets.get("foils"),
        spans={name: _cells(table, column, _text) for name, column in spans.items()},
        ids=ids["answers"],
    )


def _singular(columns: Mapping[str, str]) -> dict[str, str]:
    """The chosen columns by what they hold, in one form of its name."""
    known = {name: role for role, names in OWN.items() for name in names}
    wrong = [role for role in columns if role not in known and not role.startswith(SPAN)]
    if wrong:
        raise ValueError(
            f"`columns` must name clean, corrupt, answer, foil or {SPAN}NAME; got {wrong[0]!r}; "
            'give for instance {"clean": "sentence_good"}'
        )
    return {known.get(role, role): name for role, name in columns.items()}


def _names(table: Table, chosen: dict[str, str], *, foils: bool) -> dict[str, str]:
    """The column of each thing that a task needs."""
    there = table.columns
    found: dict[str, str] = {}
    for role, names in OWN.items():
        either = [name for name in names if name in there]
        if len(either) > 1 and role not in chosen:
            raise ValueError(
                f"{table.source} must have one column for each thing; it has "
                f"{' and '.join(either)}; leave one out, or say"
                f' which it is: columns={{"{names[0]}": …}}'
            )
        found[role] = next(iter(either), "")
    if "corrupt" not in there or not found["answers"]:  # EAP-IG has texts beside its ids
        for answers, wrong in EAP_IG:
            if answers in there and wrong in there:
                found |= {"answers": answers, "foils": wrong}
                break
    found |= {name: name for name in there if name.startswith(SPAN)}
    found |= chosen
    for role, name in found.items():
        needed = name or (foils or role != "foils")
        if needed and name not in there:
            wanted = name or " or ".join(OWN[role])
            raise ValueError(
                f"{table.source} must have a column {wanted}; it has {', '.join(there)}; rename "
                f'one, or say which it is: columns={{"{OWN.get(role, [role])[0]}": …}}'
            )
    return {role: name for role, name in found.items() if name}


def _cells(table: Table, name: str, read: Callable[[Any], Any]) -> list[Any]:
    """A column as what it must be."""
    found = []
    for i, cell in enumerate(table.columns[name]):
        try:
            found.append(read(cell))
        except (TypeError, ValueError) as error:
            got, do = "nothing", "fill it in"
            if not _is_empty(cell):
                got, do = f"{cell!r}, of type {type(cell).__name__}", "write it as one"
            raise ValueError(
                f"column {name!r} must hold {error}; {table.row(i)} has {got}; {do}, or leave that "
                "row out"
            ) from None
    return found


def _is_empty(cell: Any) -> bool:
    """True for what stands for no value: nothing, an empty text, not a number."""
    return cell is None or str(cell) in ("", "nan", "<NA>", "NaT")


def _text(cell: Any) -> str:
    if not isinstance(cell, str) or not cell:
        raise TypeError("a text in every row")
    return cell


def _texts(cell: Any) -> list[str]:
    """One text, or several as a list, which may be written in JSON."""
    values = _listed(cell)
    if not values or not all(isinstance(value, str) and value for value in values):
        raise TypeError("a text, or a list of texts, in every row")
    return values


def _ids(cell: Any) -> list[int]:
    """One token id, or several as a list, which may be written in JSON."""
    values = _listed(cell)
    if not values:
        raise TypeError("a token id, or a list of them, in every row")
    try:
        found = [int(value) for value in values]
        whole = all(float(v) == i for v, i in zip(values, found, strict=True))
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or any(isinstance(value, bool) for value in values):
        raise TypeError("a token id, or a list of them, in every row")
    return found


def _listed(cell: Any) -> list[Any]:
    """The entries of a cell, which is one of them if it is no list."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            return [cell]  # a text
    if hasattr(cell, "tolist"):  # of numpy
        cell = cell.tolist()
    return list(cell) if isinstance(cell, list | tuple) else [cell]


# -- MIB -------------------------------------------------------------------------------------------


def _from_mib(table: Table, chosen: dict[str, str]) -> Table:
    """The same table in our own layout."""
    there = [name for name in table.columns if name.endswith(COUNTERFACTUAL)]
    usual = [name for name in MIB if name in there] or there
    name = chosen.get("corrupt") or (usual[0] if len(usual) == 1 else "")
    if name not in there:
        raise ValueError(
            f"{table.source} must be told its counterfactual; it has {', '.join(there)}; give "
            f'columns={{"corrupt": "{there[0]}"}}'
        )
    columns: dict[str, list[Any]] = {"clean": [], "corrupt": [], "answer": [], "foil": []}
    for i in range(len(table)):
        row = {key: cells[i] for key, cells in table.columns.items()}
        try:
            other = row[name]
            answer, foil = _asked(row), _other(row, other)
            cells = (row[chosen.get("clean", "prompt")], other["prompt"], answer, foil)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{table.row(i)} must hold a prompt, choices and an answerKey, and {name!r} the "
                f"same; it does not ({type(error).__name__}: {error}); leave that row out"
            ) from error
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    others = {n: cells for n, cells in table.columns.items() if n.startswith(SPAN)}
    return Table(columns | others, table.source, table.lines)


def _asked(row: Mapping[str, Any]) -> str:
    """What a row of MIB's asks for."""
    if row.get("choices") is None:
        return str(row["label"])
    choices, key = row["choices"], row["answerKey"]
    if isinstance(choices, Mapping):
        labels = list(choices["label"])
        return str(labels[labels.index(key) if isinstance(key, str) else int(key)])
    return _spaced(row, str(choices[int(key)]))


def _other(row: Mapping[str, Any], counterfactual: Mapping[str, Any]) -> str | list[str]:
    """What it is compared with: the row's other choices if these are names, else what the
    counterfactual asks for.
    """
    choices = row.get("choices")
    if choices is None or isinstance(choices, Mapping):
        return _asked(counterfactual)
    return [_spaced(row, str(c)) for k, c in enumerate(choices) if k != int(row["answerKey"])]


def _spaced(row: Mapping[str, Any], word: str) -> str:
    """A name with the space before it that MIB puts there."""
    return word if row["prompt"][-1:].isspace() or word[:1].isspace() else f" {word}"
