"""How the dictionaries were made, and how to make them again.

    python -m tasks.zoo.dictionaries ioi-gpt2
    python -m tasks.zoo.dictionaries smollm2-135m

Nothing but a fetched model is downloaded. Training goes on where it stopped when the same command
is given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tasks.zoo.dictionaries import home
from tasks.zoo.dictionaries.recipes import RECIPES

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=", ".join(RECIPES))],
    out: Annotated[
        Path | None,
        typer.Option(help="folder; default: where zoo.dictionaries looks for them"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="how long; default: as the recipe says")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of weights and texts")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Train sparse dictionaries of a model of the zoo, and print how good each is."""
    from tasks.zoo.dictionaries.training import train

    try:
        judged = train(name, out=out or home(name), rounds=rounds, seed=seed, threads=threads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for site, quality in judged.items():
        typer.echo(f"{site:9} {quality.line()}")


if __name__ == "__main__":
    app()
