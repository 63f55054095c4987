"""Kill trainings at random moments, and see that nothing committed is lost and each ends as if it had never been killed: `python tests/kills.py 1000 --seed 0`.

A server that has imported torch once forks a training, kills it (SIGKILL), forks a reader that compares all that the folder holds with the same training left alone, and starts it again,
until it ends. A training says through a pipe when a commit begins and when it is done, so that kills can be aimed: at any time, into a commit, into the closing, into a resumption."""
import argparse
import importlib
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[name] = "1"      # a process with threads can't be forked
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dit_nb import Recorder, open_run, store, supervised
from dit_nb.store import Trajectory, TrajectoryWriter

N, SIZE, EPOCHS = 46, 8, 8
g = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 6, generator=g), torch.randint(3, (N,), generator=g)
PER_EPOCH, EVERY = {"ordinary": 6, "watched": 6, "fetched": 6, "halves": 12}, ("all", 5, "sqrt", "log")          # steps; every=...


class Restless(Dataset):
    "Samples that are drawn anew at each reading, by torch, numpy and Python"
    def __len__(self): return N
    def __getitem__(self, i): return X[i] * random.choice([.5, 1., 2.]) + .1 * torch.randn(6) + float(np.random.rand()), Y[i]


PLAIN, RESTLESS = TensorDataset(X, Y), Restless()


def data_of(kind): return PLAIN if kind in ("ordinary", "halves") else RESTLESS


def seed_all(seed): random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def network():
    "A network with frozen parameters, running statistics and dropout"
    seed_all(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 3))
    model[0].bias.requires_grad_(False)
    return model


loss_fn = supervised(F.cross_entropy)


def train(kind, path, every, started=lambda rec: None):
    """Train as a user would, going on with what `path` holds; return a hash of all that the training ends with.

    Kinds: "ordinary" by `rec.step`; "halves" with two steps for each batch; "watched", with a DataLoader; "fetched", with `rec.fetch`. The last two read a data set that draws."""
    model, data = network(), data_of(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=.01) if kind in ("ordinary", "fetched") else torch.optim.SGD(trained, lr=.05, momentum=.9, dampening=.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, .05, EPOCHS * PER_EPOCH[kind])
    seed_all(os.getpid())                                              # an interrupted training knows nothing of the random states that it had
    with Recorder(model, optimizer, loss_fn, data, path, every, steps=EPOCHS * PER_EPOCH[kind], resume=True, stateful={"scheduler": scheduler}, clip_norm=1.) as rec:
        started(rec)
        if not rec.steps: seed_all(1)
        if kind == "watched": loader = rec.watch(DataLoader(data, SIZE, shuffle=True))
        elif kind == "fetched": rec.watch()
        for epoch in range(rec.epoch, EPOCHS):
            for batch in breakably(loader if kind == "watched" else rec.batches(SIZE), rec, PER_EPOCH[kind] * (epoch + 1)):
                with following(rec, scheduler), breakable:
                    if kind in ("ordinary", "halves"):
                        for idx in batch.chunk(2) if kind == "halves" else [batch]: rec.step(idx)
                    else:
                        x, y = batch if kind == "watched" else rec.fetch(batch)
                        optimizer.zero_grad()
                        F.cross_entropy(model(x), y).backward()
                        nn.utils.clip_grad_norm_(trained, 1.)
                        optimizer.step()
                if rec.steps in (20, 41): rec.mark(f"step {rec.steps}")
                if rec.steps % 17 < 2: rec.flush()
            torch.rand(3), random.random()                             # what users do between epochs may draw
            if epoch % 3 == 2: rec.flush()
    h = sha256()
    for v in [*model.state_dict().values(), *(v for s in optimizer.state_dict()["state"].values() for k, v in sorted(s.items()))]: h.update(v.numpy().tobytes())
    h.update(repr((scheduler.state_dict(), optimizer.param_groups[0]["lr"])).encode())
    return h.hexdigest()


class Breakable:
    "A part of a training that Ctrl-C may interrupt; what comes elsewhere waits for it."
    inside, due = False, False
    def __enter__(self):
        self.inside = True
        if self.due: raise KeyboardInterrupt

    def __exit__(self, *_): self.inside = False

    def __call__(self, *_):
        self.due = True
        if self.inside: raise KeyboardInterrupt


breakable = Breakable()


def breakably(batches, rec, end):
    "The same batches; Ctrl-C may interrupt their fetching, but not what comes when step `end` ends an epoch"
    batches = iter(batches)
    while True:
        with breakable if rec.steps < end else nullcontext():
            if (batch := next(batches, None)) is None: return
        yield batch


@contextmanager
def following(rec, scheduler):
    "Let the scheduler follow a step also if that is interrupted by hand when it is made already: what is not done then is not done when the training goes on, either."
    before = rec.steps
    try: yield
    finally:
        if rec.steps > before: scheduler.step()


# A training that commits often and tells of it

