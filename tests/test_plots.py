"""Pictures: every one says its unit and sign, keeps its texts apart and on the page, draws on given axes and nothing else, and takes what a training may leave: NaN, one window, one sample, ten thousand."""
import io
import warnings
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_nb import (Influence, Query, Recorder, breast_cancer, corrupt_labels, diagnose, digits, error_bound, find_corrupted, influence, leave_one_out, loss_query, margin_query,
                    patterns, phases, prediction_query, stages, supervised)
from dit_nb.dynamics import PATTERNS
from dit_nb.plots import (COLORS, COLUMN, PAGE, PALETTE, PATTERN_COLORS, STYLE, VERDICTS, plot_agreement, plot_bounds, plot_corrupted, plot_diagnosis, plot_heatmap, plot_influence,
                          plot_opinions, plot_patterns, plot_samples, plot_scores, plot_stages, plot_style, plot_summary, plot_window)

matplotlib.use("agg")
loss_fn = supervised(F.cross_entropy)


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close("all")


class World:
    "A small training on digits with wrong labels, and one on a table, with all that can be drawn of them."

    def __init__(self, path):
        train, self.val = digits(dtype=torch.float64)
        self.train, self.record = corrupt_labels(train.subset(torch.arange(120)), .1)
        self.run = self.recorded(nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)), self.train, path / "digits", 6)
        self.q = loss_query(loss_fn, self.val[:])
        self.infl, self.true = influence(self.run, self.q, progress=False), leave_one_out(self.run, self.q, progress=False)
        self.logit = influence(self.run, prediction_query(self.val.x[:1], 3), progress=False)
        self.margin = influence(self.run, margin_query(self.val.x, self.val.y), progress=False)
        self.judged = diagnose(self.run, self.infl, 40, progress=False)
        self.patterns, self.stages = patterns(self.infl), stages(self.infl)
        self.found = find_corrupted(self.run, self.val[:], evidence=0, progress=False)
        self.table, table_val = breast_cancer(torch.float64)
        self.table = self.table.subset(torch.arange(60))
        self.table_run = self.recorded(nn.Linear(30, 2), self.table, path / "table", 3)
        self.bound = error_bound(self.table_run, loss_query(loss_fn, table_val[:]), convex=True, progress=False)
        self.table_true = leave_one_out(self.table_run, self.bound.query, progress=False)
        self.table_found = find_corrupted(self.table_run, table_val[:], evidence=0, progress=False)

    def recorded(self, model, data, path, epochs):
        torch.manual_seed(0)
        for p in model.double().parameters(): nn.init.normal_(p, std=.3)
        with Recorder(model, torch.optim.SGD(model.parameters(), lr=.1), loss_fn, data, path=path) as rec:
            for _ in range(epochs):
                for idx in rec.batches(20): rec.step(idx)
        return rec.finish()


@pytest.fixture(scope="module")
def world(tmp_path_factory): return World(tmp_path_factory.mktemp("plots"))


DRAWN = {   # on one axes; each takes the world and the axes
    "influence": lambda w, ax=None: plot_influence(w.infl, [0, 3, 7, 9], ax, truth=w.true),
    "influence, batches": lambda w, ax=None: plot_influence(w.infl, [0, 3], ax, batches=True),
    "logit": lambda w, ax=None: plot_influence(w.logit, 5, ax),
    "agreement": lambda w, ax=None: plot_agreement(w.infl, w.true, ax=ax),
    "agreement, intervals": lambda w, ax=None: plot_agreement(w.infl, w.true, ax=ax, error=w.judged),
    "bound": lambda w, ax=None: plot_bounds(w.bound, 3, w.table_true, ax),
    "interval": lambda w, ax=None: plot_bounds(w.judged, 3, w.true, ax),
    "window": lambda w, ax=None: plot_window(w.run, "epoch 2", "epoch 4", w.infl, ax),
    "margin": lambda w, ax=None: plot_window(w.run, 0, "epoch 4", w.margin, ax),
    "heat map": lambda w, ax=None: plot_heatmap(w.patterns, ax=ax),
    "heat map, relative": lambda w, ax=None: plot_heatmap(w.patterns, relative=True, ax=ax),
    "heat map, no patterns": lambda w, ax=None: plot_heatmap(w.logit, ax=ax),
    "stages": lambda w, ax=None: plot_stages(w.stages, phases=phases(w.stages, 2), ax=ax),
    "jaccard": lambda w, ax=None: plot_stages(w.stages, "jaccard", ax=ax),
    "scores": lambda w, ax=None: plot_scores(w.found, w.record, ax=ax),
    "scores alone": lambda w, ax=None: plot_scores(w.found, ax=ax),
    "opinions": lambda w, ax=None: plot_opinions(w.found, w.record, ax),
    "bars": lambda w, ax=None: plot_samples(w.bound.infl, w.table, k=4, axes=ax)[0],
    "suspects": lambda w, ax=None: plot_corrupted(w.table_found, w.table, k=6, axes=ax)[0],
}
SEVERAL = {  # that make a figure of many axes
    "samples": lambda w: plot_samples(w.infl, w.train),
    "corrupted": lambda w: plot_corrupted(w.found, w.train),
    "patterns": lambda w: plot_patterns(w.patterns),
    "diagnosis": lambda w: plot_diagnosis(w.judged),
    "summary": lambda w: plot_summary(w.run, w.infl, [(0, "epoch 1"), ("epoch 4", "epoch 6")], w.true, w.train),
}
EVERY = DRAWN | SEVERAL
SIGNED = [k for k in DRAWN if k not in ("window", "margin", "stages", "jaccard", "scores", "scores alone", "opinions", "suspects")]


