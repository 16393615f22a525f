"""Packages whose public names are imported when they are first used.

Importing the package then costs nothing, and the command refuses an argument before torch is there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, homes: Mapping[str, str]) -> None:
    """Lets a package give names of its modules: `lazily(__name__, {"module": "name other"})`.

    A module that is called like a name (`circuits.draw`) does not take the name's place when it is
    imported, whoever comes first.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    class Package(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in home:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(f"{package}.{home[name]}"), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in home and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*vars(self), *home})

    sys.modules[package].__class__ = Package
