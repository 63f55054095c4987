"""The book builds without a warning and without a dead link, and shows what it should and nothing else."""
import re
import subprocess
import sys

import nbformat
import pytest

import dit_nb
from test_notebooks import NBS, NOTEBOOKS, ROOT

sys.path.append(str(ROOT / "tools"))
import book                                                                    # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")        # of Sphinx's own extensions


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("book") / "site"
    wrong = book.build(site)
    assert not wrong, "\n".join(wrong)
    return site


def pages(site): return {p: (site / p.with_suffix(".html")).read_text(encoding="utf-8") for p in NOTEBOOKS}


def test_book(site):
    "Every notebook has a page that the contents lead to; directives and hidden cells are not on it; nothing is loaded from elsewhere; the search knows what is on the pages."
    index = (site / "index.html").read_text(encoding="utf-8")
    for notebook, text in pages(site).items():
        assert notebook.name == "index.ipynb" or f'href="{notebook.with_suffix(".html").as_posix()}"' in index, f"{notebook} is in no table of contents"
        plain = re.sub(r"<[^>]+>", "", text)
        assert not re.search(r"#\|\s*(hide|export|default_exp|echo|output|include|eval|fig-alt)", plain), f"{notebook}: a directive is printed"
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+stylesheet[^>]+href="https?:', text), f"{notebook} loads something from elsewhere"
        for cell in nbformat.read(NBS / notebook, as_version=4).cells:
            if cell.cell_type == "code" and re.match(r"#\|\s*hide\b", cell.source) and len(secret := cell.source.splitlines()[-1].strip()) > 25:
                assert re.sub(r"\W", "", secret) not in re.sub(r"&\w+;|\W", "", plain), f"{notebook}: a hidden cell is shown"
    search = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(word in search for word in ("leave_one_out", "find_corrupt", "adjoint")), "the search does not find what is there"


def test_formulas(site):
    "No formula has swallowed the words beside it, as a display in the middle of a paragraph once made them."
    for notebook, text in pages(site).items():
        swallowed = re.findall(r'class="math[^"]*">\\\(\s*(and|where|with|is|the|of|for|which)\b', text)
        assert not swallowed, f"{notebook}: {swallowed} set as formulas"


def test_colours_of_tables(site):
    text = (site / "benchmarks/errors.html").read_text(encoding="utf-8")
    assert re.search(r"#T_\w+ *\{\s*background-color", text) and "<style scoped" not in text


def test_a_table_that_a_cell_makes_is_a_table(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<td>(<p>)?dattri DVEmb(</p>)?</td>", text) and "| dattri" not in text


def test_the_source_can_be_moved(tmp_path):
    "What `--keep-source` leaves is read where it lies: the workflow checks the links to the web with it."
    (tmp_path / "first").mkdir()
    book.source(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    read = "import sys; from sphinx.application import Sphinx; Sphinx(*sys.argv[1:], 'dummy', status=None)"       # a fresh process: this one may have things in memory
    subprocess.run([sys.executable, "-c", read, *(str(tmp_path / name) for name in ("moved", "moved", "out", "trees"))], check=True, timeout=120)


def test_api_is_complete(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in dit_nb.__all__: assert re.search(rf"<h3>{name}<", text), f"{name} is not in the API reference"


def test_references_are_complete():
    "Every paper with a number that a notebook cites is in the list."
    listed = set(re.findall(r"\d{4}\.\d{5}", (NBS / "references.ipynb").read_text(encoding="utf-8")))
    for notebook in NOTEBOOKS:
        cited = {m for c in nbformat.read(NBS / notebook, as_version=4).cells for m in re.findall(r"(?i:arxiv)\D{0,20}(\d{4}\.\d{5})", c.source)}
        assert cited <= listed, f"{notebook} cites {sorted(cited - listed)}, which the references lack"


def test_tutorials_say_what_is_learnt():
    for notebook in NOTEBOOKS:
        if notebook.parts[0] != "tutorials": continue
        opening = " ".join(c.source for c in nbformat.read(NBS / notebook, as_version=4).cells[:4] if c.cell_type == "markdown")
        assert re.search(r"After this (tutorial|notebook)|You will learn", opening), f"{notebook} does not say what is learnt"


@pytest.mark.parametrize("page, wrong", [('<a href="gone.html">x</a>', "leads nowhere"), ('<a href="#gone">x</a>', "no such anchor"), ('<a href="http://site.org">x</a>', "no address of the web"),
                                         (f'<a href="{book.SETTINGS["git_url"]}/edit/main/nbs/gone.md">x</a>', "not in the repository"), (f'<a href="{book.SETTINGS["git_url"]}/blob/main/LICENSE">x</a>', ""),
                                         ('<a id="here" href="#here">x</a> <a href="https://site.org/a">y</a> <img src="data:image/png;base64,">', "")])
def test_dead_links_are_seen(page, wrong, tmp_path):
    (tmp_path / "index.html").write_text(page)
    found = book.dead(tmp_path)
    assert (len(found) == 1 and wrong in found[0]) if wrong else not found


def test_a_page_of_a_notebook():
    "Hidden cells and warnings go, exported code stays without its directive, and what a kernel would draw is left out."
    new = nbformat.v4
    cells = [new.new_code_cell("#| hide\nsecret = 1"), new.new_code_cell("#| default_exp x"), new.new_code_cell("#| export\ndef f(): pass"), new.new_code_cell("#| echo: false\nshown = 1"),
             new.new_code_cell("#| output: false\nx", outputs=[new.new_output("stream", name="stdout", text="x")]), new.new_code_cell("w", outputs=[new.new_output("stream", name="stderr", text="warning")])]
    nb = book.shown(new.new_notebook(cells=cells))
    assert [c.source for c in nb.cells] == ["def f(): pass", "shown = 1", "x", "w"] and not any(c.outputs for c in nb.cells) and nb.cells[1].metadata["tags"] == ["remove-input"]
