"""Labels and cleansing over random runs: derivatives by every label against differences of whole trainings, symmetries of the order, and mending against plain training."""
import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from cases import CLASSES, crossing, tensors, train as train_plainly
from dit_nb import (Recorder, breast_cancer, cleanse, corrupt_labels, detection, digits, find_corrupted, influence, label_influence, leave_one_out,
                    loss_query, remove, restore_labels, supervised)
from dit_nb.cleansing import WINDOWS, converging, equal_parts, harm, share_of_wrong, sharpness_of, victims
from dit_nb.labels import LabelledRun, label_losses, labels_of, with_labels

loss_fn = supervised(F.cross_entropy)


# --- the derivative by every label ---------------------------------------------------------------------------------

CROSSINGS = [("logistic", "SGD"), ("one hidden layer", "momentum"), ("two hidden layers", "AdamW"), ("convolution", "Nesterov"), ("batch norm", "momentum"),
             ("batch norm, images", "AdamW"), ("dropout", "weight decay"), ("batch norm and dropout", "SGD"), ("tied weights", "RMSprop"), ("frozen layer", "Adam"),
             ("changing modes", "dampening"), ("layer norm", "NAdam"), ("attention, dropout", "momentum"), ("embedding", "Adagrad")]


def labelled_case(kind, optimizer, every=1):
    "A random run whose batches have class labels in one place; every other kind in micro-batches."
    i, case = CROSSINGS.index((kind, optimizer)), crossing(kind, optimizer)
    normed = kind.startswith("batch norm")
    micro = (4 if normed else 3) if i % 2 else None
    sizes = [8 if normed and micro else max(4, s) if normed else s for s in case.sizes]
    return replace(case, form=("tensors", "dict", "rows", "augmented")[i % 4], loss=("cross entropy", "coupled")[i % 3 == 2], micro=micro, sizes=sizes,
                   unused=min(case.unused, case.n - max(sizes)) if not case.again else case.unused, clip={k: v for k, v in case.clip.items() if k == "norm"}, every=every)


def class_query(case):
    "The loss on some samples, from the classes alone."
    x, _, y = case.samples(5, 5, torch.float64)
    return lambda m: F.cross_entropy(m(x), y)


def value(run, state, query):
    "A query at a state, on a model of its own."
    model = run.model_at(0)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for k, v in {**state.buffers, **state.params}.items(): own[k].copy_(v)
        return float(query(model.eval()))


def replayed(view, query, at, weights, start=0):
    "`[K]` the query at the boundaries `at` of the training from `start` on, with label weights `[n, C]`."
    return np.array([value(view, s, query) for t, s in view.replay(start, at[-1], weights) if t in at])


def slope(view, query, at, given, j, c, start=0):
    "`[K]` minus the derivative by the weight of sample `j` under the label `c`, by central differences, once extrapolated."
    def central(h):
        up, down = given.clone(), given.clone()
        up[j, c] += h
        down[j, c] -= h
        return -(replayed(view, query, at, up, start) - replayed(view, query, at, down, start)) / (2 * h)
    return (4 * central(5e-5) - central(1e-4)) / 3


def labels(case): return case.samples(case.n, 0, torch.float64)[2]


