"""The estimate is the derivative, and the truth is retraining: random runs against slow, independent references."""
import numpy as np
import pytest
import torch

from cases import Case, KINDS, difference, for_cases, plain, unrolled, weights
from dit_nb import influence, leave_one_out, open_run, remove

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def worst():
    "The largest deviations that the tests of this file met, which `pytest -n 0 -s` shows."
    found = {}
    yield found
    for name, (deviation, count) in found.items(): print(f"\n{name}: {deviation:.1e} of the largest effect in its row, {count} comparisons", end="")


def agree(worst, name, got, reference, rtol, floor=0., scale=None):
    "Assert that `got` `[..., samples]` deviates by at most `rtol` of the largest effect in its row (`scale`, if given, knows more samples)."
    largest = np.abs(reference if scale is None else scale).max(-1, keepdims=True)
    gap = np.maximum(np.abs(got - reference) - floor, 0)
    deviation = (gap / np.maximum(largest, 1e-300)).max()
    before, count = worst.get(name, (0., 0))
    worst[name] = max(before, deviation), count + 1
    failed = sorted(set(np.argwhere(gap > rtol * largest)[:, 0].tolist()))
    assert deviation <= rtol, f"{name}: queries {failed} deviate, by up to {deviation:.1e} of the largest effect"


def stacked(results): return np.stack([r.values for r in results])


def starts(case): return [0, *case.at[:-1]]


def estimates(run, case, queries, **kw):
    "`(always [Q, K, n], window [Q, K, K, n])`"
    return [stacked(influence(run, queries, at=case.at, removal=removal, **kw)) for removal in ("always", "window")]


# The estimate

@each_kind
def test_estimate_is_the_finite_difference(kind, worst):
    def check(case):
        run, queries, some, h = case.record()[0], case.queries(), case.some(3), 4e-3
        always, window = estimates(run, case, queries)
        size = np.abs([r.baseline for r in influence(run, queries, at=case.at)])[..., None]
        floor = 100 * np.finfo(float).eps * size / h                                     # rounding of Q, divided by h
        for i, start in enumerate(starts(case)):
            fd = np.stack([difference(case, queries, j, start, h) for j in some], -1)
            if start == 0: agree(worst, "always, finite differences", always[..., some], fd, 1e-6, floor)
            agree(worst, "window, finite differences", window[:, i:, i][..., some], fd[:, i:], 1e-6, floor[:, i:])
    for_cases(kind, 7, check)


@each_kind
def test_estimate_is_autograd_through_the_unrolled_run(kind, worst):
    def check(case):
        run, queries = case.record()[0], case.queries()
        uses = unrolled(case, queries)
        for how in ("looped", "auto" if kind == "group norm" else "batched"):       # torch can't batch GroupNorm's second derivative
            always, window = estimates(run, case, queries, pullback=how)
            agree(worst, f"always, unrolled ({how})", always, uses.sum(2), 1e-9)
            for k, t in enumerate(case.at):
                for i, start in enumerate(starts(case)):
                    part = uses[:, k, start:t].sum(1) if i <= k else np.zeros_like(window[:, k, i])
                    agree(worst, f"window, unrolled ({how})", window[:, k, i], part, 1e-9, scale=uses[:, k].sum(1))
            assert not always[..., case.never].any() and not window[..., case.never].any()
    for_cases(kind, 10, check)


@each_kind
def test_uses_sum_to_the_values(kind, worst):
    def check(case):
        run, queries = case.record()[0], case.queries()
        for infl, parts in zip(influence(run, queries, at=case.at, per_step=True), unrolled(case, queries)):
            assert infl.uses.index.tolist() == [(t, j) for t, b in enumerate(case.batches[:case.at[-1]]) for j in b.tolist()]
            agree(worst, "single uses, unrolled", infl.uses.to_numpy().T, np.array([parts[:, t, j] for t, j in infl.uses.index]).T, 1e-9)
            total = infl.uses.groupby("sample").sum().reindex(range(case.n), fill_value=0.).to_numpy().T
            np.testing.assert_allclose(total, infl.values, rtol=0, atol=1e-13 * max(1, np.abs(infl.values).max()))
    for_cases(kind, 3, check)


def test_small_memory_gives_the_same():
    def check(case):
        run, queries = case.record()[0], case.queries()
        small, large = (estimates(run, case, queries, pullback="batched", memory=m)[0] for m in (1, 2**30))
        np.testing.assert_allclose(small, large, rtol=0, atol=1e-11 * np.abs(large).max())
        small, large = (stacked(leave_one_out(run, queries, at=case.at, memory=m)) for m in (1, 2**30))
        np.testing.assert_allclose(small, large, rtol=0, atol=1e-11)
    for_cases("two hidden layers", 3, check)


@each_kind
def test_baseline_is_the_query_of_the_trained_model(kind):
    def check(case):
        run, queries = case.record()[0], case.queries()
        for results in (influence(run, queries, at=case.at), leave_one_out(run, queries, [0], at=case.at)):
            np.testing.assert_allclose([r.baseline for r in results], plain(case, queries), rtol=1e-10, atol=1e-12)
    for_cases(kind, 3, check)


@each_kind
def test_float32_is_close_to_float64(kind, worst):
    def check(case):
        single, double = (estimates(case.record(dtype)[0], case, case.queries(dtype)) for dtype in (torch.float32, torch.float64))
        for removal, a, b in zip(("always", "window"), single, double): agree(worst, f"{removal}, float32", a, b, 1e-3, 1e-9)
    for_cases(kind, 3, check)


# The record under it

@each_kind
def test_replayed_states_are_the_live_ones(kind):
    def check(case):
        run, states = case.record()
        fresh = open_run(run.path, case.model(), case.loss_fn, case.data())
        for t in torch.randperm(len(states), generator=case.numbers(6)).tolist():
            state = fresh.state(t)
            tensors = state.params | state.buffers
            assert all(torch.equal(tensors[k], v) for k, v in states[t].items()), f"state {t}"
        assert run.verify(100) == 0
    for_cases(kind, 4, check)


# The truth

@each_kind
@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_removal_is_plain_retraining(kind, method):
    def check(case):
        run, queries, some = case.record()[0], case.queries(), case.some(3)
        groups, kw = [[j] for j in some] + [some[-2:]], dict(at=case.at, method=method)
        single = stacked(leave_one_out(run, queries, some, **kw)), stacked(leave_one_out(run, queries, some, removal="window", **kw))
        sets = stacked(remove(run, queries, groups, **kw)), stacked(remove(run, queries, groups, removal="window", **kw))
        whole = plain(case, queries)
        for i, start in enumerate(starts(case)):
            truth = np.stack([plain(case, queries, weights(case, g, -1., start)) - whole for g in groups], -1)
            for got in (single, sets):
                expected = truth[..., :got[0].shape[-1]]
                if start == 0: np.testing.assert_allclose(got[0], expected, rtol=1e-10, atol=1e-10)
                np.testing.assert_allclose(got[1][:, i:, i], expected[:, i:], rtol=1e-10, atol=1e-10)
                assert not got[1][:, :i, i].any()
        if case.never: assert not single[0][..., 0].any() and not single[1][..., 0].any()
    for_cases(kind, 4, check)
