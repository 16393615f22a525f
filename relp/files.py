"""Files: whole or not at all, in whole characters."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

__all__ = ["check_texts", "written_whole"]


def check_texts(owner: str, value: object) -> None:
    """Refuses half a surrogate pair in any text of `value`, keys included: UTF-8 has none.

    >>> check_texts("the title", "IOI")

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

    >>> from pathlib import Path
    >>> with written_whole(Path("notes.txt")) as temporary:
    ...     temporary.write_text("whole or not at all")

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
