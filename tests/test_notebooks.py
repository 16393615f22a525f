"""The notebooks run from top to bottom, and stay what they are: stories, not programs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert [n.name for n in NOTEBOOKS] == ["01_discover_ioi.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")  # what Jupyter's own processes warn about
def test_it_runs_and_shows_pictures(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "def " not in source
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [o for o in outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert len(pictures) == source.count("draw(")
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
