"""The baselines on every kind of model: against sums over plain gradients, nothing of the caller's touched, and said clearly what can't be done."""
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import KINDS, OPTIMIZERS, crossing
from dit_nb import Recorder, influence, loss_query, supervised
from dit_nb.baselines import (DETECTORS, confident_learning, detectors, dvemb, final_loss, forgetting, forgotten, influence_function, losses_at, mean_loss,
                              out_of_fold, self_influence, tracin)

PAIRS = [(kind, list(OPTIMIZERS)[i % len(OPTIMIZERS)]) for i, kind in enumerate(KINDS)]
VMAPPED = ["logistic", "two hidden layers", "convolution", "batch norm", "residual", "attention", "vision transformer", "frozen layer", "tied weights"]


def slope_of(run, query, t):
    "The query's gradient by the trained parameters at the state before step `t`, by autograd on a copy of the model."
    model = run.model_at(t)
    params = {k: p.requires_grad_() for k, p in model.named_parameters() if k in run.meta["params"]}
    return dict(zip(params, torch.autograd.grad(query(model), list(params.values()), materialize_grads=True, allow_unused=True)))


def own_gradients(run, t):
    "`{sample: gradient / B}` of a step, by plain training of it with a single weight."
    parts, state = run.trajectory.parts(t), run.state(t)
    def of(j):
        w = torch.zeros(run.n_samples, run.length or 1, dtype=torch.float64)
        w[j] = 1
        return run.gradient(state, parts, run.trajectory.settings(t)["training"], weights=w if run.length else w[:, 0], t=t)[0]
    return {j: of(j) for j in run.batch(t).tolist()}


def dot(a, b): return sum(float((a[k] * b[k]).sum()) for k in a)


@pytest.mark.parametrize("kind, optimizer", PAIRS)
def test_tracin_is_the_sum_over_steps(kind, optimizer):
    run, _ = crossing(kind, optimizer).record()
    def query(model): return sum((p * torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)).sum() + (p ** 2).sum() for p in model.parameters())
    expected, found = np.zeros(run.n_samples), tracin(run, query, at=[1, run.steps])
    for t in range(run.steps):
        slope, h = slope_of(run, query, t), run.trajectory.settings(t)["groups"]
        rate = {k: g["lr"] * (-1 if g.get("maximize") else 1) for names, g in zip(run.rule.groups, h) for k in names}
        for j, g in own_gradients(run, t).items(): expected[j] += sum(rate[k] * float((slope[k] * g[k]).sum()) for k in slope)
        if t == 0: first = expected.copy()
    np.testing.assert_allclose(found.values, [first, expected] if run.steps > 1 else [expected], rtol=1e-7, atol=1e-10 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", [k for k in KINDS])
def test_data_value_embedding_is_its_recursion(kind):
    case = crossing(kind, "SGD")
    case.clip, case.again, case.micro = {}, False, None
    run, _ = case.record()
    def query(model): return sum((p * torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)).sum() for p in model.parameters())
    def flat(g): return torch.cat([g[k].flatten() for k in run.meta["params"]])
    u, expected = flat(slope_of(run, query, run.steps)), np.zeros(run.n_samples)
    for t in reversed(range(run.steps)):
        def filled(what): return flat({k: torch.full(run.meta["params"][k][1], float(g[what]), dtype=torch.float64) for names, g in zip(run.rule.groups, run.trajectory.settings(t)["groups"]) for k in names})
        rate = filled("lr")
        own, size = {j: flat(g) for j, g in own_gradients(run, t).items()}, sum(p.divisor for p in run.trajectory.parts(t)) / len(run.trajectory.parts(t))
        if run.length: pytest.skip("a token is a sample of the outer products: another matrix")
        back = torch.zeros_like(u)
        for j, g in own.items():
            expected[j] += float((rate * u) @ g)
            back += size * float((rate * u) @ g) * g
        u = u * (1 - rate * filled("weight_decay")) - back
    np.testing.assert_allclose(dvemb(run, query, at=[run.steps]).values[0], expected, rtol=1e-6, atol=1e-9 * max(1, np.abs(expected).max()))


