"""Bounds are never below the measured error: random small runs by every optimizer, constants measured exactly; and they can be violated, by leaving out what they are made of."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from cases import OPTIMIZERS, crossing, for_cases
from dit_nb import error_bound, influence, leave_one_out, parameter_query

KINDS = ["logistic", "one hidden layer", "two hidden layers", "convolution", "layer norm", "tied weights", "frozen layer"]
BOTH = ["trajectory", "worst case"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*is not smooth at"), pytest.mark.filterwarnings("ignore:exact removal runs one retraining after the other")]


def coordinates(run):
    "A query for every single parameter."
    return [parameter_query(k, i) for k, (_, shape) in run.meta["params"].items() for i in np.ndindex(*shape)]


def errors(run, queries, at):
    "`[Q, K, n]`: how far the estimate is from the truth, and how large the truth is"
    true, infl = leave_one_out(run, queries, at=at, progress=False), influence(run, queries, at=at, progress=False)
    return np.stack([np.abs(t.values - i.values) for t, i in zip(true, infl)]), np.stack([np.abs(t.values) for t in true])


def holds(bound, error, size):
    "At every boundary, for every sample, but for the rounding of differences."
    return (bound >= error * (1 - 1e-6) - 1e-11 * (1 + size)).all()


def small_run(case, optimizer=None):
    "The recorded run of a case; micro-batches only where the bounds can do them, and most by kinds of SGD, whose bounds say something."
    family = ["SGD", "weight decay", "momentum", "Nesterov", "SGD", "dampening", "SGD", case.optimizer]
    case = replace(case, form="tensors", warm=0, optimizer=optimizer or family[case.seed % 8], clip=case.clip if case.seed % 3 == 0 else {})
    if OPTIMIZERS[case.optimizer][0] is not torch.optim.SGD or case.groups > 1 or case.clip: case = replace(case, micro=None)
    return case, case.record()[0], case.queries()[case.seed % 2]


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_never_below_the_measured_error(kind, tightest):
    def check(case):
        case, run, q = small_run(case)
        (error,), (size,) = errors(run, [q], case.at)
        linear = run.rule.name == "SGD"
        convex = kind == "logistic" and case.loss == "cross entropy" and case.optimizer != "maximize"
        found = {how: error_bound(run, q, at=case.at, kind=how, constants="exact", convex=convex, progress=False) for how in BOTH}
        for how, b in found.items():
            assert holds(b.values, error, size), f"{how}: {b}"
            tightest(f"{how}, {'SGD' if linear else 'others'}", b.values[-1], error[-1])
        np.testing.assert_allclose(b.infl.values, influence(run, q, at=case.at, progress=False).values, rtol=1e-9, atol=1e-14)
        if case.seed % 3: return
        e, true = (np.linalg.norm(x[:, -1], axis=0) for x in errors(run, coordinates(run), case.at[-1:]))
        for how, b in found.items():
            assert holds(b.params[-1], e, true) and holds(b.size[-1], true, true), how
            tightest(f"parameters, {how}", b.params[-1], e)
    for_cases(kind, 29, check)


@pytest.mark.parametrize("missing, kind, loss, sizes, linear", [("query", "one hidden layer", "cross entropy", [12], False), ("curvature", "logistic", "squares", [6, 6, 12], True),
                                                                 ("lipschitz", "one hidden layer", "cross entropy", [6, 3, 3], True)])
def test_without_one_of_its_terms_it_is_violated(missing, kind, loss, sizes, linear):
    "Else the test above could not fail. After one step only the query is curved; a linear model's squared loss has no third derivative; a query of one parameter is not curved."
    case = replace(crossing(kind, "SGD", 3), form="tensors", loss=loss, sizes=sizes, at=[len(sizes)], n=14, groups=1, clip={}, again=False, warm=0, micro=None, every=1, unused=0)
    run, q = case.record()[0], case.queries()[2 if linear else 0]
    (error,), (size,) = errors(run, [q], case.at)
    if missing == "lipschitz": error[:, np.unique(np.concatenate([b.numpy() for b in case.batches[1:]]))] = 0          # samples that come again are bounded by their own curvature too
    whole, without = (error_bound(run, q, at=case.at, constants="exact", known=known, progress=False) for known in ({}, {missing: 0.}))
    assert holds(whole.values, error, size) and error.max() > 1e-6 and not holds(without.values, error, size)


def test_given_constants_bound_softmax_regression_without_any_retraining():
    """The Hessian of logsumexp is at most 1/2, its third derivative at most sqrt(2)^3 / (6 sqrt(3)): no constant is measured along the true runs, which are never made."""
    def check(case):
        case, run, q = small_run(replace(case, loss="cross entropy", clip={}, groups=1), ["SGD", "momentum", "weight decay"][case.seed % 3])
        x = case.samples(case.n, 0, torch.float64)[0].square().sum(1).numpy() + 1
        q = case.queries()[0]
        there = case.samples(4, 5, torch.float64)[0].square().sum(1).numpy() + 1
        known = dict(curvature=x / 2, lipschitz=x ** 1.5 * 2 ** 1.5 / (6 * 3 ** .5), query=there.mean() / 2)
        (error,), (size,) = errors(run, [q], case.at)
        for convex in (True, False):
            b = error_bound(run, q, at=case.at, constants="exact", known=known, convex=convex, progress=False)
            assert "given" in b.sources.values() and not any("true" in s for s in b.sources.values()) and holds(b.values, error, size)
    for_cases("logistic", 25, check)


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "weight decay"])
def test_estimated_constants_are_near_the_exact_ones(optimizer):
    "The estimate of a spectrum's end is inside it, and reaches it in small problems; probes are right on average."
    case, run, q = small_run(replace(crossing("one hidden layer", "SGD", 3), sizes=[12] * 5, at=[5], n=14, groups=1, clip={}, again=False, seed=8, micro=None), optimizer)
    exact, estimated = (error_bound(run, q, at=[5], constants=how, progress=False, **kw).constants for how, kw in [("exact", {}), ("estimated", dict(every=1))])
    low, high = exact["lowest curvature"], exact["highest curvature"]
    assert (estimated["highest curvature"] <= high * (1 + 1e-6) + 1e-9).all() and (estimated["highest curvature"] >= .8 * high).all()
    assert (estimated["lowest curvature"] >= np.minimum(low, 0) - 1e-9).all()
    runs = [error_bound(run, q, at=[5], seed=s, progress=False) for s in range(40)]
    squares = np.mean([b.constants["gradient"] ** 2 for b in runs], axis=0) ** .5
    assert (squares > .9 * exact["gradient"]).all()


@pytest.fixture(scope="module")
def tightest():
    "How near the bounds come to the error, which `pytest -n 0 -s` shows."
    found = {}
    def note(name, bound, error):
        used = error > 1e-12
        with np.errstate(over="ignore"): found.setdefault(name, []).extend((bound[used] / error[used]).tolist())
    yield note
    for name, ratios in found.items(): print(f"\n{name}: median {np.median(ratios):.1f}, least {np.min(ratios):.2f} times the error, {len(ratios)} comparisons", end="")
