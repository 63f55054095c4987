"""Set before torch is imported: the two workers share two cores, so each computes on one thread."""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ.setdefault(name, "1")
os.environ["TQDM_DISABLE"] = "1"

from hypothesis import settings

settings.register_profile("same every time", derandomize=True)   # a landing must not hang on what is drawn
settings.load_profile("same every time")