def telling(tell, steps, states):
    """Let writers commit after so many `steps` and `states` at the latest, and `tell` of it: `b` when a commit begins, `c T` when `T` steps are committed, `f` when the folder
    begins to be closed."""
    store.COMMIT_SECONDS, store.COMMIT_STEPS, store.SEGMENT_STATES = 0., steps, states
    def wrap(name, before, after=None):
        method = getattr(TrajectoryWriter, name)
        def wrapped(self, *args, **kw):
            tell(before)
            result = method(self, *args, **kw)
            if after: tell(f"c {self.steps}")
            return result
        setattr(TrajectoryWriter, name, wrapped)
    wrap("_begin", "b", after=True), wrap("flush", "b", after=True), wrap("close", "f")


def forked(job):
    "Run `job(tell)` in a fork; return `(pid, pipe)` of what it tells. Its errors are told, too."
    out, into = os.pipe()
    if pid := os.fork():
        os.close(into)
        return pid, out
    try:
        signal.signal(signal.SIGINT, breakable)
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        job(lambda line: os.write(into, f"{line}\n".encode()))
    except BaseException:
        for line in traceback.format_exc().splitlines(): os.write(into, f"E {line}\n".encode())
        os._exit(1)
    os._exit(0)


class Attempt:
    "A forked job, what it has told, and when"
    open = True
    def __init__(self, job): self.start, self.lines, self.rest, (self.pid, self.pipe) = time.monotonic(), [], b"", forked(job)

    def listen(self, until, stop=lambda line: False):
        "Collect lines until the time is over (True), a line is to `stop` (True), or the job is over (False)."
        while (left := until - time.monotonic()) > 0:
            if not select.select([self.pipe], [], [], left)[0]: return True
            got = os.read(self.pipe, 65536)
            if not got: return False
            *lines, self.rest = (self.rest + got).split(b"\n")
            self.lines += [line.decode() for line in lines]
            if any(stop(line.decode()) for line in lines): return True
        return True

    def kill(self, sign=signal.SIGKILL):
        "End the job, and collect what it has told before; return whether it was there to be killed."
        os.kill(self.pid, sign)
        while self.listen(time.monotonic() + 60): pass
        self.close()
        return os.waitpid(self.pid, 0)[1] != 0

    def finish(self, limit=120):
        "Wait for the end; RuntimeError with its traceback if the job failed, TimeoutError if it hangs."
        if self.listen(time.monotonic() + limit):
            self.kill()
            raise TimeoutError(f"hangs for {limit} s; told: {self.lines[-3:]}")
        self.close()
        status = os.waitpid(self.pid, 0)[1]
        if status: raise RuntimeError(f"ended with status {status}:\n" + "\n".join(line[2:] for line in self.lines if line[0] == "E"))
        return self.lines

    def close(self): os.close(self.pipe); self.open = False

    @property
    def committed(self): return max((int(line[2:]) for line in self.lines if line[0] == "c"), default=None)


# What a folder must hold

POINT = ("epoch", "place", "groups", "fresh", "stateful", "random", "after", "loader")