def own(draw, w):
    "The figure of its own that a function makes"
    return np.ravel(draw(w))[0].figure


def every_axes(fig): return [a for ax in fig.axes for a in (ax, *ax.child_axes)]


def texts(fig):
    "The texts of a drawn figure and their boxes, without the labels of ticks that lie beyond the axis"
    fig.canvas.draw()
    ticks = [(t, np.sort(axis.get_view_interval())) for ax in every_axes(fig) for axis in (ax.xaxis, ax.yaxis) for t in axis.get_major_ticks()]
    beyond = [label for t, (low, high) in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)]
    seen = [t for t in fig.findobj(plt.Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    return [(t.get_text(), t.get_window_extent()) for t in seen]


def faults(fig):
    "Texts that the figure's edge cuts off, and pairs of texts that overlap"
    boxes, page = texts(fig), fig.bbox.padded(2)
    cut = [s for s, b in boxes if not (page.contains(b.x0, b.y0) and page.contains(b.x1, b.y1))]
    return cut + [(s, r) for i, (s, a) in enumerate(boxes) for r, b in boxes[:i] if a.shrunk(.9, .8).overlaps(b.shrunk(.9, .8))]


def words(fig): return " ".join(" ".join(s for s, _ in texts(fig)).split())


# --- what is said, and where it stands

@pytest.mark.parametrize("name", EVERY)
def test_no_text_overlaps_or_leaves_the_page(world, name):
    fig = own(EVERY[name], world)
    assert not faults(fig)
    assert fig.get_figwidth() <= PAGE + .01


@pytest.mark.parametrize("name", DRAWN)
def test_a_column_is_wide_enough(world, name):
    with plot_style(): fig, ax = plt.subplots(figsize=(COLUMN, 3.2))
    DRAWN[name](world, ax)
    assert not faults(fig)


@pytest.mark.parametrize("name", DRAWN)
def test_axes_are_labelled(world, name):
    ax = DRAWN[name](world)
    assert ax.get_xlabel() and (ax.get_ylabel() or all(t.get_text() for t in ax.get_yticklabels()))


@pytest.mark.parametrize("name", SIGNED)
def test_the_sign_is_stated(world, name):
    said = words(own(DRAWN[name], world))
    assert "removal raises" in said
    if "logit" not in said: assert "helpful" in said or "harmful" in said or name in ("bound", "interval")


@pytest.mark.parametrize("name", ["samples", "diagnosis", "summary"])
def test_the_sign_is_stated_in_figures(world, name): assert "removal raises" in words(own(SEVERAL[name], world))


def test_colours_say_helpful_whatever_the_query(world):
    "For a margin, of which more is better, what raises it when removed is harmful"
    for infl, high in ((world.infl, "helpful"), (world.margin, "harmful"), (world.logit, "removal raises")):
        mesh = plot_heatmap(infl).collections[0]
        assert matplotlib.colors.to_hex(mesh.cmap(1.)).upper() == COLORS[high] and mesh.norm.vmin == -mesh.norm.vmax


# --- the heat map, the bounds, the scores: what is drawn is the result

def test_rows_are_sorted_by_pattern_and_effect(world):
    p = world.patterns
    ax = plot_heatmap(p)
    shown, at = ax.collections[0].get_array(), 0
    for name in PATTERNS:
        values = p.values[(p.frame["pattern"] == name).to_numpy()]
        rows = shown[at:at + len(values)]
        assert sorted(map(tuple, rows)) == sorted(map(tuple, values)) and (np.diff(rows.sum(1)) <= 1e-15).all()
        at += len(values)
    assert at == len(shown) == len(p.frame)


@pytest.mark.parametrize("most", [1, 7, 30, 120, 10_000])
def test_merged_rows_keep_the_sums(world, most):
    mesh = plot_heatmap(world.patterns, most=most).collections[0]
    heights = np.diff(mesh.get_coordinates()[:, 0, 1])
    assert len(heights) <= most + 3 or most == 1 and len(heights) <= 4
    assert heights.sum() == pytest.approx(120)
    per_pattern = -(-120 // most)
    if per_pattern == 1: np.testing.assert_allclose(mesh.get_array().sum(0), world.patterns.values.sum(0), atol=1e-12)


def test_columns_are_as_wide_as_their_windows():
    x = np.random.default_rng(0).normal(size=(5, 4))
    mesh = plot_heatmap(made(x, widths=(1, 2, 30, 4))).collections[0]
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 1, 3, 33, 37])
    order = np.argsort(-x.sum(1), kind="stable")
    np.testing.assert_allclose(mesh.get_array(), x[order])


def test_the_band_is_the_bound(world):
    w, j = world, 3
    ax = plot_bounds(w.bound, j, w.table_true)
    low, high, estimate, true = ax.lines[1:]
    y = np.r_[0, w.bound.infl.values[:, j]]
    half = np.r_[0, w.bound.values[:, j]]
    limit = 6 * max(np.abs(y).max(), np.abs(w.table_true.values[:, j]).max())
    np.testing.assert_allclose(estimate.get_ydata(), y)
    np.testing.assert_allclose(high.get_ydata(), np.clip(y + half, -limit, limit))
    np.testing.assert_allclose(low.get_ydata(), np.clip(y - half, -limit, limit))
    np.testing.assert_allclose(true.get_ydata(), np.r_[0, w.table_true.values[:, j]])


def test_endless_bounds_say_so(world):
    wide = replace(world.bound, values=np.full_like(world.bound.values, np.inf))
    ax = plot_bounds(wide, 3, world.table_true)
    assert "±inf" in words(ax.figure) and np.isfinite(ax.get_ylim()).all()


def test_error_bars_are_the_half_widths(world):
    half = np.linspace(0, 1e-3, 120)
    ax = plot_agreement(world.infl, world.true, error=half)
    bars = np.array([s[:, 1] for s in ax.collections[0].get_segments()])
    np.testing.assert_allclose(np.diff(bars)[:, 0], 2 * half, atol=1e-12)
    share = (np.abs(world.infl.window() - world.true.window()) <= half).mean()
    assert f"{share:.0%} in their bar" in ax.texts[0].get_text()


def test_ticks_are_the_updates_of_a_sample(world):
    ax = plot_influence(world.infl, [4, 50], batches=True)
    for rows, j in zip(ax.collections, (4, 50)):
        assert [s[0, 0] - .5 for s in rows.get_segments()] == [t for t in range(world.run.steps) if j in world.run.batch(t)]


def test_scores_are_counted_and_the_border_parts_them(world):
    f = world.found
    ax = plot_scores(f, world.record, bins=20)
    wrong = f["sample"].isin(world.record["sample"])
    for patch, on in zip(ax.patches, (~wrong, wrong)):
        np.testing.assert_array_equal(patch.get_data().values, np.histogram(f["score"][on], np.linspace(0, 1, 21))[0])
    x = ax.lines[0].get_xdata()[0]
    assert (f["score"][f["flagged"]] >= x).all() and (f["score"][~f["flagged"]] <= x).all()
    assert f"{wrong.sum()}, {(wrong & f['flagged']).sum()} flagged" in words(ax.figure)


# --- what a training may leave

def made(x, query=None, widths=None, **kw):
    "An `Influence` of which these `[n, W]` are the values on the windows"
    n, W = x.shape
    times = np.cumsum(np.full(W, 10) if widths is None else widths)
    return Influence(x.cumsum(1).T, times, np.arange(n), np.ones(W), query or Query(len, "loss", "lower"), "always", kw.pop("method", "first order"), "float64", "none", int(times[-1]), {}, **kw)


def exact(infl, noise=0.): return replace(infl, values=infl.values + noise * np.random.default_rng(1).normal(size=infl.values.shape), method="exact")


def finds(n, seed=0):
    "A frame as from `find_corrupted`"
    score = np.sort(np.random.default_rng(seed).beta(.5, 3, n))[::-1]
    return pd.DataFrame({"sample": np.arange(n), "given": 0, "suggested": 1, "score": score, "flagged": np.arange(n) < n // 10, "by_loss": 1 - score, "by_influence": (1 - score) ** 2})


@pytest.mark.parametrize("n, W", [(1, 1), (1, 6), (3, 1), (40, 2)])
def test_few_samples_and_windows(n, W):
    infl = made(np.random.default_rng(n).normal(size=(n, W)))
    true = exact(infl, .1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = [plot_influence(infl, 0, truth=true), plot_agreement(infl, true, error=np.full(n, .2)), plot_samples(infl)[0], plot_heatmap(infl), plot_heatmap(infl, relative=True), plot_scores(finds(n)), plot_opinions(finds(n))]
        if W >= 4: axes += [plot_heatmap(patterns(infl))]
        for ax in axes: assert not faults(ax.figure)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    "As of a training that diverged for some samples, at some boundary"
    infl = made(np.random.default_rng(0).normal(size=(30, 5)))
    infl.values[3:, 4] = infl.values[:, 5] = value
    true = exact(infl, .01)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):                 # the difference of two infinities, in `window`
        warnings.simplefilter("error")
        ax = plot_influence(infl, [3, 4, 5], truth=true)
        assert np.isfinite(ax.get_ylim()).all() and not faults(ax.figure)
        ax = plot_agreement(infl, true)
        assert "28 samples, 2 not finite" in ax.get_title("left") and not faults(ax.figure)
        ax, = plot_samples(infl, k=3)
        assert len(ax.patches) == 6 and "sample 4" not in words(ax.figure)
        for relative in (False, True):
            ax = plot_heatmap(infl, relative)
            assert np.isfinite(ax.collections[0].norm.vmax) and not faults(ax.figure)
            assert np.isfinite(np.ma.filled(ax.collections[0].get_array(), np.nan)).all(1).sum() == 28
    infl.values[:] = np.nan
    with pytest.raises(ValueError, match="choose an earlier window"): plot_agreement(infl, exact(infl))
    assert not plt.get_fignums() or np.isfinite(plot_heatmap(infl).collections[0].norm.vmax)


def test_nothing_moves():
    infl = made(np.zeros((12, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ax in (plot_heatmap(infl), plot_heatmap(infl, True), plot_influence(infl, [0, 1]), plot_agreement(infl, exact(infl)), plot_stages(stages(infl))): assert not faults(ax.figure)


def test_samples_never_used_have_no_score():
    f = finds(40)
    f.loc[35:, "score"] = np.nan
    assert "never used, no score: 5" in words(plot_scores(f, [1, 2]).figure)
    assert "never used, no score: 40" in words(plot_scores(f.assign(score=np.nan, flagged=False)).figure)
    assert not faults(plot_opinions(f.assign(score=np.nan)).figure)


def test_ten_thousand_samples_make_small_files():
    x = np.random.default_rng(0).normal(size=(10_000, 12)) * np.linspace(2, 0, 12)
    infl = made(x)
    p, f = patterns(infl, draws=2), finds(10_000)
    true = exact(infl, .3)
    for ax in (plot_heatmap(p), plot_heatmap(infl), plot_agreement(infl, true, error=np.full(10_000, .5)), plot_scores(f, range(0, 1000, 3)), plot_opinions(f), plot_samples(infl)[0], plot_influence(infl, [0, 1])):
        ax.figure.canvas.draw()
    assert len(plot_heatmap(p).collections[0].get_array()) <= 404
    file = io.BytesIO()
    with plot_style(): plot_heatmap(p).figure.savefig(file, format="pdf", dpi=200)
    assert len(file.getvalue()) < 500_000


# --- manners

@pytest.mark.parametrize("name", DRAWN)
def test_given_axes_are_used_and_nothing_else_is_made(world, name):
    fig, axes = plt.subplots(1, 2, figsize=(9, 4))
    before, numbers = dict(plt.rcParams), plt.get_fignums()
    assert DRAWN[name](world, axes[0]) is axes[0]
    assert plt.get_fignums() == numbers and dict(plt.rcParams) == before
    assert not axes[1].has_data() and (len(fig.axes) == 2 or name == "margin")          # whose other unit takes a second axis


@pytest.mark.parametrize("name", EVERY)
def test_the_callers_settings_stay(world, name):
    plt.figure(), plt.close("all")                              # the backend is loaded
    with plt.rc_context({"font.size": 17, "axes.facecolor": "pink", "figure.dpi": 33}):
        before = dict(plt.rcParams)
        EVERY[name](world)
        assert dict(plt.rcParams) == before


@pytest.mark.parametrize("name", ["influence", "agreement", "heat map", "scores", "window", "stages"])
def test_on_a_dark_page_no_letter_is_dark(world, name):
    with plot_style(dark=True):
        fig = own(DRAWN[name], world)
        fig.canvas.draw()
    light = matplotlib.colors.to_rgb("#181818")
    assert matplotlib.colors.to_rgb(fig.get_facecolor()) == light
    inside = {"stages"}                                          # numbers in cells stand on the cells' colours
    if name not in inside:
        for t in fig.findobj(plt.Text):
            if t.get_visible() and t.get_text().strip(): assert np.mean(matplotlib.colors.to_rgb(t.get_color())) > .3, t.get_text()


def test_transparent_pictures_have_no_ground(world):
    with plot_style(dark=True, transparent=True):
        fig, file = own(DRAWN["influence"], world), io.BytesIO()
        fig.savefig(file, format="png")
    file.seek(0)
    assert plt.imread(file)[0, 0, 3] == 0


def test_style_is_undone_also_after_errors():
    before = dict(plt.rcParams)
    for kw in ({}, {"dark": True}, {"dark": False, "transparent": True}):
        with pytest.raises(ZeroDivisionError), plot_style(**kw): 1 / 0
        assert dict(plt.rcParams) == before


def test_text_stays_text_in_svg_and_pdf(world):
    svg, pdf = io.BytesIO(), io.BytesIO()
    with plot_style():
        fig = own(DRAWN["agreement"], world)
        fig.savefig(svg, format="svg"), fig.savefig(pdf, format="pdf")
    assert "removal raises" in svg.getvalue().decode() and "Pearson" in svg.getvalue().decode()
    assert b"/CIDFontType2" in pdf.getvalue() and b"/Type3" not in pdf.getvalue()


def test_one_palette():
    "Every colour that means something is one of Okabe and Ito's"
    for names in (COLORS, PATTERN_COLORS, VERDICTS): assert set(names.values()) <= set(PALETTE.values())
    assert len(set(PATTERN_COLORS.values())) == 4 and len(set(VERDICTS.values())) == 3
    assert set(STYLE["axes.prop_cycle"].by_key()["color"]) <= set(PALETTE.values())


def test_lines_are_told_apart_without_colour(world):
    lines = plot_influence(world.infl, range(6)).lines[1:]
    assert len({line.get_marker() for line in lines}) == 6
    marks = [c.get_paths()[0].vertices.shape for c in plot_opinions(world.found).collections]
    assert len(set(marks)) == 2


WRONG = {
    "heat map of something else": (TypeError, "patterns\\(infl\\)", lambda w: plot_heatmap(w.stages)),
    "no row": (ValueError, "at least one row", lambda w: plot_heatmap(w.infl, most=0)),
    "no bound": (TypeError, "error_bound, calibrate and diagnose", lambda w: plot_bounds(w.infl, 3)),
    "no such sample": (ValueError, "choose from infl.samples", lambda w: plot_bounds(w.bound, 999)),
    "another truth": (ValueError, "compute both alike", lambda w: plot_bounds(w.bound, 3, w.true)),
    "error of another length": (ValueError, "one half width for each", lambda w: plot_agreement(w.infl, w.true, error=[1.])),
    "batches without a run": (ValueError, "load_influence\\(path, run\\)", lambda w: plot_influence(replace(w.infl, run=None), 3, batches=True)),
    "no frame": (ValueError, "empty", lambda w: plot_scores(w.found[:0])),
    "no bin": (ValueError, "one or more", lambda w: plot_scores(w.found, bins=0)),
    "another record": (ValueError, "the run's own training set", lambda w: plot_scores(w.found, [7000])),
    "another record, opinions": (ValueError, "the run's own training set", lambda w: plot_opinions(w.found, [7000])),
    "no sample in a diagnosis": (ValueError, "at least one", lambda w: plot_diagnosis(w.judged, k=0)),
    "many axes": (TypeError, "axes.flat\\[0\\]", lambda w: plot_heatmap(w.infl, ax=np.array([1, 2]))),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_drawn_is_refused_before_a_figure_is_made(world, name):
    error, remedy, draw = WRONG[name]
    with pytest.raises(error, match=remedy): draw(world)
    assert not plt.get_fignums()
