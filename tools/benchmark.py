"""Runs a benchmark without a notebook: the cells of nbs/benchmarks/NAME.ipynb, in this terminal.

    python tools/benchmark.py peers             as its page shows it
    python tools/benchmark.py peers --small     every cell, on less: what the tests run

What the page prints is printed, and what it writes (peers writes peers.csv, from which README's table is made) is written. Exits 1 where a cell fails.
"""
import os
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "nbs/benchmarks"


def names(): return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def run(name):
    "Whether all cells ran"
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("PYTHONPATH", str(ROOT))              # for the processes that a benchmark starts
    sys.path.insert(0, str(ROOT))
    os.chdir(FOLDER)                                            # as Jupyter does
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    shell = InteractiveShell.instance(config=Config(InteractiveShell={"colors": "nocolor"}, HistoryManager={"enabled": False}))
    cells = [cell for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    return all(shell.run_cell(cell.source, store_history=True).success for cell in cells)


def main():
    args = [a for a in sys.argv[1:] if a != "--small"]
    if len(args) != 1 or args[0] not in names(): sys.exit(f"{__doc__}\nBenchmarks: {', '.join(names())}")
    os.environ["DIT_NB_BENCHMARKS"] = "small" if "--small" in sys.argv else "full"
    start, done = time.monotonic(), run(args[0])
    print(f"{args[0]}: {'done' if done else 'FAILED'}, {time.monotonic() - start:.0f} s")
    sys.exit(not done)


if __name__ == "__main__": main()
