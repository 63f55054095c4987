"""A recorded run survives kills, damage, hostile content, full disks and company: what is read is what was recorded, or an error that names the file."""
import ctypes
import errno
import gc
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kills
from dit_nb import Recorder, influence, leave_one_out, loss_query, open_run, store, supervised
from dit_nb.data import digits
from dit_nb.store import Part, Schedule, Trajectory, TrajectoryWriter, digest, link
from dit_nb.trajectory import check_run
from kills import Attempt

pytestmark = pytest.mark.filterwarnings("ignore")
loss_fn = supervised(F.cross_entropy)
DATABASE = ("run.sqlite", "run.sqlite-wal", "run.sqlite-shm")


# Kills

def test_kills():
    "The short form of `python tests/kills.py 1000`"
    done = subprocess.run([sys.executable, kills.__file__, "20", "--seed", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) kills", done.stdout)[1]) >= 20 and int(re.search(r"(\d+) runs that ended bitwise equal", done.stdout)[1])


# A run on a few digits: dropout, moving buffers, frozen parameters; and one whose process died

@pytest.fixture(scope="module")
def train():
    train, val = digits()
    return train.subset(torch.arange(40)), val[:20]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(.2), nn.Linear(4, 10))
    model[0].bias.requires_grad_(False)
    return model


def record(path, data, epochs=3, stop=None, started=lambda rec: None, after=lambda rec: None, **kw):
    "Record twelve steps, and commit several times, or return after the step `stop`. Returns the `Recorder`, of which `started` is told, and `after` each step."
    model = network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1, momentum=.9)
    rec = Recorder(model, optimizer, loss_fn, data, path, every=3, **kw)
    started(rec)
    for _ in range(rec.epoch, epochs):
        for idx in rec.batches(10):
            rec.step(idx)
            if rec.steps % 3 == 2: rec.flush()
            if stop and rec.steps == 5: rec.writer.db.execute("pragma wal_checkpoint")                  # so that the main file holds steps, too
            after(rec)
            if rec.steps == stop: return rec
    rec.finish()
    return rec


def everything(path, data):
    "All that the folder says, verified: a list for each step, and what else there is."
    tr = Trajectory(path).check()
    try:
        each = [(tr.batch(t).tolist(), tr.losses(t).tobytes(), tr.settings(t), [p.random for p in tr.parts(t)]) for t in range(tr.steps)]
        states = {t: {k: v.numpy().tobytes() for k, v in tr.state(t).items()} for t in tr.states()}
        return each, states, tr.marks, tr.meta, {k: v.numpy().tobytes() for k, v in tr.read("constants.safetensors").items()}
    finally: tr.close()


def results(path, data):
    "What is computed from the folder: influence, one exact removal, the final state"
    run = open_run(path, network(), loss_fn, data[0])
    try:
        q = loss_query(loss_fn, data[1])
        return [influence(run, q, at=[run.steps]).values.tobytes(), leave_one_out(run, q, [3]).values.tobytes(), run.model_at()[4].weight.detach().numpy().tobytes()]
    finally: run.trajectory.close()


def resumed(path, data):
    "All that the folder holds after the training has gone on to its end"
    rec = record(path, data[0], resume=True)
    return everything(path, data), [p.detach().numpy().tobytes() for p in rec.model.parameters()]


class Runs:
    "Finished and unfinished runs in `folder`, `other` ones of the same form, and what is right for each."
    def __init__(self, folder, data):
        self.folder, self.data = folder, data
        for name, kw in {"finished": {}, "unfinished": {"stop": 11}, "other finished": {"seed": 1}, "other unfinished": {"seed": 1, "stop": 11}}.items():
            def job(tell): record(folder / name, data[0], **kw), os._exit(0)                   # without closing anything
            if name == "finished": record(folder / name, data[0])                              # what torch imports for that, forks need not
            else: Attempt(job).finish()
        (folder / "outside.safetensors").write_bytes((folder / "finished" / "constants.safetensors").read_bytes())
        self.right = {}
        for name in ("finished", "unfinished"):
            for read in (everything, results): self.right[name, read] = read(folder / name, data)
            shutil.copytree(folder / name, folder / "copy")
            self.right[name, resumed] = resumed(folder / "copy", data)
            shutil.rmtree(folder / "copy")

    def files(self, name): return sorted(f.name for f in (self.folder / name).iterdir() if f.name != "writing.lock")


@pytest.fixture(scope="module")
def runs(train):
    "In memory, where that is possible: to sync hundreds of copies to a disk takes minutes"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder: yield Runs(Path(folder), train)


def touched(file, do):
    "Whether `do(file)` has read the file: the time of access says so, on most file systems"
    os.utime(file, (1, 2e9))
    do(file)
    return file.stat().st_atime != 1


def test_runs(runs):
    "The runs are what the tests below need"
    assert {"run.sqlite", "constants.safetensors", "states-000000000.safetensors", "states-000000003.safetensors"} <= set(runs.files("finished")) and "run.sqlite-wal" not in runs.files("finished")
    assert {*DATABASE, "resume-000000011.safetensors", "states-000000009.safetensors"} <= set(runs.files("unfinished")) and len(runs.right["unfinished", everything][0]) == 11
    assert runs.right["unfinished", resumed] == runs.right["finished", resumed] and runs.right["finished", resumed][0] == runs.right["finished", everything]
    if not touched(runs.folder / "outside.safetensors", Path.read_bytes): pytest.skip("this file system does not note when files are read: the tests of hostile content see less here")


