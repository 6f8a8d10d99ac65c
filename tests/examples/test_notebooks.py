"""Every notebook runs from its first cell to its last, and is committed as it looks after that."""

import nbformat
import pytest
from common import ROOT
from nbclient import NotebookClient


FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    # without one the tests below would pass
    assert NOTEBOOKS


@each_notebook
def test_runs_in_its_folder(path):
    notebook = nbformat.read(path, as_version=4)
    # they are healthy runs; not earlier, since a notebook may say where the Hub is before it imports anything
    strict = "import warnings\nimport loqt_peft\nwarnings.simplefilter('error', loqt_peft.LoQTWarning)"
    imported = next(i for i, cell in enumerate(notebook.cells) if "from loqt_peft" in cell.source)
    notebook.cells.insert(imported + 1, nbformat.v4.new_code_cell(strict))
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


@each_notebook
def test_is_committed_with_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
