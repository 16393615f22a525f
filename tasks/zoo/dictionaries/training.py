"""Training the dictionaries of one model: all sites at once, on texts that are drawn as it goes.

A round reads fresh texts, goes through the vectors that the sites hold a few times, sets features
that were never on anew, and writes a checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tasks.zoo.dictionaries.autoencoders import Autoencoders
from tasks.zoo.dictionaries.places import hook_of, vectors
from tasks.zoo.dictionaries.quality import Quality, measured
from tasks.zoo.dictionaries.recipes import RECIPES, Recipe
from tasks.zoo.dictionaries.texts import Corpus, Mixture, Texts

__all__ = ["train"]

WARMUP = 0.02
"""Share of the steps in which the learning rate rises."""
REVIVING = 0.85
"""Share of the rounds behind which no feature is set anew: each has time to learn."""
LAYOUT = "6.0.0"
"""The version of SAELens whose layout is written."""


def train(
    name: str,
    *,
    out: Path,
    rounds: int | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: bool = True,
) -> dict[str, Quality]:
    """Trains a model's dictionaries into `out`, a folder for each site; returns how good they are.

    It goes on where it stopped: what has been done is kept in `out/checkpoint` until the end.

    Args:
        name: the model's.
        out: made if it is not there.
        rounds: how long; as the recipe says if None.
        seed: of weights and texts.
        threads: of the CPU.
        progress: shows a bar, and the loss as a share of the variance.

    Raises:
        ValueError: no recipe for this model, or `out` holds a checkpoint of another run.
    """
    if name not in RECIPES:
        raise ValueError(
            f"the model must be one of {sorted(RECIPES)}; got {name!r}; choose one of them"
        )
    from tasks import zoo
    from tasks.zoo.train import load_checkpoint, save_checkpoint

    torch.set_num_threads(threads)
    recipe = RECIPES[name]
    rounds = recipe.rounds if rounds is None else rounds
    model = zoo.load(name)
    checkpoint = out / "checkpoint" / "state.safetensors"
    texts = _texts(name, model, checkpoint.parent, (rounds + 1) * recipe.texts, seed)
    width = int(model.cfg.d_model)
    trained = Autoencoders(len(recipe.sites), width, recipe.features, recipe.active)
    optimizer = torch.optim.Adam(
        [p for p in trained.parameters() if p.requires_grad], betas=(0.9, 0.99), fused=True
    )
    run = {"name": name, "rounds": rounds, "seed": seed}
    header: dict[str, Any] = {"run": run, "round": 0}
    if checkpoint.exists():
        header = load_checkpoint(checkpoint, trained, optimizer, run)

    bar = tqdm(range(header["round"], rounds), initial=header["round"], total=rounds,
               disable=not progress, desc=name)  # fmt: skip
    for number in bar:
        x = vectors(model, texts.round(number, recipe.texts), recipe.sites)
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        if number == 0:
            trained.start(x, draw)
        loss = _round(trained, optimizer, recipe, x, number / rounds, 1 / rounds, draw)
        bar.set_postfix_str(" ".join(f"{share:.3f}" for share in loss.tolist()))
        header["round"] = number + 1
        save_checkpoint(checkpoint, trained, optimizer, header)

    x = vectors(model, texts.round(rounds, recipe.texts), recipe.sites)
    files = dict(zip(recipe.sites, trained.exported(x, getattr(torch, recipe.dtype)), strict=True))
    unseen = vectors(model, texts.held_out(), recipe.sites, first=False)
    tasks = texts.tasks()
    judged = {
        site: measured(model, site, files[site], own, tasks)
        for site, own in zip(recipe.sites, unseen, strict=True)
    }
    for site, weights in files.items():
        _write(out / site, weights, _config(name, model, site, weights, judged[site]))
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return judged


def _texts(name: str, model: Any, folder: Path, count: int, seed: int) -> Texts:
    from tasks.zoo.downloads import DOWNLOADS, fetched

    if name in DOWNLOADS:
        return Mixture(model.tokenizer, fetched(DOWNLOADS[name]), folder, count, seed)
    return Corpus(model.tokenizer, seed)


def _round(
    trained: Autoencoders,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    x: Tensor,
    done: float,
    share: float,
    draw: torch.Generator,
) -> Tensor:
    """Goes through the vectors; returns the unexplained share of the variance of each site.

    Args:
        trained: what is trained.
        optimizer: of it.
        recipe: how.
        x: the vectors.
        done: share of the training that lies behind.
        share: of the training that this round is.
        draw: for the order.
    """
    x = trained.scaled(x)
    fired = torch.zeros(trained.b_enc.shape, dtype=torch.bool)
    total = torch.zeros(len(x))
    steps = [
        at
        for _ in range(recipe.passes)
        for at in torch.randperm(x.shape[1], generator=draw).split(recipe.batch)
    ]
    for step, at in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _rate(done + share * step / len(steps))
        batch = x[:, at]
        guess, values = trained(batch)
        loss = (batch - guess).square().sum(-1).mean(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        trained.unit()
        fired |= (values > 0).any(1)
        total += loss.detach() / len(steps)
    if done + share < REVIVING:
        _revive(trained, optimizer, x, ~fired, draw)
    return total


def _revive(
    trained: Autoencoders,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    dead: Tensor,
    draw: torch.Generator,
) -> None:
    trained.revive(x, dead, draw)
    for parameter, axis in ((trained.w_enc, 2), (trained.w_dec, 1), (trained.b_enc, 1)):
        mask = dead.unsqueeze(3 - axis) if parameter.dim() == 3 else dead
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][key].masked_fill_(mask, 0.0)


def _rate(done: float) -> float:
    """Of the highest learning rate: a linear rise, then half a cosine down to a hundredth."""
    if done < WARMUP:
        return max(done / WARMUP, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


# -- files -----------------------------------------------------------------------------------------


def _config(
    name: str, model: Any, site: str, weights: dict[str, Tensor], judged: Quality
) -> dict[str, Any]:
    """Settings in SAELens' keys; what was measured is among its free ones."""
    width, features = weights["W_enc"].shape
    return {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",  # of the weights in use, whatever they are in the file
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT,
            "model_name": name,
            "hook_name": hook_of(site, int(model.cfg.n_layers)),
            "prepend_bos": True,
            "explained_variance": round(judged.explained, 4),
            "l0": round(judged.active, 2),
            "dead": round(judged.dead, 4),
            "metric_kept": {task: round(share, 3) for task, share in judged.kept.items()},
        },
    }


def _write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Each file appears whole or not at all; the settings last, with which a folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "fresh.tmp"
    save_file(weights, fresh)
    fresh.replace(folder / "sae_weights.safetensors")
    fresh.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    fresh.replace(folder / "cfg.json")
