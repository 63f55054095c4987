"""The window explorer without a browser: its widgets are set as a page sets them, and what they then show is read."""
import re
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dit_nb import Recorder, breast_cancer, digits, explore, influence, leave_one_out, loss_query, open_run, remove, supervised
from dit_nb.cleansing import converging
from dit_nb.data import Samples
from dit_nb.dynamics import PATTERNS, patterns
from dit_nb.explorer import GREY
from dit_nb.queries import parameter_query
from dit_nb.results import Influence, strongest

TRAIN, VAL = digits()
DATA, loss_fn = TRAIN.subset(range(120)), supervised(F.cross_entropy)


def network(inputs=64, out=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, out))


def recorded(path, data=DATA, epochs=6, model=None, finish=True, size=20):
    model = network() if model is None else model
    rec = Recorder(model, torch.optim.SGD(model.parameters(), lr=.3), loss_fn, data, path=path, seed=0)
    for epoch in range(epochs):
        for idx in rec.batches(size): rec.step(idx)
    return rec.finish() if finish else rec


QUERIES = [loss_query(loss_fn, VAL[:], "validation loss"), loss_query(loss_fn, VAL.subset(VAL.y == 5)[:], "loss on fives")]


@pytest.fixture(scope="module")
def run(tmp_path_factory): return recorded(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def infls(run): return influence(run, QUERIES, progress=False)


@pytest.fixture
def ex(infls): return explore(infls)


def cards(ex): return [[b.sample for b in line if b.sample is not None] for line in ex.cards]


def top(infl, window, keep=None): return [infl.samples[c].tolist() for c in strongest(infl.window(*window), 8, keep)]


def test_opens_on_the_full_run(ex, infls):
    assert ex.window == (0, 36) and "full run" in ex.head.value and cards(ex) == top(infls[0], (0, 36)) and ex.selected == cards(ex)[0][0]
    assert bytes(ex.training.value).startswith(b"\x89PNG") and bytes(ex.course.value).startswith(b"\x89PNG")
    assert "120 samples" in repr(ex) and "dit-explorer" in ex.widget._dom_classes
    assert {"application/vnd.jupyter.widget-view+json", "text/plain"} <= set(ex._repr_mimebundle_())


@pytest.mark.parametrize("a, b", [(0, 1), (2, 5), (3, 4), (5, 6), (0, 6)])
def test_any_window_is_what_the_result_says(ex, infls, a, b):
    ex.slider.index = a, b
    edges = [0, *infls[0].times]
    w = edges[a], edges[b]
    assert ex.window == w and cards(ex) == top(infls[0], w) and infls[0].name(*w) in ex.head.value
    for s, line in enumerate(ex.cards):
        for button in line:
            if button.sample is None: continue
            v = infls[0].window(*w)[infls[0].columns[button.sample]]
            assert (v > 0) == (s == 0) and f"sample {button.sample} ({DATA.classes[DATA.y[button.sample]]})" in button.tooltip and f"{abs(v):.3g}" in button.tooltip
    frame = ex.frame()
    assert frame.attrs["window"] == w and np.allclose(frame["influence"], np.sort(infls[0].window(*w))[::-1]) and len(frame) == 120


def test_handles_that_meet_leave_a_window(ex):
    ex.slider.index = 3, 3
    assert ex.window == (18, 24)
    ex.slider.index = 6, 6
    assert ex.window == (30, 36)


def test_a_drag_draws_no_picture_and_moves_the_band(ex, monkeypatch):
    monkeypatch.setattr("dit_nb.explorer.drawn", lambda *a, **kw: pytest.fail("a picture was drawn"))
    before = ex.style_.value
    ex.slider.index = 1, 3
    band = lambda css: [float(x) for x in re.search(r"dit-band-training \{left: ([\d.]+)%; width: ([\d.]+)%", css).groups()]
    (left, bottom, width, height), _ = ex.boxes["training"]
    assert np.allclose(band(ex.style_.value), [100 * (left + width / 6), 100 * width / 3], atol=1e-3) and band(before)[1] > band(ex.style_.value)[1]


def test_messages_of_a_drag_are_few(ex):
    "One for each card that changes, one style sheet, title, facts: what a page can draw at once."
    sent = []
    def watch(widget):
        send = widget.send_state
        widget.send_state = lambda key=None: (sent.append((type(widget).__name__, key)), send(key))[1]
    seen = set()
    def walk(widget):
        if id(widget) in seen: return
        seen.add(id(widget)), watch(widget)
        for child in getattr(widget, "children", ()): walk(child)
    walk(ex.widget)
    ex.slider.index = 0, 2
    assert 0 < len(sent) <= 45 and not any(name == "Image" for name, _ in sent)


def test_presets(ex, run, infls):
    for name, window in [("First", (0, 6)), ("Middle", (12, 24)), ("Full", (0, 36))]:
        ex.presets[name].click()
        assert ex.window == window
    ex.presets["Convergence"].click()
    t1, t2 = converging(run, QUERIES[0])
    assert ex.window == (t1, t2) or infls[0].baseline[0] < max(infls[0].baseline)      # step 0 itself is not a boundary


def test_play_slides_the_window(ex):
    ex.window = 0, 12
    for i in range(5): ex.play.value = i
    assert ex.window == (24, 36)
    ex.play.value = 5
    assert ex.window == (30, 36)                                                       # narrower at the end
    ex.presets["Full"].click()
    ex.play.value = 2
    assert ex.window == (12, 18)


def test_selection(ex, infls):
    button = ex.cards[1][0]
    button.click()
    j = button.sample
    assert ex.selected == j and f"<td>{j}, {DATA.classes[DATA.y[j]]}</td>" in ex.facts.value and "harmful, the 1st of" in ex.facts.value
    assert "dit-chosen" in button._dom_classes and "dit-chosen" not in ex.cards[0][0]._dom_classes
    assert patterns(infls[0].select([j])).frame["pattern"][0] in ex.facts.value
    ex.window = "epoch 1", "epoch 2"
    assert "epoch 2" in ex.facts.value
    with pytest.raises(ValueError, match="has no sample 500: it has 120"): ex.select(500)


def test_search(ex):
    ex.search.value = "17"
    assert ex.selected == 17
    for text, said in [("170", "no sample 170"), ("seventeen", "not the number of a sample")]:
        ex.search.value = text
        assert said in ex.status.value and "dit-alarm" in ex.status.value and ex.selected == 17


def test_queries(ex, infls):
    ex.window = "epoch 1", "epoch 3"
    ex.queries.value = 1
    assert cards(ex) == top(infls[1], (6, 18)) and ex.window == (6, 18) and "loss on fives" in ex.titles[0].value and ex.query == "loss on fives"
    ex.query = "validation loss"
    assert cards(ex) == top(infls[0], (6, 18))
    with pytest.raises(ValueError, match="no query 'accuracy'"): ex.query = "accuracy"
    with pytest.raises(ValueError, match="runs backwards"): ex.window = "epoch 3", "epoch 1"


def test_filters(infls):
    suspects = pd.DataFrame({"sample": range(120), "given": DATA.y.numpy(), "suggested": 3, "score": .5, "flagged": np.arange(120) % 5 == 0})
    ex, y = explore(infls, suspects=suspects), DATA.y.numpy()
    ex.filters["class"].value = 4
    assert cards(ex) == top(infls[0], (0, 36), y == 4) and (ex.frame()["label"] == "4").all() and f"{(y == 4).sum()} samples" in ex.head.value
    ex.filters["label"].value = 0
    assert cards(ex) == top(infls[0], (0, 36), (y == 4) & suspects["flagged"].to_numpy())
    ex.filters["class"].value, ex.filters["label"].value = -1, 1
    assert cards(ex) == top(infls[0], (0, 36), ~suspects["flagged"].to_numpy())
    ex.filters["label"].value = -1
    kinds = patterns(infls[0]).frame["pattern"].to_numpy()
    for i, name in enumerate(PATTERNS):
        ex.filters["pattern"].value = i
        assert cards(ex) == top(infls[0], (0, 36), kinds == name) and (ex.frame()["pattern"] == name).all()
    ex.filters["pattern"].value = -1
    ex.select(10)
    assert "suggested 3" in ex.facts.value and "flagged as wrong" in ex.facts.value
    few = explore(influence(infls[0].run, QUERIES[0], at=[12, 36], progress=False))
    few.filters["pattern"].value = 1
    assert "too few windows" in few.status.value and few.filters["pattern"].value == -1


def test_exact_value(run, infls):
    model, before = run.model, [p.clone() for p in run.model.parameters()]
    run.model.train()
    state = torch.get_rng_state()
    ex = explore(infls)
    j = ex.selected
    ex.exact.click()
    ex.work.wait()
    true = leave_one_out(run, QUERIES[0], [j], progress=False)
    assert np.array_equal(ex.truth.values, true.values) and ex.truth.method == "exact" and f"sample {j} was removed exactly" in ex.status.value
    assert "exact" in ex.facts.value and "the estimate is off by" in ex.facts.value and ex.frame().set_index("sample")["exact"][j] == true.window()[0]
    assert ex.work.box.layout.visibility == "hidden" and run.model is model and model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    ex.exact.click()
    assert "is known" in ex.status.value
    ex.queries.value = 1
    assert ex.truth is None                                                            # of the other query nothing is known


def test_cancelled(infls):
    ex, started = explore(infls), threading.Event()
    ex.work.start("waiting", lambda progress: [started.set(), *iter(lambda: tick(progress), None)], lambda found: pytest.fail("it was cancelled"))
    started.wait(5)
    assert ex.work.running and ex.work.box.layout.visibility == "visible"
    ex.exact.click()
    assert "still running" in ex.status.value
    ex.work.button.click()
    ex.work.wait(20)
    assert not ex.work.running and "cancelled, nothing was changed" in ex.status.value and ex.truth is None


def tick(progress):
    "One tick of a long computation"
    from dit_nb.progress import progress_bar
    for _ in progress_bar(range(3), "waiting", progress): pass
    return 1


def test_cancelled_exact_removal(run, infls, monkeypatch):
    ex, begun = explore(infls), threading.Event()
    show = ex.work.show
    def first(progress):
        show(progress)
        begun.set()
        progress.cancel()
    ex.work.show = first
    ex.exact.click()
    ex.work.wait(60)
    assert begun.is_set() and "cancelled" in ex.status.value and ex.truth is None
    ex.work.show = show
    ex.exact.click()
    ex.work.wait(60)
    assert ex.truth is not None


def test_diagnosis(run, infls):
    ex = explore(infls[0])
    ex.judge.click()
    ex.work.wait()
    assert ex.diagnosis is not None and ex.diagnosis.verdict in ex.facts.value and len(ex.truth.samples) == 64
    given = explore(infls[0], truth=ex.diagnosis)
    assert given.diagnosis is ex.diagnosis and "exact" in given.facts.value
    row = ex.diagnosis.samples().iloc[infls[0].columns[given.selected]]
    assert row.trust in given.facts.value


def test_failures_are_said(infls):
    broken = explore(infls[0])
    broken.run = open_run(broken.run.path, network(), loss_fn, DATA)
    broken.run.path = broken.run.path / "gone"
    broken.exact.click()
    broken.work.wait()
    assert "dit-alarm" in broken.status.value and "gone" in broken.status.value


def test_a_run_that_grows(tmp_path):
    rec = recorded(tmp_path / "run", epochs=4, finish=False)
    rec.flush()
    reader = open_run(tmp_path / "run", network(), loss_fn, DATA)
    infl = influence(reader, QUERIES[0], progress=False)
    ex = explore(infl)
    ex.window = "epoch 1", "epoch 3"
    ex.refresh.click()
    assert "nothing new" in ex.status.value
    for idx in rec.batches(20): rec.step(idx)
    rec.flush()
    ex.refresh.click()
    ex.work.wait()
    assert "1 new boundaries, up to step 30" in ex.status.value and [n for n, _ in ex.slider.options][-1] == "epoch 5" and ex.window == (6, 18)
    np.testing.assert_allclose(ex.infl.values, influence(rec.finish(), QUERIES[0], progress=False).values, rtol=1e-4, atol=1e-9)


def test_two_windows(ex, infls):
    ex.window = "epoch 2", "epoch 6"
    assert ex.second.layout.display == "none"
    ex.compare.value = True
    assert ex.second.layout.display == "" and bytes(ex.scatter.value).startswith(b"\x89PNG") and "epoch 1" in ex.second.children[0].value
    before = bytes(ex.scatter.value)
    ex.other.index = 0, 3
    assert bytes(ex.scatter.value) != before and "start to epoch 3" in ex.second.children[0].value and ex.changes.value.count("<tr>") == 11


def test_export(ex, tmp_path):
    ex.export.click()
    names = re.findall(r"download='([^']+)' href='data:([\w/+]+);base64,", ex.links.value)
    assert [kind for _, kind in names] == ["text/csv", "image/png", "image/svg+xml"] and names[0][0] == "validation_loss_full_run.csv"
    for end in ("png", "svg", "pdf"): assert ex.save(tmp_path / f"x.{end}").stat().st_size > 5000


def test_rows_texts_and_others(tmp_path):
    "What has no images has words; what has neither has numbers."
    cells, held = breast_cancer()
    cells = cells.subset(range(60))
    run = recorded(tmp_path / "cells", cells, model=network(30, 2))
    infl = influence(run, loss_query(loss_fn, held[:]), progress=False)
    ex = explore(infl)
    assert " sd" in ex.cards[0][0].description and "malignant" in "".join(b.description for b in ex.cards[0] + ex.cards[1])
    texts = Samples(cells.x, cells.y, cells.classes, texts=[f"text number {i}, which is <b>long</b> enough" for i in range(60)])
    assert "text number" in explore(infl, texts).cards[0][0].description and "&lt;b&gt;" in explore(infl, texts).facts.value
    plain = explore(infl, TensorDataset(cells.x, cells.y))
    assert plain.faces.of_class is not None and plain.cards[0][0].sample is not None
    alone = explore(infl, list(zip(cells.x, cells.y)))
    assert alone.faces.of_class is None and alone.filters["class"].disabled


def test_results_of_all_kinds(run, infls, tmp_path):
    inside = explore(influence(run, QUERIES[0], removal="window", progress=False))
    inside.window = "epoch 2", "epoch 4"
    assert cards(inside) == top(inside.infl, (12, 24))
    exact = leave_one_out(run, QUERIES[0], range(20), progress=False)
    assert explore(exact).exact.description == "Exact value" and len(explore(exact).frame()) == 20
    both = explore(infls[0], truth=exact)
    both.select(3)
    assert "the estimate is off by" in both.facts.value and both.frame()["exact"].notna().sum() == 20
    sets = explore(remove(run, QUERIES[0], [[1, 2, 3], [4, 5]], progress=False))
    assert "2 sets" in sets.head.value and "samples:" in sets.cards[0][0].description + sets.cards[1][0].description
    neutral = explore(influence(run, parameter_query("0.weight", (0, 0)), progress=False))
    assert "removal raises" in neutral.titles[0].value
    neutral.presets["Convergence"].click()
    assert "only of queries that fall" in neutral.status.value
    infls[0].save(tmp_path / "x.safetensors")
    from dit_nb import load_influence
    lonely = explore(load_influence(tmp_path / "x.safetensors"), DATA)
    assert cards(lonely) == top(infls[0], (0, 36)) and lonely.exact not in lonely.widget.children and "refresh" not in str(lonely._rows())
    one = explore(influence(run, QUERIES[0], at=[36], progress=False))
    one.presets["First"].click(), one.presets["Middle"].click()
    assert one.window == (0, 36) and "too few windows" in one.facts.value


@pytest.mark.parametrize("wrong, error, message", [
    (lambda i, r: explore(42), TypeError, "not a int"), (lambda i, r: explore([]), ValueError, "no result"), (lambda i, r: explore(i, TRAIN), ValueError, "the data set has"), (lambda i, r: explore(i, k=0), ValueError, "at least one card"),
    (lambda i, r: explore(i, truth=i[0]), ValueError, "as many truths"), (lambda i, r: explore(i[0], truth=i[1]), ValueError, "differ in their query"),
    (lambda i, r: explore([i[0], i[1].select(range(5))]), ValueError, "same samples"), (lambda i, r: explore(i[0], truth=leave_one_out(r, QUERIES[0], [1], at=[36], progress=False)), ValueError, "lacks some of the result's boundaries")])
def test_wrong_questions(run, infls, wrong, error, message):
    with pytest.raises(error, match=message): wrong(infls, run)


def test_colours_can_be_read():
    "Grey letters against a light and a dark ground: WCAG's contrast of 4.5 to 1, nearly."
    def light(c): return sum(w * (x / 12.92 if x <= .04045 else ((x + .055) / 1.055) ** 2.4) for w, x in zip((.2126, .7152, .0722), c))
    grey = light([int(GREY[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    assert (1.05) / (grey + .05) > 4.5 and (grey + .05) / (light([.07] * 3) + .05) > 4


def test_many_samples_in_bounded_time_and_messages():
    "60,000 samples and 100 boundaries: a drag touches no array of all boundaries. (How long it takes is measured in a browser, tests/test_browser.py.)"
    n, K, rng = 60_000, 100, np.random.default_rng(0)
    infl = Influence(rng.normal(size=(K, n)).cumsum(0), np.arange(1, K + 1), np.arange(n), np.ones(K), QUERIES[0], "always", "first order", "float32", "", K, {})
    ex = explore(infl)
    ex.window = 20, 70
    up = np.argsort(-(infl.values[69] - infl.values[19]))[:8]
    assert cards(ex)[0] == up.tolist()
    ex.compare.value = True
    assert bytes(ex.scatter.value).startswith(b"\x89PNG")
