"""The explorer in a real browser with a real kernel, as a page of Voila and in JupyterLab: dragged, clicked, cancelled. What was seen lies in _screenshots/.

How long a key press takes until the cards have changed is measured and printed at the end (`conftest.py`); it is not asserted, because machines are shared."""
import functools
import json
import re
import statistics
import traceback

import nbformat
import pytest

from browser import PICTURES, ROOT, browser, missing, page, picture, server

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

DIGITS = """
import tempfile, warnings
warnings.filterwarnings("ignore")
import ipywidgets, torch, torch.nn.functional as F
from dit_nb import *
from dit_nb.explorer import _signed
torch.set_num_threads(1)
train, val = digits()
train, loss_fn = train.subset(range(300)), supervised(F.cross_entropy)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))
with Recorder(model, torch.optim.SGD(model.parameters(), lr=.1), loss_fn, train, path=tempfile.mkdtemp(), seed=0) as rec:
    for epoch in range(8):
        for idx in rec.batches(30): rec.step(idx)
run = rec.finish()
infls = influence(run, [loss_query(loss_fn, val[:], "validation loss"), loss_query(loss_fn, val.subset(val.y == 5)[:], "loss on fives")], progress=False)
ex = explore(infls)
right = leave_one_out(run, infls[0].query, [ex.selected], progress=False)
ex
"""
TRUTH = "ipywidgets.HTML(f\"<span class='truth'>{ex.selected}: {_signed(right.window()[0])}</span>\")"
SLOW = """
import time
from dit_nb.progress import progress_bar
def slowly(progress):
    for _ in progress_bar(range(3000), "waiting", progress): time.sleep(.02)
b = ipywidgets.Button(description="Wait")
b.add_class("wait")
b.on_click(lambda _: ex.work.start("waiting", slowly, lambda _: None))
b
"""
MANY = """
import numpy as np, torch
from dit_nb import explore
from dit_nb.data import Samples
from dit_nb.queries import Query
from dit_nb.results import Influence
def many(n, K):
    rng = np.random.default_rng(0)
    data = Samples(torch.from_numpy(rng.random((n, 28, 28), dtype="float32")), torch.from_numpy(rng.integers(0, 10, n)))
    return Influence(rng.normal(size=(K, n)).cumsum(0) / 1e4, np.arange(1, K + 1) * 10, np.arange(n), np.exp(-np.arange(K) / K), Query(None, "validation loss", "lower"), "always", "first order", "float32", "", K * 10, {}), data
explore(*many(%d, %d))
"""


def notebook(folder, name, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    notebook(folder, "digits", DIGITS, TRUTH, SLOW)
    notebook(folder, "few", MANY % (600, 10))
    notebook(folder, "many", MANY % (60_000, 100))
    (folder / "quickstart.ipynb").write_bytes((ROOT / "nbs/tutorials/01_quickstart.ipynb").read_bytes())
    return folder


@pytest.fixture(scope="module")
def chrome():
    with browser() as b: yield b


@pytest.fixture(scope="module")
def voila(folder):
    with server("voila", folder) as address: yield address


@pytest.fixture(scope="module")
def lab(folder):
    with server("lab", folder) as address: yield address


def text(p, part): return p.locator(f".dit-{part}").first.inner_text()
def wait(p, part, pattern):
    "Wait until a part of the page says something; its text"
    p.wait_for_function("([s, r]) => new RegExp(r).test(document.querySelector(s)?.innerText ?? '')", arg=[f".dit-{part}", pattern])
    return text(p, part)
def opened(p):
    p.wait_for_selector(".dit-explorer .dit-card:not([disabled])")
    wait(p, "facts", "sample")
    p.wait_for_function("document.querySelectorAll('.dit-over img').length == 2 && [...document.querySelectorAll('.dit-over img')].every(i => i.naturalWidth > 0)")
def cards(p): return p.evaluate("[...document.querySelectorAll('.dit-card:not([disabled])')].map(c => c.innerText + getComputedStyle(c).backgroundImage).join()")
def number(p, css): return int(re.match(r"\d+", p.locator(css).inner_text())[0])
def press(p, handle, key, times=1):
    p.locator(f".dit-slider .noUi-handle-{handle}").focus()
    for _ in range(times): p.keyboard.press(key)
def change(p, do):
    before = cards(p)
    do()
    p.wait_for_function("b => [...document.querySelectorAll('.dit-card:not([disabled])')].map(c => c.innerText + getComputedStyle(c).backgroundImage).join() != b", arg=before)


def twice(test):
    "Repeat a test that fails, once, and keep what was wrong in _screenshots/: browsers, servers and kernels share two cores with all other tests."
    @functools.wraps(test)
    def repeated(**fixtures):
        try: test(**fixtures)
        except Exception:
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / f"{test.__name__}_failed_once.txt").write_text(traceback.format_exc())
            test(**fixtures)
    return repeated


