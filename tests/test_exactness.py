"""The estimate is the derivative, and the truth is retraining: every optimizer, every kind of model, against slow, independent references."""
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume
from torch.utils.data import DataLoader, TensorDataset

from cases import DRAWING, KINDS, LENGTH, LOOPED, NORMED, OPTIMIZERS, cross, crossing, difference, distance, for_cases, plain, tensors, unrolled, weights
from dit_nb import Recorder, influence, input_gradient_query, leave_one_out, loss_query, open_run, remove, supervised
from dit_nb.estimator import kink_width

each_kind = pytest.mark.parametrize("kind", KINDS)
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
language_models = pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("GPT")])

# Small random networks often have parameters near Adam's eps; that is said, and is no failure here. So is which kinds vmap can't train.
pytestmark = [pytest.mark.filterwarnings("ignore:.*is not smooth at"), pytest.mark.filterwarnings("ignore:exact removal runs one retraining after the other"),
              pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")]


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


# Every kind of model by every optimizer

@each_optimizer
@each_kind
def test_estimate_is_the_finite_difference_and_vectorised_removal_is_retraining(kind, optimizer):
    found = cross(kind, optimizer)
    assert found["recorded"] == 0, "the recorded training ends elsewhere than the same loop with torch.optim alone"
    assert found["estimate"] < 1e-6 and found["truth"] < 1e-10, found


# The estimate

@pytest.mark.parametrize("kind", [k for k in KINDS if k not in NORMED])
def test_estimate_is_autograd_through_the_unrolled_run(kind, worst):
    def check(case):
        assume(case.optimizer != "ASGD")
        run, queries = case.record()[0], case.queries()
        uses = unrolled(case, queries)
        assume(np.isfinite(uses).all())                       # torch's own derivative of a root of 0 (a token never met, under Adam) is not
        rtol = 1e-7 if case.optimizer == "NAdam" else 1e-9       # torch keeps its product of momenta in float32
        size = 1e-14 * np.abs([r.baseline for r in influence(run, queries, at=case.at)])[..., None]            # rounding of the query
        for how in ("looped", "auto" if kind == "group norm" else "batched"):       # torch can't batch GroupNorm's second derivative
            always, window = estimates(run, case, queries, pullback=how)
            agree(worst, f"always, unrolled ({how})", always, uses.sum(2), rtol, size)
            for k, t in enumerate(case.at):
                for i, start in enumerate(starts(case)):
                    part = uses[:, k, start:t].sum(1) if i <= k else np.zeros_like(window[:, k, i])
                    agree(worst, f"window, unrolled ({how})", window[:, k, i], part, rtol, size[:, k], scale=uses[:, k].sum(1))
            assert not always[..., case.never].any() and not window[..., case.never].any()
        for infl, parts in zip(influence(run, queries, at=case.at, per_step=True), uses):
            assert infl.uses.index.tolist() == [(t, j) for t, b in enumerate(case.batches[:case.at[-1]]) for j in b.tolist()]
            single = infl.uses.groupby(["step", "sample"]).sum()                    # of a sample that came twice in a batch
            agree(worst, "single uses, unrolled", single.to_numpy().T, np.array([parts[:, t, j] for t, j in single.index]).T, rtol, 1e-14 * np.abs(infl.baseline)[:, None])
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


@pytest.mark.parametrize("kind", ["two hidden layers", "convolution", "batch norm", "attention", "LSTM"])
def test_float32_is_close_to_float64(kind, worst):
    "By optimizers that are linear in the gradient: others amplify rounding where the gradient is near their eps."
    def check(case):
        assume(OPTIMIZERS[case.optimizer][0] is torch.optim.SGD)
        single, double = (estimates(case.record(dtype)[0], case, case.queries(dtype)) for dtype in (torch.float32, torch.float64))
        for removal, a, b in zip(("always", "window"), single, double): agree(worst, f"{removal}, float32", a, b, 1e-3, 1e-8)
    for_cases(kind, 3, check)


# Where an optimizer's derivative is easily lost

DEAD = ["Adam", "AdamW", "AMSGrad", "NAdam", "RMSprop", "RMSprop, centered", "Adagrad", "RAdam", "Adamax", "Adadelta"]

@pytest.mark.parametrize("optimizer", DEAD)
@pytest.mark.parametrize("lit", [None, 4])
def test_an_input_that_was_always_zero_brings_no_nan(optimizer, lit):
    """Where every gradient so far was exactly 0, Adam divides 0 by its eps, and the root of its second moment has no derivative. One column stays dark, or is lit by a
    single sample in the last step."""
    case = replace(crossing("one hidden layer", optimizer), form="tensors", loss="cross entropy", again=False, micro=None, clip={}, warm=0, n=8, unused=0,
                   sizes=[7, 8, 7, 8], at=[3, 4], groups=1)
    kind, lr, chosen = OPTIMIZERS[optimizer]
    batches, data = case.batches, case.data()
    x, y = data.tensors
    x[:, 2] = 0
    if lit is not None: batches[:3], x[lit, 2] = [b[b != lit] for b in batches[:3]], 1.
    eps = {"eps": 1e-8} | ({"initial_accumulator_value": 0.} if optimizer == "Adagrad" else {})
    old = OPTIMIZERS[optimizer]
    OPTIMIZERS[optimizer] = kind, lr, {**chosen, **eps}
    case.data = lambda dtype=None: TensorDataset(x, y)
    try:
        run, queries = case.record()[0], case.queries()[:2] + case.queries()[-1:]
        found = stacked(influence(run, queries, at=case.at))
        assert np.isfinite(found).all()
        for j in (0, 4):
            reference = difference(case, queries, j)
            np.testing.assert_allclose(found[..., j], reference, rtol=0, atol=1e-6 * np.abs(found).max())
        true = stacked(leave_one_out(run, queries, [0, 4], at=case.at, method="vmap"))
        for c, j in enumerate((0, 4)):
            np.testing.assert_allclose(true[..., c], plain(case, queries, weights(case, [j], -1.)) - plain(case, queries), rtol=0, atol=1e-10)
    finally: OPTIMIZERS[optimizer] = old


# Tokens

@language_models
def test_tokens_add_up_to_their_sample_and_each_is_a_finite_difference(kind):
    def check(case):
        run, queries = case.record()[0], case.queries()
        per_token, per_sample = (stacked(influence(run, queries, at=case.at, per_token=on)) for on in (True, False))
        np.testing.assert_allclose(per_token.sum(-1), per_sample, rtol=0, atol=1e-13 * max(1., np.abs(per_sample).max()))
        used = [j for j in case.some(case.n) if j not in case.never]
        size = np.maximum(np.abs(per_token).max((-1, -2)), 1e-4 * np.abs(plain(case, queries)))
        for j, place in ((used[0], 0), (used[-1], LENGTH - 1)):
            assert (np.abs(per_token[..., j, place] - difference(case, queries, (j, place))) < 1e-6 * size).all()
    for_cases(kind, 4, check)


@language_models
def test_removing_tokens_is_retraining_without_their_losses(kind):
    def check(case):
        run, queries, pairs = case.record()[0], case.queries()[:2], [(j, p) for j, p in zip(case.some(4), (0, LENGTH - 1, 1, 2))]
        whole = plain(case, queries)
        single, sets = stacked(leave_one_out(run, queries, pairs, at=case.at)), stacked(remove(run, queries, [pairs[:2], pairs], at=case.at))
        for got, groups in ((single, [[p] for p in pairs]), (sets, [pairs[:2], pairs])):
            truth = np.stack([plain(case, queries, weights(case, g, -1.)) - whole for g in groups], -1)
            np.testing.assert_allclose(got, truth, rtol=1e-10, atol=1e-10)
    for_cases(kind, 3, check)


# The record under it

@each_kind
def test_replayed_states_are_the_live_ones(kind):
    "Parameters, buffers and slots, also where the training went on from an optimizer that had slots already."
    def check(case):
        run, states = case.record()
        fresh = open_run(run.path, case.model(), case.loss_fn, case.data(), collate_fn=case.collate_fn)
        for t in torch.randperm(len(states), generator=case.numbers(6)).tolist():
            state = fresh.state(t)
            replayed = state.params | state.buffers | state.slots
            assert all(torch.equal(replayed[k], v) for k, v in states[t].items() if not k.endswith(".initial")), f"state {t}"
        assert run.verify(100) == 0
    for_cases(kind, 5, check)


@each_optimizer
def test_a_parameter_that_is_met_late_starts_like_any_other(optimizer):
    "ASGD's first rate is the schedule's at that moment; SGD does not dampen the first momentum."
    case = replace(crossing("rare parameter", optimizer), form="tensors", loss="cross entropy", n=10, unused=0, again=False, micro=None, clip={}, warm=0,
                   sizes=[7, 5, 10, 4], every=3, at=[4])
    (run, states), queries = case.record(), case.queries()[1:2]
    for t, live in enumerate(states): assert all(torch.equal(v, live[k]) for k, v in run.state(t).params.items()), f"state {t}"
    j = case.some(1)[0]
    found = stacked(influence(run, queries, at=case.at))
    np.testing.assert_allclose(found[..., j], difference(case, queries, j), rtol=0, atol=1e-6 * np.abs(found).max())


def watched(case, rec=None, weights=None):
    "The loop of a user with a DataLoader of the case's batches, perhaps recorded, perhaps with sample weights `[T, n]`: model and optimizer at its end."
    model, optimizer = case.start()
    data = case.data()
    loader = DataLoader(data, batch_sampler=case.batches, collate_fn=case.collate_fn)
    if rec: rec = case.recorder(model, optimizer, data=data)
    torch.manual_seed(case.seed), np.random.seed(case.seed), random.seed(case.seed)
    for t, batch in enumerate(rec.watch(loader) if rec else loader):
        case.before_step(t, model, optimizer, reseed=False)
        optimizer.zero_grad()
        losses = case.loss_fn(model, batch)
        (losses.mean() if weights is None else (losses * weights[t, case.batches[t]].view(-1, *[1] * (losses.ndim - 1))).mean()).backward()
        case.clip_gradients(model, optimizer)
        optimizer.step()
    return (rec.finish() if rec else None), model, optimizer


@pytest.mark.parametrize("kind", ["two hidden layers", "batch norm and dropout", "rare parameter", "transformer layer", "GRU", "GPT, tied, dropout"])
def test_a_watched_loop_is_the_same_training_and_gives_its_derivative(kind):
    def check(case):
        case = replace(case, micro=None, at=[len(case.sizes)], form="rows" if case.form in ("dict", "nested") else case.form)       # which a DataLoader can't read
        run, model, optimizer = watched(case, rec=True)
        assert distance(tensors(model, optimizer), tensors(*watched(case)[1:])) == 0
        query, (j, *_) = case.queries()[0], [j for j in case.some(case.n) if j not in case.never]
        found, model = influence(run, query, at=case.at), model.eval()
        assert query(model).item() == pytest.approx(found.baseline[-1], rel=1e-12)
        def value(h): return query(watched(case, weights=weights(case, [j], h))[1].eval()).item()
        slope = [(value(-h) - value(h)) / (2 * h) for h in (1e-5, 5e-6)]
        assert (4 * slope[1] - slope[0]) / 3 == pytest.approx(found.values[0, j], abs=1e-6 * max(np.abs(found.values).max(), 1e-3 * abs(found.baseline[-1])))
    for_cases(kind, 3, check)


# The truth

@each_kind
def test_removal_is_plain_retraining(kind):
    "Of samples and of sets, by either method; and the baseline is the query of the trained model."
    def check(case):
        run, queries, some = case.record()[0], case.queries()[::3], case.some(3)
        groups, whole = [[j] for j in some] + [some[-2:]], plain(case, queries)
        truth = {start: np.stack([plain(case, queries, weights(case, g, -1., start)) - whole for g in groups], -1) for start in starts(case)}
        for method in ("auto", "loop"):
            kw = dict(at=case.at, method=method)
            results = leave_one_out(run, queries, some, removal="window", **kw)
            single, sets = stacked(results), stacked(remove(run, queries, groups, **kw))
            np.testing.assert_allclose([r.baseline for r in results], whole, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(sets, truth[0], rtol=1e-10, atol=1e-10)
            for i, start in enumerate(starts(case)):
                np.testing.assert_allclose(single[:, i:, i], truth[start][:, i:, :len(some)], rtol=1e-10, atol=1e-10)
                assert not single[:, :i, i].any()
            if case.never: assert not single[..., 0].any()
    for_cases(kind, 2, check)


@pytest.mark.parametrize("kind", sorted(DRAWING))
def test_random_numbers_are_the_same_in_vectorised_training(kind):
    "But for dropout on a transposed tensor, where torch fills the mask in the memory's order: such models are retrained one by one, and that is said."
    case = replace(crossing(kind, "SGD"), n=8, unused=0, again=False, micro=None)
    for sizes in ([8, 4], [4, 8] if kind in NORMED else [1, 8]):          # one sample alone has no other order
        run, queries = replace(case, sizes=sizes, warm=0, at=[2]).record()[0], case.queries()[:1]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found, = leave_one_out(run, queries, [0])
        looped = [w for w in said if "torch draws the random numbers of a batch of runs in another order" in str(w.message)]
        assert found.notes["method"] == ("loop" if kind in LOOPED else "vmap") and len(looped) == (kind in LOOPED)


def test_a_model_with_one_module_in_two_places_is_given_back():
    case = crossing("batch norms", "momentum")
    run, _ = case.record()
    mine = {k: (id(v), v.detach().clone()) for k, v in [*run.model.named_parameters(), *run.model.named_buffers()]}
    influence(run, case.queries()[:2], at=case.at), leave_one_out(run, case.queries()[:2], [0], at=case.at), run.verify()
    for k, v in [*run.model.named_parameters(), *run.model.named_buffers()]: assert id(v) == mine[k][0] and torch.equal(v, mine[k][1])


# Kinks

@each_kind
def test_a_smooth_network_has_nothing_to_smooth(kind):
    case = crossing(kind, "AMSGrad" if "AMSGrad" in OPTIMIZERS else "AdamW")
    run, queries = case.record()[0], case.queries()
    plain, *others = ([influence(run, queries, at=case.at, pullback="looped", smooth=how)] for how in (None, "auto", .1))
    for results in others:
        assert np.array_equal(stacked(results[0]), stacked(plain[0]), equal_nan=True) and all((a.baseline == b.baseline).all() for a, b in zip(results[0], plain[0]))
    assert others[0][0][0].notes["smooth"] is None


class Bent(torch.nn.Module):
    "Two layers and a pooling with `relu`, whatever its spelling."
    def __init__(self, relu, pool):
        super().__init__()
        self.conv, self.hidden, self.out, self.relu, self.pool = torch.nn.Conv1d(1, 3, 3), torch.nn.Linear(9, 6), torch.nn.Linear(6, 3), relu, pool

    def forward(self, x): return self.out(self.relu(self.hidden(self.pool(self.relu(self.conv(x[:, None]))).flatten(1))))


F = torch.nn.functional
SPELLINGS = {"function": F.relu, "module": torch.nn.ReLU(), "module, in place": torch.nn.ReLU(inplace=True), "torch.relu_": lambda x: torch.relu_(x * 1), "clamp": lambda x: x.clamp(min=0), "clamp_min_": lambda x: x.clamp_min_(0),
             "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)), "leaky": lambda x: F.leaky_relu(x, 0., inplace=True), "hardtanh": lambda x: F.hardtanh(x, 0., 1e9), "threshold": lambda x: F.threshold(x, 0, 0),
             "half of the sum": lambda x: (x + x.abs()) / 2}
POOLS = {"module": torch.nn.MaxPool1d(2), "with places": lambda x: F.max_pool1d(x, 2, return_indices=True)[0], "adaptive": lambda x: F.adaptive_max_pool1d(x, 3),
         "max": lambda x: x.unflatten(-1, (3, 2)).max(-1).values, "in two dimensions": lambda x: F.max_pool2d(x[:, :, None], (1, 2))[:, :, 0], "min": lambda x: -(-x).unflatten(-1, (3, 2)).min(dim=-1)[0]}


def bent(relu, pool, dtype=torch.float64, every=1):
    "A recorded run of `Bent`, and a loss and a gradient query."
    torch.manual_seed(0)
    model, x, y = Bent(relu, pool).to(dtype), torch.randn(40, 8, dtype=dtype), torch.arange(40) % 3
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.2, momentum=.5), loss := supervised(F.cross_entropy), TensorDataset(x[:30], y[:30]), every=every) as rec:
        for _ in range(3):
            for idx in rec.batches(10): rec.step(idx)
    return rec.finish(), [loss_query(loss, (x[30:], y[30:])), input_gradient_query(x[30], 1, 3)]