@pytest.mark.parametrize("kind, optimizer", CROSSINGS)
def test_derivatives_are_those_of_the_training(kind, optimizer):
    case = labelled_case(kind, optimizer)
    (run, _), query, y = case.record(), class_query(case), labels(case)
    found = label_influence(run, query, at=case.at, classes=CLASSES, progress=False)
    used = sorted({j for b in case.batches for j in b.tolist()})
    assert found.values.shape == (len(case.at), case.n, CLASSES) and (found.given[used] == y.numpy()[used]).all() and (found.given[case.never] == -1).all()
    plain = influence(run, query, at=case.at, progress=False).values
    scale = np.abs(found.values).max()
    assert np.allclose(found.values[:, used, y[used]], plain[:, used], rtol=1e-7, atol=1e-12 * scale) and not found.values[:, case.never].any()
    view, given = LabelledRun(run, CLASSES), F.one_hot(y, CLASSES).double()
    first = case.batches[0]
    for j, c in [(int(first[0]), (int(y[first[0]]) + 1) % CLASSES), (int(first[-1]), int(y[first[-1]]))]:
        assert np.allclose(found.values[:, j, c], slope(view, query, case.at, given, j, c), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("kind, optimizer", CROSSINGS[:6])
def test_windows_by_themselves(kind, optimizer):
    case = labelled_case(kind, optimizer)
    (run, _), query, y = case.record(), class_query(case), labels(case)
    at = sorted({2, run.steps})
    windows = label_influence(run, query, at=at, removal="window", since=1, classes=CLASSES, progress=False)
    assert windows.windows() == list(zip([1, *at], at)) and np.isfinite(windows.values).all()
    inside = influence(run, query, at=[1, *at], removal="window", progress=False)
    view, given = LabelledRun(run, CLASSES), F.one_hot(y, CLASSES).double()
    for t1, t2 in windows.windows():
        v, scale = windows.window(t1, t2), np.abs(windows.values).max()
        meet = sorted({j for b in case.batches[t1:t2] for j in b.tolist()})
        assert np.allclose(v[meet, y[meet]], inside.window(t1, t2)[meet], rtol=1e-7, atol=1e-12 * scale)
        assert not np.delete(v, meet, 0).any() and np.isnan(np.delete(windows.losses[at.index(t2)], meet, 0)).all()
        j, c = meet[0], (int(y[meet[0]]) + 1) % CLASSES
        assert np.allclose(v[j, c], slope(view, query, [t2], given, j, c, t1), rtol=1e-5, atol=1e-6 * scale)
        moved = windows.relabelling(t1, t2)
        used = np.flatnonzero(windows.given >= 0)
        assert not moved[used, windows.given[used]].any() and np.allclose(moved[j, c], v[j, y[j]] - v[j, c])


@pytest.mark.parametrize("kind, optimizer", [CROSSINGS[1], CROSSINGS[4], CROSSINGS[6]])
def test_states_that_are_not_stored(kind, optimizer):
    "A run of which every third state is on disk answers as one with all of them."
    (full, _), (thin, _) = labelled_case(kind, optimizer).record(), (case := labelled_case(kind, optimizer, every=3)).record()
    a, b = (label_influence(r, class_query(case), at=case.at, classes=CLASSES, progress=False) for r in (full, thin))
    assert np.allclose(a.values, b.values, rtol=1e-9, atol=1e-14) and np.array_equal(a.losses, b.losses, equal_nan=True)


def test_several_queries_are_one_by_one():
    case = labelled_case(*CROSSINGS[4])
    (run, _), y = case.record(), labels(case)
    queries = [class_query(case), lambda m: m(case.samples(3, 7, torch.float64)[0]).square().sum()]
    together = label_influence(run, queries, at=case.at, classes=CLASSES, progress=False)
    for q, found in zip(queries, together): assert np.allclose(found.values, label_influence(run, q, at=case.at, classes=CLASSES, progress=False).values, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind, optimizer", [CROSSINGS[i] for i in (1, 2, 4, 6, 8)])
def test_another_label_is_another_data_set(kind, optimizer):
    "Weights that pick other labels give the plain training on the relabelled data."
    case = replace(labelled_case(kind, optimizer), form="tensors")
    (run, _), y = case.record(), labels(case)
    new = torch.where(torch.arange(case.n) % 3 == 0, (y + 1) % CLASSES, y)
    *_, (_, state) = LabelledRun(run, CLASSES).replay(weights=F.one_hot(new, CLASSES).double())
    model, optim_ = case.start()
    for t in range(len(case.sizes)): train_plainly(case, t, model, optim_, TensorDataset(case.data().tensors[0], new))
    other = tensors(model, optim_)
    assert all(torch.allclose(v, other[k], rtol=1e-9, atol=1e-11) for k, v in {**state.params, **state.buffers}.items())


def test_dropout_and_statistics_count_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.5), nn.Linear(6, 3))
    other, batch = copy.deepcopy(net), (torch.randn(8, 4), torch.arange(8) % 3)
    with torch.random.fork_rng(): every = label_losses(loss_fn, net, batch, 3)
    with torch.random.fork_rng(): plain = loss_fn(other, batch)
    assert torch.equal(every[torch.arange(8), batch[1]], plain) and torch.equal(net[1].running_mean, other[1].running_mean)
    assert int(net[1].num_batches_tracked) == 1