# Damage

def flip_bit(f, rng, size): patch(f, (i := rng.randrange(size)), bytes([f.read_bytes()[i] ^ (1 << rng.randrange(8))]))
def flip_byte(f, rng, size): patch(f, (i := rng.randrange(size)), bytes([f.read_bytes()[i] ^ rng.randrange(1, 256)]))
def zeros(f, rng, size): patch(f, rng.randrange(size), bytes(rng.choice([16, 512, 4096])))
def truncated(f, rng, size): os.truncate(f, rng.choice([rng.randrange(size), size - 1, size // 4096 * 4096, size // 2 // 4096 * 4096]))
def appended(f, rng, size): patch(f, size, rng.randbytes(rng.choice([1, 24, 4096])))
def emptied(f, rng, size): os.truncate(f, 0)
def deleted(f, rng, size): f.unlink()
def folder(f, rng, size): f.unlink(), f.mkdir()
def fifo(f, rng, size): f.unlink(), os.mkfifo(f)
def of_another_run(f, rng, size): shutil.copy(f.parents[1] / f"other {f.parent.name.split('-')[0]}" / f.name, f)
def linked(f, rng, size): f.rename(f.parents[1] / "elsewhere"), f.symlink_to(f.parents[1] / "elsewhere")
def dangling(f, rng, size): f.unlink(), f.symlink_to(f.parents[1] / "nowhere")


def swapped(f, rng, size):
    n, data = rng.choice([8, 512, 4096]), f.read_bytes()
    i, j = sorted(rng.randrange(max(1, size // n)) * n for _ in range(2))
    a, b = data[i:i + n], data[j:j + n]
    patch(f, i, b), patch(f, j, a)


def patch(f, i, new):
    with open(f, "r+b") as out: out.seek(i), out.write(new)


MUTATIONS = {flip_bit: 7, flip_byte: 7, zeros: 4, swapped: 4, truncated: 4, appended: 2, emptied: 1, deleted: 1, folder: 1, fifo: 1, of_another_run: 1, linked: 1, dangling: 1}


def outcome(path, read, runs, kind, shorter=False):
    """Return how `read(path)` ends, "same", "shorter" or "refused"; AssertionError for another result, for another kind of error, and one that names nothing.

    A write-ahead log that was damaged ends, for SQLite, where its checksums fail: what it held before is a valid older state of the run, as if the training had been killed
    earlier; nobody can tell. Only then may the run be shorter."""
    try: found = read(path, runs.data)
    except (ValueError, OSError) as e:
        named = str(path) if kind in DATABASE else kind
        assert named in str(e), f"the error does not name {named}: {e!r}"
        return "refused"
    right = runs.right[path.name.split("-")[0], read]
    if found == right: return "same"
    assert shorter and read is not resumed, "the result is another one"
    if read is everything:
        (steps, states, marks, meta, constants), whole = found, right
        assert steps == whole[0][:len(steps)] and states.items() <= whole[1].items() and marks.items() <= whole[2].items() and (meta, constants) == whole[3:]
    return "shorter"


def attacked(jobs, do):
    "Return the texts that `do(*job)` returns for each of the jobs; they run in forks, so that a crash or a hang is seen as such. AssertionError with all that went wrong."
    answers, wrong = [], []
    while len(answers) < len(jobs):
        def job(tell):
            for args in jobs[len(answers):]:
                try: tell("o " + do(*args))
                except BaseException: tell("x " + json.dumps(traceback.format_exc()[-1500:]))
        a, heard, how = Attempt(job), -1, None
        while (there := a.listen(time.monotonic() + 20, stop=lambda line: True)) and len(a.lines) > heard: heard = len(a.lines)
        if there: a.kill()
        else:
            try: a.finish()
            except RuntimeError as e: how = f"crashes: {e}"
        for line in a.lines:
            if line[0] == "x": wrong.append(f"{jobs[len(answers)]}: {json.loads(line[2:])}")
            if line[0] in "ox": answers.append(line[2:])
        if there or how:
            wrong.append(f"{jobs[len(answers)]} {how or 'hangs'}")
            answers.append("")
    assert not wrong, f"{len(wrong)} of {len(jobs)}:\n" + "\n\n".join(wrong[:10])
    return answers


@pytest.mark.parametrize("name", ["finished", "unfinished"])
def test_damage(runs, name):
    jobs = [(file, mutate, i) for file in runs.files(name) for mutate, n in MUTATIONS.items() for i in range(n)]
    def do(file, mutate, i):
        path = runs.folder / f"{name}-{file}-{mutate.__name__}-{i}"
        shutil.copytree(runs.folder / name, path)
        try:
            mutate(path / file, random.Random(f"{file} {mutate.__name__} {i}"), (path / file).stat().st_size)
            may, reads = file in DATABASE[1:], [everything, results] + [resumed] * (name == "unfinished")
            return " ".join(outcome(path, read, runs, file, may) for read in reads)
        finally: shutil.rmtree(path), (runs.folder / "elsewhere").unlink(missing_ok=True)
    answers = attacked(jobs, do)
    found = Counter(" ".join(answers).split())
    assert found["refused"] > found["same"] > 0
    if name == "finished": assert not found["shorter"]


# Hostile content, whose checksums are right

def forge(path, statements, outside):
    """Change the database as an attacker would who knows how checksums are made: afterwards all of them are right. `statements` are SQL, or `(SQL, arguments)`, in which `{outside}`
    stands for the path of a file elsewhere."""
    db = sqlite3.connect(path / "run.sqlite", isolation_level=None)
    for sql, args in ((s, ()) if isinstance(s, str) else s for s in statements): db.execute(sql, [x.replace("{outside}", str(outside)) if isinstance(x, str) else x for x in args])
    chain, before, meta = "", 0, db.execute(store.META).fetchall()
    for i, steps, finished, _, _ in db.execute("select * from commits order by id").fetchall():
        rows = digest(*(db.execute(q, (before, steps)).fetchall() for q in (store.STEPS, store.RANDOM)))
        chain = link(chain, (i, steps, finished, rows), store.covered(db.execute, i)[i], meta if i == 0 else [])
        db.execute("update commits set rows = ?, hash = ? where id = ?", (rows, chain, i))
        before = steps
    for value, in db.execute("select value from resume").fetchall(): db.execute("update resume set hash = ?", (digest(value),))
    db.execute(f"pragma user_version = {db.execute('select count(*) from commits').fetchone()[0]}")
    db.close()


def segment(column, value): return lambda path: [(f"update files set {column} = ? where name = ?", (value, SEGMENT))]


def meta(key, value): return lambda path: [("update meta set value = ? where key = ?", (value if isinstance(value, str) else json.dumps(value), key))]
def setting(value): return lambda path: [("update settings set value = ? where id = 0", (value if isinstance(value, (str, bytes, int)) else json.dumps(value),))]
def steps(column, value, t=4): return lambda path: [(f"update steps set {column} = ? where t = ?", (value, t))]
def drawn(column, value): return lambda path: [(f"update random set {column} = ? where t = 4", (value,))]
def sql(*statements): return lambda path: list(statements)


def changed(key, value, inside="groups"):
    "Settings 0 with something else in the first group, or beside the groups"
    def statements(path):
        db = sqlite3.connect(path / "run.sqlite")
        found = json.loads(db.execute("select value from settings where id = 0").fetchone()[0])
        db.close()
        (found["groups"][0] if inside == "groups" else found)[key] = value
        if value is None: del (found["groups"][0] if inside == "groups" else found)[key]
        return setting(found)(path)
    return statements


def point(**change):
    "The point to go on from, with something else in it"
    def statements(path):
        db = sqlite3.connect(path / "run.sqlite")
        value = json.dumps({**json.loads(db.execute("select value from resume").fetchone()[0]), **change})
        db.close()
        return [("update resume set value = ?", (value,))]
    return statements


def planted(name, content=None):
    "A segment with other content, and a right checksum of that"
    def statements(path):
        if content is not None: (path / name).write_bytes(content)
        return [("update files set bytes = ?, hash = ? where name = ?", (*store.checksum(path / name), name))]
    return statements


def unruly(*statements): return lambda path: ["pragma writable_schema = on", *statements]


class Bomb:
    def __reduce__(self): return os.system, ("touch boom",)


SEGMENT, DEEP, BOMB = "states-000000003.safetensors", "[" * 100_000 + "]" * 100_000, pickle.dumps(Bomb())
OUTSIDE = ["../outside.safetensors", "{outside}", "..", "", "a/../../outside.safetensors", "states-000000003.safetensors/../../outside.safetensors", "states-000000003.safetensors\0", "run.sqlite", "writing.lock",
           "resume-000000003.safetensors", "states-000000003.pt", "STATES-000000003.safetensors", "states-３３３３３３３３３.safetensors", b"states-000000003.safetensors", 7]
HOSTILE = {
    **{f"name {n!r}": segment("name", n) for n in OUTSIDE},
    **{f"states {s[:20]}": segment("states", s) for s in ("[-3]", "[3.5]", '["3"]', "{}", "3", "null", "[]", "[4, 3]", "[3, 3]", "[1000000000000000000000]", "[1e400]", "[true]", DEEP, "[3, 4")},
    **{f"size {n!r}": segment("bytes", n) for n in (-1, 2**62, "x", 1e300)},
    "hash of bytes": segment("hash", b"x"), "file of no commit": lambda path: ["insert into files values ('../outside.safetensors', 1, '', '[5]', 99)"],
    **{f"{k} {str(v)[:30]}": meta(k, v) for k, v in [
        ("optimizer", "Evil"), ("optimizer", "__import__('os').system('touch boom')"), ("optimizer", 5), ("optimizer", ["SGD"]), ("optimizer", "LBFGS"), ("optimizer", "Adam"), ("groups", [["nobody"]]), ("groups", "x"), ("groups", []),
        ("groups", [[], []]), ("groups", [[5]]), ("n_samples", -1), ("n_samples", 0), ("n_samples", "x"), ("n_samples", 1.5), ("n_samples", True), ("n_samples", 2**70), ("n_samples", 5), ("length", -1), ("length", "x"), ("length", 10**30),
        ("params", {}), ("params", []), ("params", {"4.weight": ["load", [10, 4]]}), ("params", {"4.weight": ["float32", [-1]]}), ("params", {"4.weight": ["float32", [2**62, 2**62]]}), ("params", {"4.weight": ["float32", "x"]}),
        ("params", {"4.weight": [5]}), ("slots", {}), ("slots", {"4.weight.exp_avg": ["float32", [10, 4]]}), ("buffers", {"x": ["float32", [1]]}), ("constants", {"0.bias": ["float32", [5]]}), ("constants", {"0.bias": ["float64", [4]]}),
        ("differentiable", ["nobody"]), ("differentiable", 5), ("fingerprint", 5), ("fingerprint", "x"), ("format", 4), ("format", "3"), ("format", [3]), ("optimizer", DEEP), ("optimizer", "\0"), ("seed", DEEP), ("groups", "NaN")]},
    "meta of bytes": sql("update meta set value = x'ff' where key = 'optimizer'"), "meta without": sql("delete from meta where key = 'slots'"), "meta key of bytes": sql("update meta set key = x'ff' where key = 'seed'"),
    **{f"settings {str(v)[:20]}": setting(v) for v in (DEEP, "[]", "5", "null", "{}", b"x", {"groups": 5, "training": True}, {"groups": [], "training": True}, {"groups": [{}], "training": True}, {"groups": [{"lr": .1}], "training": True})},
    **{f"settings {where} {k} {str(v)[:20]}": changed(k, v, where) for where, k, v in [
        ("groups", "lr", "__import__('os')"), ("groups", "lr", None), ("groups", "momentum", {}), ("groups", "momentum", 0), ("groups", "lr", [[1]]), ("", "training", 5), ("", "training", [5]), ("", "training", None), ("", "parts", [[-1, 1]]), ("", "parts", []),
        ("", "parts", [[10, 0]]), ("", "parts", [[5, 5]]), ("", "parts", [[2.5, 1]] * 4), ("", "parts", 5), ("", "parts", [[10]]), ("", "parts", [[10, "x"]]), ("", "parts", [[10, float("nan")]]), ("", "idle", ["nobody"]), ("", "idle", 5), ("", "fresh", [{}]),
        ("", "clip", 5), ("", "clip", {"norm": "x"}), ("", "clip", {"evil": 1})]},
    **{f"{column} {str(v)[:20]}": steps(column, v) for column, v in [
        ("t", -1), ("t", 10**6), ("t", 2**62), ("batch", b""), ("batch", "0123456789" * 4), ("batch", b"123"), ("batch", np.array([-1] * 10, "<i4").tobytes()), ("batch", np.array([40] * 10, "<i4").tobytes()), ("batch", 5), ("losses", "x" * 40), ("losses", b"123"),
        ("losses", b""), ("losses", 5), ("settings", 999), ("settings", -1), ("settings", "x"), ("settings", b"x"), ("settings", 1e300)]},
    "step lost": sql("delete from steps where t = 4"), "all steps lost": sql("delete from steps"),
    **{f"random {column} {str(v)[:20]!r}": drawn(column, v) for column, v in [
        ("t", 10**9), ("t", -1), ("t", "x"), ("part", -1), ("part", 99), ("part", "x"), ("part", 2**62), ("phase", "evil"), ("phase", b"model"), ("generator", "os"), ("generator", "cuda"), ("generator", "numpy"), ("generator", "python"), ("generator", b"torch"),
        ("state", "x" * 5056), ("state", b""), ("state", b"x" * 5056), ("state", bytes(5056)), ("state", 5)]},
    "numpy beyond its words": sql(("update random set generator = 'numpy', state = ? where t = 4", (struct.pack("<iid", 2**31 - 1, 0, 0.) + bytes(2496),))),
    "python beyond its words": sql(("update random set generator = 'python', state = ? where t = 4", (struct.pack("<?d", False, 0.) + np.full(625, 2**32 - 1, "<u4").tobytes(),))),
    **{f"commit {column} {v!r}": sql((f"update commits set {column} = ? where id = 1", (v,))) for column, v in [("steps", 2**62), ("steps", -5), ("steps", "x"), ("steps", 2.5), ("finished", "x"), ("id", 77), ("id", -3)]},
    "no commits": sql("delete from commits"), "a commit of nothing": sql("insert into commits values (99, 9999999999, 1, '', '')"),
    **{f"mark {t!r}": sql(("update marks set t = ? where name = 'epoch 1'", (t,))) for t in (-1, 10**9, 2**62, "x", 1.5, b"x")}, "mark name": sql("update marks set name = x'00ff' where name = 'epoch 1'"),
    "view": sql("create view evil as select * from steps"), "trigger": sql("create trigger evil after insert on steps begin delete from marks; end"), "index": sql("create index evil on steps (abs(t))"), "table": sql("create table evil (x)"),
    "trigger with an index's name": unruly("insert into sqlite_master values ('trigger', 'sqlite_autoindex_evil_1', 'steps', 0, 'CREATE TRIGGER sqlite_autoindex_evil_1 after insert on steps begin delete from marks; end')"),
    "view for a table": sql("alter table steps rename to real", "create view steps as select * from real"),
    "virtual table": unruly("insert into sqlite_master values ('table', 'sqlite_autoindex_x', 'x', 0, 'CREATE VIRTUAL TABLE sqlite_autoindex_x using fts3(x)')"),
    "default with code": unruly("update sqlite_master set sql = replace(sql, 'losses blob', 'losses blob default (load_extension(''evil''))') where name = 'steps'"),
    "other root page": unruly("update sqlite_master set rootpage = 99999 where name = 'steps'"), "root page of another": unruly("update sqlite_master set rootpage = (select rootpage from sqlite_master where name = 'meta') where name = 'steps'"),
    "pickle": planted(SEGMENT, BOMB), "segment of nothing": planted(SEGMENT, b""), "segment of zeros": planted(SEGMENT, bytes(1000)), "header without end": planted(SEGMENT, struct.pack("<Q", 2**63) + b"{}"),
    "deep header": planted(SEGMENT, struct.pack("<Q", len(DEEP)) + DEEP.encode()), "other tensors": lambda path: (shutil.copy(path / "constants.safetensors", path / SEGMENT), planted(SEGMENT)(path))[1],
    "other dtype": planted(SEGMENT, struct.pack("<Q", 64) + b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'.ljust(64) + b"x"),
    **{f"point {str(c)[:40]}": point(**c) for c in [
        {"file": "../outside.safetensors"}, {"file": "{outside}"}, {"file": 5}, {"file": "constants.safetensors"}, {"file": "run.sqlite"}, {"file": None}, {"check": None}, {"check": [1, "x"]}, {"steps": 3}, {"steps": "x"}, {"epoch": -1}, {"epoch": "x"}, {"epoch": None},
        {"place": -1}, {"place": "x"}, {"place": [1]}, {"groups": []}, {"groups": [{"params": [1]}]}, {"groups": [{"lr": .1}]}, {"groups": "x"}, {"groups": [{"lr": "x", "momentum": {}, "dampening": [], "weight_decay": None, "nesterov": 1, "maximize": 2}]},
        {"fresh": ["nobody"]}, {"fresh": 5}, {"fresh": [[]]}, {"stateful": {"evil": 1}}, {"stateful": 5}, {"random": {"torch": "x"}}, {"random": {"os": "eA=="}}, {"random": 5}, {"random": {"torch": 5}}, {"after": {"torch": "!"}}, {"after": None}, {"after": {"numpy": "eHg="}},
        {"loader": 5}, {"loader": {"random": {}, "place": -1}}, {"loader": {"random": {"torch": "x"}, "place": 0}}, {"loader": {}}]},
    "deep point": sql(("update resume set value = ?", (DEEP,))), "point of bytes": sql("update resume set value = x'00ff'"), "point of a number": sql("update resume set value = 5"), "point of a list": sql("update resume set value = '[]'"),
}
VALID = {"file of no commit", "format 3", "point {'file': None}", "point {'loader': {}}"}             # what no commit mentions is not read; the state to go on from can be computed, too


def test_hostile(runs):
    "No file outside is opened, no code is run, nothing crashes or hangs; what is forged is refused, by an error that names the folder, if it can be told from a recording"
    outside = runs.folder / "outside.safetensors"
    def do(name):
        path = runs.folder / "unfinished-hostile"
        shutil.copytree(runs.folder / "unfinished", path)
        os.chdir(path)
        os.utime(outside, (1, 2e9))                                 # reading it would set the time of access
        try:
            forge(path, HOSTILE[name](path), outside)
            found = []
            for read in (everything, results, resumed):
                try: assert read(path, runs.data) == runs.right["unfinished", read] or name not in VALID
                except (ValueError, OSError) as e:
                    assert str(path) in str(e) or re.search("the model is not the recorded one|the data set", str(e)), f"the error does not name the folder: {e!r}"
                    found.append("refused")
                except RuntimeError as e:
                    assert read is not everything and re.search("the losses of its batch differ|misses the recorded state", str(e)), repr(e)
                    found.append("not that training")
                else: found.append("believed")
            assert outside.stat().st_atime == 1 and not (path / "boom").exists()
            return ", ".join(found)
        finally: shutil.rmtree(path, ignore_errors=True)
    answers = attacked([(name,) for name in HOSTILE], do)
    assert {name for name, found in zip(HOSTILE, answers, strict=True) if found == "believed, believed, believed"} == VALID


def hot_journal(victim):
    "A rollback journal that tells SQLite to clean up `victim`, which it says to be the journal of a transaction over several databases"
    name = str(victim).encode()
    return bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", 0, 0, 1, 512, 4096) + bytes(484) + struct.pack(">I", 2**18 + 1) + name + struct.pack(">2I", len(name), sum(name)) + bytes.fromhex("d9d505f920a163d7")


@pytest.mark.parametrize("name", ["finished", "unfinished"])
def test_planted_files(runs, name):
    "Files that were put beside those of a run, under names that a recorder or SQLite would open, lead to nothing outside"
    victim = runs.folder / "victim"
    plants = {"link": lambda f: f.symlink_to(victim), "fifo": os.mkfifo, "folder": Path.mkdir, "journal": lambda f: f.write_bytes(hot_journal(victim)), "noise": lambda f: f.write_bytes(b"noise" * 1000)}
    def do(file, plant):
        path = runs.folder / f"{name}-planted"
        shutil.copytree(runs.folder / name, path)
        victim.write_bytes(b"do not touch")
        os.utime(victim, (1, 2e9))
        try:
            (path / file).unlink(missing_ok=True)
            plants[plant](path / file)
            return " ".join(outcome(path, read, runs, "run.sqlite", shorter=file == "run.sqlite-wal") for read in (everything, results, resumed))
        finally:
            assert victim.stat().st_atime == 1 and victim.read_bytes() == b"do not touch"
            shutil.rmtree(path)
    files = ["writing.lock", "run.sqlite-journal", "run.sqlite-wal", "run.sqlite-shm", "states-000000012.safetensors", "states-000000012.safetensors.tmp", "constants.safetensors.tmp", "resume-000000012.safetensors", "resume-000000012.safetensors.tmp"]
    jobs = [(file, plant) for file in files if not (name == "finished" and file == "states-000000012.safetensors") for plant in plants]
    answers = dict(zip(jobs, attacked(jobs, do), strict=True))
    assert all(a == "refused refused refused" for (file, plant), a in answers.items() if file == "run.sqlite-journal" or (file.startswith("run.sqlite") and plant in ("link", "fifo", "folder")))
    assert all(a == "same same same" for (file, plant), a in answers.items() if file.endswith(".tmp") and plant != "folder")


# A full disk

def small_disk(folder):
    "Give this process, and nobody else, a disk of 8 MB at `folder`; return a function that leaves so many bytes of it free, or as many as there are. OSError where that can't be."
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x20000 | (0x10000000 if uid else 0)): raise OSError(ctypes.get_errno(), "no namespaces for mounts here")             # CLONE_NEWNS, CLONE_NEWUSER
    if uid:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")): Path(f"/proc/self/{name}").write_text(line)
    for args in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]):
        if (done := subprocess.run(["mount", *args], capture_output=True, text=True)).returncode: raise OSError(done.stderr)
    def leave(free=None):
        (folder / "ballast").unlink(missing_ok=True)
        if free is not None: (folder / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - free)))
    return leave


def small_files(folder):
    "The like, for files of this process: none may be larger"
    def leave(free=None): resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if free is None else free, resource.RLIM_INFINITY))
    return leave


