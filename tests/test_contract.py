"""Bad input is refused with a remedy, nothing of the caller's changes, and results say what they mean."""
import inspect
import itertools
import random
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import dit_nb
from dit_nb import (Influence, Recorder, compare, influence, leave_one_out, loss_query, margin_query, open_run, remove,
                    supervised, verify)

cross_entropy = supervised(F.cross_entropy)


# A world with one recorded run, one running recording, and a caller whose things are in disorder

def network(outputs=3, dtype=torch.float64):
    "A network with a frozen bias, and BatchNorm and dropout in evaluation mode."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(.5), nn.Linear(5, outputs)).to(dtype)
    net[1].eval(), net[3].eval(), net[0].bias.requires_grad_(False)
    return net


def samples(n=12, stream=1):
    "A data set of `n` random samples."
    g = torch.Generator().manual_seed(stream)
    return TensorDataset(torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g))


def trained(model): return [p for p in model.parameters() if p.requires_grad]


def sgd(model, lr=.3, **kw): return torch.optim.SGD(trained(model), lr=lr, **kw)


class World:
    "What the tests use: `run` and results on it, the recording `rec` of the model `live`, and `model`, which the run is bound to."
    def __init__(self, folder):
        self.folder, self.path, self.data, self.model, self.live = folder, folder / "run", samples(), network(), network()
        with Recorder(self.model, sgd(self.model), cross_entropy, self.data, self.path, every=2) as rec:
            for _ in range(2):
                for idx in rec.batches(4): rec.step(idx)
        self.run, self.val = rec.finish(), samples(5, 2)[:]
        self.q = loss_query(cross_entropy, self.val)
        self.infl, self.inside = influence(self.run, self.q), influence(self.run, self.q, removal="window")
        self.exact = leave_one_out(self.run, self.q)
        self.optimizer = sgd(self.live)
        self.rec = Recorder(self.live, self.optimizer, cross_entropy, self.data, folder / "live")
        self.rec.step([0, 1, 2])
        for p in trained(self.model): p.data.normal_()
        self.model[0].weight.grad = torch.full_like(self.model[0].weight, 7.)
        for m in (self.model, self.model[2]): m.eval()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def step(self, idx=(3, 4, 5), loss=cross_entropy):
        "A step of the running recording, with another loss."
        self.rec.loss_fn = loss
        try: return self.rec.step(idx)
        finally: self.rec.loss_fn = cross_entropy

    def record(self, model=None, optimizer=None, data=None, path=None, **kw):
        "A new recording."
        model = network() if model is None else model
        return Recorder(model, optimizer or sgd(model), cross_entropy, self.data if data is None else data, path or self.folder / "new", **kw)

    def open(self, model=None, loss=cross_entropy, data=None, path=None):
        "The recorded run, opened with something else."
        return open_run(path or self.path, self.model if model is None else model, loss, self.data if data is None else data)


@pytest.fixture
def world(tmp_path): return World(tmp_path)


def belongings(world):
    "All that a call must leave alone: both models' tensors and gradients (objects and values), flags and modes; random states; the folder's bytes."
    def of(model):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {k: (id(v), v.requires_grad, v.detach().numpy().tobytes(), id(v.grad), v.grad is not None and v.grad.numpy().tobytes())
                for k, v in tensors.items()}
    return {"tensors": [of(m) for m in (world.model, world.live)], "modes": [[c.training for c in m.modules()] for m in (world.model, world.live)],
            "torch": torch.get_rng_state().tolist(), "numpy": repr(np.random.get_state()), "python": random.getstate(),
            "grad": torch.is_grad_enabled(), "folder": {f.name: f.read_bytes() for f in sorted(world.path.iterdir())}}


def unchanged(world, call):
    "Run `call(world)`, and assert that it left everything alone, also if it failed."
    before = belongings(world)
    try: return call(world)
    finally: assert belongings(world) == before


# Bad input

class Noise(Dataset):
    "Other values at each reading, from a generator of its own"
    own = torch.Generator()
    def __len__(self): return 12
    def __getitem__(self, i): return torch.randn(4, dtype=torch.float64, generator=self.own), 0


class Stream(IterableDataset):
    "Samples without numbers"
    def __iter__(self): return iter(())


class Restless(nn.Linear):
    "A layer that puts another tensor in a buffer's place"
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class Shrinking(nn.Linear):
    "A layer that changes its own weight"
    def forward(self, x):
        with torch.no_grad(): self.weight.mul_(1.)
        return super().forward(x)