def test_data_value_embedding_refuses():
    for optimizer in ("momentum", "Adam", "maximize"):
        with pytest.raises(NotImplementedError, match="plain SGD"): dvemb(crossing("logistic", optimizer).record()[0], lambda m: next(m.parameters()).sum())


def small(kind, act=None, n=40, steps=6, classes=3):
    "A small classification, by a network of some kind"
    torch.manual_seed(0)
    shape = (1, 3, 3) if kind in ("convolution", "residual", "vision transformer") else (4, 4) if kind == "attention" else (4,)
    x, y = torch.randn(n, *shape, dtype=torch.float64), torch.arange(n) % classes
    model, loss_fn = KINDS[kind](5, act or nn.Tanh()).double(), supervised(F.cross_entropy)
    with Recorder(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.2), loss_fn, (x, y)) as rec:
        for epoch in range(steps // 2):
            for idx in rec.batches(n // 2): rec.step(idx)
    return rec.finish(), loss_query(loss_fn, (x[:7] + .1, y[:7]))


@pytest.mark.parametrize("kind", VMAPPED)
def test_all_of_them_leave_everything_as_it_was(kind):
    run, q = small(kind)
    for m in list(run.model.modules())[::2]: m.eval()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    def now(): return ({k: v.clone() for k, v in run.model.state_dict().items()}, [m.training for m in run.model.modules()], [p.grad for p in run.model.parameters()], [p.requires_grad for p in run.model.parameters()],
                       random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_default_dtype())
    before, scores = now(), detectors(run)
    others = [tracin(run, q).values, dvemb(run, q).values, influence_function(run, q).values, influence_function(run, q, solver="explicit", at=["epoch 1", "epoch 3"]).values]
    after = now()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items()) and before[1:] == after[1:]
    assert list(scores) == list(DETECTORS) and scores.shape == (40, len(DETECTORS)) and np.isfinite(scores.to_numpy()).all() and all(np.isfinite(v).all() for v in others)


@pytest.mark.parametrize("kind", VMAPPED)
def test_influence_functions_solve(kind):
    run, q = small(kind)
    names, model = list(run.meta["params"]), run.model_at()
    params = [dict(model.named_parameters())[k].requires_grad_() for k in names]
    x, y = run.dataset
    def gradient(loss): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mean = gradient(F.cross_entropy(model(x), y))
        H = torch.stack([torch.cat([v.flatten() for v in torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True)]) for e in mean])
        own = torch.stack([gradient(F.cross_entropy(model(x[j:j + 1]), y[j:j + 1])).detach() for j in range(40)])
        solved = torch.linalg.solve(H + .7 * torch.eye(len(H)), torch.stack([gradient(q(model)).detach(), *own]).T)
    rtol = 2e-2 if kind == "vision transformer" else 1e-6         # torch.func.hessian is off in the rows of LayerNorm's weights, autograd's own is not
    np.testing.assert_allclose(influence_function(run, q, damping=.7, solver="explicit").values[0], own @ solved[:, 0] / 40, rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(influence_function(run, q, damping=.7, max_iter=12).values[0], own @ solved[:, 0] / 40, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(influence_function(run, damping=.7), (own * solved[:, 1:].T).sum(1) / 40, rtol=rtol, atol=1e-12)
    norms = []
    for t in run.marks.values():
        at = run.model_at(t)
        inside = [dict(at.named_parameters())[k].requires_grad_() for k in names]
        norms.append([sum(float(g.square().sum()) for g in torch.autograd.grad(F.cross_entropy(at(x[j:j + 1]), y[j:j + 1]), inside)) for j in range(40)])
    np.testing.assert_allclose(self_influence(run), .2 * np.sum(norms, 0), rtol=1e-8)


def test_self_influence_of_many_parameters_is_that_of_the_last_layer():
    torch.manual_seed(0)
    x, y, model, loss_fn = torch.randn(30, 20, dtype=torch.float64), torch.arange(30) % 3, nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 3)).double(), supervised(F.cross_entropy)
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.2), loss_fn, (x, y)) as rec:
        for idx in rec.batches(10): rec.step(idx)
    run = rec.finish()
    end = run.model_at()
    with torch.no_grad(): h = end[:2](x)
    theta = torch.cat([p.detach().flatten() for p in end[2].parameters()])
    def losses(v): return F.cross_entropy(h @ v[:150].view(3, 50).T + v[150:], y, reduction="none")
    H, g = torch.func.hessian(lambda v: losses(v).mean())(theta), torch.func.jacrev(losses)(theta)
    expected = (g * torch.linalg.solve(H + torch.eye(153) / (3 * .2), g.T).T).sum(1) / 30
    np.testing.assert_allclose(influence_function(run), expected, rtol=1e-6)
    np.testing.assert_allclose(influence_function(run, layers=["2.weight", "2.bias"]), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["two hidden layers", "batch norm"])