@pytest.mark.parametrize("small, step", [(small_disk, 16_000), (small_files, 40_000)])
def test_full_disk(runs, small, step, tmp_path):
    "Recording stops with an OSError that says what to do, wherever the disk is full; what was committed can be read, and with more room the training goes on to the same end"
    path = tmp_path / "run"
    def fill(tell):
        try: leave = small(tmp_path)
        except OSError as e: return tell(f"skip {e}")
        for free in range(0, 480_000, step):
            recs, error = [], None
            shutil.rmtree(path, ignore_errors=True)
            gc.collect()                                              # open databases keep their room
            leave(free)
            try: record(path, runs.data[0], started=recs.append)
            except OSError as e: error = e
            if error:
                assert error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO) and "recording has stopped" in str(error) and str(path) in str(error), repr(error)
                for rec in recs: check_stopped(rec)
                try: everything(path, runs.data)
                except OSError: pass                                  # to be read, a run that was not finished needs 32 KB for SQLite
            leave()
            try: steps, commits = len(everything(path, runs.data)[0]), len(Trajectory(path).commits)
            except FileNotFoundError: steps = commits = None
            assert commits == (recs[0].writer.commits if recs else None) and (steps == 12) == (error is None)
            assert resumed(path, runs.data) == runs.right["finished", resumed]
            tell(f"{steps} steps")
    def check_stopped(rec):
        for do in (rec.finish, lambda: rec.step([1, 2]), rec.flush):
            with pytest.raises(RuntimeError, match="nothing more can be recorded"): do()
        with pytest.raises(KeyError), rec: raise KeyError             # the context manager hides no other error, either
        loss_fn(rec.model, runs.data[1]).mean().backward()
        rec.optimizer.step()
        assert all(p.isfinite().all() for p in rec.model.parameters())
    said = Attempt(fill).finish()
    if said[0].startswith("skip"): pytest.skip(f"no small disk can be made here: {said[0][5:]}")
    assert {line.split()[0] for line in said} >= {"None", "0", "2", "5", "8", "11", "12"}         # it was full at each commit