def compare(path, kind, reference, committed, resumable=True, end=False):
    "AssertionError unless the folder holds a valid beginning of the reference run with at least `committed` steps, of which each bit is equal."
    try: tr = Trajectory(path).check()
    except FileNotFoundError:
        assert not committed, f"{committed} steps were committed, and the run is gone"
        return
    ref = Trajectory(reference)
    assert committed is None or tr.steps >= committed, f"{committed} steps were committed, {tr.steps} are there"
    assert tr.steps <= ref.steps and {k: v for k, v in tr.meta.items() if k != "every"} == {k: v for k, v in ref.meta.items() if k != "every"}
    must, may = ({k: t for k, t in ref.marks.items() if t < tr.steps}, {k: t for k, t in ref.marks.items() if t <= tr.steps})
    assert must.items() <= tr.marks.items() <= may.items(), (tr.marks, ref.marks, tr.steps)        # a mark may come after the commit of its step
    for t in range(tr.steps):
        assert torch.equal(tr.batch(t), ref.batch(t)) and tr.settings(t) == ref.settings(t), t
        for a, b in zip(tr.parts(t), ref.parts(t), strict=True):
            assert torch.equal(a.idx, b.idx) and a.divisor == b.divisor and a.random == b.random and (a.losses is b.losses is None or a.losses.tobytes() == b.losses.tobytes()), t
    for t in tr.states():
        a, b = tr.state(t), ref.state(t)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b), f"state {t}"
    a, b = tr.read("constants.safetensors"), ref.read("constants.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    if tr.steps and resumable:
        point, state = tr.resume_point()
        assert point["steps"] == tr.steps and all(torch.equal(v, ref.state(tr.steps)[k]) for k, v in (state or {}).items())
    if end:
        there, _ = ref.resume_point()
        assert tr.steps == ref.steps and tr.finished and tr.marks == ref.marks and all(point[k] == there[k] for k in POINT), "the ends differ"
        run, whole = (open_run(p, network(), loss_fn, data_of(kind)) for p in (path, reference))
        for t in range(0, tr.steps, 7): assert all(torch.equal(v, whole.state(t).params[k]) for k, v in run.state(t).params.items()), f"replayed state {t}"


def stage(told, committed):
    "Where in a training's life it was killed, by what it had told"
    last = told[-1][0] if told else ""
    if "f" in told: return "while closing"
    if last == "b": return "in a commit" if committed is not None else "in the first commit"
    return "between commits" if last else "while resuming" if committed is not None else "before the first commit"


class Attack:
    """Trainings in `folder` that are killed; `counts` says what happened, `failures` where something was lost or differed (its folder is then kept)."""
    def __init__(self, folder, seed=0):
        self.folder, self.rng, self.counts, self.failures, self.ends, self.seconds = Path(folder), random.Random(seed), Counter(), [], {}, {}
        def imports(tell): train("ordinary", self.folder / "warm", 1), tell(" ".join(sys.modules))
        for name in Attempt(imports).finish()[-1].split():                 # what torch imports in a first step, once for all forks
            if name.startswith("torch.") and name not in sys.modules: importlib.import_module(name)
        for kind in PER_EPOCH:
            a = Attempt(self.training(kind, self.reference(kind), "all"))
            self.ends[kind], self.seconds[kind] = a.finish()[-1], time.monotonic() - a.start

    def reference(self, kind): return self.folder / f"{kind}.reference"

    def training(self, kind, path, every):
        steps, states = self.rng.choice([1, 5, 20, 99]), self.rng.choice([1, 3, 512])
        return lambda tell: (telling(tell, steps, states), tell("e " + train(kind, path, every, lambda rec: tell(f"r {rec.steps}"))))

    def aimed(self, a, aim, kind):
        "Wait until the training is to be killed; return whether it is still there."
        rng = self.rng
        if aim not in ("commit", "close"): return a.listen(a.start + {"start": rng.uniform(0, .1), "never": 120}.get(aim, rng.uniform(0, 1.1 * self.seconds[kind])))
        sign, left = "b" if aim == "commit" else "f", rng.choice([1, 2, rng.randint(1, 20)]) if aim == "commit" else 1
        def stop(line):
            nonlocal left
            left -= line == sign
            return not left
        if there := a.listen(a.start + 120, stop): time.sleep(rng.choice([.001, .005, .02]) * rng.random())
        return there

    def life(self, kind, every, kills):
        "A training that is killed again and again, up to `kills` times, until it ends; `failures` gets the first loss or difference."
        path, committed, n, aims = self.folder / f"run {self.counts['runs']}", None, 0, []
        self.counts["runs"] += 1
        try:
            while True:
                aim = self.rng.choice(["hand", "time", "time", "commit", "commit", "start", "close"][kind == "halves":]) if n < kills else "never"
                aims.append(aim)
                a = Attempt(self.training(kind, path, every))
                over = not self.aimed(a, aim, kind) or not a.kill(signal.SIGINT if aim == "hand" else signal.SIGKILL)        # it may have ended before it could be killed
                if a.open: a.finish()
                committed = max((x for x in (committed, a.committed) if x is not None), default=None)
                errors = [line[2:] for line in a.lines if line[0] == "E"]
                if errors and (aim != "hand" or errors[-1] != "KeyboardInterrupt"): raise RuntimeError("it failed:\n" + "\n".join(errors))
                self.counts["resumes"] += any(line[0] == "r" and line != "r 0" for line in a.lines)
                if not over:
                    n += 1
                    self.counts.update({"interruptions by hand": 1} if aim == "hand" else {"kills": 1, stage(a.lines, committed): 1})
                Attempt(lambda tell: compare(path, kind, self.reference(kind), committed, end=over)).finish()
                if over: break
            if a.lines[-1] != self.ends[kind]: raise RuntimeError("the end differs")
            self.counts["runs that ended bitwise equal"] += 1
            shutil.rmtree(path)
        except (RuntimeError, TimeoutError) as e: self.failures.append(f"{kind}, every={every!r}, {path}: after {n} kills, the last {stage(a.lines, committed)} (aims: {', '.join(aims)}): {e}")

    def run(self, kills):
        "Go on until so many kills are made."
        while (left := kills - self.counts["kills"]) > 0:
            self.life(self.rng.choice([*PER_EPOCH]), self.rng.choice(EVERY), min(left, 12))
            print(f"\r{self.counts['kills']} kills, {len(self.failures)} failures", end="", file=sys.stderr)
        print(file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", default=1000, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begun, folder = time.monotonic(), tempfile.mkdtemp(prefix="kills_")
    attack = Attack(folder, args.seed)
    attack.run(args.number)
    for failure in attack.failures: print(failure)
    print(", ".join(f"{v} {k}" for k, v in attack.counts.items()) + f", {len(attack.failures)} failures, {time.monotonic() - begun:.0f} s")
    if attack.failures: sys.exit(1)
    shutil.rmtree(folder)