def counting(m, b):
    m[1].running_mean.add_(1)
    return cross_entropy(m, b)


def poisoned(m, b): return cross_entropy(m, b) / torch.tensor([1., 0, 1])


def autocasting(m, b):
    with torch.autocast("cpu"): return cross_entropy(m, b)


def under_autocast(w):
    with torch.autocast("cpu"): w.step()


def with_momentum(w):
    w.optimizer.param_groups[0]["momentum"] = .9
    try: w.step()
    finally: w.optimizer.param_groups[0]["momentum"] = 0


def unfrozen(w):
    w.optimizer.add_param_group({"params": [w.live[0].bias.requires_grad_()]})
    try: w.step()
    finally: w.optimizer.param_groups.pop(), w.live[0].bias.requires_grad_(False)


def all_frozen():
    model = network()
    return {"model": model, "optimizer": (sgd(model), model.requires_grad_(False))[0]}


def holding(*modules): return nn.Sequential(*modules, network())


def compiled():
    model = network()
    return {"model": torch.compile(model), "optimizer": sgd(model)}


def watching(w, loader=None, change=lambda model: None, **kw):
    "One step of a watched loop on `loader`, which does something else besides."
    with torch.random.fork_rng(devices=[]):                                     # a DataLoader draws a seed
        rec = w.record(model := network(), o := sgd(model))
        for x, y in rec.watch(loader or DataLoader(w.data, batch_size=4), **kw):
            o.zero_grad()
            F.cross_entropy(model(x), y).backward()
            change(model)
            o.step()


class Once(torch.autograd.Function):
    "The square, whose derivative can't be differentiated"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g * 2 * ctx.saved_tensors[0]


def one_step(w, loss_fn):
    "The first step of a new recording, with this loss."
    rec = w.record()
    rec.loss_fn = loss_fn
    rec.step([0, 1, 2])


def unseen(w):
    rec = w.record(model := network(), o := sgd(model))
    rec.watch()
    cross_entropy(model, w.data[:4]).mean().backward()
    o.step()


def half(model): model[0].weight.grad.mul_(.5)


def built(kind, *args, **kw):
    "A module, built without touching the random state."
    with torch.random.fork_rng(devices=[]): return kind(*args, **kw)


def smooth(m, b): return F.cross_entropy(m(b[0]), b[1], reduction="none", label_smoothing=.3)


def relabelled(w):
    "The data with one label changed that the fingerprint does not probe."
    big = samples(100)
    with w.record(data=big, path=w.folder / "big") as rec:
        for idx in rec.batches(25): rec.step(idx)
    x, y = big.tensors
    changed = int(rec.finish().batch(3)[0])
    return w.open(data=TensorDataset(x, torch.where(torch.arange(100) == changed, (y + 1) % 3, y)), path=rec.path)


def unbatchable(w, how):
    "A sweep through GroupNorm, whose second derivative torch can't batch."
    model = built(lambda: nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)).double())
    with Recorder(model, sgd(model), cross_entropy, w.data) as rec:
        for idx in rec.batches(4): rec.step(idx)
    return influence(rec.finish(), w.q, at=[1, 2, 3], pullback=how)


def clipped(w):
    "A run in which a hook halved the gradients of a single step."
    model, steps = network(), itertools.count()
    optimizer = sgd(model)
    def halve(*_):
        if next(steps) == 1:
            for p in trained(model): p.grad.mul_(.5)
    optimizer.register_step_pre_hook(halve)
    with w.record(model, optimizer, samples(100), w.folder / "clipped") as rec:
        for idx in rec.batches(10): rec.step(idx)
    return rec.finish()


