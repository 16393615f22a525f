"""What the command shows: lines, tables, and what a user can mend as one sentence."""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = [
    "answering",
    "console",
    "errors",
    "one_line_errors",
    "or_dash",
    "or_none",
    "print_table",
    "records",
    "say",
]

console = Console()
errors = Console(stderr=True)


def say(line: str) -> None:
    """One line, however long: paths and numbers stay whole when the output is read by a program."""
    console.print(line, soft_wrap=True, highlight=False)


def print_table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, blocks: bool = False
) -> None:
    """A table; where the screen would cut a word or a number of it, a line for each cell.

    `blocks`: a line between rows that begin with another word.
    """
    table = Table(*map(escape, headers), title=escape(title))
    for row, below in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(*map(escape, row), end_section=blocks and row[0] != below[0])
    shown = ["".join(part.text for part in line) for line in console.render_lines(table)]
    words = Counter(" ".join(cell for row in (headers, *rows) for cell in row).split())
    if words <= Counter(" ".join(shown).split()):
        console.print(table)
        return
    say(f"[italic]{escape(title)}[/]")
    width = max(map(len, headers))
    for row in rows:
        say("")
        for header, cell in zip(headers, row, strict=True):
            say(f"{escape(header):{width}} {escape(cell)}")


def or_dash(value: float, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if math.isnan(value) else format(value, form)


def or_none(value: float) -> float | None:
    """A number, or what JSON has where there is none."""
    return None if math.isnan(value) else value


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame as JSON has them: null where there is no number."""
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return found


@contextmanager
def answering(as_json: bool) -> Iterator[dict[str, Any]]:
    """A command at work: gives what it answers to programs, for it to fill.

    With `as_json` the answer is printed when the work is done, and all that is said before goes to
    stderr. What a user can mend is one sentence, as in `one_line_errors`.
    """
    answer: dict[str, Any] = {}
    console.stderr = as_json
    try:
        with one_line_errors():
            yield answer
            text = json.dumps(answer, ensure_ascii=False, allow_nan=False, indent=2)
    finally:
        console.stderr = False
    if as_json:
        typer.echo(text)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend is one sentence on stderr and exit code 1, not a traceback.

    So is a warning, without the line of our source that Python would show.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        errors.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in the background
    try:
        if ours:
            signal.signal(signal.SIGINT, _interrupt)
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        kept = str(stop) or "files that were said to be written are whole, nothing else is kept"
        errors.print(f"[red]interrupted:[/] {escape(kept)}", soft_wrap=True)
        raise typer.Exit(128 + signal.SIGINT) from stop
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, which Python would swallow in a finalizer: there it comes again a little later."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            Timer(0.05, signal.raise_signal, [number]).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt
