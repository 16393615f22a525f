"""The notebooks run from top to bottom, and stay what they are: stories, not programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tasks.zoo.downloads import DOWNLOADS, kept

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REAL, SHIPPED = "smollm2-135m", "ioi-gpt2"

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [out for cell in code(notebook) for out in cell.get("outputs", [])]


def test_there_are_three() -> None:
    assert [n.stem for n in NOTEBOOKS] == [
        "01_discover_ioi", "02_relp_vs_attribution_patching", "03_export_circuit_diagrams",
    ]  # fmt: skip


@each
def test_it_is_a_story_with_short_cells(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source
    assert first.startswith("# ") and "**You will learn**" in first and "**What it costs**" in first
    for cell in code(notebook):
        assert "def " not in cell.source and len(cell.source.splitlines()) <= 18, cell.source
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert "ccc" not in kinds  # at most two cells without a word between


@each
def test_it_is_committed_with_its_outputs(path: Path) -> None:
    """A result under each cell, pictures that need no script, nothing of this machine."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code(notebook):
        assert cell.execution_count and cell.outputs, cell.source
        figures = re.search(r"^(draw\(|figure$)", cell.source, re.MULTILINE)
        if figures and cell.source.splitlines()[-1].startswith(("draw(", "figure")):
            assert any("image/png" in out.get("data", {}) for out in cell.outputs), cell.source
    for out in outputs(notebook):
        assert out.output_type != "error" and out.get("name") != "stderr"
        text = str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", ""))
        assert not re.search(r"/(tmp|root|home|work)/", text), text


@pytest.mark.long
@each
@pytest.mark.filterwarnings("ignore")  # what Jupyter's own processes warn about
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """On the shipped model where the real one was not fetched."""
    notebook = nbformat.read(path, as_version=4)
    shown = sum(bool(cell.outputs) for cell in code(notebook))
    for cell in code(notebook):
        if kept(DOWNLOADS[REAL]) is None:
            cell.source = cell.source.replace(f'"{REAL}"', f'"{SHIPPED}"')
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert sum(bool(cell.outputs) for cell in code(notebook)) == shown
    assert not [o for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