@pytest.mark.parametrize("folds", [2, 3, 7])
def test_out_of_fold_is_training_without_the_fold(kind, folds):
    run, _ = small(kind)
    fold, p = np.random.default_rng(3).permutation(np.arange(40) % folds), out_of_fold(run, folds, seed=3)
    for k in range(folds):
        *_, (_, end) = run.replay(weights=torch.from_numpy((fold != k).astype(float)))
        model = run.model_at()
        model.load_state_dict({**model.state_dict(), **end.params, **end.buffers})
        with torch.no_grad(): np.testing.assert_allclose(p[fold == k], model(run.dataset[0][fold == k]).softmax(1), rtol=1e-7)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(out_of_fold(run, folds, seed=3, memory=1), p, rtol=1e-9)


def test_losses():
    for kind, optimizer in (("GPT", "AdamW"), ("batch norm", "SGD"), ("dropout", "momentum"), ("two hidden layers", "Adam")):
        run, _ = crossing(kind, optimizer).record()
        expected = {j: [] for j in range(run.n_samples)}
        for t in range(run.steps):
            for part in run.trajectory.parts(t):
                for j, l in zip(part.idx.tolist(), part.losses): expected[j].append(np.mean(l))
        np.testing.assert_allclose(mean_loss(run), [np.mean(v) if v else np.nan for v in expected.values()])
        assert final_loss(run).shape == (run.n_samples,) and np.allclose(losses_at(run, run.steps), final_loss(run), equal_nan=True)
        assert np.isnan(mean_loss(run, 0, 1)).sum() == run.n_samples - len(set(run.batch(0).tolist()))


def test_forgetting():
    rng = np.random.default_rng(0)
    history = rng.random((9, 200)) < rng.random(200)
    counts = [sum(1 for a, b in zip(h, h[1:]) if a and not b) if any(h) else 9 for h in history.T]
    assert forgotten(history).tolist() == counts and forgotten(np.ones((1, 3))).tolist() == [0, 0, 0] and forgotten(np.zeros((1, 3))).tolist() == [1, 1, 1]
    run, _ = small("two hidden layers")
    x, y = run.dataset
    with torch.no_grad(): right = [run.model_at(t)(x).argmax(1).eq(y).numpy() for t in run.marks.values()]
    assert forgetting(run).tolist() == forgotten(right).tolist()


def test_what_cannot_be_done(monkeypatch):
    run, q = small("logistic")
    with pytest.raises(ValueError, match="folds"): out_of_fold(run, 41)
    with pytest.raises(ValueError, match="solver"): influence_function(run, q, solver="lissa")
    rows = crossing("GPT", "SGD").record()[0]
    for f in (forgetting, confident_learning, out_of_fold):
        with pytest.raises(TypeError, match="classification"): f(rows)
    monkeypatch.setitem(sys.modules, "dattri.algorithm", None), monkeypatch.setitem(sys.modules, "dattri.task", None), monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    for f in (self_influence, influence_function, confident_learning):
        with pytest.raises(ImportError, match=r"dit_nb\[peers\]"): f(run)
    assert list(detectors(run, progress=False)) == ["final loss", "mean loss", "forgetting"]
    assert influence(run, q, progress=False).values.shape == tracin(run, q).values.shape
