"""A real browser and real servers for the tests: Debian's Chromium (or another), driven by Playwright, against Voila and JupyterLab on this machine only."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "_screenshots"                        # what the tests saw, to be looked at
QUIET = ("--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars").split()


def chromium():
    "The path of a browser of Chromium's family, or None"
    return next((found for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable") if (found := shutil.which(name))), None)


def missing():
    "Why there is no browser to test with, or an empty text"
    try: import playwright, voila                        # noqa: F401
    except ImportError as e: return f"{e}: pip install -e '.[dev]'"
    return "" if chromium() else "no Chromium was found: apt-get install --no-install-recommends chromium"


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(kind, folder):
    "The address of a server of the notebooks in `folder`: `voila` serves them as pages, `lab` is JupyterLab. It has settings of its own, and this tree's package."
    port, own = _free_port(), Path(folder) / f".{kind}"
    env = os.environ | {f"JUPYTER_{k}_DIR": str(own / k.lower()) for k in ("CONFIG", "RUNTIME", "DATA")} | {"IPYTHONDIR": str(own / "ipython"), "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    for name in ("config", "runtime", "data", "ipython"): (own / name).mkdir(parents=True, exist_ok=True)
    command = {"voila": ["-m", "voila", str(folder), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--show_tracebacks=True"],
               "lab": ["-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None"]}[kind]
    ready = f"http://127.0.0.1:{port}" + {"voila": "/voila/static/voila.js", "lab": "/api/status"}[kind]
    with open(own / "log", "w") as log:
        process = subprocess.Popen([sys.executable, *command], env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                try: urllib.request.urlopen(ready, timeout=2); break
                except OSError:
                    if process.poll() is not None: raise RuntimeError(f"{kind} has ended:\n{(own / 'log').read_text()[-2000:]}") from None
                    time.sleep(.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def browser():
    "A browser that reaches this machine only."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        b = p.chromium.launch(executable_path=chromium(), args=[*root, *QUIET])
        try: yield b
        finally: b.close()


@contextmanager
def page(b, address, dark=False, size=(1100, 1000)):
    "A page of the browser at an address; what it asks of other hosts is refused."
    context = b.new_context(viewport=dict(zip(("width", "height"), size)), color_scheme="dark" if dark else "light")
    p = context.new_page()
    p.set_default_timeout(90_000)
    p.route("**/*", lambda r: r.continue_() if "//127.0.0.1:" in r.request.url or not r.request.url.startswith("http") else r.abort())
    try:
        p.goto(address)
        yield p
    finally: context.close()


def picture(p, name):
    PICTURES.mkdir(exist_ok=True)
    p.screenshot(path=PICTURES / f"{name}.png")