# Interrupted by hand, changed by hand, repaired

def test_interruption_outside_a_context(runs, tmp_path):
    "As in a notebook: the cell is interrupted within a step, and `finish` is called in the next one"
    path, recs = tmp_path / "run", []
    def stopping(model, batch):
        if recs[0].steps == 7: raise KeyboardInterrupt
        return loss_fn(model, batch)
    try: record(path, runs.data[0], started=lambda rec: (recs.append(rec), setattr(rec, "loss_fn", stopping)))
    except KeyboardInterrupt: pass
    assert recs[0].finish().steps == 7
    (found, params), (right, ends) = resumed(path, runs.data), runs.right["finished", resumed]
    assert params == ends and (found[0], *found[2:]) == (right[0], *right[2:]) and {**found[1], **right[1]} == found[1]         # state 7 is stored, too


def test_point_of_a_changed_model(runs, tmp_path):
    "Whatever was done to the parameters between steps is no part of the record, nor of what goes on from it"
    def spoil(rec):
        if rec.steps != 7: return
        with torch.no_grad(): rec.model[0].weight.mul_(2)
        rec.flush()
        raise InterruptedError
    try: record(tmp_path / "run", runs.data[0], after=spoil)
    except InterruptedError: pass
    assert Trajectory(tmp_path / "run").resume_point()[1] is None and resumed(tmp_path / "run", runs.data) == runs.right["finished", resumed]


