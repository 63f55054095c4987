"""Result files: whole or not at all, bit by bit, and nothing wrong with them goes unnoticed."""
import csv
import errno
import json
import os
import resource
import subprocess
import sys
import threading
import types
from dataclasses import fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

import dit_nb
from dit_nb import (Influence, Query, Recorder, compare, influence, leave_one_out, load_influence, loss_query, plot_agreement, plot_influence, plot_samples, remove,
                    results, store, supervised, verify)

ARRAYS = ("values", "times", "samples", "baseline")
KINDS = (".safetensors", ".csv", ".parquet")


def made(K=2, n=3, removal="always", length=None, tokens=False, groups=False, uses=0, seed=0, **kw):
    "A result of any shape. Its floats are random bits: infinities, every kind of NaN, subnormal numbers."
    rng = np.random.default_rng(seed)
    def floats(*shape): return rng.integers(0, 2**64, shape, dtype=np.uint64, endpoint=False).view(np.float64)
    values = floats(K, *([K] if removal == "window" else []), n, *([] if length is None else [length]))
    times = np.sort(rng.choice(np.arange(1, 3 * K + 2), K, replace=False))
    sets = [rng.integers(0, 99, (rng.integers(1, 4), 2) if rng.random() < .5 else rng.integers(0, 4)) for _ in range(n)] if groups else None
    index = pd.MultiIndex.from_arrays(rng.integers(0, 9, (2, uses)), names=["step", "sample"])
    frame = pd.DataFrame(floats(uses, K), columns=pd.Index(times), index=index) if uses else None
    samples, query = rng.integers(0, 99, (n, 2)) if tokens else rng.permutation(n), Query(len, "loss", "lower")
    notes = {"near_eps": .1, "pullback": {np.int64(4): (1e-3, np.float32(2))}}
    return Influence(values, times, samples, floats(K), query, removal, "exact", "float64", "runs/x", 3 * K + 2, {"epoch 1": 3, "Ende": np.int64(5)}, groups=sets, uses=frame,
                     length=length, **{"n_samples": 99, "notes": notes} | kw)


def same(a, b):
    "Whether two results are the same, bit by bit, but for the query's code and the run."
    for k in ARRAYS: assert (x := getattr(a, k)).tobytes() == (y := getattr(b, k)).tobytes() and x.shape == y.shape and x.dtype == y.dtype, k
    for k in ("removal", "method", "dtype", "path", "steps", "marks", "notes", "length", "n_samples"): assert getattr(a, k) == getattr(b, k), k
    assert (a.query.name, a.query.better, a.effects) == (b.query.name, b.query.better, b.effects)
    assert (a.groups is None) == (b.groups is None) and (a.uses is None) == (b.uses is None)
    if a.groups is not None:
        for g, h in zip(a.groups, b.groups, strict=True): np.testing.assert_array_equal(g, h, strict=True)
    if a.uses is not None:
        pd.testing.assert_frame_equal(a.uses, b.uses)
        assert a.uses.to_numpy().tobytes() == b.uses.to_numpy().tobytes()


def forged(data, change=lambda said, arrays: None):
    "The bytes of a result file after `change(said, arrays)`, with a right checksum."
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    said, arrays = json.loads(header["__metadata__"]["dit_nb"]), dict(safetensors.numpy.load(data))
    change(said, arrays)
    data = safetensors.numpy.save(arrays, {"dit_nb": json.dumps(said)})
    found, checksum = store._seal(data)
    return data[:found.start(1)] + checksum + data[found.end(1):]


def refuses(file, data, match=""):
    "`data` as a file are refused, with a ValueError that names the file and says why."
    file.write_bytes(data)
    with pytest.raises(ValueError) as e: load_influence(file)
    assert str(file) in str(e.value) and match in str(e.value), e.value


