"""Every label's influence against differences of whole trainings; the order's symmetries; mending against plain training."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_nb import (Recorder, Samples, cleanse, corrupt_labels, detection, digits, find_corrupted, influence, label_influence, leave_one_out,
                    loss_query, remove, supervised)
from dit_nb.cleansing import converging, harm, share_of_wrong
from dit_nb.labels import LabelledRun
from dit_nb.models import cnn, mlp, resnet

loss_fn = supervised(F.cross_entropy)
TRAIN, HELD = digits(dtype=torch.float64, flat=False)
VAL, TEST = HELD.subset(range(100)), HELD.subset(range(100, 220))
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW

MODELS = {"dense": lambda: mlp(64, 12, act=nn.Tanh), "convolutions": lambda: cnn((1, 8, 8), width=2),
          "batch norm": lambda: resnet((1, 8, 8), widths=(4, 6), act=nn.GELU),
          "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Dropout(.3), nn.Linear(12, 10))}
OPTIMIZERS = {"SGD": lambda p: SGD(p, lr=.1), "momentum": lambda p: SGD(p, lr=.05, momentum=.9, weight_decay=1e-3), "AdamW": lambda p: AdamW(p, lr=3e-3, eps=1e-4)}


def recorded(data, model="dense", optimizer="SGD", epochs=3, batch=20, used=None, path=None, seed=0, micro=None, marks=True):
    "A run in float64 on the samples `used` of the data (default: all)"
    torch.manual_seed(seed)
    net = MODELS[model]().double() if isinstance(model, str) else model.double()
    rec = Recorder(net, OPTIMIZERS[optimizer](net.parameters()), loss_fn, data, seed=seed, **({"path": path} if path else {}))
    pool, order = torch.arange(len(data)) if used is None else torch.as_tensor(used), torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for idx in pool[torch.randperm(len(pool), generator=order)].split(batch): rec.step(idx, micro=micro)
        if marks: rec.mark(f"epoch {epoch + 1}")
    return rec.finish()


def some(n=60, share=.2, seed=0): return corrupt_labels(TRAIN.subset(range(n)), share, seed=seed)


@pytest.mark.parametrize("model, optimizer, micro", [("dense", "momentum", None), ("dense", "AdamW", 7), ("convolutions", "SGD", None),
                                                     ("batch norm", "momentum", None), ("batch norm", "SGD", 10), ("dropout", "AdamW", None)])
def test_every_label_is_a_derivative_of_the_training(model, optimizer, micro):
    data, _ = some(40)
    run, query = recorded(data, model, optimizer, epochs=2, micro=micro), loss_query(loss_fn, VAL[:])
    found, view, h = label_influence(run, query, progress=False), LabelledRun(run, 10), 1e-4
    def after(j, c, move):
        w = F.one_hot(data.y, 10).double()
        w[j, c] += move
        *_, (_, state) = view.replay(weights=w)
        net = run.model_at(0)
        tensors = dict(net.named_parameters()) | dict(net.named_buffers())
        with torch.no_grad():
            for k, v in {**state.buffers, **state.params}.items(): tensors[k].copy_(v)
            return float(query(net))
    for j, c in [(3, int(data.y[3])), (3, (int(data.y[3]) + 1) % 10), (17, 0)]:
        difference = -(after(j, c, h) - after(j, c, -h)) / 2 / h
        assert found.window()[j, c] == pytest.approx(difference, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("removal", ["always", "window"])
@pytest.mark.parametrize("model", MODELS)
def test_the_given_label_is_the_sample(model, removal):
    data, _ = some()
    run, queries = recorded(data, model), [loss_query(loss_fn, VAL[:]), loss_query(loss_fn, TEST[:], "other")]
    found, plain = label_influence(run, queries, removal=removal, progress=False), influence(run, queries, removal=removal, progress=False)
    for f, p in zip(found, plain):
        for t1, t2 in f.windows():
            np.testing.assert_allclose(f.window(t1, t2)[np.arange(60), data.y], p.window(t1, t2), rtol=1e-8, atol=1e-13)
            assert (f.relabelling(t1, t2)[np.arange(60), data.y] == 0).all()


def test_windows_do_not_depend_on_which_others_are_asked():
    run, query = recorded(some()[0]), loss_query(loss_fn, VAL[:])
    whole = label_influence(run, query, removal="window", progress=False)
    late = label_influence(run, query, ["epoch 3"], "window", since="epoch 2", progress=False)
    assert np.array_equal(late.window("epoch 2", "epoch 3"), whole.window("epoch 2", "epoch 3"))
    with pytest.raises(ValueError, match="neighbouring"): late.window(0, "epoch 3")


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_of_the_callers_is_changed(broken):
    data, _ = some()
    run = recorded(data, "batch norm")
    run.model[1].eval()
    for p in run.model.parameters(): p.grad = torch.ones_like(p)
    before = [v.clone() for v in run.model.state_dict().values()], [m.training for m in run.model.modules()], torch.get_rng_state()
    if broken:
        with pytest.raises(ValueError): find_corrupted(run, VAL[:], classes=3, progress=False)
    else: cleanse(run, find_corrupted(run, VAL[:], progress=False), TEST[:])
    assert all(torch.equal(a, b) for a, b in zip(before[0], run.model.state_dict().values()))
    assert before[1] == [m.training for m in run.model.modules()] and torch.equal(before[2], torch.get_rng_state())
    assert all((p.grad == 1).all() for p in run.model.parameters())


def test_the_answer_does_not_depend_on_how_classes_are_numbered():
    data, _ = some(100)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    def renamed(s): return Samples(s.x, order[s.y])
    one = MODELS["dense"]().double()
    other = MODELS["dense"]().double()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():                                      # the output that was c's is order[c]'s
        other[-1].weight[order], other[-1].bias[order] = one[-1].weight.clone(), one[-1].bias.clone()
    a = find_corrupted(recorded(data, one, epochs=5), VAL[:], progress=False)
    b = find_corrupted(recorded(renamed(data), other, epochs=5), renamed(VAL)[:], progress=False)
    assert a["sample"].tolist() == b["sample"].tolist() and a["hurts"][0] == b["hurts"][0]
    np.testing.assert_allclose(a["score"], b["score"], rtol=1e-8)
    assert order[torch.tensor(a["suggested"])].tolist() == b["suggested"].tolist() and a.attrs["window"] == b.attrs["window"]


def test_samples_that_were_never_used_come_last_and_are_not_flagged():
    data, _ = some(80, .3)
    used = np.setdiff1d(np.arange(80), [5, 60, 61])
    found = find_corrupted(recorded(data, used=used, epochs=5), VAL[:], progress=False)
    assert sorted(found["sample"][-3:]) == [5, 60, 61] and not found["flagged"][-3:].any() and found["score"][:-3].notna().all()
    assert len(found) == 80 and (found["given"][-3:] == -1).all()


def test_unusual_questions():
    data, _ = some(80)
    run = recorded(data, epochs=4)
    few = VAL.subset((VAL.y != 3).nonzero()[:, 0])
    assert find_corrupted(run, few[:], progress=False)["score"].notna().all()                      # no validation samples of a class
    unmarked = find_corrupted(recorded(data, epochs=4, marks=False), VAL[:], progress=False)
    assert unmarked["score"].notna().all() and unmarked.attrs["window"][1] <= 16
    again = find_corrupted(run, VAL[:], progress=False)
    pd.testing.assert_frame_equal(again, find_corrupted(run, VAL[:], progress=False))
    assert find_corrupted(run, VAL[:], window=("epoch 1", "epoch 3"), progress=False).attrs["window"] == (4, 12)
    assert find_corrupted(run, VAL[:], evidence=0, progress=False)["hurts"].isna().all()


def test_two_classes():
    keep = (TRAIN.y < 2).nonzero()[:, 0]
    two = Samples(TRAIN.x[keep], TRAIN.y[keep])
    bad, record = corrupt_labels(two, .1, seed=0)
    run = recorded(bad, mlp(64, 16, classes=2), epochs=8)
    seen = VAL.subset((VAL.y < 2).nonzero()[:, 0])
    found = find_corrupted(run, seen[:], progress=False)
    assert detection(found, record)["accuracy"] > .97 and detection(found, record)["mended"] > .9


@pytest.mark.parametrize("model, optimizer", [("dense", "AdamW"), ("batch norm", "momentum")])
def test_mending_is_training(model, optimizer):
    data, _ = some(80, .3)
    run = recorded(data, model, optimizer)
    bad = pd.DataFrame({"sample": [1, 4, 33], "suggested": [7, 2, 0], "flagged": True})
    query = loss_query(loss_fn, TEST[:])
    out = cleanse(run, bad, TEST[:], "remove")
    exact = remove(run, query, [[1, 4, 33]], progress=False)
    assert out.table["loss"].diff().iloc[1] == pytest.approx(exact.values[-1, 0], rel=1e-6, abs=1e-10)
    y = data.y.clone()
    y[[1, 4, 33]] = torch.tensor([7, 2, 0])
    renamed, put_right = recorded(Samples(data.x, y), model, optimizer), cleanse(run, bad, TEST[:])
    for k, v in renamed.state(renamed.steps).params.items(): torch.testing.assert_close(put_right.state.params[k], v, rtol=1e-6, atol=1e-8)
    assert float(loss_fn(put_right.model(), TEST[:]).detach().mean()) == pytest.approx(put_right.table["loss"].iloc[1])


def test_whom_a_sample_hurts_is_exact():
    data, _ = some()
    run = recorded(data)
    found = harm(run, [2, 9], VAL[:6], 3, 9)
    single = [loss_query(loss_fn, VAL[i:i + 1], f"{i}") for i in range(6)]
    true = leave_one_out(run, single, [2, 9], at=[3, 9], removal="window", progress=False)
    np.testing.assert_allclose(found, np.stack([t.window(3, 9) for t in true], 1), rtol=1e-6, atol=1e-10)


def test_convergence_ends_where_the_loss_rises_again():
    run = recorded(some()[0], epochs=6)
    marks = list(run.marks.values())
    course = dict(zip([0, *marks], [2., 1., .55, .5, .52, .9, 1.4]))
    names = {k: v for k, v in zip([0, *marks], range(7))}
    values = {tuple(run.state(t).params["1.bias"].tolist()): course[t] for t in names}
    def query(model): return sum(p.sum() for p in model.parameters()) * 0 + values[tuple(model[1].bias.tolist())]
    assert converging(run, query) == (marks[0], marks[3])


def test_shares_and_figures():
    assert share_of_wrong(np.full(100, .99), 10) < .01 and share_of_wrong(np.r_[np.full(70, .999), np.full(30, .001)], 10) == pytest.approx(.3, abs=.01)
    frame = pd.DataFrame({"sample": [3, 0, 2, 1], "score": [.9, .8, .2, np.nan], "flagged": [True, True, False, False], "suggested": [5, 6, 7, 8]})
    figures = detection(frame, [3])
    assert figures["roc_auc"] == 1 and figures["accuracy"] == .75 and figures["precision"] == .5 and figures["recall"] == 1 and figures["flagged"] == 2
    assert detection(frame, pd.DataFrame({"sample": [3, 0], "true": [5, 1]}))["mended"] == .5
