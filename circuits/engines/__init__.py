"""Who does the work: this process, or the workers of a cluster."""

from typing import TYPE_CHECKING

from relp import lazy

if TYPE_CHECKING:
    from circuits.engines.local import Engine, LocalEngine
    from circuits.engines.ray import RayEngine

__all__ = ["Engine", "LocalEngine", "RayEngine"]

lazy.lazily(__name__, {"local": "Engine LocalEngine", "ray": "RayEngine"})
