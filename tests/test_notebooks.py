"""Every notebook runs from top to bottom, in a real kernel of the Python that runs pytest.

Benchmarks run in small: every cell, on less. `DIT_NB_BENCHMARKS=full python -m pytest tests/test_notebooks.py` runs them as their pages show them, with
the assertions on their figures, which takes the better part of an hour."""
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
# Tutorials and benchmarks take longest: they start first.
NOTEBOOKS = sorted((path.relative_to(NBS) for path in NBS.rglob("*.ipynb")
                    if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)),
                   key=lambda path: (len(path.parts) == 1, path))


class ThisPython(AsyncKernelManager):
    "Starts kernels of this interpreter, whatever kernels the machine has installed."
    @property
    def kernel_spec(self): return KernelSpec(**get_kernel_dict())


def kernel_environment(folder):
    "This process's environment; the package of this tree; no start-up files of the user; figures inline."
    env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    return env | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"),
                  "DIT_NB_BENCHMARKS": env.get("DIT_NB_BENCHMARKS", "small"), "TQDM_DISABLE": "1", "IN_TEST": "1"}          # IN_TEST: nbdev exports nothing


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.with_suffix("").as_posix())
def test_notebook_runs(notebook, tmp_path):
    # A copy, so that what a notebook writes beside itself never reaches the tree.
    copy = shutil.copytree(NBS, tmp_path / "nbs", ignore=shutil.ignore_patterns(".*")) / notebook
    shutil.copy(ROOT / "settings.ini", tmp_path)
    nb = nbformat.read(copy, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            cell.metadata["tags"] = ["skip-execution"]
    client = NotebookClient(nb, timeout=600, kernel_manager_class=ThisPython,
                            resources={"metadata": {"path": str(copy.parent)}})
    failure = None
    with TemporaryDirectory() as sockets:                       # sockets in files: kernels side by side cannot clash
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip, kernel.connection_file = "ipc", f"{sockets}/kernel", f"{sockets}/kernel.json"
        try: client.execute(env=kernel_environment(tmp_path))
        except (CellControlSignal, DeadKernelError) as error:   # a cell failed, took too long, or killed its kernel
            failure = re.sub(r"\x1b\[[0-9;]*m", "", f"nbs/{notebook}: {type(error).__name__}\n{error}")
    if failure: pytest.fail(failure, pytrace=False)
