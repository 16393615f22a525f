"""Which scores find the better circuits: CPR and CMD on the models that ship, and the time.

python tests/benchmarks/evaluation.py
python tests/benchmarks/evaluation.py --exact    # and exact edge effects, which take minutes
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import typer
from floor import floor, seconds
from transformers import AutoModelForCausalLM

from circuits import evaluate, patch
from relp import GRADIENT, PRESETS, Scores, attribute
from tasks import ioi, zoo
from tasks.zoo.shelf import shipped

MEANING = """
Edges are scored on {pairs} pairs of prompts; circuits of the best edges, in the sizes of MIB
(arXiv:2504.13151), are run on {pairs} others, with all other edges corrupt. CPR is the area under
faithfulness by size, edges ranked by score (higher is better, above 1 is possible); CMD the area
between faithfulness and 1, edges ranked by |score| (0 is best), with its 95 % interval over pairs.
`p vs EAP`: how likely a difference in CMD as large as that to GRADIENT, which is EAP, is by chance.
GRADIENT (5 steps) is EAP-IG. `times floor`: CPU time of the scores, in units of two forward passes
and one backward of the plain model on the same pairs. One thread; two small models, one task.
"""


def main(pairs: int = 16, exact: bool = False) -> None:
    """Prints one table for each model."""
    print(MEANING.format(pairs=pairs))
    for name in shipped():
        table = compared(name, pairs, exact=exact)
        print(f"{name}\n{table.to_string(float_format='{:.3f}'.format, na_rep='–')}\n", flush=True)


def compared(name: str, pairs: int, *, exact: bool) -> pd.DataFrame:
    """CPR, CMD and time of every way to score edges, best CMD first."""
    model = zoo.load(name)
    found_on, judged_on = (ioi(model.tokenizer, pairs=pairs, seed=seed) for seed in (0, 1))
    ways = [partial(attribute, rules=rules) for rules in PRESETS.values()]
    ways += [partial(attribute, rules=GRADIENT, steps=5), *([partial(patch)] if exact else [])]
    folder = Path(zoo.__file__).parent / name
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    unit = floor(plain.eval().requires_grad_(False), found_on)
    unit()
    once = median(seconds(unit)[0] for _ in range(5))
    scores: list[Scores] = []
    times = {}
    for way in ways:
        work = partial(way, model, found_on, level="edge", progress=False)
        cpu, _ = seconds(lambda work=work: scores.append(work()))  # type: ignore[misc]
        times[scores[-1].rules] = cpu / once
    signed = evaluate(model, judged_on, scores, signed=True, progress=False)
    absolute = evaluate(model, judged_on, scores, progress=False)
    table = absolute.areas().set_index("rules")[["CMD", "CMD_low", "CMD_high"]]
    table.insert(0, "CPR", signed.areas().set_index("rules")["CPR"])
    for other in table.index.drop("GRADIENT"):
        test = absolute.compare(other, "GRADIENT").set_index("measure")
        table.loc[other, "p vs EAP"] = test.loc["CMD", "p_value"]
    return table.assign(**{"times floor": pd.Series(times)}).sort_values("CMD")


if __name__ == "__main__":
    typer.run(main)
