"""Where a model's weights go, and how precise they are: checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DTYPES", "MAPS", "Placement", "mixed"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate makes itself."""
AWAY = ("cpu", "disk")
"""Entries of a device map whose weights are fetched when they are needed."""


@dataclass(frozen=True)
class Placement:
    """What `zoo.load` is asked for beside the model; None: as it is without being asked.

    >>> from tasks.zoo.placement import Placement
    >>> Placement(dtype="bfloat16").options()
    {'dtype': torch.bfloat16}

    Raises:
        ValueError: a value is none of those that there are, the device is not there, the bridge
            would refuse the device map, or a device and a device map are both given.
    """

    device: Any = None
    dtype: Any = None
    device_map: Any = None

    def __post_init__(self) -> None:
        if self.device is not None and self.device_map is not None:
            raise ValueError(
                "`device` and `device_map` must not both be given; got "
                f"{str(self.device)!r} and {self.device_map!r}; a device map says itself what goes "
                "where, so leave `device` out"
            )
        if self.dtype is not None and self._dtype not in DTYPES:
            raise ValueError(
                f"`dtype` must be one of {', '.join(DTYPES)}; got {self._dtype!r}; leave it out "
                "for float32"
            )
        if self.device not in (None, "auto"):
            _must_be_there("device", self.device)
        if self.device_map is not None:
            self._check_map()

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def _map(self) -> Any:
        """The device map as transformers takes it: a file is read, one place is for everything."""
        given = self.device_map
        if isinstance(given, Mapping):
            return dict(given)
        text = str(given)
        if text.endswith(".json"):
            try:
                given = json.loads(Path(text).expanduser().read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(
                    "a file of a device map must be JSON, of names of modules and their devices; "
                    f"{text!r} could not be read ({error}); check the path"
                ) from error
            return given
        return text if text in MAPS else {"": int(text) if text.isdigit() else text}

    def _check_map(self) -> None:
        found = self._map
        if isinstance(found, str):
            return
        if not isinstance(found, Mapping) or not found:
            raise ValueError(
                f"`device_map` must be one of {', '.join(MAPS)}, a device, a dictionary of names "
                f"of modules and their devices, or a JSON file of one; got {self.device_map!r}; "
                "'auto' fills one device after the other"
            )
        # an index is a GPU; what else is asked for may be misspelt, which is said behind
        kinds = {"cuda" if isinstance(d, int) else str(d).partition(":")[0] for d in found.values()}
        if "cuda" in kinds and kinds & {*AWAY}:
            raise ValueError(mixed(str(self.device_map)))
        for device in found.values():
            if device != "disk":
                _must_be_there("device_map", device)

    def options(self) -> dict[str, Any]:
        """What `TransformerBridge.boot_transformers` gets."""
        import torch  # not at the top: it takes seconds

        options: dict[str, Any] = {}
        if self.dtype is not None:
            options["dtype"] = getattr(torch, self._dtype)
        if self.device_map is not None:
            options["device_map"] = self._map
        elif self.device not in (None, "auto"):
            options["device"] = self.device
        return options


def mixed(device_map: str) -> str:
    """Why a device map is refused that leaves some weights on CPU or disk and others not."""
    return (
        "a device map must keep all weights on GPUs, or all on CPU and disk, as the bridge refuses "
        f"the two together; got {device_map}, which mixes them; give more or larger GPUs, "
        "dtype='bfloat16', or 'cpu' or 'disk' for everything"
    )


def _must_be_there(what: str, asked: object) -> None:
    """Refuses a device that this machine does not have."""
    if str(asked) == "cpu":
        return
    import torch  # not at the top: it takes seconds

    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        there += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    # an index is that of a GPU
    name = f"{there[-1].partition(':')[0]}:{asked}" if isinstance(asked, int) else str(asked)
    if name not in there:
        raise ValueError(
            f"`{what}` must name what torch finds on this machine ({', '.join(there)}); got "
            f"{str(asked)!r}; leave it out, or install a torch for that device"
        )
