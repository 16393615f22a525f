"""Whether Python finds our own `tasks` and `circuits`: the names are common ones."""

from __future__ import annotations

from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

__all__ = ["check_neighbours"]

BEGINS = {
    "circuits": '"""Circuits: scores become graphs, graphs are pruned, judged, drawn and exported.',
    "tasks": '"""Tasks: prompts whose answer hangs on one thing, and models small enough to ship.',
}
"""How the sources of our packages begin: where they lie is another thing in each installation."""


def check_neighbours() -> None:
    """Notices a file or folder that is found in place of ours, and one that was installed over it.

    Raises:
        ImportError: there is one; the message names it.
    """
    root = Path(__file__).parent.parent
    for name, begins in BEGINS.items():
        try:
            found = find_spec(name)
        except ValueError:  # a stand-in that a program made, as for building documentation
            continue
        ours = PathFinder.find_spec(name, [str(root)])
        if found is None or ours is None or _begins(found, begins):
            continue
        if _place(found) == _place(ours):
            raise ImportError(
                f"`{name}` must be the package that comes with relp; another distribution has put "
                f"its own in the same place, {_place(found)}; uninstall that one, then install "
                "relp again with pip install --force-reinstall"
            )
        raise ImportError(
            f"`{name}` must be the package that comes with relp, {_place(ours)}; Python finds "
            f"{_place(found)} first; rename that one, start Python in another folder, or "
            "uninstall the distribution that it belongs to"
        )


def _begins(spec: ModuleSpec, begins: str) -> bool:
    """Whether a module's source begins like that, as far as there is a source to read."""
    if spec.loader is None or spec.origin is None:  # a folder without __init__.py
        return False
    read = getattr(spec.loader, "get_source", lambda name: None)
    try:
        source = read(spec.name)
    except ImportError:  # not text
        return False
    return source is None or source.startswith(begins)


def _place(spec: ModuleSpec) -> str:
    return spec.origin or next(iter(spec.submodule_search_locations or ()), spec.name)