REFUSED = {
    # a step
    "scalar loss": (ValueError, "reduction='none'", lambda w: w.step(loss=lambda m, b: cross_entropy(m, b).mean())),
    "one loss too few": (ValueError, "exactly one loss", lambda w: w.step(loss=lambda m, b: cross_entropy(m, b)[1:])),
    "losses with two dimensions": (ValueError, r"flatten\(1\)", lambda w: w.step(loss=lambda m, b: m(b[0]))),
    "integer losses": (ValueError, "floating", lambda w: w.step(loss=lambda m, b: b[1])),
    "loss that is no tensor": (TypeError, "must return a tensor", lambda w: w.step(loss=lambda m, b: [1., 2., 3.])),
    "detached losses": (ValueError, "detach", lambda w: w.step(loss=lambda m, b: cross_entropy(m, b).detach())),
    "non-finite losses": (ValueError, r"samples \[4\] are not finite: lower the learning rate", lambda w: w.step(loss=poisoned)),
    "index too large": (IndexError, r"0 \.\. 11", lambda w: w.step([3, 12])),
    "negative index": (IndexError, r"0 \.\. 11", lambda w: w.step([-1, 3])),
    "mask for indices": (ValueError, "nonzero", lambda w: w.step(torch.ones(12) > 0)),
    "real-valued indices": (ValueError, "sample indices", lambda w: w.step([3., 4.])),
    "empty batch": (ValueError, "non-empty", lambda w: w.step([])),
    "statistics inside loss_fn": (NotImplementedError, "only the optimizer, and BatchNorm", lambda w: w.step(loss=counting)),
    "autocast": (NotImplementedError, "full precision", under_autocast),
    "autocast inside loss_fn": (NotImplementedError, "full precision", lambda w: w.step(loss=autocasting)),
    "one loss per token": (ValueError, "per_token=True", lambda w: w.step(loss=lambda m, b: m(b[0]))),
    "batch of a loop that is not watched": (RuntimeError, r"call rec\.watch\(\) first", lambda w: w.rec.fetch([3])),
    "momentum turned on": (NotImplementedError, "momentum", with_momentum),
    "layer unfrozen": (NotImplementedError, "new Recorder", unfrozen),
    "step after the end": (RuntimeError, "new Recorder", lambda w: (w.rec.finish(), w.step())),
    "mark twice": (ValueError, "own name", lambda w: (w.rec.mark("a"), w.rec.mark("a"))),
    # a recording
    **{kind: (NotImplementedError, "train with one of torch.optim's SGD", lambda w, kind=kind: w.record(m := network(), getattr(torch.optim, kind)(trained(m))))
       for kind in ("LBFGS", "Rprop", "SparseAdam", "Adafactor")},
    "optimizer of another package": (NotImplementedError, "comes from", lambda w: w.record(m := network(), type("Mine", (torch.optim.SGD,), {})(trained(m)))),
    "differentiable optimizer": (NotImplementedError, "leave it out", lambda w: w.record(m := network(), torch.optim.Adam(trained(m), differentiable=True))),
    "compiled loss": (NotImplementedError, "plain form", lambda w: one_step(w, torch.compile(cross_entropy, backend="aot_eager"))),
    "autograd function without a second derivative": (NotImplementedError, "plain form", lambda w: one_step(w, lambda m, b: Once.apply(cross_entropy(m, b)))),
    "two kinds of clipping": (ValueError, "not both", lambda w: w.record(clip_norm=1., clip_value=1.)),
    "losses of samples per token": (ValueError, "one loss per token", lambda w: w.record(per_token=True)),
    "optimizer of another model": (ValueError, r"model\.parameters\(\)", lambda w: w.record(optimizer=sgd(network()))),
    "nothing to train": (ValueError, "frozen", lambda w: w.record(**all_frozen())),
    "half precision": (NotImplementedError, "float32 or float64", lambda w: w.record(network(dtype=torch.bfloat16))),
    "compiled model": (NotImplementedError, "not torch.compile", lambda w: w.record(**compiled())),
    "compiled module": (NotImplementedError, "not torch.compile", lambda w: w.record(holding(torch.compile(built(nn.Linear, 4, 4))))),
    "model split over devices": (NotImplementedError, r"its \.module", lambda w: w.record(holding(nn.DataParallel(built(nn.Linear, 4, 4))))),
    "sparse embedding": (NotImplementedError, "sparse=False", lambda w: w.record(holding(built(nn.Embedding, 4, 4, sparse=True)))),
    "embedding with a largest norm": (NotImplementedError, "max_norm=None", lambda w: w.record(holding(built(nn.Embedding, 4, 4, max_norm=1.)))),
    "statistics over devices": (NotImplementedError, "BatchNorm1d", lambda w: w.record(holding(nn.SyncBatchNorm(4)))),
    "statistics of InstanceNorm": (NotImplementedError, "track_running_stats=False", lambda w: w.record(holding(nn.InstanceNorm1d(4, track_running_stats=True)))),
    "buffer that is replaced": (NotImplementedError, "evaluation mode", lambda w: w.record(built(Restless, 4, 3, dtype=torch.float64)).step([0])),
    "weight that changes itself": (NotImplementedError, "evaluation mode", lambda w: w.record(built(Shrinking, 4, 3, dtype=torch.float64)).step([0])),
    # a watched loop
    "watched: another data set": (ValueError, "same object", lambda w: watching(w, DataLoader(samples(), batch_size=4))),
    "watched: no batches": (ValueError, "batch_size=None", lambda w: watching(w, DataLoader(w.data, batch_size=None))),
    "watched: own collate_fn": (ValueError, "collate_fn to the Recorder", lambda w: watching(w, DataLoader(w.data, batch_size=4, collate_fn=lambda rows: rows))),
    "watched: another gradient": (ValueError, "must be what the loop minimises", lambda w: watching(w, change=half)),
    "watched: accumulation not told": (ValueError, "accumulate", lambda w: watching(w, accumulate=2)),
    "watched: step without a batch": (RuntimeError, "without a batch", unseen),
    "path that holds a run": (FileExistsError, "overwrite=True", lambda w: w.record(path=w.path)),
    "path of a file": (FileExistsError, "folder", lambda w: w.record(path=w.path / "run.sqlite")),
    "every=0": (ValueError, "at least 1", lambda w: w.record(every=0)),
    "data set without numbers": (TypeError, r"list\(dataset\)", lambda w: w.record(data=Stream())),
    "data set of noise": (ValueError, "global generators", lambda w: w.record(data=Noise())),
    # opening a run
    "no run": (FileNotFoundError, "check the path", lambda w: w.open(path=w.folder / "nowhere")),
    "model of another shape": (ValueError, "build it as for the recording", lambda w: w.open(network(4))),
    "model of another dtype": (ValueError, "build it as for the recording", lambda w: w.open(network(dtype=torch.float32))),
    "model without a layer": (ValueError, "build it as for the recording", lambda w: w.open(network()[:1])),
    "model with one layer more": (ValueError, "build it as for the recording", lambda w: w.open(network().append(built(nn.Linear, 3, 3)))),
    "data set of another length": (ValueError, "training set of the recording", lambda w: w.open(data=samples(13))),
    "other data": (ValueError, "same samples in the same order", lambda w: w.open(data=samples(12, 9))),
    # a sweep, and retraining
    **{f"{name}, {f.__name__}": (error, word, lambda w, f=f, kw=kw: f(w.run, *kw(w)[0], **kw(w)[1])) for f in (influence, leave_one_out)
       for name, error, word, kw in [
           ("boundary behind the end", ValueError, r"1 \.\. 6", lambda w: ([w.q], dict(at=[3, 7]))),
           ("boundary before the start", ValueError, r"1 \.\. 6", lambda w: ([w.q], dict(at=[-1, 3]))),
           ("no boundary", ValueError, r"1 \.\. 6", lambda w: ([w.q], dict(at=[]))),
           ("boundary between steps", (TypeError, ValueError), "steps", lambda w: ([w.q], dict(at=[2.5]))),
           ("unknown mark", KeyError, "it has epoch 1, epoch 2", lambda w: ([w.q], dict(at=["epoch 3"]))),
           ("unknown removal", ValueError, "'always' or 'window'", lambda w: ([w.q], dict(removal="never"))),
           ("query that is a number", TypeError, "loss_query", lambda w: ([3.], {})),
           ("query that returns a number", TypeError, r"no \.item\(\)", lambda w: ([lambda m: 3.], {})),
           ("query that returns a vector", ValueError, "reduce it, or pass a list", lambda w: ([lambda m: m[4].bias], {})),
           ("no query", ValueError, "quer", lambda w: ([[]], {}))]},
    "batched pull-back that torch can't do": (RuntimeError, "looped", lambda w: unbatchable(w, "batched")),
    **{f"gradients changed in one step, {f.__name__}": (RuntimeError, "clipping", lambda w, f=f: f(clipped(w), w.q)) for f in (influence, leave_one_out)},
    "unknown pull-back": (ValueError, "looped", lambda w: influence(w.run, w.q, pullback="fast")),
    "unknown method": (ValueError, "loop", lambda w: leave_one_out(w.run, w.q, method="fast")),
    "sample removed twice": (ValueError, "repeated", lambda w: leave_one_out(w.run, w.q, [3, 3])),
    "sample outside": (IndexError, r"0 \.\. 11", lambda w: leave_one_out(w.run, w.q, [12])),
    "negative sample": (IndexError, r"0 \.\. 11", lambda w: leave_one_out(w.run, w.q, [-1])),
    "mask for samples": (ValueError, "nonzero", lambda w: leave_one_out(w.run, w.q, np.ones(12, bool))),
    "no groups": (ValueError, "no samples", lambda w: remove(w.run, w.q, [])),
    "empty group": (ValueError, "non-empty", lambda w: remove(w.run, w.q, [[0], []])),
    **{f"another loss, {name}": (RuntimeError, "loss_fn", lambda w, f=f: f(w.open(loss=smooth), w.q)) for name, f in
       {"influence": influence, "vmap": lambda r, q: leave_one_out(r, q, method="vmap"), "loop": lambda r, q: leave_one_out(r, q, method="loop"),
        "late": lambda r, q: remove(r, q, [[int(r.batch(5)[0])]], at=[6], removal="window")}.items()},
    **{f"another label, {f.__name__}": (RuntimeError, "data", lambda w, f=f: f(relabelled(w), w.q)) for f in (influence, leave_one_out)},
    # results
    "window backwards": (ValueError, "give t1 < t2", lambda w: w.infl.window("epoch 2", "epoch 1")),
    "empty window": (ValueError, "give t1 < t2", lambda w: w.inside.window(3, 3)),
    "window outside": (ValueError, r"influence\(\.\.\., at=", lambda w: w.infl.window(0, 7)),
    "window from no boundary": (ValueError, r"influence\(\.\.\., at=", lambda w: w.infl.top(3, 1, 6)),
    "window of an unknown mark": (KeyError, "it has epoch 1, epoch 2", lambda w: w.infl.window("epoch 3")),
    "frame of windows": (ValueError, r"use window\(t1, t2\)", lambda w: w.inside.frame()),
    "two kinds of removal": (ValueError, "compute both alike", lambda w: compare(w.inside, w.exact)),
    "two queries": (ValueError, "the truth about", lambda w: compare(influence(w.run, margin_query(*w.val)), w.exact)),
    "no common boundary": (ValueError, "no common boundary", lambda w: compare(influence(w.run, w.q, at=[2]), w.exact)),
    "state outside": (IndexError, "0 to 6", lambda w: w.run.state(7)),
    "negative state": (IndexError, "0 to 6", lambda w: w.run.state(-1)),
    "batch outside": (IndexError, "0 to 5", lambda w: w.run.batch(6)),
}