@pytest.mark.parametrize("batch", [(torch.zeros(2, 3), torch.tensor([1, 0])), [torch.zeros(2, 3), torch.tensor([1, 0])], {"x": torch.zeros(2, 3), "label": torch.tensor([1, 0])},
                                   {"input_ids": torch.zeros(2, 3), "labels": torch.tensor([1, 0])}])
def test_forms_of_batches(batch):
    new = with_labels(batch, torch.tensor([2, 2]))
    assert labels_of(batch).tolist() == [1, 0] and labels_of(new).tolist() == [2, 2] and type(new) is type(batch)


# --- whose model it is ---------------------------------------------------------------------------------------------

class Asks:
    "A query that fails when it is asked for the `last` time."
    def __init__(self, last): self.left = last
    def __call__(self, m):
        self.left -= 1
        if self.left < 0: raise ArithmeticError("no answer")
        return m(torch.ones(2, 4, dtype=torch.float64)).sum()


@pytest.mark.parametrize("last", [100, 0, 1])
def test_the_callers_model_is_left_alone(last):
    case = labelled_case("batch norm and dropout", "SGD")
    run, _ = case.record()
    model = run.model
    for i, (k, p) in enumerate(model.named_parameters()): p.grad = torch.full_like(p, i) if i % 2 else None
    list(model.modules())[2].eval()
    def snapshot(): return ([m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}, [None if p.grad is None else p.grad.clone() for p in model.parameters()],
                            [p.requires_grad for p in model.parameters()], torch.get_rng_state(), np.random.get_state()[1].copy())
    before = snapshot()
    try: label_influence(run, Asks(last), at=case.at, classes=CLASSES, progress=False)
    except ArithmeticError: assert last < 100
    else: assert last == 100
    for a, b in zip(before, snapshot()):
        if isinstance(a, dict): assert all(torch.equal(v, b[k]) for k, v in a.items())
        elif isinstance(a, list): assert all((u is v) or (u == v if isinstance(u, bool) else torch.equal(u, v)) for u, v in zip(a, b))
        else: assert np.array_equal(a, b)


# --- finding -------------------------------------------------------------------------------------------------------

