"""Saves a circuit: `python -m tasks.planted induction FOLDER --noise 0.1 --distractors 8`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tasks import planted

app = typer.Typer(add_completion=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=", ".join(planted.names()))],
    folder: Annotated[Path, typer.Argument(help="a new folder, for model, tokenizer and truth")],
    pairs: Annotated[int, typer.Option(help="pairs of prompts in planted.json")] = 16,
    seed: Annotated[int, typer.Option(help="of prompts, noise and distractors")] = 0,
    noise: Annotated[float, typer.Option(help="random weights, as a share of the others")] = 0.0,
    distractors: Annotated[int, typer.Option(help="further heads, of no consequence")] = 0,
) -> None:
    """Write a transformer by hand whose true edges are known."""
    try:
        made = planted.plant(name, pairs=pairs, seed=seed, noise=noise, distractors=distractors)
        made.save(folder)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{made.name}: {len(made.edges)} true edges ({made.direction}) in {folder}")


if __name__ == "__main__":
    app()