@pytest.mark.parametrize("row", REFUSED)
def test_bad_input_is_refused_with_a_remedy(world, row):
    error, remedy, call = REFUSED[row]
    with pytest.raises(error, match=remedy): unchanged(world, call)
    if row != "step after the end":
        steps = world.rec.writer.steps                                     # a refused step is not recorded, and the recording goes on
        assert steps == 1
        world.rec.step([6, 7])
    run = world.rec.finish()
    assert run.verify() == 0 and open_run(run.path, network(), cross_entropy, world.data).steps == run.steps
    assert not any((world.folder / "new").glob("*")) or row in ("buffer that is replaced", "weight that changes itself", "compiled loss", "autograd function without a second derivative") or row.startswith("watched")


def test_parameters_changed_between_steps_are_refused(world):
    with torch.no_grad(): world.live[0].weight.mul_(.5)
    with pytest.raises(RuntimeError, match="new Recorder"): unchanged(world, World.step)


def test_networks_that_torch_cannot_batch_are_looped(world):
    np.testing.assert_allclose(unbatchable(world, "auto").values, unbatchable(world, "looped").values, rtol=1e-9, atol=1e-15)


def test_a_run_is_replaced_only_on_demand(world):
    world.record(path=world.path, overwrite=True).finish()
    assert world.open().steps == 0
    with pytest.raises(ValueError, match="record some training"): influence(world.open(), world.q)


