"""Features of sparse dictionaries as parts of what a site of a model holds.

The values of features times their directions, and what they leave over (`rest`: the error of the
reconstruction, its offset, and the features that are not kept), sum to what the site holds. The
model runs as it is: the dictionary only says how a change at the site is divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp.bridge.basis import shape
from relp.bridge.sites import Sites
from relp.dictionaries import Dictionary
from relp.dictionaries.hook_names import place_of
from relp.layout import Component

__all__ = ["NO_FEATURES", "Features", "divisions", "features_of", "fingerprints"]

CHUNK_BYTES = 64 << 20
"""Memory for the values of all features at the tokens at work."""
NO_FEATURES: Mapping[str, Any] = MappingProxyType({})
"""What calls take if nothing is given."""
PARTS = ("resid", "mid", "attn", "mlp", "mixer", "z", "neurons")
"""Where in a block dictionaries can be."""


@dataclass(frozen=True, eq=False)
class Features:
    """The features of a dictionary at one site."""

    site: str
    """What they are parts of: `L3.mlp`, `L4.resid`, `final`."""
    reads: str
    """Where their values are read: the same site, or for a transcoder what the MLP reads."""
    dictionary: Dictionary
    kept: tuple[int, ...] = ()
    """Numbers of those that are components; the rest is the site without them."""

    def name(self, number: int) -> str:
        """`L3.mlp/f1021`."""
        return f"{self.site}/f{number}"

    @property
    def rest(self) -> str:
        """What no feature that is kept holds."""
        return f"{self.site}/rest"

    @property
    def all(self) -> str:
        """Stands for those that are kept, together."""
        return f"{self.site}/f"

    def values(
        self, held: Mapping[str, Tensor], chosen: Int[Tensor, " chosen"] | None = None
    ) -> Float[Tensor, "pair pos any_feature"]:
        """Values of (the chosen) features in a run, from what its sites hold."""
        return self.dictionary.encode(held[self.reads], chosen)

    def directions(self, chosen: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen d"]:
        """What a unit of each of these features adds to the site."""
        return self.dictionary.w_dec[chosen.to(self.dictionary.w_dec.device)].float()

    def compared(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Compared:
        """Which features differ between two runs, and how well all describe the own one."""
        found = torch.zeros(self.dictionary.features, dtype=torch.bool)
        error = 0.0
        apart = (own[self.site] != other[self.site]).any(-1)
        for at in self._chunks(own[self.reads]):
            one, two = ({self.reads: run[self.reads][:, at]} for run in (own, other))
            values = self.values(one)
            found |= (values != self.values(two)).any(0).any(0).cpu()
            guess = self.dictionary.decode(values) + self.dictionary.offset(one[self.reads])
            left = (own[self.site][:, at].float() - guess)[apart[:, at]]
            error += float(left.square().sum(dtype=torch.float64))
        return Compared(found.nonzero().flatten(), error, own[self.site][apart].double())

    def keeping(self, components: Iterable[str]) -> Features:
        """With those kept that are among some names of components.

        Raises:
            ValueError: the dictionary has not so many.
        """
        parsed = [Component.parse(name) for name in components]
        own = {c.head for c in parsed if c.kind == "feature" and c.name == self.name(c.head)}
        if own and max(own) >= self.dictionary.features:
            raise ValueError(
                f"features of {self.site!r} must be below {self.dictionary.features}, as many as "
                f"its dictionary has; got {self.name(max(own))!r}; count from 0"
            )
        return replace(self, kept=tuple(sorted(own)))

    def divided(
        self, held: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "pair pos kept"], Float[Tensor, "pair pos d"]]:
        """The values of the features that are kept, and what they leave over of the site."""
        numbers = torch.tensor(self.kept, dtype=torch.long)
        values = torch.cat([self.values({self.reads: held[self.reads][:, at]}, numbers)
                            for at in self._chunks(held[self.reads])], 1)  # fmt: skip
        whole = held[self.site].float()
        return values, whole - values.to(whole) @ self.directions(numbers).to(whole)

    def _chunks(self, held: Float[Tensor, "pair pos d"]) -> Iterator[slice]:
        """Positions, a few at a time: memory does not follow the size of the dictionary."""
        pairs, length, _ = held.shape
        some = max(1, CHUNK_BYTES // (8 * pairs * self.dictionary.features))
        yield from (slice(begin, begin + some) for begin in range(0, length, some))


class Compared(NamedTuple):
    """Of the features of a site in two runs."""

    differing: Int[Tensor, " chosen"]
    """The numbers of those whose values differ, in order."""
    error: float
    """The squares of what all features leave over where the runs differ, summed."""
    held: Float[Tensor, "token d"]
    """What the site holds there, in the own run."""


def features_of(sites: Sites, given: Mapping[str, object]) -> tuple[Features, ...]:
    """The features of dictionaries by the site (or the hook point) that each is of.

    Raises:
        TypeError: `given` is no mapping, or holds what is no dictionary.
        ValueError: there is no such site, or a dictionary does not fit it.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            "`features` must be a mapping from sites to dictionaries, as {'L3.mlp': "
            f"load_dictionary(path)}}; got a {type(given).__name__}"
        )
    found: dict[str, Features] = {}
    for name, anything in given.items():
        site = _site(sites, name)
        if site in found:
            raise ValueError(
                f"a site can have one dictionary; {name!r} names {site!r} a second time; leave one "
                "out"
            )
        dictionary = Dictionary.of(anything).to(sites.device)
        reads = dictionary.reads if dictionary.is_transcoder else site
        width_in = _width(sites, reads) if reads in sites.points else dictionary.d_in
        dictionary.must_fit(site, width_in, _width(sites, site), len(sites.blocks))
        if reads not in sites.points:
            raise ValueError(
                f"{dictionary.called} must read a site of {sites.model_name!r}; it reads "
                f"{reads!r}; say where with dictionary.placed('L3.mlp_in', 'L3.mlp')"
            )
        found[site] = Features(site, reads, dictionary)
    order = list(sites.points)  # final and unembed first
    return tuple(sorted(found.values(), key=lambda f: (f.site == "final", order.index(f.site))))


