"""Repetitions of every kind of training: bit by bit without a change, sound with one, and nothing of the caller's is touched or left behind."""
import gc
import os
import random
import tempfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cases import DRAWING, KINDS, LENGTH, OPTIMIZERS, crossing
from dit_nb import Recorder, compare, ensemble, health, influence, leave_one_out, loss_query, open_run, repeatability, repetition, supervised
from dit_nb.distributed import torchrun
from dit_nb.repeats import metasmoothness, order_is_free, sharpness

cross_entropy = supervised(F.cross_entropy)
PAIRS = [(kind, list(OPTIMIZERS)[i % len(OPTIMIZERS)]) for i, kind in enumerate(KINDS)] + [("two hidden layers", o) for o in OPTIMIZERS]


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    "Temporary files of a test lie in a folder of its own, which tells what is left."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@contextmanager
def as_it_was(model):
    "The block leaves the model, its modes and gradients, the random states and the temporary folder as they were."
    for m in list(model.modules())[::2]: m.eval()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 7.) if first.requires_grad else None
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    def now(): return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], [None if p.grad is None else p.grad.clone() for p in model.parameters()],
                       [vars(m).get("forward") for m in model.modules()], random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), folders())
    before = now()
    yield
    after = now()
    assert before[0].keys() == after[0].keys() and all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1] == after[1] and before[3:] == after[3:]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before[2], after[2]))


def folders():
    gc.collect()
    return sorted(os.listdir(tempfile.gettempdir()))


def all_of(s): return {**s.params, **s.buffers, **s.slots}


@pytest.mark.parametrize("kind, optimizer", PAIRS)
def test_repetitions(kind, optimizer):
    run, states = crossing(kind, optimizer).record()
    with as_it_was(run.model):
        same = repetition(run, scale=0)
        assert same.trajectory.states() == run.trajectory.states() and same.marks == run.marks and same.steps == run.steps
        for t in range(run.steps + 1):
            now = all_of(same.state(t))
            assert all(v.data_ptr() % 64 == 0 for v in now.values() if v.numel())       # elsewhere a matrix product may round differently
            assert all(torch.equal(v, now[k]) for k, v in all_of(run.state(t)).items())
            assert all(torch.equal(v, states[t][k]) for k, v in same.state(t).params.items())
        for t in range(run.steps):
            assert same.trajectory.losses(t).tobytes() == run.trajectory.losses(t).tobytes() and same.trajectory.settings(t) == run.trajectory.settings(t)
            for a, b in zip(run.trajectory.parts(t), same.trajectory.parts(t), strict=True): assert torch.equal(a.idx, b.idx) and a.divisor == b.divisor and a.random == b.random
        moved, rounded = repetition(run), repetition(run, rounding=True)
        for other in (moved, rounded): assert other.verify(None) < 1e-6 and other.trajectory.check()
        assert any(not torch.equal(v, moved.state(0).params[k]) for k, v in run.state(0).params.items())
        drift = max(float((v - rounded.state(run.steps).params[k]).abs().max()) for k, v in run.state(run.steps).params.items())
        assert drift < 1e-6 and ("order" in rounded.meta["repetition"]["how"]) == order_is_free(run) and not (order_is_free(run) and kind in DRAWING)
        del same, moved, rounded, other


@pytest.mark.filterwarnings("ignore:exact removal runs one")
@pytest.mark.parametrize("kind, optimizer", PAIRS)
def test_answers(kind, optimizer):
    "What is asked of several runs is what each of them answers; the symptoms are there; nothing stays."
    case = crossing(kind, optimizer, seed=1)
    run, _ = case.record()
    q, some = case.queries()[0], case.some(3)
    with as_it_was(run.model):
        ens = ensemble(run, q, repeats=2, at=case.at, exact=some, progress=False, per_token=bool(case.length))
        assert ens.mean.values.shape == (len(case.at), case.n, *[LENGTH] * bool(case.length)) and "mean of 3 runs" in repr(ens)
        again = repetition(run, seed=1)
        np.testing.assert_allclose(ens.members[2].values, influence(again, q, at=case.at, per_token=bool(case.length), progress=False).values, rtol=1e-6, atol=1e-12)
        truth = leave_one_out(again, q, some, at=case.at, progress=False)
        np.testing.assert_allclose(ens.exact.members[2].values, truth.values, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(ens.exact.mean.window(), np.mean([m.window() for m in ens.exact.members], 0), atol=1e-12)
        compare(ens.mean, ens.exact.mean)
        h = health(run, q, at=case.at, k=1, removals=2, steps=2, progress=False)
        assert h.frame["growth"].ge(1 - 1e-9).all() and h.frame[["growth", "metasmoothness", "noise"]].notna().all(axis=None) and h.frame["metasmoothness"].abs().le(1 + 1e-9).all()
        assert h.frame["edge"].notna().all() == (OPTIMIZERS[optimizer][0].__name__ in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")) and h.sharpness["sharpness"].notna().all()
        del again, truth


def small_run(act=nn.Tanh(), steps=6, **kw):
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 3)).double()
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.3), cross_entropy, data, **kw) as rec:
        for t in range(steps): rec.step(torch.arange(4 * t, 4 * t + 8) % 20)
    return rec.finish(), data


