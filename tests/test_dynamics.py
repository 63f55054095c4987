"""Patterns, stages and phases over many random curves: what must change nothing changes nothing, and known structure is found."""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.isotonic import isotonic_regression
from torch import nn

from dit_nb import Influence, Query, Recorder, digits, ensemble, influence, leave_one_out, loss_query, supervised
from dit_nb.dynamics import (PATTERN_LIMITS, PATTERNS, agreement_by_pattern, classify, curve_noise, curve_windows, parts_of, measured, patterns, phases, segments, silhouettes, stages,
                             top_jaccard, unexplained, window_values)
from dit_nb.plots import plot_patterns, plot_stages

SEEDS = st.integers(0, 10_000)


def curves(seed, n=30, W=12):
    "Curves of many kinds: white, smooth, rising, with zeros"
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(n // 3, W)), rng.normal(size=(n // 3, W)).cumsum(1), np.exp(-rng.uniform(-6, 6, (n // 3, 1)) * np.linspace(0, 1, W))])
    return x * rng.lognormal(0, 2, (len(x), 1)) * (rng.random(x.shape) < .95)


def result(x, removal="always", widths=None, **kw):
    "An `Influence` of which these are the curves"
    n, W = x.shape
    times = np.cumsum(np.full(W, 10) if widths is None else widths)
    values = x.cumsum(1).T
    if removal == "window": values = np.stack([[x[:, i:k + 1].sum(1) if i <= k else np.zeros(n) for i in range(W)] for k in range(W)])
    return Influence(values, times, np.arange(n), np.zeros(W), Query(len, "loss", "lower"), removal, "exact", "float64", "none", int(times[-1]), {}, **kw)


def blocks(sizes, n=200, noise=.7, seed=0):
    rng = np.random.default_rng(seed)
    return result(np.concatenate([rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, m)) for m in sizes], 1))


# --- definitions ---------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(1e-9, 1e9), st.sampled_from([-1, 1]))
def test_scale_and_sign_change_nothing(seed, factor, sign):
    x = curves(seed)
    near = np.abs(unexplained(x @ parts_of(np.ones(12), 12)) - PATTERN_LIMITS["unexplained"]) < 1e-9
    assert (classify(x) == classify(sign * factor * x))[~near].all()
    each = np.random.default_rng(seed).lognormal(0, 4, (len(x), 1))
    a, b = (patterns(result(y), draws=20, seed=seed).frame for y in (x, sign * each * x))
    assert (a["pattern"] == b["pattern"])[~near].all() and np.allclose(a["signal"], b["signal"], atol=1e-9)
    if sign == 1: assert np.allclose(a["confidence"][~near], b["confidence"][~near], atol=.11)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_order_of_samples_changes_nothing(seed):
    x = curves(seed)
    order = np.random.default_rng(seed).permutation(len(x))
    a, b = patterns(result(x), draws=10).frame, patterns(result(x[order]), draws=10).frame
    for column in ("pattern", "strength", "signal", "unexplained"): assert (a[column].to_numpy()[order] == b[column].to_numpy()).all() or np.allclose(a[column].to_numpy()[order], b[column])
    for how in ("pearson", "spearman", "kendall"):
        assert np.allclose(stages(result(x)).matrix(how), stages(result(x[order])).matrix(how), equal_nan=True, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([2, 3, 5]))
def test_finer_windows_change_nothing_where_they_hold_the_twelfths(seed, parts):
    x, rng = curves(seed), np.random.default_rng(seed)
    pieces = rng.normal(size=(*x.shape, parts))
    fine = (pieces - pieces.mean(-1, keepdims=True) + x[..., None] / parts).reshape(len(x), -1)        # any division of each window
    a, b = (unexplained(y @ parts_of(np.ones(y.shape[1]), 12)) for y in (x, fine))
    assert np.allclose(a, b, atol=1e-8)
    assert (classify(x) == classify(fine))[np.abs(a - PATTERN_LIMITS["unexplained"]) > 1e-6].mean() > .95          # zeros may round to either sign
    assert (classify(np.repeat(x, 2, 1) / 2) == classify(x)).mean() > .95


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(2, 14))
def test_one_turn_is_the_best_isotonic_pair(seed, S):
    x = curves(seed, W=S)
    x = x[(x != 0).any(1)]
    def slow(x): return min(((x - s * np.r_[isotonic_regression(s * x[:k]), isotonic_regression(s * x[k:], increasing=False)]) ** 2).sum() for k in range(1, S) for s in (1, -1)) / (x ** 2).sum()
    assert np.allclose(unexplained(x), [slow(y) for y in x], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(.1, 10), min_size=1, max_size=30), st.integers(1, 20))
def test_parts_lose_nothing(widths, parts):
    M = parts_of(widths, parts)
    assert np.allclose(M.sum(1), 1) and (M >= 0).all()
    assert np.allclose(np.array(widths) @ M, np.sum(widths) / parts)


