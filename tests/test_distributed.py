"""Several processes give the numbers of one, all the same on each; if one fails, all do, and soon. One set of processes per size runs everything."""
import os
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cases import KINDS, LENGTH, OPTIMIZERS, crossing
from dit_nb import influence, leave_one_out, open_run, remove
from dit_nb.distributed import Ranks, torchrun
from dit_nb.estimator import coupling

LIMIT = 300                                                   # seconds after which processes count as hanging
pytestmark = [pytest.mark.filterwarnings("ignore:.*is not smooth at"), pytest.mark.filterwarnings("ignore:exact removal runs one retraining after the other"),
              pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")]


# The runs

def cases():
    "`{name: case}`, the same in every process: each kind of model, each optimizer, and what is special about sharing."
    optimizers, found = list(OPTIMIZERS), {}
    for i, kind in enumerate(KINDS): found[kind] = replace(crossing(kind, optimizers[i % len(optimizers)]), loss="cross entropy")
    plain = dict(form="tensors", loss="cross entropy", again=False, warm=0, n=13, unused=1, sizes=[12, 1, 2, 7], every=1, at=[1, 3, 4], micro=None, clip={})
    for optimizer, change in (("SGD", {}), ("AdamW", dict(clip={"norm": .2})), ("momentum", dict(clip={"value": .05}, micro=5, again=True)), ("AdamW", dict(micro=3, every=3))):
        found[f"ragged, {optimizer}, {change}"] = replace(crossing("one hidden layer", optimizer), **{**plain, **change})
    found["coupled"] = replace(crossing("one hidden layer", "SGD"), **{**plain, "loss": "coupled", "sizes": [12, 8, 9, 7]})
    return found


def coupled(case):
    "Whether a loss depends on the size or the rest of its batch (also on its padding) in a way that no name tells."
    return case.kind == "rare parameter" or case.loss == "coupled" or case.form == "ragged"


EXACT = {k for k in cases() if k.startswith("ragged")} | {"dropout", "batch norms", "transformer layer", "GPT, tied, dropout"}          # where samples are removed too


def opened(case, path, loss_fn=None): return open_run(path, case.model(), loss_fn or case.loss_fn, case.data(), collate_fn=case.collate_fn)


def answers(name, case, run):
    "Everything that ranks share, as `{what: array}`."
    queries, found = (lambda q: q[:2] + q[-1:])(case.queries()), {}
    def keep(what, results):
        for i, r in enumerate(results if isinstance(results, list) else [results]):
            found[f"{what}, query {i}"], found[f"{what}, baseline {i}"] = r.values, r.baseline
            if r.uses is not None: found[f"{what}, uses {i}"], found[f"{what}, index {i}"] = r.uses.to_numpy(), np.array(r.uses.index.tolist())
    split = "boundaries" if coupled(case) else "auto"
    for removal in ("always", "window"): keep(removal, influence(run, queries, at=case.at, removal=removal, pullback="looped", split=split))
    keep("uses", influence(run, queries[:2], at=case.at, per_step=True, split=split))
    keep("one query, boundaries", influence(run, queries[0], at=case.at, per_step=True, split="boundaries"))
    if case.length: keep("tokens", influence(run, queries[:2], at=case.at, per_token=True, split=split))
    if name not in EXACT: return found
    some = [j for j in case.some(4) if j not in case.never] or case.some(1)
    keep("samples", leave_one_out(run, queries[:2], some, at=case.at, removal="window"))
    keep("sets", remove(run, queries[0], [some[:1], some, *([case.never] if case.never else [])], at=case.at))
    if case.length: keep("single tokens", leave_one_out(run, queries[0], [(some[0], LENGTH - 1), (some[-1], 0)], at=case.at, memory=1))
    if name == "dropout": keep("loop", leave_one_out(run, queries[0], some, at=case.at, method="loop"))
    return found


# The processes

def outcome(f):
    "`(kind of error, message, seconds)` of `f()`."
    start = time.monotonic()
    try: f()
    except Exception as e: return type(e).__name__, str(e), time.monotonic() - start
    return "none", "", time.monotonic() - start


def failures(ranks, paths):
    "`{what: outcome on each rank}` of calls that fail on one rank or on all."
    case, last, path = cases()["ragged, SGD, {}"], ranks.size - 1, paths["ragged, SGD, {}"]
    q, run = case.queries()[0], opened(case, path)
    def failing(rank, after, pause=0.):
        "The run with a loss that fails on one rank, after some calls; on the others it takes its time"
        calls = []
        def loss_fn(model, batch):
            calls.append(1)
            if ranks.rank != rank: time.sleep(pause)
            elif len(calls) > after: raise FileNotFoundError("the disk is gone")
            return case.loss_fn(model, batch)
        return opened(case, path, loss_fn)
    normed, relative = opened(cases()["batch norm"], paths["batch norm"]), opened(cases()["coupled"], paths["coupled"])
    calls = {
        "in a shared batch": lambda: influence(failing(last, 0), q, at=case.at),
        "among boundaries": lambda: influence(failing(last, 0), q, at=case.at, split="boundaries"),
        "in a long loop": lambda: leave_one_out(failing(0, 4, pause=.25), q, range(13), at=case.at, method="loop"),          # two minutes' work for the others
        "bad argument": lambda: influence(run, q, at=[99] if ranks.rank == last else case.at),
        "bad sample": lambda: leave_one_out(run, q, [99] if ranks.rank == last else [0]),
        "other arguments": lambda: influence(run, q, at=[4 - ranks.rank]),
        "other samples": lambda: remove(run, q, [[ranks.rank]]),
        "everywhere": lambda: influence(run, q, removal="never"),
        "split of a norm": lambda: influence(normed, cases()["batch norm"].queries()[0], split="batch"),
        "coupled loss": lambda: influence(relative, q),
        "uneven sums": lambda: uneven(ranks)}
    return {what: ranks.gather(outcome(call)) for what, call in calls.items()}


def uneven(ranks):
    with ranks.together():
        for _ in range(2 if ranks.first else 3): ranks.sum({"x": torch.ones(2)})


def worker(rank, size, folder, paths):
    "What every process does: all cases, then all failures, then the last process dies."
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    ranks, found = Ranks(), {}
    for name, case in cases().items():
        run = opened(case, paths[name])
        mine = answers(name, case, run)
        same = ranks.gather({what: v.tobytes() for what, v in mine.items()})
        found[name] = mine, [what for what in mine if any(s[what] != same[0][what] for s in same)], influence(run, case.queries()[0], at=case.at, split="boundaries" if coupled(case) else "auto").notes["split"]
    case, path = cases()["ragged, SGD, {}"], paths["ragged, SGD, {}"]
    pair, run, q = dist.new_group([0, 1]), opened(case, path), case.queries()[0]
    def waiting(seconds): return opened(case, path, lambda m, b: case.loss_fn(m, b) if rank or time.sleep(seconds) is None else None)       # the first process is slow
    calls = {"alone": (influence, run, dict(process_group=False)), "pair": (influence, run, dict(process_group=pair)), "slow": (influence, waiting(.6), dict(split="boundaries")),
             "slow truth": (leave_one_out, waiting(.1), dict(method="loop"))}
    alone = {f: f(run, q, at=case.at, process_group=False).values for f in (influence, leave_one_out)}
    own = {what: outcome(lambda: np.testing.assert_allclose(f(r, q, at=case.at, **kw).values, alone[f], rtol=0, atol=1e-9)) for what, (f, r, kw) in calls.items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        influence(run, q, at=case.at[:1], split="boundaries")
    idle = ranks.gather([str(w.message) for w in told if "nothing to do" in str(w.message)])
    own, failed = ranks.gather(own), failures(ranks, paths)
    again = ranks.sum({"x": torch.ones(2)})["x"].tolist()                                      # the group is as good as new
    if rank == size - 1: os._exit(0)
    died = outcome(lambda: influence(run, case.queries()[0], at=case.at))
    torch.save((found, own, idle, failed, again, died), f"{folder}/rank {rank}")


@pytest.fixture(scope="module")
def recorded():
    "`{name: run}`, and what one process answers."
    runs = {name: case.record()[0] for name, case in cases().items()}
    return runs, {name: answers(name, case, opened(case, runs[name].path)) for name, case in cases().items()}


@pytest.mark.parametrize("size", [2, 3])
def test_processes_give_the_numbers_of_one_and_fail_together(size, recorded, tmp_path):
    runs, expected = recorded
    processes = mp.spawn(worker, (size, str(tmp_path), {name: str(run.path) for name, run in runs.items()}), nprocs=size, join=False)
    end = time.monotonic() + LIMIT
    while not processes.join(timeout=1):
        if time.monotonic() < end: continue
        for p in processes.processes: p.kill()
        pytest.fail(f"{size} processes hang")
    found, own, idle, failed, again, died = torch.load(tmp_path / "rank 0", weights_only=False)
    for name, (mine, differ, split) in found.items():
        assert not differ, f"{name}: ranks differ in {differ}"
        assert mine.keys() == expected[name].keys()
        assert split == f"{'boundaries' if coupled(cases()[name]) or coupling(runs[name], cases()[name].at[-1]) else 'batch'}, {size} ranks", name
        for what, v in mine.items():
            one = expected[name][what]
            assert v.shape == one.shape and np.isfinite(v).all(), (name, what)
            np.testing.assert_allclose(v, one, rtol=0, atol=1e-9 * max(np.abs(one).max(initial=0), 1e-3), err_msg=f"{name}, {what}")
    splits = [split for *_, split in found.values()]
    assert sum(s.startswith("batch") for s in splits) >= 10 and sum(s.startswith("boundaries") for s in splits) >= 10

    for r, o in enumerate(own):
        assert {what: found[:2] for what, found in o.items() if found[0] != "none"}.keys() == ({"pair"} if r == 2 else set()), o         # to which the third does not belong
        assert o["slow"][2] > 1 and o["slow truth"][2] > 1                     # others have waited for more than one round
    assert idle[0][0].startswith(f"{size - 1} of {size} processes") and not any(idle[1:])
    last = size - 1
    def says(what, rank, kind, message):
        found = failed[what][rank]
        assert found[0] == kind and message in found[1], (what, rank, found)
    for what, rank, kind, message in [("in a shared batch", last, "FileNotFoundError", "the disk is gone"), ("among boundaries", last, "FileNotFoundError", "the disk is gone"),
                                      ("in a long loop", 0, "FileNotFoundError", "the disk is gone"), ("bad argument", last, "ValueError", "99"), ("bad sample", last, "IndexError", "99")]:
        says(what, rank, kind, message)
        for r in range(size):
            if r != rank: says(what, r, "RuntimeError", f"rank {rank} of {size} failed: {kind}: "), says(what, r, "RuntimeError", message)
    for r in range(size):
        says("other arguments", r, "ValueError", "times is [4] on rank 0 and [3] on rank 1")
        says("other samples", r, "ValueError", "groups is [[0]] on rank 0 and [[1]] on rank 1")
        says("everywhere", r, "ValueError", "'never'")
        says("split of a norm", r, "ValueError", "use split='boundaries'")
        says("coupled loss", r, "RuntimeError", "use split='boundaries'")
        says("uneven sums", r, "RuntimeError", "the same steps")
    slow = {what: [round(o[2], 1) for o in outcomes] for what, outcomes in failed.items() if max(o[2] for o in outcomes) > 15}
    assert not slow, f"it took seconds until all had failed: {slow}"
    assert again == [size, size]
    assert died[0] == "RuntimeError" and died[2] < 15, died


def test_torchrun_from_one_process(recorded, tmp_path, monkeypatch):
    "The command that users have; a process that fails ends the job, and its message arrives."
    runs, expected = recorded
    name, folder = "ragged, SGD, {}", os.path.dirname(__file__)
    monkeypatch.chdir(tmp_path)
    job = f"""
import sys
sys.path.insert(0, {folder!r})
import numpy as np, torch.distributed as dist
from test_distributed import cases, influence, opened
dist.init_process_group("gloo")
case = cases()[{name!r}]
run, at = opened(case, {str(runs[name].path)!r}), case.at
infl = influence(run, case.queries()[0], at=at)
if dist.get_rank() == 0:
    np.save("values.npy", infl.values)
    print(infl.notes["split"])
if dist.get_rank() == 1: at = [77]
influence(run, case.queries()[0], at=at)
"""
    with pytest.raises(RuntimeError, match="given 77"): torchrun(job)
    assert torchrun(job.replace("at = [77]", "pass")).split() == ["batch,", "2", "ranks"]
    np.testing.assert_allclose(np.load("values.npy"), expected[name]["always, query 0"], rtol=0, atol=1e-9)
