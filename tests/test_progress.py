"""All long work shows how far it is, can be silenced, and can be stopped from elsewhere: then everything is as it was."""
import os
import random
import tempfile
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_nb import (Cancelled, Progress, Recorder, check_run, cleanse, corrupt_labels, diagnose, digits, ensemble, error_bound, error_proxy, find_corrupted, health, influence, label_influence, leave_one_out,
                    loss_query, refine, remove, repeatability, repetition, second_order, supervised, with_curvature)
from dit_nb.baselines import detectors, dvemb, forgetting, influence_function, mean_loss, out_of_fold, self_influence, tracin
from dit_nb.cleansing import harm
from dit_nb.progress import progress_bar
from dit_nb.repeats import metasmoothness, sharpness
from dit_nb.results import Windows
from dit_nb.trajectory import Run, open_run

loss_fn = supervised(F.cross_entropy)
TRAIN, VAL = digits(torch.float64)
DATA, RECORD = corrupt_labels(TRAIN.subset(range(60)), .1, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)).double()
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.2), loss_fn, DATA, path=tmp_path_factory.mktemp("runs") / "run", seed=0) as rec:
        for epoch in range(4):
            for idx in rec.batches(20): rec.step(idx)
    return rec.finish()


@pytest.fixture(scope="module")
def infl(run): return influence(run, QUERY, progress=False)


@pytest.fixture(scope="module")
def found(run): return find_corrupted(run, VAL[:], progress=False)