def test_smooth_courses():
    t = (np.arange(24) + .5) / 24
    for rate in (2., 5., 20., 60.):
        assert classify(np.array([np.exp(-rate * t), np.exp(-rate * t[::-1])])).tolist() == [0, 1]
    for tilt in (0, .2, .5): assert classify(np.array([1 + tilt * (2 * t - 1), 1 - tilt * (2 * t - 1)])).tolist() == [2, 2] or tilt == .5
    assert (classify(np.array([np.sin(2 * np.pi * (3 * t + f)) for f in np.arange(0, 1, .07)])) == 3).all()


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_a_reason_is_given_where_it_fluctuates(seed):
    x = curves(seed)
    kind, why = measured(x)
    assert ((why > 0) == (kind == 3))[(x != 0).any(1)].all() and (kind == classify(x)).all()


# --- confidence ----------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_more_noise_less_confidence(seed):
    infl = result(curves(seed, 90))
    means = [patterns(infl, noise=c * np.sqrt((window_values(infl) ** 2).mean(1, keepdims=True)), draws=60).frame["confidence"].mean() for c in (0, .1, .5, 2.)]
    assert means == sorted(means, reverse=True) and means[0] == 1 and means[-1] < .45


def test_probabilities_and_reproducibility():
    infl = result(curves(3, 60))
    a, b, c = (patterns(infl, noise=.1, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(a.frame, b.frame)
    assert not a.frame.equals(c.frame) and (a.frame["pattern"] == c.frame["pattern"]).all()
    p = a.frame[list(PATTERNS)].to_numpy()
    assert np.allclose(p.sum(1), 1) and (p >= 0).all()
    assert np.allclose(a.frame["confidence"], [row[row["pattern"]] for _, row in a.frame.iterrows()])
    shares = a.shares()
    assert np.isclose(shares["share"].sum(), 1) and (shares["low"] <= shares["share"]).all() and (shares["share"] <= shares["high"]).all() and np.isclose(shares["of_strength"].sum(), 1)


def test_noise_in_every_form_is_the_same():
    infl, rng = result(curves(5)), np.random.default_rng(0)
    sd = rng.uniform(.1, 1, (30, 12))
    frames = [patterns(infl, noise=noise).frame for noise in (sd, lambda t1, t2: sd[:, t1 // 10])]
    pd.testing.assert_frame_equal(*frames)
    pd.testing.assert_frame_equal(patterns(infl, noise=.3).frame, patterns(infl, noise=np.full((1, 12), .3)).frame)
    class Runs: members = [replace(infl, values=infl.values + rng.normal(size=infl.values.shape)) for _ in range(6)]
    single = patterns(infl, noise=Runs).frame
    mean = replace(infl, values=np.mean([m.values for m in Runs.members], axis=0), notes={"runs": 6})
    assert single["signal"].mean() < patterns(mean, noise=Runs).frame["signal"].mean()


def test_noise_is_read_off_smooth_curves():
    rng, t = np.random.default_rng(0), np.linspace(0, 1, 24)
    x = np.exp(-rng.uniform(0, 3, (300, 1)) * t)
    size = np.sqrt((x ** 2).mean(1, keepdims=True))
    for level in (0., .1, .4): assert abs(np.median(curve_noise(x + level * size * rng.normal(size=x.shape)) / size) - level) < .06


def test_zero_curves():
    infl = result(np.zeros((6, 5)))
    p = patterns(infl)
    assert (p.frame["confidence"] == .25).all() and (p.frame["strength"] == 0).all() and not p.shares()["of_strength"].any() and np.isfinite(p.course()).all()
    assert phases(infl, 2) and repr(p) and np.isnan(stages(infl).matrix()).all().all()
    assert patterns(infl, relative=True).frame["confidence"].max() == .25


# --- stages and phases ---------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(3, 40))
def test_matrices_are_those_of_pandas(seed, n):
    x = np.random.default_rng(seed).normal(size=(n, 6))
    s, frame = stages(result(x), k=min(5, n - 1)), pd.DataFrame(x)
    for how in ("pearson", "spearman", "kendall"): assert np.allclose(s.matrix(how), frame.corr(how))
    sets = [set(np.argsort(-np.abs(c), kind="stable")[:s.k]) for c in x.T]
    assert np.allclose(s.matrix("jaccard"), [[len(a & b) / len(a | b) for a in sets] for b in sets])
    assert np.allclose(top_jaccard(x, s.k), s.matrix("jaccard helpful")) and np.allclose(top_jaccard(-x, s.k), s.matrix("jaccard harmful"))


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.lists(st.integers(2, 5), min_size=2, max_size=4))
def test_blocks_are_found(seed, sizes):
    ends = [0, *np.cumsum(sizes) * 10]
    assert phases(stages(blocks(sizes, noise=.5, seed=seed))) == list(zip(ends, ends[1:]))
    assert phases(stages(blocks(sizes, noise=.5, seed=seed)), len(sizes), how="pearson") == list(zip(ends, ends[1:]))


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(2, 8), st.data())
def test_segments_are_the_best(seed, W, data):
    r = np.corrcoef(np.random.default_rng(seed).normal(size=(20, W)), rowvar=False)
    n = data.draw(st.integers(1, W))
    def cost(ends): return sum(np.trace(r[a:b, a:b]) - r[a:b, a:b].sum() / (b - a) for a, b in zip(ends, ends[1:]))
    from itertools import combinations
    found = segments(r, n)
    assert len(found) == n and sum(found) == W and min(found) >= 1
    assert np.isclose(cost(np.cumsum([0, *found])), min(cost([0, *inner, W]) for inner in combinations(range(1, W), n - 1)), atol=1e-9)


def test_silhouettes_are_those_of_scikit_learn():
    from sklearn.metrics import silhouette_samples
    r = stages(blocks([3, 4, 2])).matrix("spearman").to_numpy()
    assert np.allclose(silhouettes(r, [3, 4, 2]), silhouette_samples((1 - r).clip(0), np.repeat([0, 1, 2], [3, 4, 2]), metric="precomputed"))
    assert silhouettes(r, [1, 8])[0] == 0


def test_windows():
    x = curves(0)
    infl = result(x)
    infl.marks = {f"epoch {i + 1}": 20 * (i + 1) for i in range(6)}
    assert curve_windows(infl) == [(20 * i, 20 * i + 20) for i in range(6)] and window_values(infl).shape == (30, 6)
    infl.marks = {"a": 60, "b": 120}
    assert len(curve_windows(infl)) == 12 and len(curve_windows(infl, least=2)) == 2
    inside = result(x, "window")
    assert np.allclose(window_values(inside), x) and (patterns(inside).frame["pattern"] == patterns(result(x)).frame["pattern"]).all()
    uneven = result(x, widths=np.arange(1, 13))
    assert [b - a for a, b in stages(uneven, 3).windows] == [28, 27, 23] and stages(uneven, 3).full.shape == (30,)


# --- a real run ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    train, _ = digits(torch.float64)
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double(), train.subset(range(80))
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.1), supervised(F.cross_entropy), data, path=tmp_path_factory.mktemp("run") / "run") as rec:
        for epoch in range(6):
            for idx in rec.batches(20): rec.step(idx)
    return rec.finish()


@pytest.fixture(scope="module")
def query(): return loss_query(supervised(F.cross_entropy), digits(torch.float64)[1][:])


def test_a_run(run, query):
    infl, true = influence(run, query, progress=False), leave_one_out(run, query, range(0, 80, 2), progress=False)
    p = patterns(infl, noise=ensemble(run, query, repeats=2, progress=False))
    assert p.by_class()["samples"].sum() == 80 and np.isclose(p.by_class()["of_strength"].sum(), 1) and len(p.typical(p.frame["pattern"][0], 1)) == 1
    by = agreement_by_pattern(p, infl, true)
    assert by["samples"].xs("full run", level="window")["all"] == 40 == by["samples"].xs("full run", level="window").drop("all").sum()
    assert by.loc["all"]["pearson"].min() > .9 and by["same_sign"].between(0, 1).all()
    assert agreement_by_pattern(p, true, true).loc["all"]["same_sign"].eq(1).all()
    s = stages(infl, 3)
    for how in ("pearson", "spearman", "kendall", "jaccard"):
        whole = s.with_full(how, draws=5)
        pairs = [[s._likeness(np.c_[v, other], how)[0, 1] for v in s.values.T for other in ([s.full] if part == "full" else [s.full - v])] for part in ("full", "rest")]
        assert np.allclose(whole[["full", "rest"]].to_numpy().T, pairs)
    table = s.with_full("spearman", draws=50)
    assert (table["full_low"] <= table["full_high"]).all() and np.isclose(table["size"].sum(), 1)
    assert all(w in infl.windows() or infl.window(*w).shape == (80,) for w in phases(infl))
    for thing in (p, s, p.shares(), s.phase_table()): assert repr(thing)
    plot_patterns(p), plot_stages(s, phases=phases(s, 2))
    plt.close("all")


@pytest.mark.parametrize("call, words", [
    (lambda i: patterns(i, windows=[(0, 10), (20, 30), (30, 40), (40, 50)]), "without gaps"),
    (lambda i: patterns(i, windows=[(0, 60), (60, 120)]), "too few windows"),
    (lambda i: patterns(i, noise=np.ones(12)), "noise must be"),
    (lambda i: patterns(i, noise=np.nan), "noise must be"),
    (lambda i: patterns(i, draws=0), "draws=0"),
    (lambda i: patterns(replace(i, values=i.values * np.nan)), "not finite"),
    (lambda i: patterns(i).by_class(), "no labels"),
    (lambda i: patterns(i).typical("none"), "the four are"),
    (lambda i: stages(i, 13), "ask for more"),
    (lambda i: stages(i.select([0, 1])), "3 or more"),
    (lambda i: stages(i, k=0), "1 to 29"),
    (lambda i: stages(i).matrix("pairs"), "how must be"),
    (lambda i: stages(i).interval("kendall"), "intervals are for"),
    (lambda i: phases(i, 13), "1 to 12 phases"),
    (lambda i: stages(i).phase_table([(0, 5)]), "not a boundary"),
    (lambda i: agreement_by_pattern(patterns(i.select(range(9))), i, i), "were not classified"),
])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words): call(result(curves(0)))