@pytest.fixture(scope="module")
def reference(): return bent(F.relu, torch.nn.MaxPool1d(2))


@pytest.mark.parametrize("relu, pool", [(r, "module") for r in SPELLINGS] + [("function", p) for p in POOLS])
def test_smoothed_kinks_are_the_same_in_every_spelling(reference, relu, pool):
    run, queries = bent(SPELLINGS[relu], POOLS[pool])
    plain, smooth = (stacked(influence(*reference, smooth=how)) for how in (None, .1))
    for how in ("looped", "batched"):
        found = stacked(influence(run, queries, smooth=.1, pullback=how))
        np.testing.assert_allclose(found, smooth, rtol=0, atol=1e-9 * np.abs(smooth).max(-1, keepdims=True).max())
    assert all(np.abs(smooth - plain).max(-1)[q].max() > 1e-3 * np.abs(plain[q]).max() for q in range(2)), "nothing was smoothed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothing_leaves_the_recorded_run_alone(dtype):
    "Losses, updates and replayed states keep their bits: a sweep over replayed states is that over stored ones."
    results = []
    for every in (1, 4, 100):
        run, queries = bent(torch.nn.ReLU(inplace=True), torch.nn.MaxPool1d(2), dtype, every)
        results.append(influence(run, queries, smooth=.05, pullback="looped"))
        assert run.verify(None) == 0
    for other in results[1:]: assert all(np.array_equal(a.values, b.values) and np.array_equal(a.baseline, b.baseline) for a, b in zip(other, results[0]))
    plain = influence(run, queries, pullback="looped")
    assert all(np.array_equal(a.baseline, b.baseline) and not np.array_equal(a.values, b.values) for a, b in zip(plain, results[0]))


def test_the_measured_width_is_twice_the_mean_largest_move():
    "For one step of plain SGD on one layer, by hand: a sample's removal moves the activations by the step that it would have made."
    torch.manual_seed(0)
    model, x, y = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    start = [p.detach().clone() for p in model.parameters()]
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.2), supervised(F.cross_entropy), TensorDataset(x, y)) as rec: rec.step(range(6))
    moves = []
    for j in range(6):
        both = []
        for keep in (torch.ones(6), torch.ones(6).index_fill_(0, torch.tensor(j), 0.)):
            w, b, v, c = (p.clone().requires_grad_() for p in start)
            grads = torch.autograd.grad((keep * F.cross_entropy(F.linear(F.linear(x, w, b).relu(), v, c), y, reduction="none")).sum() / 6, [w, b])
            both.append(F.linear(x, w - .2 * grads[0], b - .2 * grads[1]))
        moves.append(float(((both[0] - both[1]).abs().max() / both[0].std(correction=0)).detach()))
    assert kink_width(rec.finish(), removals=200) == pytest.approx(2 * np.mean(moves), rel=.15)            # 200 random ones of six