def fingerprints(features: Sequence[Features]) -> str:
    """What tells these dictionaries from others: `L3.mlp 1f0c9a…, L4.resid 77ab01…`."""
    return ", ".join(f"{f.site} {f.dictionary.fingerprint}" for f in features)


def divisions(
    sites: Sites, given: Mapping[str, object], components: Iterable[str]
) -> tuple[Features, ...]:
    """Those dictionaries whose features, or rest, are among some components, with these kept.

    Raises:
        TypeError, ValueError: as `features_of`; or a component is of no dictionary that is given.
    """
    components = tuple(components)
    of_sites = {n.partition("/")[0]: n for n in components if "/" in n}
    found = {f.site: f for f in features_of(sites, given)}
    if missing := of_sites.keys() - found.keys():
        raise ValueError(
            f"components of a dictionary need it in `features`; got {of_sites[min(missing)]!r} and "
            f"dictionaries of {', '.join(found) or 'nothing'}; give those that the scores were "
            "computed with"
        )
    return tuple(f.keeping(components) for f in found.values() if f.site in of_sites)


def _site(sites: Sites, name: str) -> str:
    """Our name of a site that a caller has named."""
    site = place_of(name).site or name
    if site == f"L{len(sites.blocks)}.resid":
        site = "final"
    part = site.partition(".")[2]
    if site not in sites.points or not (part in PARTS or site == "final"):
        raise ValueError(
            f"`features` must be given by sites of {sites.model_name!r}, as 'L0.mlp', 'L1.resid', "
            f"'L0.attn' or 'final' ({len(sites.blocks)} blocks); got {name!r}; a transcoder's is "
            "the one that it writes"
        )
    return site


def _width(sites: Sites, site: str) -> int:
    """How many numbers a site holds at each position."""
    block, _, part = site.partition(".")
    if part in ("z", "neurons"):
        of = sites.blocks[int(block[1:])]
        module = of.mixer if part == "z" else of.mlp
        assert module is not None and module.out is not None
        return shape(module.out.module)[1]
    return int(sites.model.cfg.d_model)
