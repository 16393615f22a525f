"""One pair of a task as it is read, and the table that a notebook shows of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.task import Task

__all__ = ["Pair"]

SHOWN = 4
"""Pairs that a table shows."""
MARKED = "background:#fde68a;color:#111"


@dataclass(frozen=True)
class Pair:
    """One pair of a task: `task[3]`, or what `for pair in task` gives.

    >>> pair = task[0]
    >>> pair.clean.count(pair.answers[0]), pair.clean.count(pair.foils[0])
    (1, 2)
    >>> pair.spans["IO"][0] == pair.answers[0]
    True

    Texts are what the tokenizer makes of the task's tokens, without a beginning-of-sequence token
    that stands first. A task that was made of token ids has no text: ids stand in its place.
    """

    clean: str | tuple[int, ...]
    corrupt: str | tuple[int, ...]
    answers: tuple[str | int, ...]
    """All that are right, with their leading space."""
    foils: tuple[str | int, ...]
    spans: Mapping[str, tuple[str | int, int]] = field(hash=False)
    """The token at each named position, and the position."""


def pair_of(task: Task, i: int) -> Pair:
    """What a task holds of one of its pairs."""
    length, tokenizer = int(task.lengths[i]), task.tokenizer
    clean, corrupt = (side[i, :length].tolist() for side in (task.clean, task.corrupt))
    ends = {name: int(at[i]) for name, at in task.spans.items()}

    def text(before: list[int], *tokens: int) -> str | int:
        return tokens[0] if tokenizer is None else read_after(tokenizer, before, tokens)

    def whole(row: list[int]) -> str | tuple[int, ...]:
        return tuple(row) if tokenizer is None else read(tokenizer, row)

    prompt = clean[: ends["end"] + 1]
    answers, foils = (
        tuple(text(prompt, token) for token in side[i].reshape(-1).tolist() if token >= 0)
        for side in (task.answers, task.foils)
    )
    if (targets := task.metric.targets) is not None:  # behind the prompt stands the answer
        tokens = [token for token in targets[i].tolist() if token >= 0]
        answers = tuple(tokens) if tokenizer is None else (text(prompt, *tokens),)
        length = len(prompt)
    return Pair(
        clean=whole(clean[:length]),
        corrupt=whole(corrupt[:length]),
        answers=answers,
        foils=foils,
        spans={name: (text(clean[:at], clean[at]), at) for name, at in ends.items()},
    )


# -- in a notebook ---------------------------------------------------------------------------------


def table(task: Task) -> str:
    """The first pairs of a task, token by token, as HTML; where the two differ is marked."""
    parts = [f"<p>{escape(repr(task))}</p>"]
    for i in range(min(SHOWN, len(task))):
        parts.append(_pair_table(task, i))
    if len(task) > SHOWN:
        parts.append(f"<p>… and {len(task) - SHOWN:,} pairs more</p>")
    return "".join(parts)


def _pair_table(task: Task, i: int) -> str:
    """Positions, spans, and the tokens of both prompts, of one pair."""
    pair, length = pair_of(task, i), int(task.lengths[i])
    rows = [side[i, :length].tolist() for side in (task.clean, task.corrupt)]
    names = [
        " ".join(name for name, (_, at) in pair.spans.items() if at == pos) for pos in range(length)
    ]
    lines = [_line("th", f"pair {i}", list(map(str, range(length)))), _line("th", "", names)]
    differ = [a != b for a, b in zip(*rows, strict=True)]
    for label, row in zip(("clean", "corrupt"), rows, strict=True):
        tokens = map(str, row) if task.tokenizer is None else read_tokens(task.tokenizer, row)
        lines.append(_line("td", label, list(tokens), differ))
    said = ", ".join(map(repr, pair.answers)), ", ".join(map(repr, pair.foils)) or "–"
    return (
        f"<table>{''.join(lines)}</table>"
        f"<p>answers: {escape(said[0])}; foils: {escape(said[1])}</p>"
    )


def _line(tag: str, label: str, cells: list[str], marked: list[bool] | None = None) -> str:
    """One row of a table; spaces are kept, and what is marked has a colour."""
    styles = [f"white-space:pre;{MARKED * mark}" for mark in marked or [False] * len(cells)]
    shown = "".join(
        f'<{tag} style="{style}">{escape(cell)}</{tag}>'
        for style, cell in zip(styles, cells, strict=True)
    )
    return f"<tr><th>{escape(label)}</th>{shown}</tr>"


# -- texts of ids ----------------------------------------------------------------------------------


def read(tokenizer: Any, row: Sequence[int]) -> str:
    """The text of token ids, without a first token that stands for the beginning alone.

    In a chat it may open each turn: then it is part of the text.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    start = int(list(row[:1]) == [bos] and bos not in row[1:])
    return str(tokenizer.decode(list(row[start:]), clean_up_tokenization_spaces=False))


def read_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to those before them, with its leading space."""
    short, long, alone = (
        str(tokenizer.decode(list(row), clean_up_tokenization_spaces=False))
        for row in (before, [*before, *tokens], tokens)
    )
    return long[len(short) :] if long.startswith(short) else alone


def read_tokens(tokenizer: Any, row: Sequence[int]) -> list[str]:
    """Each token by itself, as the vocabulary spells it where nothing whole would be seen."""
    spelled = tokenizer.convert_ids_to_tokens(list(row))
    texts = [str(tokenizer.decode([token])) for token in row]
    seen = ["\ufffd" not in text and bool(text) and text.isprintable() for text in texts]
    return [t if whole else s for s, t, whole in zip(spelled, texts, seen, strict=True)]
