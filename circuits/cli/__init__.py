"""The `relp` command: discover a circuit, measure effects, compare rules, draw, convert files.

What an option cannot be is said at once: torch and TransformerLens take seconds to import, so they
are where they are used, behind the checks. A command prints for people, or with `--json` for
programs; what a user can mend is one sentence on stderr and exit code 1, wrong usage is 2, and an
interruption 130.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from circuits.cli.bench import bench
from circuits.cli.compare import compare
from circuits.cli.discover import discover
from circuits.cli.lists import coverage, models, tasks
from circuits.cli.patch import merge, patch, verify
from circuits.cli.pictures import draw, explore, export
from circuits.cli.plan import plan

__all__ = ["COMMANDS", "app"]

COMMANDS: dict[Callable[..., None], str] = {
    discover: "relp discover ioi --edges 100 --out runs/ioi",
    compare: "relp compare ioi --model smollm2-135m --out runs/compare",
    patch: "relp patch ioi --level node --out effects.safetensors",
    verify: "relp verify ioi --budget 200 --out sample.safetensors",
    merge: "relp merge part*.safetensors --out effects.safetensors",
    bench: "relp bench --case saturation --out runs/bench",
    plan: "relp plan discover --model smollm2-135m --pairs 32 --tokens 15",
    coverage: "relp coverage ioi-llama --rules RELP",
    tasks: "relp tasks --model ioi-gpt2",
    models: "relp models",
    draw: "relp draw effects.safetensors --kind head --out heads.html",
    explore: "relp explore runs/ioi/ioi.json --edges 50 --out page.html",
    export: "relp export runs/ioi/ioi.json ioi.graphml",
}
"""Each command, with an example of it."""

app = typer.Typer(
    help="Find circuits in transformers with relevance patching, and check them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for function, example in COMMANDS.items():
    app.command(epilog=f"Example: {example}")(function)
