"""What the benchmarks measure with, and what they train on."""
import os
import time

import torch.nn.functional as F

from dit_nb import digits, fashion_mnist


SMALL = os.environ.get("DIT_NB_BENCHMARKS") == "small"       # as the tests run the benchmarks; what their pages show is of the whole


def sized(full, small): return small if SMALL else full


def in_turns(repeats, **contestants):
    "Seconds of processor time, the best of `repeats` after a first one; contestants take turns, so that a slow moment hits all."
    best = {k: float("inf") for k in contestants}
    for _ in range(0 if SMALL else repeats, -1, -1):                                           # the first pays one-off costs, and will not be the best
        for k, f in contestants.items():
            start = time.process_time()
            f()
            best[k] = min(best[k], time.process_time() - start)
    return best


def clothes(n=8192):
    "Return `(train, val, name)` of Fashion-MNIST, `n` images for training; where it is not installed, of scikit-learn's digits, enlarged to 28 by 28 pixels."
    try: return fashion_mnist(n=n), fashion_mnist(train=False, n=1000), "Fashion-MNIST"
    except FileNotFoundError: pass
    def enlarged(s): return type(s)(F.interpolate(s.x.view(-1, 1, 8, 8), size=28, mode="bilinear"), s.y, s.classes)
    return (*map(enlarged, digits()), "digits, enlarged to 28 by 28 pixels (Fashion-MNIST is not installed: on Debian and Ubuntu the package dataset-fashion-mnist)")
