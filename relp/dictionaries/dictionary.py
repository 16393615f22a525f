"""A sparse dictionary as a value: what a place of a model holds, as a sum of features.

Reconstruction of a vector x:

    x̂ = Σ_f value_f(x) · w_dec[f] + offset(x),    value_f = out(x) · activation(pre_f),
    pre = ((x - centre(x)) · factor(x) - b_dec where it subtracts) @ w_enc + b_enc

with centre, factor and out of the normalisation (0, 1 and 1 if there is none). The values are in
the units of the place: whatever scale is undone behind the decoder is multiplied in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp.dictionaries.activations import Activation, TopK, moved, parameters
from relp.dictionaries.hook_names import same_site
from relp.dictionaries.normalizations import Frame, LayerNorm, Normalization, Scaled

__all__ = ["Dictionary", "Rule"]

Rule = Literal["derivative", "secant"]
"""How a feature's value follows its pre-activation between two runs."""
Features = Int[Tensor, " chosen"]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Sparse features of what one place of a model holds: encoder, nonlinearity, decoder.

    An autoencoder writes what it reads; a transcoder reads one site and writes another (what an MLP
    reads and what it adds). Computes in float32 on the device of the vectors, on any leading axes.

    >>> import torch
    >>> from relp.dictionaries import Dictionary, Relu
    >>> eye = torch.eye(2)
    >>> both = torch.cat([eye, -eye])  # two directions and their opposites
    >>> of = Dictionary(both.T, both, torch.zeros(4), torch.zeros(2), Relu(), "L3.mlp", "L3.mlp")
    >>> of.encode(torch.tensor([1.0, -2.0])).tolist()
    [1.0, 0.0, 0.0, 2.0]
    >>> of.reconstruct(torch.tensor([1.0, -2.0])).tolist()
    [1.0, -2.0]

    Raises:
        ValueError: shapes do not go together.
    """

    w_enc: Float[Tensor, "d_in feature"]
    w_dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation
    reads: str = ""
    """The site that it reads; empty where its file does not say."""
    writes: str = ""
    """The site that it reconstructs."""
    subtracts: bool = False
    """`b_dec` is subtracted from the (normalised) input before encoding."""
    normalization: Normalization = Scaled()  # noqa: RUF009  # frozen
    w_skip: Float[Tensor, "d_in d_out"] | None = None
    """What a skip transcoder adds of its input as it is."""
    name: str = ""
    """For messages: the file or folder."""
    transcodes: bool = False
    """Its file says that it is a transcoder, also if not of what."""
    doubt: str = ""
    """Why `reads` may be wrong, as a sentence: see `hook_names`; settled by `placed`."""

    def __post_init__(self) -> None:
        features, d_out = self.b_enc.numel(), self.b_dec.numel()
        lies = self.w_enc.dim() == 2 and self.w_enc.shape[0] == features != self.w_enc.shape[1]
        d_in = self.w_enc.shape[1 if lies else 0] if self.w_enc.dim() == 2 else -1
        expected = {
            "w_enc": (self.w_enc, (d_in, features)),
            "w_dec": (self.w_dec, (features, d_out)),
            "b_enc": (self.b_enc, (features,)),
            "b_dec": (self.b_dec, (d_out,)),
        }
        expected |= {n: (p, (features,)) for n, p in parameters(self.activation).items()}
        if self.w_skip is not None:
            expected["w_skip"] = (self.w_skip, (d_in, d_out))
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                turned = tuple(tensor.shape) == shape[::-1] and len(shape) == 2
                raise ValueError(
                    f"{self.called}: {name} must be {list(shape)} to go with the biases of "
                    f"{features} features and {d_out} outputs; got {list(tensor.shape)}; "
                    + ("transpose it" if turned else "take weights that belong together")
                )
        if self.subtracts and (d_in != d_out or self.is_transcoder):
            raise ValueError(
                f"{self.called}: only an autoencoder can subtract b_dec from its input, as only "
                f"there both are of one place; got a transcoder from {d_in} to {d_out}; set "
                "subtracts=False (apply_b_dec_to_input in its config)"
            )
        if isinstance(self.activation, TopK) and not 0 < self.activation.k <= features:
            raise ValueError(
                f"{self.called}: k must be between 1 and its {features} features; got "
                f"{self.activation.k}; mend its config"
            )

    @classmethod
    def of(cls, anything: object) -> Dictionary:
        """A dictionary as it is, that of a path (see `load_dictionary`), or of a SAELens object.

        SAELens objects are recognised by what they have (`cfg`, `W_enc`, `W_dec`): it need not be
        installed.

        Raises:
            TypeError: it is none of these.
            ValueError: the file or object is of a kind that is not known, or broken.
        """
        from relp.dictionaries import load_dictionary, saelens  # they build this class

        if isinstance(anything, Dictionary):
            return anything
        if isinstance(anything, str) or hasattr(anything, "__fspath__"):
            return load_dictionary(anything)
        if all(hasattr(anything, name) for name in ("cfg", "W_enc", "W_dec")):
            return saelens.of_object(anything)
        raise TypeError(
            "a dictionary must be a relp.Dictionary, the path of its file or folder, or a SAELens "
            f"SAE or transcoder; got {type(anything).__name__}; load it from files with "
            "relp.load_dictionary(path), or build Dictionary(w_enc, w_dec, b_enc, b_dec, Relu())"
        )

    # -- what it is --------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """How many there are."""
        return self.b_enc.numel()

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return int(self.w_enc.shape[0])

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return int(self.w_dec.shape[1])

    @property
    def is_transcoder(self) -> bool:
        """It reads one place and writes another."""
        return self.transcodes or self.reads != self.writes or self.w_skip is not None

    @property
    def called(self) -> str:
        """For messages: its name in quotes."""
        return repr(self.name) if self.name else "this dictionary"

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hex digits of the SHA-256 of all weights and of how they are used."""
        digest = hashlib.sha256()
        tensors = {n: getattr(self, n) for n in ("w_enc", "w_dec", "b_enc", "b_dec", "w_skip")}
        for name, tensor in (tensors | parameters(self.activation)).items():
            if tensor is not None:
                digest.update(f"{name}{list(tensor.shape)}".encode())
                # contiguous: one and the same matrix may lie in memory either way
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        rest = {
            name: value
            for name, value in vars(self.activation).items()
            if not isinstance(value, Tensor)
        }
        used = (type(self.activation).__name__, rest, self.normalization, self.subtracts)
        digest.update(repr(used).encode())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> Dictionary:
        """The dictionary with its weights on a device."""
        names = ("w_enc", "w_dec", "b_enc", "b_dec", "w_skip")
        found = {n: t.to(device) for n in names if (t := getattr(self, n)) is not None}
        return replace(self, activation=moved(self.activation, lambda t: t.to(device)), **found)

    def placed(
        self,
        reads: str,
        writes: str = "",
        *,
        gain: Float[Tensor, " d_in"] | None = None,
        bias: Float[Tensor, " d_in"] | None = None,
    ) -> Dictionary:
        """The dictionary with where it reads and writes said anew; settles a doubt.

        Args:
            reads: a site, as `L3.mlp_in`.
            writes: the same for an autoencoder, which is meant if it is left out.
            gain: what the norm before the MLP multiplies by (1 + weight in Gemma), if a transcoder
                was trained on what stands before that factor (`ln2.hook_normalized`): the encoder
                is divided by it, so that it reads what stands behind.
            bias: what that norm adds, if it does (LayerNorm).

        Raises:
            ValueError: a gain for an autoencoder, or behind a normalisation of the dictionary.
        """
        writes = writes or reads
        placed = replace(self, reads=reads, writes=writes, transcodes=writes != reads, doubt="")
        if gain is None and bias is None:
            return placed
        if not placed.transcodes or self.normalization != Scaled():
            what = f"one with {self.normalization}" if placed.transcodes else "an autoencoder"
            raise ValueError(
                f"{self.called}: a gain can be divided out of a transcoder without normalisation "
                f"of its own; got {what}; leave gain out"
            )
        gain = torch.ones(self.d_in) if gain is None else gain.detach().float()
        bias = torch.zeros(self.d_in) if bias is None else bias.detach().float()
        if gain.shape != (self.d_in,) or bias.shape != gain.shape or bool((gain == 0).any()):
            raise ValueError(
                f"{self.called}: gain and bias must be of {self.d_in} numbers, none of the gain "
                f"0; got {list(gain.shape)} and {list(bias.shape)}; take those of the norm before "
                "the MLP"
            )
        w_enc = self.w_enc / gain.to(self.w_enc)[:, None]
        placed = replace(placed, w_enc=w_enc, b_enc=self.b_enc - bias.to(w_enc) @ w_enc)
        if self.w_skip is None:
            return placed
        w_skip = self.w_skip / gain.to(w_enc)[:, None]
        return replace(placed, w_skip=w_skip, b_dec=self.b_dec - bias.to(w_skip) @ w_skip)

    def must_fit(self, site: str, width_in: int, width_out: int, blocks: int | None = None) -> None:
        """Refuses what cannot be a dictionary of this site of a model.

        Args:
            site: what it is to reconstruct; a transcoder may be named by what it reads as well.
            width_in: width of what it is to read.
            width_out: width of what it is to write.
            blocks: how many the model has, if known: the output of the last is `final`.

        Raises:
            ValueError: its file says another site, or something that must be settled first; or the
                widths differ.
        """
        if self.doubt:
            raise ValueError(f"{self.called} must say where it reads without doubt: {self.doubt}")
        if self.is_transcoder and not (self.reads and self.writes):
            says = f"{self.reads or 'nothing'!r} and {self.writes or 'nothing'!r}"
            raise ValueError(
                f"{self.called}: a transcoder must have a site that it reads and one that it "
                f"writes; its file says {says}; say both with "
                "dictionary.placed('L3.mlp_in', 'L3.mlp')"
            )
        own = {self.reads, self.writes} - {""}
        if own and not any(same_site(one, site, blocks) for one in own):
            raise ValueError(
                f"{self.called} must be a dictionary of {site!r}; its file says "
                f"{' to '.join(sorted(own, key=(self.reads, self.writes).index))!r}; use it there, "
                f"or dictionary.placed({site!r}) if the file is wrong"
            )
        if (width_in, width_out) != (self.d_in, self.d_out):
            raise ValueError(
                f"{self.called} must read {width_in} and write {width_out} numbers at {site!r}; "
                f"it reads {self.d_in} and writes {self.d_out}; use the dictionary of this model"
            )

    # -- features ----------------------------------------------------------------------------------

    def before(
        self, x: Float[Tensor, "*axes d_in"], chosen: Features | None = None
    ) -> Float[Tensor, "*axes any_feature"]:
        """Pre-activations of all features, or of those with these numbers, in their order."""
        x = x.float()
        return self._before(x, self.normalization.frame(x), chosen)

    def encode(
        self, x: Float[Tensor, "*axes d_in"], chosen: Features | None = None
    ) -> Float[Tensor, "*axes any_feature"]:
        """Values of features, in units of the site: `decode(values) + offset(x)` is x̂.

        A TopK chooses among all features, also if only some are asked for.
        """
        x = x.float()
        frame = self.normalization.frame(x)
        return self._values(self._before(x, frame, self._needed(chosen)), chosen) * self._out(frame)

    def decode(
        self, values: Float[Tensor, "*axes any_feature"], chosen: Features | None = None
    ) -> Float[Tensor, "*axes d_out"]:
        """What features with these values write: values @ w_dec[chosen], without any offset."""
        w_dec = self.w_dec if chosen is None else self.w_dec[chosen.to(self.w_dec.device)]
        return values.float() @ w_dec.to(values.device, torch.float32)

    def offset(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        """The part of the reconstruction that is of no feature: bias, mean, skip connection."""
        x = x.float()
        frame = self.normalization.frame(x)
        offset = self.b_dec.to(x) * self._out(frame)
        if not self.is_transcoder:
            offset = offset + frame.centre
        return offset if self.w_skip is None else offset + x @ self.w_skip.to(x)

    def reconstruct(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        """x̂, or what a transcoder says of the site that it writes."""
        return self.decode(self.encode(x)) + self.offset(x)

    def slope(
        self,
        own: Float[Tensor, "*axes d_in"],
        other: Float[Tensor, "*axes d_in"],
        rule: Rule,
        chosen: Features | None = None,
    ) -> Float[Tensor, "*axes any_feature"]:
        """How a feature's value follows its own pre-activation from the own to the other run.

        `derivative` is taken in the own run: 1 where a ReLU, JumpReLU or TopK is on (exp(r_mag)
        where a Gated is), else 0. `secant` is the difference of the two runs' values over that of
        their pre-activations, and the derivative where those agree to rounding: what a feature does
        that is off in one run and on in the other, jump included. Each feature counts by its own
        pre-activation also in a TopK, and with a Gated by p = W_enc·x, on which gate and magnitude
        both depend.

        A normalisation of the dictionary is held as it is in the own run (mean of each vector
        apart, which is linear): the other run is read with the own run's length or deviation. So
        with a `LayerNorm` or `UnitNorm` the product of the secant and the change of the
        pre-activation is the change of the value but for that of the scale.

        Source: DeepLIFT's Rescale rule, arXiv:1704.02685; features by arXiv:2403.19647.

        Raises:
            ValueError: no such rule.
        """
        if rule not in ("derivative", "secant"):
            raise ValueError(
                f"`rule` must be 'derivative' or 'secant'; got {rule!r}; see Dictionary.slope"
            )
        own, other = own.float(), other.float().to(own.device)
        frame, wanted = self.normalization.frame(own), self._needed(chosen)
        pre = self._before(own, frame, wanted)
        slopes = self._slopes(pre, chosen)
        if rule == "secant":
            # the mean is each run's own: it is no scale
            theirs = frame._replace(centre=self.normalization.frame(other).centre)
            pre_ = self._before(other, theirs, wanted)
            change = self._cut(pre_, chosen) - self._cut(pre, chosen)
            values, values_ = self._values(pre, chosen), self._values(pre_, chosen)
            # on in both or off in both, a value is linear: its slope without any rounding
            same = slopes == self._slopes(pre_, chosen)
            same |= change.abs() <= self._rounding(own, other, frame, chosen)
            change = torch.where(same, torch.ones_like(change), change)
            slopes = torch.where(same, slopes, (values_ - values) / change)
        return slopes * self._out(frame)

    def reading(
        self, own: Float[Tensor, "*axes d_in"], chosen: Features | None = None
    ) -> tuple[Float[Tensor, "*axes 1"], Float[Tensor, "d_in any_feature"]]:
        """How a change of x enters the pre-activations: a factor of each vector, and a matrix.

        `before(x + step) - before(x)` is `factor * (step @ matrix)`, with the scale of a
        normalisation held as it is in the own run, as in `slope`. Without normalisation the factor
        is 1 and the matrix the encoder.
        """
        own = own.float()
        w_enc = self.w_enc if chosen is None else self.w_enc[:, chosen.to(self.w_enc.device)]
        w_enc = w_enc.to(own)
        if isinstance(self.normalization, LayerNorm):  # it takes the mean out of any step
            w_enc = w_enc - w_enc.mean(0)
        return self.normalization.frame(own).factor, w_enc

    # -- how good it is ----------------------------------------------------------------------------

    def explained(
        self,
        x: Float[Tensor, "*axes d_in"],
        target: Float[Tensor, "*axes d_out"] | None = None,
    ) -> float:
        """Share of the variance of these vectors that the reconstruction explains.

        1 - Σ|x - x̂|² / Σ|x - mean|²: 1 is all of it, 0 as much as their mean does, less is worse.

        Args:
            x: what it reads.
            target: what a transcoder is to write there; x for an autoencoder.

        Raises:
            ValueError: a transcoder without `target`, or vectors that do not vary.
        """
        if target is None and self.is_transcoder:
            raise ValueError(
                f"{self.called}: `target` must be what the model holds at the site that a "
                "transcoder writes; got none; pass explained(x, target)"
            )
        true = (x if target is None else target).float().flatten(0, -2)
        guess = self.reconstruct(x).to(true.device).flatten(0, -2)
        total = float((true - true.mean(0)).square().sum(dtype=torch.float64))
        if not total:
            raise ValueError(
                f"{self.called}: the variance is of vectors that differ; got {len(true)} alike; "
                "pass those of several positions"
            )
        return 1 - float((true - guess).square().sum(dtype=torch.float64)) / total

    def sparsity(self, x: Float[Tensor, "*axes d_in"]) -> float:
        """Mean number of features that are on for a vector (L0)."""
        return float((self.encode(x) != 0).sum(-1).double().mean())

    # -- inside ------------------------------------------------------------------------------------

    def _needed(self, chosen: Features | None) -> Features | None:
        """Whose pre-activations the values of the chosen hang on."""
        return None if isinstance(self.activation, TopK) else chosen

    def _cut(self, all_or_chosen: Tensor, chosen: Features | None) -> Tensor:
        """The chosen features of what `_needed` gave."""
        if chosen is None or self._needed(chosen) is not None:
            return all_or_chosen
        return all_or_chosen[..., chosen.to(all_or_chosen.device)]

    def _cut_down(self, chosen: Features | None) -> Activation:
        if self._needed(chosen) is None or chosen is None:
            return self.activation
        return moved(self.activation, lambda p: p[chosen.to(p.device)])

    def _before(self, x: Tensor, frame: Frame, chosen: Features | None) -> Tensor:
        z = (x - frame.centre) * frame.factor
        if self.subtracts:
            z = z - self.b_dec.to(z)
        w_enc, b_enc = self.w_enc, self.b_enc
        if chosen is not None:
            chosen = chosen.to(w_enc.device)
            w_enc, b_enc = w_enc[:, chosen], b_enc[chosen]
        return z @ w_enc.to(z) + b_enc.to(z)

    def _values(self, pre: Tensor, chosen: Features | None) -> Tensor:
        return self._cut(self._cut_down(chosen).values(pre), chosen)

    def _slopes(self, pre: Tensor, chosen: Features | None) -> Tensor:
        return self._cut(self._cut_down(chosen).slopes(pre), chosen)

    def _out(self, frame: Frame) -> Tensor:
        """A transcoder's output is of another place: no scale of the input is in it."""
        return torch.ones_like(frame.out) if self.is_transcoder else frame.out

    def _rounding(
        self, own: Tensor, other: Tensor, frame: Frame, chosen: Features | None
    ) -> Tensor:
        """Below what a difference of pre-activations says nothing: float32's, of their terms."""
        w_enc = self.w_enc if chosen is None else self.w_enc[:, chosen.to(self.w_enc.device)]
        length = torch.maximum(own.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True))
        length = length * frame.factor
        if self.subtracts:
            length = length + self.b_dec.to(own).norm()
        return 4 * torch.finfo(torch.float32).eps * length * w_enc.to(own).norm(dim=0)