def recorded(data, model, path, epochs=5, size=25, lr=.2, among=None, marks=True, optimizer=torch.optim.SGD, seed=0):
    "A run, on the samples `among` only."
    torch.manual_seed(seed)
    with Recorder(model, optimizer(model.parameters(), lr=lr), loss_fn, data, path=path, seed=seed) as rec:
        order = np.random.default_rng(seed)
        for epoch in range(epochs):
            if among is None and marks:
                for idx in rec.batches(size): rec.step(idx)
            else:
                for idx in np.array_split(order.permutation(len(data) if among is None else among), -(-len(data) // size)): rec.step(idx)
                if marks: rec.mark(f"epoch {epoch + 1}")
    return rec.finish()


TRAIN, HELD = digits(torch.float64)
DATA, RECORD = corrupt_labels(TRAIN.subset(range(200)), .1, seed=1)
VAL, TEST = HELD.subset(range(0, 120)), HELD.subset(range(120, 320))


def network(seed=0, out=10, inputs=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, out)).double()


@pytest.fixture(scope="module")
def run(tmp_path_factory): return recorded(DATA, network(), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def found(run): return find_corrupted(run, VAL[:], progress=False)


def same(a, b, columns=("sample", "given", "suggested", "flagged")):
    for c in columns: assert a[c].tolist() == b[c].tolist(), c
    for c in ("score", "by_loss", "by_influence"): assert np.allclose(a[c], b[c], rtol=1e-6, atol=1e-9, equal_nan=True), c


def test_the_frame(run, found):
    assert sorted(found["sample"]) == list(range(200)) and (found["given"] == DATA.y.numpy()[found["sample"]]).all()
    assert found["score"].is_monotonic_decreasing and found["score"].between(0, 1).all() and found["suggested"].between(0, 9).all()
    assert (found["suggested"] != found["given"])[found["flagged"]].all() and abs(found["flagged"].sum() - found.attrs["share"] * 200) <= 20
    assert found["hurts"][:10].map(lambda h: len(set(h)) == 3 and max(h) < len(VAL)).all() and found["hurts"][10:].isna().all()
    assert detection(found, RECORD)["roc_auc"] > .9


def test_the_same_twice(run, found):
    torch.manual_seed(5)
    again = find_corrupted(run, VAL[:], progress=False)
    pd.testing.assert_frame_equal(again, found)
    assert again.attrs == found.attrs
    assert find_corrupted(run, VAL[:], evidence=0, progress=False)["hurts"].isna().all()


def test_classes_have_no_order(run, found, tmp_path):
    perm = np.random.default_rng(0).permutation(10)
    model = network()
    with torch.no_grad():
        for p in model[2].parameters(): p[torch.from_numpy(perm)] = p.clone()
    def named(samples): return TensorDataset(samples.x, torch.from_numpy(perm)[samples.y])
    other = find_corrupted(recorded(named(DATA), model, tmp_path / "run"), named(VAL)[:], progress=False)
    back = np.argsort(perm)
    same(other.assign(given=back[other["given"]], suggested=back[other["suggested"]]), found)
    assert other.attrs["window"] == found.attrs["window"] and other["hurts"][:10].tolist() == found["hurts"][:10].tolist()


def test_validation_samples_have_no_order(run, found):
    shuffled = VAL.subset(np.random.default_rng(0).permutation(len(VAL)))
    same(find_corrupted(run, shuffled[:], evidence=0, progress=False), found)


def test_never_used(tmp_path):
    never = np.arange(0, 200, 7)
    run_ = recorded(DATA, network(), tmp_path / "run", among=np.setdiff1d(np.arange(200), never))
    frame = find_corrupted(run_, VAL[:], evidence=3, progress=False)
    assert sorted(frame["sample"][-len(never):]) == never.tolist() and not frame["flagged"][-len(never):].any()
    assert frame["score"][-len(never):].isna().all() and frame["score"][:-len(never)].notna().all() and (frame["given"] == frame["suggested"])[-len(never):].all()
    assert np.isfinite(detection(frame, RECORD)["roc_auc"])


def test_a_class_that_validation_lacks(run, found):
    some = VAL.subset(np.flatnonzero(VAL.y != 3))
    frame = find_corrupted(run, some[:], evidence=0, progress=False)
    assert np.isfinite(frame["score"]).all() and detection(frame, RECORD)["roc_auc"] > detection(found, RECORD)["roc_auc"] - .05


def test_without_marks(tmp_path):
    run_ = recorded(DATA, network(), tmp_path / "run", marks=False, epochs=12)
    assert not run_.marks
    frame = find_corrupted(run_, VAL[:], evidence=0, progress=False)
    assert set(frame.attrs["window"]) <= set(range(0, run_.steps + 1, 8)) and detection(frame, RECORD)["roc_auc"] > .9


def test_two_classes(tmp_path):
    data, val = breast_cancer(torch.float64)
    data, record = corrupt_labels(data.subset(range(200)), .1, seed=0)
    torch.manual_seed(0)
    frame = find_corrupted(recorded(data, nn.Linear(data.x.shape[1], 2).double(), tmp_path / "run", lr=.1), val[:], progress=False)
    assert (frame["suggested"] != frame["given"])[frame["flagged"]].all() and detection(frame, record)["roc_auc"] > .9


def test_a_class_without_training_samples(run, found, tmp_path):
    "A network may know more classes than the data set has."
    frame = find_corrupted(recorded(TensorDataset(*DATA[:]), network(out=12), tmp_path / "run"), VAL[:], classes=12, evidence=0, progress=False)
    assert frame["suggested"].between(0, 11).all() and detection(frame, RECORD)["roc_auc"] > .9


def test_windows(run):
    windows = {w: find_corrupted(run, VAL[:], w, evidence=0, progress=False) for w in (*WINDOWS, "converging")}
    ends = [windows[w].attrs["window"] for w in ("early", "middle", "late")]
    assert ends[0][0] == 0 and ends[2][1] == run.steps and ends[0][1] == ends[1][0] and ends[1][1] == ends[2][0] and windows["full"].attrs["window"] == (0, run.steps)
    assert windows["converging"].attrs["window"] == converging(run, loss_query(loss_fn, VAL[:]))
    a, b = (find_corrupted(run, VAL[:], w, evidence=0, progress=False) for w in (("epoch 1", "epoch 3"), (run.marks["epoch 1"], run.marks["epoch 3"])))
    pd.testing.assert_frame_equal(a, b)
    assert a.attrs["name"] == "epoch 1 to epoch 3"


def test_evidence_is_the_retraining(run, found):
    t1, t2 = found.attrs["window"]
    singles = [loss_query(loss_fn, VAL[i:i + 1]) for i in range(6)]
    some = found["sample"][:4].tolist()
    exact = leave_one_out(run, singles, sorted(some), at=[t for t in (t1, t2) if t], removal="window", progress=False)
    change = harm(run, some, VAL[:], t1, t2)
    assert change.shape == (4, len(VAL))
    for i, e in enumerate(exact): assert np.allclose(change[:, i], e.window(t1, t2)[np.searchsorted(sorted(some), some)], rtol=1e-8, atol=1e-12)
    assert np.allclose(harm(run, some, VAL[:], t1, t2, memory=1), change, rtol=1e-8, atol=1e-12)
    ten = harm(run, found["sample"][:10].tolist(), VAL[:], t1, t2)
    assert victims(ten).tolist() == found["hurts"][:10].tolist()


def test_victims_are_not_those_that_every_sample_moves():
    change = np.zeros((5, 8))
    change[:, 0] = -10 - np.arange(5)                                    # on the border: all changes move it
    change[range(5), range(1, 6)] = -1.                                  # what one sample alone does
    assert victims(change, 1)[:4, 0].tolist() == [1, 2, 3, 4] and victims(change[:2], 1)[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("epochs", [1, 3, 20])
def test_parts_of_a_run_without_marks_use_all_samples(epochs, tmp_path):
    "A window that did not use a sample says nothing of it: shorter parts would leave most samples of a short run without a score."
    torch.manual_seed(0)
    model = network()
    rec = Recorder(model, torch.optim.SGD(model.parameters(), lr=.1), loss_fn, DATA, path=tmp_path / "run", seed=0)
    for epoch in range(epochs):
        for idx in torch.randperm(len(DATA)).split(20): rec.step(idx)
    run = rec.finish()
    parts = equal_parts(run)
    assert not run.marks and len(parts) == min(epochs, 10) and parts[-1] == run.steps and not any(t % 10 for t in parts)
    frame = find_corrupted(run, VAL[:], evidence=0, progress=False)
    assert frame["score"].notna().all() and detection(frame, RECORD)["roc_auc"] > (.6 if epochs == 1 else .85)


# --- mending -------------------------------------------------------------------------------------------------------

def test_remove_is_the_removal(run, found):
    c, q = cleanse(run, found, TEST[:], "remove"), loss_query(loss_fn, TEST[:])
    group = found.loc[found["flagged"], "sample"].tolist()
    exact = remove(run, q, [group], at=[run.steps], progress=False)
    assert np.isclose(c.table.loc["removed", "loss"] - c.table.loc["as trained", "loss"], exact.window()[0], rtol=1e-9) and sorted(c.samples) == sorted(group)
    assert np.isclose(c.table.loc["as trained", "loss"], exact.baseline[-1], rtol=1e-12)


class Normed(nn.Sequential):
    def __init__(self): super().__init__(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(.3), nn.Linear(12, 10))


@pytest.mark.parametrize("make", [network, lambda: torch.manual_seed(0) and Normed().double()])
@pytest.mark.parametrize("optimizer, lr", [(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=.9), .05), (torch.optim.AdamW, .01)])
def test_relabel_is_a_training_on_the_relabelled_data(make, optimizer, lr, tmp_path):
    kw = dict(optimizer=optimizer, lr=lr, epochs=2)
    run_ = recorded(DATA, make(), tmp_path / "run", **kw)
    known = pd.DataFrame({"sample": RECORD["sample"], "suggested": RECORD["true"], "flagged": True})
    c, other = cleanse(run_, known, TEST[:]), recorded(restore_labels(DATA, RECORD), make(), tmp_path / "other", **kw)
    end = other.state(other.steps)
    assert all(torch.allclose(v, {**end.params, **end.buffers}[k], rtol=1e-8, atol=1e-10) for k, v in {**c.state.params, **c.state.buffers}.items())
    assert np.isclose(c.table.loc["relabelled", "accuracy"], (other.model_at().eval()(TEST.x).argmax(1) == TEST.y).double().mean())
    with torch.no_grad(): assert torch.allclose(c.model()(TEST.x), other.model_at().eval()(TEST.x), atol=1e-8)


@pytest.mark.parametrize("how", ["relabel", "remove"])
def test_nothing_flagged_is_nothing_changed(run, found, how):
    c, end = cleanse(run, found.assign(flagged=False), TEST[:], how), run.state(run.steps)
    assert c.gain == 0 and len(c.samples) == 0 and all(torch.equal(v, end.params[k]) for k, v in c.state.params.items())


def test_a_person_decides(run, found):
    some = found[:5].assign(flagged=True)
    assert cleanse(run, some, TEST[:]).samples.tolist() == found["sample"][:5].tolist()
    shuffled = cleanse(run, found.sample(frac=1, random_state=0), TEST[:])
    assert np.isclose(shuffled.table, cleanse(run, found, TEST[:]).table, rtol=1e-9).all()


# --- shares and scores ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0, .05, .2, .4])
@pytest.mark.parametrize("classes", [2, 5])
def test_shares(share, classes):
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, .1), 8000)
    y = np.array([rng.choice(classes, p=q) for q in p])
    y = np.where(rng.random(8000) < share, (y + rng.integers(1, classes, 8000)) % classes, y)
    of_given = p[np.arange(8000), y]
    assert abs(share_of_wrong(of_given, classes) - share) < .03 and share_of_wrong(of_given, classes) == pytest.approx(share_of_wrong(rng.permutation(of_given), classes), abs=1e-4)
    assert 0 <= share_of_wrong(np.full(9, 1.), classes) < 1e-3 and share_of_wrong(np.zeros(9), classes) > 1 - 1 / classes - 1e-3
    assert share_of_wrong(np.full(9, 1 / classes), classes) < 1 - 1 / classes + 1e-9
    assert abs(sharpness_of(np.log(p) / 4, np.array([rng.choice(classes, p=q) for q in p])) - 4) < .5