QUERY = loss_query(loss_fn, VAL[:40])
LONG = {
    "influence": lambda run, infl, found, **kw: influence(run, QUERY, **kw),
    "influence, in blocks": lambda run, infl, found, **kw: influence(run, [QUERY] * 2, memory=1, **kw),
    "influence, exact": lambda run, infl, found, **kw: influence(run, QUERY, method="exact", **kw),
    "leave_one_out": lambda run, infl, found, **kw: leave_one_out(run, QUERY, range(5), **kw),
    "leave_one_out, one by one": lambda run, infl, found, **kw: leave_one_out(run, QUERY, range(3), method="loop", **kw),
    "remove": lambda run, infl, found, **kw: remove(run, QUERY, [[1, 2], [3]], removal="window", **kw),
    "second_order": lambda run, infl, found, **kw: second_order(run, QUERY, range(3), **kw),
    "with_curvature": lambda run, infl, found, **kw: with_curvature(run, QUERY, **kw),
    "error_proxy": lambda run, infl, found, **kw: error_proxy(run, QUERY, **kw),
    "error_bound": lambda run, infl, found, **kw: error_bound(run, QUERY, **kw),
    "repetition": lambda run, infl, found, **kw: repetition(run, **kw),
    "repeatability": lambda run, infl, found, **kw: repeatability(run, QUERY, range(4), repeats=1, **kw),
    "ensemble": lambda run, infl, found, **kw: ensemble(run, QUERY, repeats=1, exact=range(3), **kw),
    "health": lambda run, infl, found, **kw: health(run, QUERY, **kw),
    "diagnose": lambda run, infl, found, **kw: diagnose(run, infl, budget=20, causes=True, **kw),
    "refine": lambda run, infl, found, **kw: refine(infl, budget=4, **kw),
    "label_influence": lambda run, infl, found, **kw: label_influence(run, QUERY, removal="window", **kw),
    "find_corrupted": lambda run, infl, found, **kw: find_corrupted(run, VAL[:], **kw),
    "harm": lambda run, infl, found, **kw: harm(run, [1, 2, 3], VAL[:], **kw),
    "cleanse": lambda run, infl, found, **kw: cleanse(run, found, VAL[:], **kw),
    "detectors": lambda run, infl, found, **kw: detectors(run, ["final loss", "mean loss", "forgetting"], **kw),
    "mean_loss": lambda run, infl, found, **kw: mean_loss(run, **kw),
    "forgetting": lambda run, infl, found, **kw: forgetting(run, **kw),
    "out_of_fold": lambda run, infl, found, **kw: out_of_fold(run, 3, **kw),
    "tracin": lambda run, infl, found, **kw: tracin(run, QUERY, **kw),
    "influence_function": lambda run, infl, found, **kw: influence_function(run, QUERY, [run.steps // 2, run.steps], **kw),
    "self_influence": lambda run, infl, found, **kw: self_influence(run, **kw),
    "dvemb": lambda run, infl, found, **kw: dvemb(run, QUERY, **kw),
    "sharpness": lambda run, infl, found, **kw: sharpness(run, 3, **kw),
    "metasmoothness": lambda run, infl, found, **kw: metasmoothness(run, **kw),
    "check_run": lambda run, infl, found, **kw: check_run(run.path, **kw),
    "verify": lambda run, infl, found, **kw: run.verify(None, **kw),
}


def numbers(x):
    "What an answer says, as one array"
    if isinstance(x, (list, tuple)): return np.concatenate([numbers(v) for v in x])
    if isinstance(x, pd.DataFrame): return x.select_dtypes("number").to_numpy(float).ravel()
    if isinstance(x, Windows): return x.values.ravel()
    if isinstance(x, Run): return np.concatenate([p.numpy().ravel() for p in x.state(x.steps).params.values()])
    return next((numbers(getattr(x, name)) for name in ("members", "table", "boundaries", "frame") if hasattr(x, name)), np.asarray(0. if hasattr(x, "__dict__") else x, float).ravel())


class Told(Progress):
    "Tells of every step, not ten times a second"
    def changed(self, bar, now=False): super().changed(bar, True)


def surroundings(run):
    "All that a call must leave as it was"
    model = run.model
    return ([v.clone() for v in model.state_dict().values()], [m.training for m in model.modules()], [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.is_grad_enabled(), sorted(os.listdir(tempfile.gettempdir()))])


def same(a, b):
    return (all(torch.equal(x, y) for x, y in zip(a[0], b[0])) and a[1] == b[1] and a[3] == b[3] and
            all(x is None and y is None or torch.equal(x, y) for x, y in zip(a[2], b[2])))


@pytest.mark.parametrize("name", LONG)
def test_stopped_work_leaves_all_as_it_was(name, run, infl, found, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ask = LONG[name]
    run.model.train()
    for p in run.model.parameters(): p.grad = torch.ones_like(p)
    before = surroundings(run)
    whole = numbers(ask(run, infl, found, progress=False))
    said = capfd.readouterr()
    assert said.out == said.err == "" and same(before, surroundings(run)), "silence"
    told = []
    p = Told(lambda p: told.append((p.name, p.done, p.total, p.text)))
    np.testing.assert_allclose(numbers(ask(run, infl, found, progress=p)), whole, rtol=1e-6, atol=1e-12)        # which pull-backs are batched is measured, and rounds
    said = capfd.readouterr()
    assert said.out == said.err == "" and told[-1][0] and told[-1][1] == told[-1][2] > 0, told
    assert not p._bars, "all bars are closed"
    ticks = 0 if name in ("repetition", "check_run") else random.Random(name).randrange(4)        # stopped at the first sign, or later where there are more
    def stop(p):
        nonlocal ticks
        ticks -= 1
        if ticks < 0: p.cancel()
    before = surroundings(run)
    with pytest.raises(Cancelled, match="was cancelled") as e:
        ask(run, infl, found, progress=Told(stop))
    assert "nothing was changed" in str(e.value) and same(before, surroundings(run))
    np.testing.assert_allclose(numbers(ask(run, infl, found, progress=False)), whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_leaves_all_as_it_was(name, run, infl, found, tmp_path, monkeypatch, capfd):
    "Wherever a long function looks whether it is to stop, Ctrl-C may come as well: at the first such place, and in the middle."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for p in run.model.parameters(): p.grad = torch.ones_like(p)
    looks = 0
    class Interrupted(Progress):
        at = None
        def check(self):
            nonlocal looks
            looks += 1
            if looks == self.at: raise KeyboardInterrupt
    LONG[name](run, infl, found, progress=Interrupted())
    before = surroundings(run)
    for at in sorted({1, 2, looks // 2, looks} - {0}):
        p, looks = Interrupted(), 0
        p.at = at
        with pytest.raises(KeyboardInterrupt): LONG[name](run, infl, found, progress=p)
        assert same(before, surroundings(run)) and not p._bars, f"interrupted at look {at}"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", LONG)
def test_another_thread_stops_everything(name, run, infl, found, tmp_path, monkeypatch):
    "The thread that works waits, as soon as it is told of, until the caller's has cancelled: so it can't have ended before."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen, pressed, ended = threading.Event(), threading.Event(), []
    p, before = Told(lambda p: (seen.set(), pressed.wait(60))), surroundings(run)
    def work():
        try: ended.append(LONG[name](run, infl, found, progress=p))
        except BaseException as e: ended.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    assert seen.wait(60)
    p.cancel()
    pressed.set()
    thread.join(60)
    assert not thread.is_alive() and isinstance(ended[0], Cancelled) and same(before, surroundings(run)) and not p._bars


def test_progress_where_bars_are_switched_off(run, monkeypatch):
    "TQDM_DISABLE is about the screen."
    monkeypatch.setenv("TQDM_DISABLE", "1")
    p = Progress()
    influence(run, QUERY, progress=p)
    assert p.done == p.total == run.steps and p.fraction == 1
    p.cancel()
    with pytest.raises(Cancelled): influence(run, QUERY, progress=p)


@pytest.mark.parametrize("when", [0, 2, 3])
def test_on_change_that_fails(when):
    "At the beginning, on the way, at the end: no bar is left behind, so the next work is told of as ever."
    def fails(p):
        if p.done == when: raise OSError("the page is closed")
    p = Told(fails)
    with pytest.raises(OSError): list(progress_bar(range(3), "first", p))
    p.on_change, again = None, []
    for _ in progress_bar(range(3), "second", p): again.append(p.name)
    assert again == ["second"] * 3 and not p._bars


def test_another_thread_stops_it(run):
    "As the explorer does: the work is in a thread, and the caller's presses Cancel."
    seen, ended = threading.Event(), []
    p = Progress(lambda p: seen.set())
    def work():
        try: leave_one_out(open_run(run.path, run.model, loss_fn, DATA), QUERY, method="loop", progress=p)
        except Cancelled as e: ended.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    assert seen.wait(60)
    p.cancel()
    thread.join(60)
    assert not thread.is_alive() and len(ended) == 1


@pytest.mark.parametrize("when", [0, 2, 12])
def test_an_error_of_who_is_told_ends_the_bar(run, when):
    "At the beginning, on the way or at the end: what comes next lies in no bar that is gone."
    told = []
    def fails(p):
        told.append(p.done)
        if p.done >= when: raise KeyError("mine")
    p = Told(fails)
    with pytest.raises(KeyError, match="mine"): second_order(run, QUERY, range(2), progress=p)
    assert told and not p._bars


def test_a_checkpoint_is_kept(run, tmp_path, monkeypatch):
    "Cancelled work goes on from where its checkpoint says."
    monkeypatch.setattr("dit_nb.estimator.CHECKPOINT_SECONDS", 0.)
    def stop(p):
        if p.done >= 6: p.cancel()
    with pytest.raises(Cancelled): influence(run, QUERY, checkpoint=tmp_path / "kept.safetensors", progress=Told(stop))
    assert (tmp_path / "kept.safetensors").exists()
    np.testing.assert_allclose(influence(run, QUERY, checkpoint=tmp_path / "kept.safetensors", progress=False).values, influence(run, QUERY, progress=False).values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("silenced", [True, False])
def test_bars_on_the_screen(run, silenced, monkeypatch, capfd):
    "A bar with the remaining time, unless the environment says no."
    import dit_nb.progress
    monkeypatch.setenv("TQDM_DISABLE", "1" if silenced else "0")
    bar = dit_nb.progress.tqdm
    monkeypatch.setattr(dit_nb.progress, "tqdm", lambda *a, **kw: bar(*a, **{**kw, "delay": 0, "mininterval": 0}))
    influence(run, QUERY, progress=True)
    said = capfd.readouterr().err
    assert (said == "") == silenced and (silenced or "sweep" in said and "<" in said)
