"""Set before torch is imported: the two workers share two cores, so each computes on one thread."""
import os
import time

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ.setdefault(name, "1")
os.environ["TQDM_DISABLE"] = "1"

from browser import PICTURES
from hypothesis import settings

settings.register_profile("same every time", derandomize=True)   # a landing must not hang on what is drawn
settings.load_profile("same every time")
BEGAN = time.time()


def pytest_terminal_summary(terminalreporter):
    "What the browser test has measured in this run"
    file = PICTURES / "latency.json"
    if file.exists() and file.stat().st_mtime >= BEGAN: terminalreporter.write_line(f"explorer, from key press to changed picture (median): {file.read_text()}")
