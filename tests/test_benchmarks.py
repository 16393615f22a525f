"""Benchmarks that run elsewhere or for long, on small shapes, so that they work where they run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import ROOT


@pytest.mark.long
def test_the_benchmark_of_gpus_runs_without_one(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "tests/benchmarks/gpu.py", "--device", "cpu", "--small"]
    subprocess.run([*command, "--rounds", "0", "--out", out], cwd=ROOT, check=True)
    on, *tables = json.loads(out.read_text()).values()
    assert on.startswith("cpu, torch") and len(tables) == 11
    assert all("why" not in row for table in tables for row in table.values())
    (cells,) = (row["differs by"] for t in tables for row in t.values() if "differs by" in row)
    assert cells < 1e-5 and all(row["same"] for row in tables[-1].values())


@pytest.mark.long
def test_a_long_prompt_at_the_shape_of_8b_fits_a_limited_process() -> None:
    asked = ["tests/benchmarks/long_prompt.py", "--tokens", "256", "--gb", "0.42", "--whole"]
    command = [sys.executable, *asked]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "of 32 blocks" in run.stdout and "805,681 edges of RELP" in run.stdout
    assert "apart from those of one graph" in run.stdout  # asserted to be less than 1e-5
