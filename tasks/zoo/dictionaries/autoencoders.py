"""Sparse autoencoders of several sites, trained side by side: each tensor has an axis of sites.

In training, of all features of all vectors in a batch the largest are kept, as many as make the
mean that is wanted (BatchTopK, arXiv:2412.06410). For use that is a threshold, which makes each
feature a function of its own pre-activation alone (a JumpReLU, arXiv:2407.14435):

    pre = (x - b_dec) @ W_enc + b_enc,    x̂ = (pre where pre > threshold, else 0) @ W_dec + b_dec

Inside, a site's vectors are divided by their spread, so that one learning rate suits all sites;
what is written is in the units of the model.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["Autoencoders", "reconstructed", "values"]

Vectors = Float[Tensor, "site vector d_model"]
Values = Float[Tensor, "site vector feature"]

SHORT = 0.03
"""Length of the encoder's columns at the start: features overlap, and many long ones overshoot."""


REVIVED = 0.5
"""Length of the encoder's columns of features that are set anew, over the mean of the others."""


class Autoencoders(nn.Module):
    """The weights of one autoencoder for each site.

    Args:
        sites: how many.
        width: of their vectors.
        features: of each autoencoder.
        active: features that are on for a vector, on average.
    """

    def __init__(self, sites: int, width: int, features: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.w_enc = nn.Parameter(torch.zeros(sites, width, features))
        self.w_dec = nn.Parameter(torch.zeros(sites, features, width))
        self.b_enc = nn.Parameter(torch.zeros(sites, features))
        self.b_dec = nn.Parameter(torch.zeros(sites, width))
        self.spread = nn.Parameter(torch.ones(sites), requires_grad=False)

    @torch.no_grad()
    def start(self, x: Vectors, draw: torch.Generator) -> None:
        """Begins at some of these vectors: features that the site really holds are soon found."""
        mean = x.mean(1)
        centred = x - mean[:, None]
        self.spread.copy_(centred.square().sum(-1).mean(1).sqrt())
        self.b_dec.copy_(mean / self.spread[:, None])
        features = self.b_enc.shape[1]
        for site, own in enumerate(centred):
            at = torch.randint(len(own), (features,), generator=draw)
            noise = torch.randn(features, own.shape[1], generator=draw)
            noise *= own.norm(dim=1).mean() / own.shape[1] ** 0.5  # no two features start the same
            self.w_dec[site] = own[at] + noise
        self.unit()
        self.w_enc.copy_(SHORT * self.w_dec.transpose(1, 2))

    @torch.no_grad()
    def unit(self) -> None:
        """Decoder rows of length 1, so that a value is the length of what a feature writes."""
        self.w_dec.div_(self.w_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    def scaled(self, x: Vectors) -> Vectors:
        """Vectors as these weights want them."""
        return x / self.spread[:, None, None]

    def before(self, x: Vectors) -> Values:
        """Pre-activations of scaled vectors."""
        return torch.baddbmm(self.b_enc[:, None], x - self.b_dec[:, None], self.w_enc)

    def forward(self, x: Vectors) -> tuple[Vectors, Values]:
        """Reconstructions of scaled vectors, and the features' values."""
        positive = self.before(x).relu()
        found = positive * (positive >= self.smallest(positive)[:, None, None])
        return torch.baddbmm(self.b_dec[:, None], found, self.w_dec), found

    @torch.no_grad()
    def smallest(self, positive: Values) -> Float[Tensor, " site"]:
        """The smallest value that is still kept where as many are as shall be."""
        sites, count, features = positive.shape
        return positive.reshape(sites, -1).kthvalue(count * (features - self.active) + 1).values

    @torch.no_grad()
    def revive(self, x: Vectors, dead: Bool[Tensor, "site feature"], draw: torch.Generator) -> None:
        """Sets features that are never on anew, on what is reconstructed worst (scaled vectors)."""
        error = x - self(x)[0]
        length_squared = (x - self.b_dec[:, None]).square().sum(-1).clamp_min(1e-12)
        share = error.square().sum(-1) / length_squared
        for site in range(len(x)):
            count = int(dead[site].sum())
            if not count:
                continue
            at = torch.multinomial(share[site], count, True, generator=draw)
            direction = nn.functional.normalize(error[site, at], dim=-1)
            alive = self.w_enc[site][:, ~dead[site]]
            length = alive.norm(dim=0).mean() if alive.numel() else SHORT
            self.w_dec[site][dead[site]] = direction
            self.w_enc[site][:, dead[site]] = direction.T * (REVIVED * length)
            self.b_enc[site][dead[site]] = 0.0

    @torch.no_grad()
    def exported(self, x: Vectors, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """What each site's file holds, in SAELens' names; thresholds suit these vectors."""
        threshold = self.smallest(self.before(self.scaled(x)).relu())
        ones = torch.ones_like(self.b_enc[0])
        return [
            {
                "W_enc": self.w_enc[site].to(dtype).contiguous(),
                "W_dec": self.w_dec[site].to(dtype).contiguous(),
                "b_enc": (self.b_enc[site] * spread).to(dtype),
                "b_dec": (self.b_dec[site] * spread).to(dtype),
                "threshold": (threshold[site] * spread * ones).to(dtype),
            }
            for site, spread in enumerate(self.spread)
        ]


def values(
    weights: dict[str, Tensor], x: Float[Tensor, "*axes d_model"]
) -> Float[Tensor, "*axes feature"]:
    """What the features of a file hold, which `weights` are of."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    return pre * (pre > w["threshold"].clamp_min(0))


def reconstructed(
    weights: dict[str, Tensor], x: Float[Tensor, "*axes d_model"]
) -> Float[Tensor, "*axes d_model"]:
    """The vectors as the features of a file say them."""
    return values(weights, x) @ weights["W_dec"].float() + weights["b_dec"].float()