def test_watched_runs_without_losses():
    _, data = small_run()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt = torch.optim.SGD(model.parameters(), lr=.3, momentum=.9)
        rec = Recorder(model, opt, cross_entropy, data)
        for epoch in range(2):
            for i, (x, y) in enumerate(rec.watch(DataLoader(data, batch_size=5, shuffle=True), accumulate=2)):
                (F.cross_entropy(model(x), y) / 2).backward()              # two micro-batches a step
                if i % 2: opt.step(), opt.zero_grad()
    run = rec.finish()
    assert run.trajectory.losses(0) is None and len(run.trajectory.parts(0)) == 2
    with as_it_was(run.model):
        same, moved = repetition(run, scale=0), repetition(run, rounding=True)
        assert all(torch.equal(v, same.state(t).params[k]) for t in range(run.steps + 1) for k, v in run.state(t).params.items())
        assert moved.verify(None) < 1e-6 and same.trajectory.losses(0) is not None and same.marks == run.marks
        del same, moved


@pytest.mark.parametrize("every", [1, 4, "sqrt", "all"])
def test_states_are_those_that_the_run_stores(every, tmp_path):
    run, data = small_run(steps=30, every=every)
    kept = repetition(run, tmp_path / "kept", seed=3)
    opened = open_run(tmp_path / "kept", run.model, cross_entropy, data)
    assert opened.trajectory.states() == run.trajectory.states() and opened.trajectory.finished and opened.meta["every"] == run.meta["every"]
    assert opened.meta["repetition"]["seed"] == 3 and all(torch.equal(v, opened.state(17).params[k]) for k, v in kept.state(17).params.items())
    assert all(torch.equal(v, repetition(opened, scale=0).state(30).params[k]) for k, v in kept.state(30).params.items())


def test_more_steps_than_memory_holds():
    run, _ = small_run(steps=200, every="sqrt")
    run.memory = 3 * run.state_bytes
    same = repetition(run, scale=0)
    assert all(torch.equal(v, same.state(200).params[k]) for k, v in run.state(200).params.items())


class Broken(Exception): pass


@pytest.mark.parametrize("path", [None, "new", "there"])
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_failure(path, error, tmp_path, monkeypatch):
    run, _ = small_run()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("stays")
    def fail(*_, **__): raise error(28, "No space left on device")
    if error is OSError: monkeypatch.setattr("dit_nb.store.save_tensors", fail)
    with as_it_was(run.model), pytest.raises(error, match="nothing of it is left" if error is OSError else None) as e:
        repetition(run, path and tmp_path / path, tick=fail)
    del e
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")) == ["there", "there/mine.txt"]


def test_an_error_of_the_data_set_is_its_own():
    run, _ = small_run()
    class Unreadable(torch.utils.data.Dataset):
        def __len__(self): return 20
        def __getitem__(self, i): raise FileNotFoundError(2, "picture 17 is missing")
    broken = type(run)(run.trajectory, run.model, run.loss_fn, Unreadable())
    with as_it_was(run.model), pytest.raises(FileNotFoundError, match="picture 17") as e: repetition(broken)
    assert "nothing of it" not in str(e.value)
    del e


def test_a_run_in_the_way_stays(tmp_path):
    run, data = small_run(path=tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run/run.sqlite"):
        with pytest.raises(FileExistsError): repetition(run, path)
    rec = Recorder(run.model, torch.optim.SGD(run.model.parameters(), lr=.1), cross_entropy, data, tmp_path / "live")
    rec.step([0])
    with pytest.raises((RuntimeError, FileExistsError)): repetition(run, tmp_path / "live")
    rec.step([1])
    assert rec.finish().verify() == 0 and open_run(tmp_path / "run", run.model, cross_entropy, data).verify() == 0


@pytest.mark.parametrize("ask", [lambda run, q: ensemble(run, q, repeats=3), lambda run, q: ensemble(run, q, repeats=2, exact=[0]), lambda run, q: repeatability(run, q, [0]), lambda run, q: health(run, q)])
@pytest.mark.parametrize("after", [1, 12, 40])
def test_an_interruption_leaves_nothing(ask, after):
    run, data = small_run(nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(.1), nn.ReLU()).double(), steps=9)
    calls = 0
    def interrupted(model):
        nonlocal calls
        calls += 1
        if calls > after: raise KeyboardInterrupt
        return cross_entropy(model, data[:]).mean()
    with as_it_was(run.model):
        try: ask(run, interrupted)
        except KeyboardInterrupt: pass
        else: assert calls <= after