@pytest.mark.parametrize("file", ["run.sqlite", "constants.safetensors", "states-000000000.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_folder_is_named(world, file, damage):
    path = world.path / file
    path.write_bytes(path.read_bytes()[:40]) if damage == "cut" else path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=file.replace(".", r"\.")): unchanged(world, lambda w: influence(w.open(), w.q))


@pytest.mark.parametrize("f", [influence, leave_one_out])
@pytest.mark.parametrize("query", [lambda m: torch.tensor(2.), lambda m: m[0].bias.sum()], ids=["constant", "of a frozen parameter"])
def test_query_that_does_not_depend_on_the_parameters(world, f, query):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        infl = unchanged(world, lambda w: f(w.run, query))
    assert not infl.values.any() and infl.values.shape == (2, 12) and infl.top(3).empty
    if f is influence: assert any("does not depend" in str(w.message) for w in caught)


# Nothing of the caller's changes

CALLS = {
    "influence": lambda w, run, q: influence(run, q).values,
    "influence, window": lambda w, run, q: influence(run, [q, margin_query(*w.val)], removal="window", per_step=True)[0].values,
    "influence, batched": lambda w, run, q: influence(run, q, pullback="batched").values,
    "leave_one_out": lambda w, run, q: leave_one_out(run, q).values,
    "leave_one_out, loop": lambda w, run, q: leave_one_out(run, q, [0, 3], method="loop").values,
    "remove": lambda w, run, q: remove(run, q, [[0, 1], [5]], removal="window").values,
    "verify": lambda w, run, q: verify(Influence(**{**vars(w.infl), "run": run, "query": dit_nb.Query(q, "q")}), 3).to_numpy(),
    "Run.state": lambda w, run, q: run.state(5).params["0.weight"],
    "Run.replay": lambda w, run, q: [s.params["0.weight"] for _, s in run.replay()][-1],
    "Run.verify": lambda w, run, q: run.verify(),
    "Run.batch_gradient": lambda w, run, q: run.batch_gradient(3).losses,
}


@pytest.mark.parametrize("name", CALLS)
def test_success_changes_nothing(world, name):
    got = unchanged(world, lambda w: CALLS[name](w, w.open(), w.q))
    with torch.no_grad(): again = unchanged(world, lambda w: CALLS[name](w, w.open(), w.q))
    np.testing.assert_allclose(got, again, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name, call", {
    "compare": lambda w: compare(w.infl, w.exact), "top": lambda w: w.infl.top(3), "repr": lambda w: (repr(w.infl), repr(w.run)),
    "open_run": lambda w: w.open(), "Run.losses": lambda w: w.run.losses(), "Recorder": lambda w: w.record(), "finish": lambda w: w.rec.finish(),
    "mark": lambda w: w.rec.mark("here"), "batches": lambda w: list(w.rec.batches(5)),
    "query": lambda w: (w.q(w.model), margin_query(*w.val)(w.model)),
}.items())
def test_small_calls_change_nothing(world, name, call): unchanged(world, call)


