"""Every notebook runs from top to bottom as on Colab, and is committed without outputs.

Each runs in a kernel of the Python that runs the tests, in an empty folder, and has to
simulate its eight devices itself.
"""

import os
import pathlib
import sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL = 600
"""Seconds after which a cell counts as hanging."""

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisPythonsKernel(AsyncKernelManager):
    """A kernel that needs no installed kernel specs, and heeds none."""

    def __init__(self, **options):
        super().__init__(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options
        )


def execute(notebook, folder):
    """Runs all cells in `folder`; an error in any raises `CellExecutionError`."""
    simulating = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in simulating}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }
    client = NotebookClient(
        notebook,
        timeout=LONGEST_CELL,
        kernel_name="python3",
        kernel_manager_class=ThisPythonsKernel,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)


def test_there_are_notebooks():
    assert NOTEBOOKS


@notebooks
def test_runs_on_eight_simulated_devices(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    last = "import jax, sys\nprint(sys.executable, jax.device_count())"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    execute(notebook, tmp_path)
    assert notebook.cells[-1].outputs[0].text.split() == [sys.executable, "8"]


@notebooks
def test_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)  # format 4.5 asks for an id in every cell
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@notebooks
def test_opens_in_colab(path):
    header, install = nbformat.read(path, as_version=4).cells[:2]
    assert header.cell_type == "markdown" and header.source.startswith("# ")
    assert "(https://colab.research.google.com/github" in header.source
    assert path.name in header.source
    skipped = 'if importlib.util.find_spec("jaxspeed") is None:'
    _, found, installs = install.source.partition(skipped)
    assert found and "\n    %pip install" in installs
