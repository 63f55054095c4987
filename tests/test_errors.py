"""Second derivatives against second differences of plain training; the curvature and the proxy against slow references; the intervals' coverage over many runs."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import KINDS, LOOPED, OPTIMIZERS, crossing, plain, weights
from dit_nb import Recorder, digits, influence, leave_one_out, loss_query, supervised
from dit_nb.errors import _derivatives, _squared_norms, calibrate, error_proxy, second_order, with_curvature

pytestmark = [pytest.mark.filterwarnings("ignore:.*is not smooth at"), pytest.mark.filterwarnings("ignore:.*does not depend on the parameters")]
ACROSS = [(k, list(OPTIMIZERS)[i % len(OPTIMIZERS)]) for i, k in enumerate(KINDS) if k not in LOOPED] + [("one hidden layer", o) for o in OPTIMIZERS]


def second_difference(case, queries, j):
    "`[Q, K]` second derivative in the weight of sample j: second differences of plain training, once extrapolated; `h` shrinks where steps `h` and `h / 2` disagree, at a kink."
    base, tries = plain(case, queries), []
    def second(h): return (plain(case, queries, weights(case, [j], h)) + plain(case, queries, weights(case, [j], -h)) - 2 * base) / h**2
    for h in (.02, .005, .001, .0002):
        whole, half = second(h), second(h / 2)
        tries.append((np.abs(whole - half).max() / max(np.abs(half).max(), 1e-300), (4 * half - whole) / 3))
        if tries[-1][0] < 1e-4: break
    return min(tries, key=lambda found: found[0])[1]

def asked_of(case): return (lambda found: found[:2] + found[-1:])(case.queries())


@pytest.mark.parametrize("kind, optimizer", ACROSS)
def test_derivatives_are_the_adjoint_and_second_differences(kind, optimizer):
    case = crossing(kind, optimizer)
    run, _ = case.record()
    queries, j = asked_of(case), int(case.batches[0][0])
    infl = np.stack([r.values for r in influence(run, queries, at=case.at, progress=False)])[..., j]
    first, second = _derivatives(run, queries, np.array([j]), np.array(case.at), "always")[..., 0, 0]
    reference = second_difference(case, queries, j)
    assert np.abs(first + infl).max() < 1e-6 * np.abs(infl).max()
    assert (np.abs(second - reference) / np.maximum(np.abs(reference).max(-1, keepdims=True), 1e-6)).max() < 1e-3


@pytest.mark.parametrize("kind", LOOPED)
def test_what_vmap_cannot_train_is_refused(kind):
    case = crossing(kind, "AdamW")
    with pytest.raises(RuntimeError, match="leave_one_out"): second_order(case.record()[0], case.queries()[0], [0], at=case.at, progress=False)


def trained(path, make=lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)), lr=.1, n=120, epochs=3, dtype=torch.float64, accumulate=False, opt=torch.optim.SGD):
    train, val = digits(dtype=dtype)
    train, loss_fn = train.subset(torch.arange(n)), supervised(F.cross_entropy)
    torch.manual_seed(0)
    model = make().to(dtype)
    with Recorder(model, opt(model.parameters(), lr=lr), loss_fn, train, path=path) as rec:
        for epoch in range(epochs):
            for idx in rec.batches(24): rec.step(idx, **({"micro": 8} if accumulate else {}))
    return rec.finish(), loss_query(loss_fn, val[:100])


@pytest.mark.parametrize("removal", ["always", "window"])
def test_chunks_and_lists_change_nothing_and_windows_are_removals_from_there_on(removal, tmp_path):
    run, q = trained(tmp_path / "run")
    some = [3, 50, 7, 11]
    one = second_order(run, q, some, removal=removal, progress=False)
    both = second_order(run, [q, q], some, removal=removal, memory=1, progress=False)
    assert all(np.allclose(r.values, one.values, rtol=1e-9, atol=1e-15) for r in both)
    true, first = leave_one_out(run, q, some, removal=removal, progress=False), influence(run, q, removal=removal, progress=False)
    assert one.values.shape == true.values.shape and one.samples.tolist() == some
    assert np.linalg.norm(one.values - true.values) < .1 * np.linalg.norm(first.values[..., some] - true.values)


@pytest.mark.parametrize("removal", ["always", "window"])
def test_curvature_of_full_rank_is_the_quadratic_form(removal, tmp_path):
    run, q = trained(tmp_path / "run", make=lambda: nn.Linear(64, 10, bias=False), n=48, epochs=2)
    infl, curved = influence(run, q, removal=removal, progress=False), with_curvature(run, q, removal=removal, rank=48, progress=False)
    i, some = -1, [0, 5, 20]
    from dit_nb.errors import _Taylor, twice_differentiable, untouched
    with untouched(run.model), twice_differentiable(run.model) as moved:
        taylor, own = _Taylor(run, moved), F.one_hot(torch.tensor(some), run.n_samples).double()
        start = 0 if removal == "always" else int(infl.times[0])
        way = bend = {k: torch.zeros(len(some), *v.shape, dtype=v.dtype) for k, v in run.state(0).params.items()}
        for t in range(start, run.steps): way, bend = taylor.step(t, own, way, bend)
        half = (taylor.query(q, run.steps, way, {k: 0 * v for k, v in bend.items()})[1] / 2).numpy()
    got = (curved.values - infl.values)[(i, some) if removal == "always" else (i, 1, some)]
    assert np.allclose(got, half, rtol=.05, atol=.02 * np.abs(half).max())


@pytest.mark.parametrize("layer, x", [(nn.Linear(5, 3), torch.randn(4, 5)), (nn.Linear(5, 3, bias=False), torch.randn(4, 6, 5)), (nn.Linear(5, 3), torch.randn(4, 2, 3, 5)), (nn.Embedding(7, 3), torch.randint(7, (4, 6))),
                                      (nn.Conv2d(2, 3, 3, padding=1, stride=2), torch.randn(4, 2, 7, 7)), (nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2), torch.randn(4, 2, 7, 7))], ids=lambda v: "" if isinstance(v, torch.Tensor) else str(v))
def test_norms_are_those_of_the_samples_gradients(layer, x):
    layer = layer.double()
    x = x.double() if x.is_floating_point() else x
    out = layer(x)
    got = _squared_norms(layer, x, torch.autograd.grad(out.sin().sum(), out)[0])
    each = [torch.autograd.grad(layer(x[i:i + 1]).sin().sum(), list(layer.parameters())) for i in range(len(x))]
    assert torch.allclose(got, torch.stack([sum((g**2).sum() for g in gs) for gs in each]))


@pytest.mark.parametrize("kind", ["convolution", "embedding", "GPT", "batch norm, images", "dropout"])
@pytest.mark.parametrize("removal", ["always", "window"])
def test_proxy_comes_with_the_influence_whatever_the_memory(kind, removal):
    case = crossing(kind, "momentum")
    run, queries = case.record()[0], case.queries()[:2]
    whole, small = (error_proxy(run, queries, at=case.at, removal=removal, memory=m, progress=False) for m in (2**30, 1))
    for p, s, infl in zip(whole, small, influence(run, queries, at=case.at, removal=removal, progress=False)):
        assert np.allclose(p.influence.values, infl.values, rtol=1e-9, atol=1e-14) and p.values.shape == infl.values.shape
        assert np.allclose(p.values, s.values, rtol=1e-9) and np.isfinite(p.values).all() and (p.values >= 0).all()
        used = np.isin(np.arange(run.n_samples), np.concatenate([run.batch(t).numpy() for t in range(case.at[-1])]))
        last = p.window()
        assert (last[~used] == 0).all() and (last[used] > 0).all()
        assert (p.window(0, case.at[0]) >= 0).all()


def test_accumulated_micro_batches_have_the_same_proxy():
    from dataclasses import replace
    case = replace(crossing("one hidden layer", "SGD"), micro=None, clip={}, loss="cross entropy", again=False)
    runs = [replace(case, micro=m).record()[0] for m in (None, 2)]
    a, b = (error_proxy(r, case.queries()[0], at=case.at, progress=False) for r in runs)
    assert np.allclose(a.values, b.values, rtol=1e-6)


def test_coverage_is_what_is_stated(tmp_path):
    for name, make, lr, opt in [("tanh", lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)), .3, torch.optim.SGD), ("ReLU", lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), .3, torch.optim.SGD),
                                ("logistic", lambda: nn.Linear(64, 10), .5, torch.optim.SGD), ("AdamW", lambda: nn.Linear(64, 10), .01, torch.optim.AdamW)]:
        run, q = trained(tmp_path / name, make=make, lr=lr, opt=opt)
        proxy, true, rng = error_proxy(run, q, progress=False), leave_one_out(run, q, progress=False), np.random.default_rng(0)
        for p, coverage, m in ((proxy, .9, 30), (None, .9, 30), (proxy, .75, 11)):
            for w in (proxy.influence.windows()[1], (0, None)):
                found = []
                for _ in range(100):
                    order = rng.permutation(run.n_samples)
                    c = calibrate(proxy.influence, true.select(order[:m]), p, coverage)
                    found.append(np.mean((np.abs(proxy.influence.window(*w) - true.window(*w)) <= c.error(*w))[order[m:]]))
                k = np.ceil((m + 1) * coverage - 1e-9)
                spread = np.sqrt(k * (m + 1 - k) / ((m + 1) ** 2 * (m + 2)) / 100)               # of the mean of 100 draws from Beta(k, m + 1 - k)
                assert k / (m + 1) - 4 * spread < np.mean(found) < k / (m + 1) + 4 * spread + 1 / run.n_samples, (name, coverage, m, np.mean(found))


def test_calibration_without_a_unit(tmp_path):
    run, q = trained(tmp_path / "run", epochs=1)
    infl, true = influence(run, q, at=[3, 5], progress=False), leave_one_out(run, q, range(40), at=[3, 5], progress=False)
    proxy = error_proxy(run, q, at=[3, 5], progress=False)
    c = calibrate(infl, true, proxy)
    late = np.setdiff1d(np.arange(run.n_samples), np.concatenate([run.batch(t).numpy() for t in range(3)]))
    assert len(late) and (c.error(0, 3)[late] == 0).all() and np.isfinite(c.error(0, 3)).all() and (c.error() > 0).all()
    assert "90%" in repr(c) and c.m == 40