def test_seeds_and_scales():
    run, _ = small_run()
    a, b, c = (repetition(run, seed=s) for s in (0, 0, 1))
    w, = [k for k in run.meta["params"] if k == "0.weight"]
    assert torch.equal(a.state(6).params[w], b.state(6).params[w]) and not torch.equal(a.state(0).params[w], c.state(0).params[w])
    far = repetition(run, scale=1.)
    ratio = (far.state(0).params[w] - run.state(0).params[w]).norm() / (a.state(0).params[w] - run.state(0).params[w]).norm()
    assert abs(ratio - 100) < 1e-6
    for bad in (-1, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match="scale"): repetition(run, scale=bad)


def test_places_in_the_batch():
    "Where a loss depends on a sample's place in its batch, samples don't change places."
    def by_place(model, batch): return cross_entropy(model, batch) * torch.linspace(.5, 1.5, len(batch[1]), dtype=torch.float64)
    run, data = small_run()
    assert order_is_free(run) and "order" in repetition(run, rounding=True).meta["repetition"]["how"]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.3), by_place, data) as rec:
        for t in range(4): rec.step(torch.arange(4 * t, 4 * t + 4))
    assert not order_is_free(rec.finish()) and "one rounding" in repetition(rec.finish(), rounding=True).meta["repetition"]["how"]


def test_an_ensemble_is_what_its_members_are():
    run, data = small_run()
    q = loss_query(cross_entropy, data[:])
    ens = ensemble(run, q, repeats=4, scale=1e-3, progress=False)
    values = np.array([influence(r, q, progress=False).window() for r in (run, *(repetition(run, scale=1e-3, seed=s) for s in range(4)))])
    np.testing.assert_allclose(ens.mean.window(), values.mean(0), atol=1e-15)
    np.testing.assert_allclose(ens.spread(), values.std(0, ddof=1), atol=1e-15)
    np.testing.assert_allclose(ens.error() * 5 ** .5, ens.spread(), atol=1e-15)
    frame = ens.frame([(0, 6)])
    np.testing.assert_allclose(frame["pearson"], np.corrcoef(values)[np.triu_indices(5, 1)].mean())
    assert 0 < frame["spread"].item() < .1 and ens.mean.run is run and ens.frame().index.tolist() == ["full run"]


def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = """
import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from dit_nb import ensemble, loss_query, open_run, supervised
g, loss_fn = torch.Generator().manual_seed(0), supervised(F.cross_entropy)
data = torch.utils.data.TensorDataset(torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g))
run = open_run("run", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), loss_fn, data)
dist.init_process_group("gloo")
ens = ensemble(run, loss_query(loss_fn, data[:]), repeats=2, exact=[1, 2], at=[3, 6], progress=False)
if dist.get_rank() == 0: np.savez("shared.npz", ens.mean.values, ens.exact.mean.values)
dist.destroy_process_group()
"""
    run, data = small_run(path=tmp_path / "run")
    alone = ensemble(run, loss_query(cross_entropy, data[:]), repeats=2, exact=[1, 2], at=[3, 6], progress=False)
    torchrun(code)
    shared = np.load("shared.npz")
    np.testing.assert_allclose(shared["arr_0"], alone.mean.values, atol=1e-13)
    np.testing.assert_allclose(shared["arr_1"], alone.exact.mean.values, atol=1e-13)


def test_metasmoothness_does_not_depend_on_memory_or_method():
    run, _ = small_run(nn.ReLU(), steps=12)
    whole = metasmoothness(run, at=[3, 12], k=3)
    for kw in ({"memory": 1}, {"method": "loop"}): np.testing.assert_allclose(metasmoothness(run, at=[3, 12], k=3, **kw), whole, atol=1e-9)


def test_sharpness_of_micro_batches_is_that_of_the_batch():
    run, data = small_run(steps=3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model.load_state_dict({**run.state(0).params})
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.3), cross_entropy, data) as rec:
        for t in range(3): rec.step(torch.arange(4 * t, 4 * t + 8) % 20, micro=3)
    a, b = (sharpness(r, [0, 2], tol=1e-9) for r in (run, rec.finish()))
    np.testing.assert_allclose(a, b, rtol=1e-6)