@pytest.mark.parametrize("name", ["finished", "unfinished"])
def test_interrupted_overwriting(runs, name, tmp_path, monkeypatch):
    "Whenever the replacement of a run is interrupted, there is the old run, none, or the beginning of the new one, and a recorder with `resume` goes on from that"
    path, unlink, outcomes = tmp_path / "run", Path.unlink, []
    for k in range(20):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(runs.folder / name, path)
        left = k
        def until(f, **kw):
            nonlocal left
            left -= f.parent == path
            if left < 0: raise KeyboardInterrupt
            return unlink(f, **kw)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", until)
            try: record(path, runs.data[0], overwrite=True)
            except KeyboardInterrupt: outcomes.append("interrupted")
            else: break
        gc.collect()
        try:
            found, right = everything(path, runs.data), runs.right["finished", everything]                 # both are this training
            assert found[0] == right[0][:len(found[0])] and found[1].items() <= right[1].items() and found[3:] == right[3:]
        except FileNotFoundError: outcomes[-1] = "no run"
        assert resumed(path, runs.data) == runs.right["finished", resumed]
    assert outcomes.count("no run") > 4


def test_repair(runs, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(runs.folder / "finished", path)
    for name in ("constants.safetensors", "states-000000006.safetensors"): (path / name).unlink()
    (path / "states-000000009.safetensors").write_bytes(b"?")
    (path / "states-000000011.safetensors.tmp").write_bytes(b"half of it")
    assert set(check_run(path)["status"]) == {"ok", "missing", "damaged", "left over"}
    assert set(check_run(path, network(), loss_fn, runs.data[0], repair=True)["status"]) == {"ok", "repaired", "removed"}
    assert set(check_run(path)["status"]) == {"ok"} and everything(path, runs.data) == runs.right["finished", everything]


# In company

def test_two_recorders(runs, tmp_path):
    "Who comes second is refused, and changes neither the folder nor his model"
    path = tmp_path / "run"
    def first(tell):
        def wait(rec): tell("ready"), go.wait()
        record(path, runs.data[0], started=wait)
    go = multiprocessing.get_context("fork").Event()
    a = Attempt(first)
    assert a.listen(time.monotonic() + 60, stop=lambda line: line == "ready")
    for kw, error in [({"overwrite": True}, RuntimeError), ({"resume": True}, RuntimeError), ({"resume": True, "overwrite": True}, RuntimeError), ({}, FileExistsError)]:
        with pytest.raises(error, match=f"{path}.*(end that process|overwrite=True)"): record(path, runs.data[0], **kw)
    with pytest.raises(RuntimeError, match="another process is recording"): check_run(path, repair=True)
    go.set()
    a.finish()
    assert everything(path, runs.data) == runs.right["finished", everything] and not (path / "writing.lock").exists()


def test_refused_resumption_changes_nothing(runs, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(runs.folder / "unfinished", path)
    model = network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1, momentum=.9)
    lock, before, random_state = store.Lock(path), [v.clone() for v in model.state_dict().values()], torch.get_rng_state()
    with pytest.raises(RuntimeError, match="unfinished Recorder of this process"): Recorder(model, optimizer, loss_fn, runs.data[0], path, every=3, resume=True)
    assert all(map(torch.equal, before, model.state_dict().values())) and not optimizer.state and torch.equal(random_state, torch.get_rng_state())
    lock.release()
    Recorder(model, optimizer, loss_fn, runs.data[0], path, every=3, resume=True).finish()


def test_race_for_a_folder(runs, tmp_path):
    "Several processes go on with the same run at once, again and again: one at a time is let in, and the training is made once"
    path = tmp_path / "run"
    shutil.copytree(runs.folder / "unfinished", path)
    def job(tell):
        for _ in range(15):
            try: record(path, runs.data[0], resume=True)
            except RuntimeError as e:
                assert re.search("another process (is recording|has gone on)", str(e))
                tell("refused")
            else: tell("let in")
    attempts = [Attempt(job) for _ in range(4)]
    said = Counter(line for a in attempts for line in a.finish())
    assert said["let in"] and said["refused"] and said.total() == 60
    assert everything(path, runs.data) == runs.right["finished", everything] and set(check_run(path)["status"]) == {"ok"}


def test_locks(tmp_path):
    "One process at a time, also where others come just as it leaves; and nobody holds a folder for one that was killed"
    def job(tell):
        for _ in range(2000):
            try: lock = store.Lock(tmp_path)
            except RuntimeError: continue
            n = int((tmp_path / "n").read_text() or 0)
            (tmp_path / "n").write_text(str(n + 1))
            lock.release()
            tell("in")
    (tmp_path / "n").write_text("0")
    attempts = [Attempt(job) for _ in range(4)]
    assert sum(len(a.finish()) for a in attempts) == int((tmp_path / "n").read_text()) > 100

    def with_worker(tell):
        lock, worker = store.Lock(tmp_path), os.fork()
        if worker: tell(str(worker))
        time.sleep(60)
        os._exit(bool(lock))
    a = Attempt(with_worker)
    assert a.listen(time.monotonic() + 60, stop=str.isdigit)
    os.kill(a.pid, signal.SIGKILL)
    os.waitpid(a.pid, 0)
    try: store.Lock(tmp_path).release()
    finally: os.kill(int(a.lines[0]), signal.SIGKILL)


def test_reader_while_the_writer_closes(runs, tmp_path):
    "A reader neither delays the end of a recording nor is disturbed by it; the next writer finds the log that was left because of him"
    path = tmp_path / "run"
    shutil.copytree(runs.folder / "unfinished", path)
    reader, start = Trajectory(path), time.monotonic()
    assert reader.steps == 11 and not reader.finished
    assert resumed(path, runs.data) == runs.right["finished", resumed] and time.monotonic() - start < 20
    assert reader.refresh().steps == 12 and reader.finished and torch.equal(reader.batch(11), Trajectory(path).batch(11))
    assert (path / "run.sqlite-wal").exists() and resumed(path, runs.data) == runs.right["finished", resumed]
    reader.close()
    gc.collect()
    assert resumed(path, runs.data) == runs.right["finished", resumed] and {f.name for f in path.glob("run.sqlite*")} == {"run.sqlite"}


COMMITS = 300


def by_hand(path, tell):
    "Write a run in hundreds of commits; everything in it follows from the step."
    meta = {"optimizer": "SGD", "groups": [["w"]], "params": {"w": ["float32", [3]]}, "buffers": {}, "slots": {}, "constants": {"c": ["float32", [2]]}, "n_samples": 10**6, "fingerprint": ""}
    writer = TrajectoryWriter(path, meta, {"c": torch.ones(2)}, Schedule(2))
    for t in range(3 * COMMITS):
        writer.hold({"w": torch.full((3,), float(t))})
        writer.append([Part(torch.arange(t, t + 5), np.full(5, t, np.float32), 5, {"model": {"torch": b"%d" % t}})], {"groups": [{"lr": t // 10}], "training": True})
        if t % 100 == 99: writer.mark(f"mark {t + 1}")
        if t % 3 == 2:
            writer.flush({"epoch": t}, {"w": torch.full((3,), t + 1.)})
            time.sleep(.003)
    writer.close({"w": torch.full((3,), t + 1.)})
    tell(f"commits {writer.commits}")


def poll(path, again, tell):
    "Read what grows, until it is finished; with `again`, by opening it anew each time."
    tr, seen, lengths = None, 0, set()
    while not tr or not tr.finished:
        try: tr = Trajectory(path) if again or tr is None else tr.refresh()
        except FileNotFoundError: continue                             # not begun yet
        assert tr.steps >= seen and tr.steps % 3 == 0
        for t in range(seen, tr.steps):
            part, = tr.parts(t)
            assert part.idx.tolist() == list(range(t, t + 5)) and (part.losses == t).all() and part.random == {"model": {"torch": b"%d" % t}} and tr.settings(t)["groups"][0]["lr"] == t // 10
        assert tr.marks == {f"mark {t}": t for t in range(100, tr.steps + 1, 100) if t % 3 == 0 or t < tr.steps}
        for t in [t for t in tr.states() if t >= seen]: assert (tr.state(t)["w"] == t).all()
        assert tr.states() == [t for t in range(tr.steps + tr.finished) if t % 2 == 0 or t == 3 * COMMITS] and (tr.read("constants.safetensors")["c"] == 1).all()
        seen = tr.steps
        lengths.add(seen)
        if again and not tr.finished: tr.close()
    tr.check().close()
    tell(f"lengths {len(lengths)}")


def test_readers_of_a_growing_run(runs):
    "Readers in other processes see valid beginnings that grow, in every moment of hundreds of commits and of the closing"
    path = runs.folder / "growing"
    readers = [Attempt(lambda tell, again=again: poll(path, again, tell)) for again in (False, False, True)]
    assert Attempt(lambda tell: by_hand(path, tell)).finish() == [f"commits {COMMITS + 2}"]
    assert all(int(r.finish()[-1].split()[1]) > 20 for r in readers)