def test_detection():
    frame = pd.DataFrame({"sample": [4, 1, 0, 3, 2], "suggested": [1, 1, 1, 0, 0], "score": [.9, .8, .5, .2, np.nan], "flagged": [True, True, False, False, False]})
    record = pd.DataFrame({"sample": [0, 4], "true": [1, 0], "given": [0, 1]})
    d = detection(frame, record)
    assert d["roc_auc"] == pytest.approx(5 / 6) and d["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert (d["accuracy"], d["precision"], d["recall"], d["flagged"], d["mended"]) == (.6, .5, .5, 2, .5)
    numbers = detection(frame, [0, 4])
    assert "mended" not in numbers and numbers.to_dict() == d.drop("mended").to_dict()
    best = detection(frame.assign(flagged=[True, False, True, False, False], score=[.9, .1, .8, .2, .3]), record)
    assert (best[["roc_auc", "average_precision", "accuracy", "precision", "recall"]] == 1).all()


# --- refused -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, error, words", [
    (lambda r, f: find_corrupted(r, VAL[:], "soon", progress=False), ValueError, "window must be"),
    (lambda r, f: find_corrupted(r, VAL[:], (1, 7), progress=False), ValueError, "boundary"),
    (lambda r, f: find_corrupted(r, VAL.subset(np.flatnonzero(VAL.y == 1))[:], progress=False), ValueError, "two classes"),
    (lambda r, f: find_corrupted(r, (VAL.x, VAL.y.double()), progress=False), TypeError, "labels"),
    (lambda r, f: label_influence(r, loss_query(loss_fn, VAL[:]), classes=4, progress=False), ValueError, "labels run from"),
    (lambda r, f: label_influence(r, loss_query(loss_fn, VAL[:]), since=3, progress=False), ValueError, "removal='window'"),
    (lambda r, f: label_influence(r, loss_query(loss_fn, VAL[:]), labels="target", progress=False), TypeError, "'target'"),
    (lambda r, f: cleanse(r, f, TEST[:], "forget"), ValueError, "how must be"),
    (lambda r, f: cleanse(r, f.drop(columns="suggested"), TEST[:]), ValueError, "suggested"),
])
def test_errors(run, found, call, error, words):
    modes = [m.training for m in run.model.modules()]
    with pytest.raises(error, match=words): call(run, found)
    assert [m.training for m in run.model.modules()] == modes


def test_tokens_are_refused():
    case = crossing("GPT", "SGD")
    run, _ = case.record()
    with pytest.raises(ValueError, match="per_token"): label_influence(run, lambda m: m(torch.zeros(1, 4, dtype=torch.long)).sum(), progress=False)