def everything(p, name):
    "What people do with an explorer, on a page that has one of two queries"
    opened(p)
    picture(p, f"{name}_opened")
    assert "full run" in text(p, "head") and p.locator(".dit-card").count() == 16 and "removal raises validation loss" in text(p, "title.dit-up")
    heights = p.evaluate("[...document.querySelectorAll('.dit-explorer > *')].map(e => e.getBoundingClientRect().top)")
    change(p, lambda: press(p, "upper", "ArrowLeft", 3))                                    # by keyboard
    wait(p, "head", "start to epoch 5")
    change(p, lambda: press(p, "lower", "ArrowRight", 2))
    assert "steps 20 to 50" in wait(p, "head", "epoch 2 to epoch 5")
    picture(p, f"{name}_window")
    assert heights == p.evaluate("[...document.querySelectorAll('.dit-explorer > *')].map(e => e.getBoundingClientRect().top)"), "the page has jumped"
    handle = p.locator(".dit-slider .noUi-handle-upper").bounding_box()                    # by mouse
    x, y, wide = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2, p.locator(".dit-slider").bounding_box()["width"]
    p.mouse.move(x, y), p.mouse.down(), p.mouse.move(x + wide * 2 / 8, y, steps=8), p.mouse.up()
    wait(p, "head", "epoch 2 to epoch 7")
    p.locator(".dit-preset-full").click()
    wait(p, "head", "full run")

    j, wrong = number(p, ".dit-card-0-0"), wait(p, "facts", "sample")
    p.locator(".dit-card-0-2").click()                                                     # another sample, and back
    other = number(p, ".dit-card-0-2")
    wait(p, "facts", rf"sample\s+{other}\b")
    assert p.locator(".dit-card.dit-chosen").count() == 1 and text(p, "facts") != wrong
    picture(p, f"{name}_selected")
    p.locator(".dit-card-0-0").click()
    wait(p, "facts", rf"sample\s+{j}\b")
    p.locator(".dit-exact").click()
    said = wait(p, "facts", r"exact\s+[+−]")
    whose, right = p.locator(".truth").inner_text().split(": ")
    assert int(whose) == j and re.search(r"exact\s+(\S+?),", said)[1] == right             # against leave_one_out in the notebook itself
    wait(p, "status", f"sample {j} was removed exactly")
    picture(p, f"{name}_exact")

    p.locator(".wait").click()
    wait(p, "work", "waiting")
    assert p.locator(".dit-cancel").is_visible()
    p.wait_for_function("document.querySelector('.dit-work').innerText.includes(' of 3,000 steps')")
    picture(p, f"{name}_working")
    p.locator(".dit-cancel").click()
    wait(p, "status", "cancelled, nothing was changed")
    p.wait_for_selector(".dit-cancel", state="hidden")

    change(p, lambda: p.locator(".dit-query select").select_option("loss on fives"))
    assert "loss on fives" in wait(p, "title", "fives")
    p.wait_for_function("!document.querySelector('.dit-facts').innerText.includes('exact')")      # of this query nothing is known exactly
    picture(p, f"{name}_query")
    p.locator(".dit-filter-class select").select_option("5")
    wait(p, "head", r"\b(?!300)\d+ samples")
    assert all(line.split("·")[1].strip().startswith("5") for line in p.locator(".dit-card:not([disabled])").all_inner_texts())
    p.locator(".dit-search input").fill("7"), p.keyboard.press("Enter")
    wait(p, "facts", r"sample\s+7\b")
    p.locator(".dit-search input").fill("7000"), p.keyboard.press("Enter")
    wait(p, "status", "no sample 7000")
    p.locator(".dit-filter-class select").select_option("all classes")
    p.locator(".dit-compare").click()
    wait(p, "changes", "rank")
    p.wait_for_function("document.querySelector('.dit-scatter img').naturalWidth > 0")
    p.locator(".dit-scatter").scroll_into_view_if_needed()
    picture(p, f"{name}_two_windows")
    p.locator(".dit-export").click()
    p.wait_for_selector(".dit-link")
    assert p.locator(".dit-link").evaluate_all("a => a.map(x => x.download.split('.').at(-1))") == ["csv", "png", "svg"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@twice
def test_page(chrome, voila, dark):
    with page(chrome, f"{voila}/voila/render/digits.ipynb{'?theme=dark' if dark else ''}", dark) as p: everything(p, "page_dark" if dark else "page")


@twice
def test_lab(chrome, lab):
    with page(chrome, f"{lab}/lab/tree/digits.ipynb?reset", size=(1300, 1700)) as p:
        p.locator(".jp-Notebook .jp-CodeCell").nth(2).wait_for()
        p.get_by_text(re.compile(r"\(ipykernel\) \| Idle")).wait_for()
        p.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
        p.get_by_text("Run All Cells", exact=True).click()
        p.wait_for_selector(".truth")
        p.locator(".dit-head").scroll_into_view_if_needed()
        everything(p, "lab")


@twice
def test_quickstart(chrome, voila, lab):
    "The first tutorial, as a page that runs it, and opened in JupyterLab."
    with page(chrome, f"{voila}/voila/render/quickstart.ipynb") as p:
        p.wait_for_selector("h1")
        p.wait_for_function("document.querySelectorAll('img').length > 1")
        assert "Traceback" not in p.inner_text("body")
        picture(p, "quickstart_page")
    with page(chrome, f"{lab}/lab/tree/quickstart.ipynb?reset") as p:
        p.wait_for_selector(".jp-Notebook h1")
        picture(p, "quickstart_lab")


PRESS = """async key => { const h = document.querySelector('.dit-slider .noUi-handle-upper'), styles = () => [...document.querySelectorAll('.dit-explorer style')].map(s => s.textContent).join(), before = styles(), t = performance.now();
  h.dispatchEvent(new KeyboardEvent('keydown', {key, code: key, bubbles: true}));
  while (styles() === before) { if (performance.now() - t > 20000) throw new Error('nothing changed'); await new Promise(requestAnimationFrame) }
  await new Promise(requestAnimationFrame); return performance.now() - t }"""


@twice
def test_latency(chrome, voila):
    "From a key press to the cards' new pictures, 600 samples x 10 boundaries and 60,000 x 100; there and back, in turns."
    found = {"few": [], "many": []}
    with page(chrome, f"{voila}/voila/render/few.ipynb") as few, page(chrome, f"{voila}/voila/render/many.ipynb") as many:
        for p in (few, many): opened(p)
        for turn in range(5):
            for name, p in (("few", few), ("many", many)):
                for key in ["ArrowLeft"] * 4 + ["ArrowRight"] * 4: found[name].append(p.evaluate(PRESS, key))
        picture(many, "many")
    median = {k: statistics.median(v) for k, v in found.items()}
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "latency.json").write_text(json.dumps({"600 samples x 10 boundaries, ms": median["few"], "60,000 samples x 100 boundaries, ms": median["many"], "ratio": median["many"] / median["few"], "presses each": len(found["few"])}))
    assert all(v > 0 for v in median.values())
