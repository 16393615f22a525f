"""Places that commands write: refused before the work starts, whole when it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["check_folder", "claimed", "going_on", "written"]


def check_folder(folder: Path) -> None:
    """Refuses an output folder that could not be made or written, before the work starts."""
    there = next(p for p in (folder, *folder.parents, Path("/")) if p.exists())
    reason = ""
    if not there.is_dir():
        reason = os.strerror(errno.EEXIST if there == folder else errno.ENOTDIR)
    elif not os.access(there, os.W_OK):
        reason = f"{str(there)!r} is read-only"
    if reason:
        raise OSError(
            f"`--out` must be a folder that can be written; {str(folder)!r} cannot ({reason}); "
            "choose another"
        )


@contextmanager
def written(out: Path) -> Iterator[None]:
    """What the system says against writing, as a sentence that names the output."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence of our own
            raise
        raise OSError(
            f"`--out` must be a place that can be written; {str(out)!r} cannot "
            f"({os.strerror(error.errno)}); make room there, or choose another"
        ) from error


@contextmanager
def claimed(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """The output of a sweep is this run's alone; gives the file that keeps what is measured."""
    from filelock import FileLock, Timeout

    if out.suffix != ".safetensors":
        raise ValueError(
            f"`--out` must be a .safetensors file; got {out.name!r}; change the suffix"
        )
    if not out.parent.is_dir():
        raise OSError(
            f"`--out` must lie in an existing folder; {str(out.parent)!r} is none; create it first"
        )
    finished = out.with_suffix(".part.safetensors")
    lock = FileLock(finished.with_suffix(".lock"))
    with written(out):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"`--out` must be a file that no other run writes; one is at work on {str(out)!r}; "
                "wait for it, or give another --out"
            ) from error
    try:
        if out.exists() and not overwrite:
            raise FileExistsError(
                f"`--out` must be a new file; {str(out)!r} exists already; give another --out, or "
                "--overwrite"
            )
        yield finished
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def going_on(out: Path, finished: Path) -> Iterator[None]:
    """What stops a sweep is told in words of the command line, with what is kept of it."""
    try:
        with written(out):
            yield
    except ValueError as error:
        if not str(error).startswith("`resume`"):
            raise
        reason = str(error).split("; ", 1)[1].rpartition("; ")[0]
        raise ValueError(
            f"{str(finished)!r} must be what an interrupted run of the same options left; it is "
            f"not ({reason}); give the options of then, another `--out`, or delete the file"
        ) from error
    except KeyboardInterrupt as stop:
        if not finished.exists():
            raise KeyboardInterrupt(
                "nothing was measured yet; run the same command again"
            ) from stop
        from safetensors import safe_open

        with safe_open(finished, framework="np") as file:
            effects = file.get_tensor("effects")
        raise KeyboardInterrupt(
            f"{(effects == effects).mean():.0%} of the effects are measured and kept in "
            f"{str(finished)!r}; run the same command again to go on"
        ) from stop
