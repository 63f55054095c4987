"""A benchmark runs without a notebook, and README's comparison is that of the benchmark's output file."""
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from test_notebooks import NBS, NOTEBOOKS, ROOT


@pytest.fixture
def tree(tmp_path):
    "A tree with the tool and two benchmarks: one works, one fails"
    (tmp_path / "nbs/benchmarks").mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/benchmark.py", tmp_path / "tools")
    for name, cells in {"fine": ["#| hide\nimport os, sys", "print('size', os.environ['DIT_NB_BENCHMARKS'])", "6 * 7", "open('fine.csv', 'w').write('figures')"],
                        "broken": ["x = 1", "1 / 0", "open('never', 'w')"]}.items():
        cells = [nbformat.v4.new_markdown_cell("# Words"), *map(nbformat.v4.new_code_cell, cells)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"nbs/benchmarks/{name}.ipynb")
    return tmp_path


def run(tree, *args): return subprocess.run([sys.executable, "tools/benchmark.py", *args], cwd=tree, capture_output=True, text=True)


@pytest.mark.parametrize("args, size", [(["fine"], "full"), (["fine", "--small"], "small"), (["--small", "fine"], "small")])
def test_a_benchmark_runs_in_a_terminal(tree, args, size):
    done = run(tree, *args)
    assert done.returncode == 0, done.stderr
    assert f"size {size}" in done.stdout and re.search(r"Out\[\d+\]: 42", done.stdout) and "fine: done" in done.stdout
    assert (tree / "nbs/benchmarks/fine.csv").read_text() == "figures"


def test_a_failing_cell_ends_it(tree):
    done = run(tree, "broken")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout + done.stderr and "broken: FAILED" in done.stdout
    assert not (tree / "nbs/benchmarks/never").exists()


@pytest.mark.parametrize("args", [[], ["nothing"], ["fine", "broken"]])
def test_what_is_no_benchmark_is_told(tree, args):
    done = run(tree, *args)
    assert done.returncode == 1 and "broken, fine" in done.stderr


def test_every_benchmark_has_its_page(): assert {p.stem for p in NOTEBOOKS if p.parts[0] == "benchmarks"} >= {"peers", "cost", "exactness", "paper"}


# README's table

FIGURES = pd.read_csv(NBS / "benchmarks/peers.csv")


def test_the_table_in_readme_is_that_of_the_output_file(monkeypatch):
    cell, = (c for c in nbformat.read(NBS / "index.ipynb", as_version=4).cells if "peers.csv" in c.source and c.cell_type == "code")
    monkeypatch.chdir(NBS)
    *lines, last = cell.source.splitlines()
    scope = {}
    exec("\n".join([*lines, f"table = {last}"]), scope)
    made = scope["table"].data
    assert made in (ROOT / "README.md").read_text(encoding="utf-8")
    assert made.count("\n") > 8 and "dit_nb" in made and "nan" not in made


def test_the_figures_are_whole():
    assert FIGURES.training.nunique() >= 10 and {"SGD", "AdamW"} == set(FIGURES.training.str.rpartition(", ")[2])
    truth = FIGURES[FIGURES.contestant == "exact, vectorised"]
    assert len(truth) == FIGURES.training.nunique() and (truth.filter(like="pearson") > 1 - 1e-9).all(axis=None)
    ours = FIGURES[FIGURES.contestant == "dit_nb"]
    assert ours.filter(like="pearson").notna().all(axis=None) and (ours.ratio_end < ours.ratio_all).all()
    peers = FIGURES[FIGURES.version.notna() & ~FIGURES.contestant.str.startswith(("dit_nb", "recorded"))]
    assert {name.split()[0] for name in peers.contestant} == {"dattri", "captum", "kronfluence", "pyDVL", "bergson"}