def test_a_step_changes_parameters_and_gradients_only(world):
    before = belongings(world)
    world.rec.step([4, 5])
    after = belongings(world)
    assert {k for k in before if before[k] != after[k]} == {"tensors"} and before["tensors"][0] == after["tensors"][0]
    moved = [k for k, v in after["tensors"][1].items() if v[2] != before["tensors"][1][k][2]]
    assert moved == ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]


class Interrupted:
    "`f`, failing from its `limit`-th call on, in the middle of things: after it changed random state and modes."
    def __init__(self, f, error, limit=np.inf): self.f, self.error, self.limit, self.calls = f, error, limit, 0

    def __call__(self, model, *batch):
        self.calls += 1
        if self.calls <= self.limit: return self.f(model, *batch)
        torch.manual_seed(5), model.train()
        raise self.error("on purpose")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("name, what", [(name, what) for name in CALLS for what in ("loss_fn", "query") if what == "loss_fn" or name[:3] != "Run"])
@pytest.mark.filterwarnings("ignore:exact removal runs one retraining")
def test_failure_in_the_middle_changes_nothing(world, name, what, error):
    def call(limit):
        loss, query = (Interrupted(f, error, limit if what == k else np.inf) for k, f in (("loss_fn", cross_entropy), ("query", world.q)))
        try: unchanged(world, lambda w: CALLS[name](w, w.open(loss=loss), query))
        finally: calls.append((loss if what == "loss_fn" else query).calls)
    calls = []
    call(np.inf)
    for limit in sorted({0, 1, calls[0] // 2, calls[0] - 1} & set(range(calls[0]))):
        with pytest.raises(error, match="on purpose"): call(limit)
    call(np.inf)


class Refuse(torch.autograd.Function):
    "The identity, whose backward fails"
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("where", ["loss_fn", "backward", "optimizer.step"])
def test_recording_goes_on_after_a_failed_step(world, where):
    def fail(*_): raise ZeroDivisionError("on purpose")
    hook = world.optimizer.register_step_pre_hook(fail) if where == "optimizer.step" else None
    loss = {"loss_fn": Interrupted(cross_entropy, ZeroDivisionError, 0), "backward": lambda m, b: Refuse.apply(cross_entropy(m, b)),
            "optimizer.step": cross_entropy}[where]
    with pytest.raises(ZeroDivisionError, match="on purpose"): unchanged(world, lambda w: w.step(loss=loss))
    if hook: hook.remove()
    world.rec.step([7, 8])
    run = world.rec.finish()
    assert run.steps == 2 and run.batch(1).tolist() == [7, 8] and run.verify() == 0
    assert all(torch.equal(v, world.live.get_parameter(k)) for k, v in run.state(2).params.items())


def test_a_failed_training_leaves_a_run_that_opens(world):
    with pytest.raises(KeyboardInterrupt), world.record(model := network()) as rec:
        for idx in rec.batches(2):
            rec.step(idx)
            if rec.writer.steps == 4: raise KeyboardInterrupt
    run = open_run(rec.path, model, cross_entropy, world.data)
    assert run.steps == 4 and run.verify() == 0 and not run.marks
    assert influence(run, world.q).times.tolist() == [4]


# What results and names say

def test_results_say_their_convention(world):
    groups = remove(world.run, world.q, [[0, 1]], removal="window", at=[2, 5])
    for infl, method, removal in [(world.infl, "first order", "always"), (world.inside, "first order", "window"),
                                  (world.exact, "exact", "always"), (groups, "exact", "window")]:
        text = repr(infl)
        for said in ("positive: removal raises the query", "batch divisor unchanged", f"removal:  {removal!r}", f"({method})", "float64",
                     str(world.path), world.q.name, f"{len(infl.times)} boundaries, {', '.join(map(str, infl.times))}", "groups" if infl is groups else "samples"):
            assert said in text, f"{said!r} is missing in\n{text}"
    assert "6 steps" in repr(world.run) and str(world.path) in repr(world.run)


def public():
    "`(name, object)` of every public name, and of the methods of the classes."
    for name in dit_nb.__all__:
        found = getattr(dit_nb, name)
        yield name, found
        if inspect.isclass(found): yield from ((f"{name}.{k}", f) for k, f in inspect.getmembers(found, inspect.isfunction)
                                              if f.__module__.startswith("dit_nb") and not k.startswith("_"))


@pytest.mark.parametrize("name, found", list(public()))
def test_docstrings(name, found):
    doc = inspect.getdoc(found) or ""
    assert len(doc) > 15 and not doc.startswith(f"{name}("), "write a docstring whose first line says what it returns"


# Memory

class Shapes(TorchDispatchMode):
    "Counts `(operation, shape)` of all tensors that operations return, with `n` in the place of the number of samples."
    def __init__(self, n):
        super().__init__()
        self.n, self.seen = n, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.update((str(func), tuple("n" if s == self.n else s for s in t.shape)) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("removal", ["always", "window"])
@pytest.mark.parametrize("pullback", ["looped", "batched"])
def test_memory_of_a_sweep_does_not_grow_with_the_number_of_samples(removal, pullback):
    def measure(n):
        with Recorder(model := network(), sgd(model), cross_entropy, samples(n), every=4) as rec:
            for t in range(10): rec.step(torch.arange(20 * t, 20 * t + 20))
        run, q = rec.finish(), loss_query(cross_entropy, samples(7)[:])
        sweep = lambda: influence(run, q, at=[3, 6, 10], removal=removal, pullback=pullback)
        sweep()
        with Shapes(n) as shapes: sweep()
        tracemalloc.start()
        size = sweep().values.nbytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return shapes.seen, size, peak
    (small, size, peak), (large, large_size, large_peak) = measure(211), measure(20011)
    assert small == large, small - large | large - small
    result = {shape for _, shape in large if "n" in shape}                               # the result and views of it, nothing else
    assert all(shape.count("n") == 1 and np.prod([s for s in shape if s != "n"]) <= 9 for shape in result), result
    assert large_peak - peak < 3 * (large_size - size) + 2**20                           # on numpy's side: the result and its copies