# What is saved comes back

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NOTES = st.recursive(PLAIN, lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(st.text() | st.integers(), x), max_leaves=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(K=st.integers(0, 4), n=st.integers(0, 5), removal=st.sampled_from(["always", "window"]), length=st.sampled_from([None, 0, 1, 3]), tokens=st.booleans(),
       groups=st.booleans(), uses=st.integers(0, 6), seed=st.integers(0, 2**32 - 1), n_samples=st.sampled_from([None, 99]), notes=st.dictionaries(st.text(), NOTES, max_size=2))
def test_every_result_comes_back(tmp_path, **kw):
    infl = made(**kw)
    loaded = load_influence(infl.save(tmp_path / "a.safetensors"))
    same(infl, loaded)
    assert loaded.run is None and repr(loaded) == repr(infl) and loaded.save(tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_odd_names_come_back(tmp_path):
    for name in ("", 'a "query", \\ ümlauts\n\t\0', '{"checksum": "' + "0" * 32 + '"}', "\ud800", "∂Q/∂θ"):
        loaded = load_influence(replace(made(), query=Query(len, name), path=name, marks={name: 1}, notes={name: name}).save(tmp_path / "a.safetensors"))
        assert {*map(ascii, (loaded.query.name, loaded.path, *loaded.marks, *loaded.notes, *loaded.notes.values()))} == {ascii(name)}


def test_every_field_is_kept():
    "A field that is added to `Influence` must be added to its file."
    assert {f.name for f in fields(Influence)} - {"run", "groups", "uses", *ARRAYS} == set(results._SAID) - {"better"}


def test_other_arrays_are_converted(tmp_path):
    "Lists, other widths of numbers, strided and big-endian arrays are saved as the same numbers; what would lose something is not."
    plain = replace(made(K=2, n=2), values=np.arange(4.).reshape(2, 2), baseline=np.zeros(2))
    values, times, samples = plain.values, plain.times, plain.samples
    for kw in ({"values": values.astype(">f8")}, {"values": np.asfortranarray(values)}, {"values": values.astype(np.float32)}, {"values": values.repeat(2, axis=1)[:, ::2]},
               {"values": torch.tensor(values)}, {"baseline": [0, 0]}, {"samples": samples.astype(np.int32)}, {"times": times.tolist()}, {"steps": np.int32(plain.steps)}):
        same(plain, load_influence(replace(plain, **kw).save(tmp_path / "a.safetensors")))
    for kw in ({"values": values + 0j}, {"values": values.astype(object)}, {"values": values[0]}, {"samples": samples + .5}, {"samples": np.arange(3)}, {"times": times[::-1]},
               {"times": times * 0}, {"steps": 1}, {"baseline": np.zeros(3)}, {"removal": "window"}, {"removal": "never"}, {"length": 2}, {"groups": [[1]]},
               {"uses": pd.DataFrame()}):
        with pytest.raises(ValueError): replace(plain, **kw).save(tmp_path / "b.safetensors")
    for kw in ({"query": None}, {"notes": {"model": torch.nn.Linear(1, 1)}}):
        with pytest.raises(TypeError): replace(plain, **kw).save(tmp_path / "b.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


# What is damaged is refused

@pytest.fixture(scope="module")
def data(): return results._written(made(groups=True, uses=2))


@pytest.mark.parametrize("shift", range(8))
def test_every_flipped_bit_is_found(tmp_path, data, shift):
    same(made(groups=True, uses=2), results._read(data))
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << shift
        refuses(tmp_path / "a.safetensors", flipped)


def test_every_changed_byte_is_found(tmp_path, data):
    "Among them are spaces that become tabs, which JSON would not mind."
    rng = np.random.default_rng(0)
    for i in range(len(data)):
        for byte in {9, 10, 13, 32, *rng.integers(0, 256, 3).tolist()} - {data[i]}:
            refuses(tmp_path / "a.safetensors", data[:i] + bytes([byte]) + data[i + 1:])


def test_every_other_length_is_found(tmp_path, data):
    for i in range(len(data)): refuses(tmp_path / "a.safetensors", data[:i])
    for more in (b"\0", b" ", data): refuses(tmp_path / "a.safetensors", data + more)
    refuses(tmp_path / "a.safetensors", data[:8] + data)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    refuses(file, safetensors.numpy.save({"values": np.zeros(3)}, {"dit_nb": "{}"}), "none of this package")
    refuses(file, made().save(tmp_path / "a.csv").read_bytes(), "none of this package")
    refuses(file, os.urandom(1000), "none of this package")


@pytest.mark.parametrize("key", ["format", *results._SAID])
def test_missing_and_mistyped_metadata_are_named(tmp_path, data, key):
    refuses(tmp_path / "a.safetensors", forged(data, lambda said, arrays: said.pop(key)), key)
    refuses(tmp_path / "a.safetensors", forged(data, lambda said, arrays: said.update({key: 1.5})), key)


@pytest.mark.parametrize("name", ["values", "times", "samples", "baseline", "group_sizes", "group_members", "use_steps", "use_samples", "uses"])
def test_missing_and_misshapen_arrays_are_named(tmp_path, data, name):
    def change(f): return forged(data, lambda said, arrays: arrays.update({name: np.ascontiguousarray(f(arrays[name]))}))
    file = tmp_path / "a.safetensors"
    refuses(file, forged(data, lambda said, arrays: arrays.pop(name)), f"missing or too many: {name}")
    for dtype in {np.uint64, np.int64, np.float64} - {results._dtype(name).type}: refuses(file, change(lambda a: a.view(dtype)), name)
    refuses(file, change(lambda a: np.zeros(a.shape, dtype=np.float32)), name)
    for f in (lambda a: a[None], lambda a: a.ravel()[0], lambda a: a[:-1], lambda a: np.concatenate([a, a])): refuses(file, change(f), " ")


def test_other_contents_are_named(tmp_path, data):
    def refused(match, change): refuses(tmp_path / "a.safetensors", forged(data, change), match)
    same(made(groups=True, uses=2), results._read(forged(data)))
    refused("format 2; this version reads format 1", lambda said, arrays: said.update(format=2))
    refused("removal is 'never'", lambda said, arrays: said.update(removal="never"))
    refused("values has shape", lambda said, arrays: said.update(removal="window"))
    refused("values has shape", lambda said, arrays: said.update(length=3))
    refused("times are", lambda said, arrays: said.update(steps=1))
    refused("times are", lambda said, arrays: arrays.update(times=arrays["times"][::-1].copy()))
    refused("too many: more", lambda said, arrays: arrays.update(more=arrays["times"]))
    refused("", lambda said, arrays: said.update(notes=["set", []]))
    refused("", lambda said, arrays: arrays.update(group_sizes=arrays["group_sizes"] - 1))
    refused("", lambda said, arrays: arrays.update(group_sizes=arrays["group_sizes"] + [2, -4, 2]))


def test_links_folders_and_devices_are_refused(tmp_path):
    file = made().save(tmp_path / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(file), (tmp_path / "nowhere.safetensors").symlink_to("gone")
    (tmp_path / "folder.safetensors").mkdir(), os.mkfifo(tmp_path / "pipe.safetensors")
    before = sorted(tmp_path.iterdir())
    for name, what in [("link", "link"), ("nowhere", "link"), ("folder", "folder"), ("pipe", "device")]:
        for f in (load_influence, made(seed=1).save):
            with pytest.raises(ValueError, match=f"{name}.safetensors is a .*{what}"): f(tmp_path / f"{name}.safetensors")
    same(made(), load_influence(file))
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(FileNotFoundError, match="b.safetensors does not exist"): load_influence(tmp_path / "b.safetensors")


# Whole or not at all

def files(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_file(tmp_path, kind):
    file = made(n=400).save(tmp_path / f"a{kind}")
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))                       # the kernel itself refuses to write more
    try:
        with pytest.raises(OSError) as e: made(n=400, seed=1).save(file)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.errno == errno.EFBIG and files(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, kind, call, error):
    def fail(*_): raise error
    file = made().save(tmp_path / f"a{kind}")
    before = files(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, call, fail)
        with pytest.raises(type(error)): made(seed=1).save(file)
    assert files(tmp_path) == before
    made(seed=1).save(file)
    assert files(tmp_path).keys() == before.keys() and files(tmp_path) != before


def test_a_killed_process_leaves_the_old_file(tmp_path):
    file = made().save(tmp_path / "a.safetensors")
    code = f"""if True:
        import os, signal
        from dit_nb.results import write_atomically
        def write(temporary):
            with open(temporary, "wb") as f:
                f.write(b"half")
                f.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        write_atomically({str(file)!r}, write)"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(dit_nb.__file__).parents[1])}, capture_output=True)
    assert done.returncode == -9, done.stderr
    same(made(), load_influence(file))
    assert len(left := sorted(f.name for f in tmp_path.iterdir())) == 2 and left[1].startswith("a.safetensors.") and left[1].endswith(".tmp")
    made(seed=1).save(file)


def test_the_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace
    def synced(f):
        calls.append(("sync", os.fstat(f).st_ino))
        fsync(f)
    def renamed(a, b):
        calls.append(("rename", os.stat(a).st_ino))
        assert Path(a).parent == Path(b).parent
        rename(a, b)
    monkeypatch.setattr(os, "fsync", synced), monkeypatch.setattr(os, "replace", renamed)
    inode = made().save(tmp_path / "a.safetensors").stat().st_ino
    assert calls == [("sync", inode), ("rename", inode), ("sync", tmp_path.stat().st_ino)]


def test_readers_meet_whole_files_only(tmp_path):
    "Two writers replace one file again and again, while it is read."
    file, both = tmp_path / "a.safetensors", [made(n=200, seed=seed) for seed in (0, 1)]
    both[0].save(file)
    writers = [threading.Thread(target=lambda infl=infl: [infl.save(file) for _ in range(40)]) for infl in both]
    for w in writers: w.start()
    seen = set()
    while any(w.is_alive() for w in writers): seen.add(load_influence(file).values.tobytes())
    for w in writers: w.join()
    assert seen <= {infl.values.tobytes() for infl in both} and [f.name for f in tmp_path.iterdir()] == [file.name]


def test_permissions_are_those_of_the_folder_or_the_old_file(tmp_path):
    tmp_path.chmod(0o750)
    file = made().save(tmp_path / "a.safetensors")
    assert file.stat().st_mode & 0o777 == 0o640
    file.chmod(0o604)
    assert made().save(file).stat().st_mode & 0o777 == 0o604


def test_a_new_folder_is_made(tmp_path): same(made(), load_influence(made().save(str(tmp_path / "new" / "folder" / "a.SAFETENSORS"))))


# The table

SHAPES = [{}, {"removal": "window"}, {"length": 3}, {"length": 3, "removal": "window"}, {"tokens": True}, {"groups": True}, {"K": 0}, {"n": 0}, {"K": 1, "n": 1}]


@pytest.mark.parametrize("kw", [{}, {"length": 2}], ids=str)
def test_what_the_uses_in_a_window_do_later(kw):
    infl = made(**{"K": 4, "n": 3, "removal": "window"} | kw)
    infl.values = np.random.default_rng(0).normal(size=infl.values.shape)
    edges, end = [0, *infl.times.tolist()], int(infl.times[-1])
    parts = [infl.window(a, b, at=end) for a, b in zip(edges, edges[1:])]
    np.testing.assert_allclose(sum(parts), infl.window(0, end))                               # all uses, seen at the end
    assert all(infl.window(a, b, at=b).tolist() == infl.window(a, b).tolist() for a, b in infl.windows())
    with pytest.raises(ValueError, match="before the end of the window"): infl.window(0, end, at=edges[1])
    with pytest.raises(ValueError, match="not a boundary"): infl.window(0, edges[1], at=end + 1)
    always = made(K=3, n=4)
    with pytest.raises(ValueError, match="removal='window'"): always.window(0, at=int(always.times[-1]))


@pytest.mark.parametrize("kw", SHAPES, ids=str)
def test_the_table_holds_every_window(kw):
    infl = made(**{"K": 3, "n": 4} | kw)
    infl.values = np.random.default_rng(0).normal(size=infl.values.shape)
    table = infl.table()
    who = ["group" if infl.groups else "sample"] + (["token"] if infl.length or infl.samples.ndim == 2 else [])
    assert table.columns.tolist() == [*who, "from", "to", "window", "influence"] and table.attrs == {"query": infl.query.name, "removal": infl.removal, "method": "exact"}
    rows = [(*np.atleast_1d(j), *([i] if infl.length else []), t1, t2, infl.name(t1, t2), float(v)) for t1, t2 in infl.windows()
            for j, x in zip(infl.samples.tolist(), infl.window(t1, t2)) for i, v in enumerate(np.atleast_1d(x))]
    assert [tuple(row) for row in table.itertuples(index=False)] == rows
    if len(infl.times) > 1:
        pair = infl.table([(infl.times[0], int(infl.times[-1]))])
        assert pair["influence"].tolist() == infl.window(infl.times[0]).ravel().tolist() and (pair["from"] == infl.times[0]).all()
        with pytest.raises(ValueError, match="not a boundary"): infl.table([(0, infl.steps)])
    assert infl.table([]).columns.tolist() == table.columns.tolist() and infl.table([]).empty


@pytest.mark.parametrize("kw", SHAPES, ids=str)
def test_the_table_is_written_in_full(tmp_path, kw):
    infl = made(**{"K": 3, "n": 4} | kw)
    infl.values, infl.query = np.random.default_rng(0).normal(size=infl.values.shape), Query(len, 'a "query", in words')
    with open(infl.save(tmp_path / "a.csv"), newline="") as f: header, *rows = csv.reader(f)
    table = infl.table()
    assert header == table.columns.tolist() and [float(row[-1]) for row in rows] == table["influence"].tolist() and [row[-2] for row in rows] == table["window"].tolist()
    parquet = pd.read_parquet(infl.save(tmp_path / "a.parquet"))
    pd.testing.assert_frame_equal(parquet, table, check_exact=True, check_dtype=len(table) > 0)
    assert parquet.attrs == table.attrs and sorted(f.name for f in tmp_path.iterdir()) == ["a.csv", "a.parquet"]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'dit_nb\[parquet\]'"): made().save(tmp_path / "new" / "a.parquet")
    made().save(tmp_path / "a.csv")
    assert [f.name for f in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("name", ["a", "a.pkl", "a.npz", "a.pt", ".csv", "a.csv.gz", "csv"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.safetensors .*\.parquet .*\.csv"): made().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


# Real results

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A run, and results on it."
    folder, g = tmp_path_factory.mktemp("world"), torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g, dtype=torch.float64), torch.randint(3, (12,), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).double()
    loss_fn = supervised(F.cross_entropy)
    with Recorder(model, torch.optim.SGD(model.parameters(), lr=.3), loss_fn, torch.utils.data.TensorDataset(x, y), folder / "run") as rec:
        for _ in range(3):
            for idx in rec.batches(4): rec.step(idx)
    run, q = rec.finish(), loss_query(loss_fn, (x, y))
    found = {"always": influence(run, q, per_step=True), "window": influence(run, q, removal="window"),
             "exact": leave_one_out(run, q, [0, 5]), "sets": remove(run, q, [[0, 1], [5]], removal="window")}
    return run, q, found, {k: infl.save(folder / f"{k}.safetensors") for k, infl in found.items()}


@pytest.mark.parametrize("kind", ["always", "window", "exact", "sets"])
def test_real_results_come_back(world, kind):
    run, q, found, saved = world
    infl, loaded, bound = found[kind], load_influence(saved[kind]), load_influence(saved[kind], run)
    for other in (loaded, bound): same(infl, other)
    assert loaded.run is None and bound.run is run and infl.n_samples == 12
    with pytest.raises(RuntimeError, match="set infl.query"): loaded.query(run.model)
    with pytest.raises(RuntimeError, match="set infl.query"): influence(run, loaded.query)


def test_loaded_results_need_no_run(world):
    *_, found, saved = world
    infl, inside, exact, sets = found.values()
    a, b, c, d = (load_influence(saved[k]) for k in found)
    for x, y in ((infl, a), (inside, b), (exact, c), (sets, d)):
        assert x.top(3, "epoch 1").equals(y.top(3, "epoch 1")) and x.table().equals(y.table()) and repr(x) == repr(y) and x.columns == y.columns
    assert infl.frame().equals(a.frame()) and compare(a, c).equals(compare(infl, exact)) and compare(b, d).equals(compare(inside, sets))
    for draw in (lambda i, t: plot_influence(i, [0, 5], truth=t), plot_agreement, lambda i, t: plot_samples(i, k=2)):
        np.testing.assert_array_equal(pixels(draw, infl, exact), pixels(draw, a, c))


def pixels(draw, *shown):
    "The picture that `draw` makes."
    fig = np.ravel(draw(*shown))[0].figure
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    plt.close(fig)
    return np.asarray(canvas.buffer_rgba())


def test_images_need_the_data_set_only(tmp_path):
    train, _ = dit_nb.digits()
    infl = replace(made(K=2, n=20), values=np.random.default_rng(0).normal(size=(2, 20)), query=Query(len, "loss", "lower"), n_samples=None)
    loaded = load_influence(infl.save(tmp_path / "a.safetensors"))
    infl.run = types.SimpleNamespace(dataset=train, n_samples=len(train))
    np.testing.assert_array_equal(pixels(plot_samples, infl), pixels(plot_samples, loaded, train))


def test_a_loaded_result_is_verified_with_run_and_query(world):
    run, q, found, saved = world
    with pytest.raises(ValueError, match=r"load_influence\(path, run\)"): verify(load_influence(saved["always"]), 2)
    bound = load_influence(saved["always"], run)
    bound.query = q
    pd.testing.assert_frame_equal(verify(bound, 3, progress=False), verify(found["always"], 3, progress=False))


@pytest.mark.parametrize("kw", [{"steps": 10}, {"n_samples": 13}, {"dtype": "float32"}])
def test_another_run_is_refused(world, tmp_path, kw):
    run, _, found, _ = world
    file = replace(found["exact"], **kw).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors is about a run with"): load_influence(file, run)
    assert load_influence(file).run is None
