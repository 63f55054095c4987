"""Random training runs in float64, and a plain training loop that shares no code with `dit_nb`'s sweeps."""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from dit_nb import (Recorder, gradient_norm_query, input_gradient_query, loss_query, margin_query, parameter_query,
                    prediction_query, supervised)

CLASSES = 3
ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU, "softplus": nn.Softplus, "silu": nn.SiLU}


# Networks

class Moody(nn.Module):
    "A layer that halves its input in training mode: wrong modes give wrong numbers."
    def forward(self, x): return x / 2 if self.training else x


class Idle(nn.Linear):
    "A linear layer with a parameter that no loss ever meets: SGD leaves it alone, also with weight decay."
    def __init__(self, d, c):
        super().__init__(d, c)
        self.idle = nn.Parameter(torch.randn(2))


class Rare(Idle):
    "A linear layer with a parameter that only batches of an even size meet."
    def forward(self, x): return super().forward(x) + (0 if len(x) % 2 else self.idle.prod())


def tied(h, act):
    "Two layers that share one weight."
    net = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, CLASSES))
    net[2].weight = net[0].weight
    return net


def frozen(h, act):
    "The first layer is not trained."
    net = nn.Sequential(nn.Linear(4, h), act, nn.Linear(h, h), act, nn.Linear(h, CLASSES))
    net[0].requires_grad_(False)
    return net


def batch_norm(h, act):
    "BatchNorm in evaluation mode, between layers in training mode."
    net = nn.Sequential(nn.Linear(4, h), nn.BatchNorm1d(h), act, nn.Linear(h, CLASSES))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(.5, 2)
    net[1].eval()
    return net


KINDS = {
    "logistic": lambda h, act: nn.Linear(4, CLASSES),
    "one hidden layer": lambda h, act: nn.Sequential(nn.Linear(4, h), act, nn.Linear(h, CLASSES)),
    "two hidden layers": lambda h, act: nn.Sequential(nn.Linear(4, h), act, nn.Linear(h, h), act, nn.Linear(h, CLASSES)),
    "convolution": lambda h, act: nn.Sequential(nn.Conv2d(1, 2, 2), act, nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(2, CLASSES)),
    "group norm": lambda h, act: nn.Sequential(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), act, nn.Flatten(), nn.Linear(8, CLASSES)),
    "layer norm": lambda h, act: nn.Sequential(nn.Linear(4, h + 2), nn.LayerNorm(h + 2), act, nn.Linear(h + 2, CLASSES)),    # of 2 values: a step
    "batch norm": batch_norm,
    "tied weights": tied,
    "frozen layer": frozen,
    "idle parameter": lambda h, act: nn.Sequential(nn.Linear(4, h), act, Idle(h, CLASSES)),
    "rare parameter": lambda h, act: nn.Sequential(nn.Linear(4, h), act, Rare(h, CLASSES)),
    "head only": lambda h, act: nn.Sequential(nn.Linear(4, h), act, nn.Linear(h, CLASSES)),
    "changing modes": lambda h, act: nn.Sequential(nn.Linear(4, h), Moody(), act, nn.Linear(h, CLASSES)),
}


# Losses

def with_l2(model, batch):
    "Cross entropy with a penalty on the model's parameters inside every sample's loss."
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none") + .05 * sum(p.square().sum() for p in model.parameters())


def coupled(model, batch):
    "A loss in which each sample meets the others of its batch."
    x, y = batch
    z = model(x)
    return F.cross_entropy(z - z.mean(0) / 2, y, reduction="none")


LOSSES = {"cross entropy": supervised(F.cross_entropy), "squares": supervised(nn.MSELoss()), "with l2": with_l2, "coupled": coupled}


# Cases

@dataclass
class Case:
    "A training run: structure drawn by hypothesis, numbers by torch from `seed`."
    kind: str
    loss: str
    act: str
    width: int
    n: int
    sizes: list
    unused: int
    every: int
    at: list
    groups: int
    decay: float
    seed: int

    @property
    def loss_fn(self): return LOSSES[self.loss]

    def numbers(self, stream):
        "A generator for one purpose, so that no two purposes share numbers."
        return torch.Generator().manual_seed(100 * self.seed + stream)

    def samples(self, n, stream, dtype):
        "Inputs `[n, ...]`, targets of the loss, and class labels `[n]`."
        g, shape = self.numbers(stream), (1, 3, 3) if self.kind in ("convolution", "group norm") else (4,)
        x, labels = torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype), torch.randint(CLASSES, (n,), generator=g)
        targets = torch.randn(n, CLASSES, generator=g, dtype=torch.float64).to(dtype) if self.loss == "squares" else labels
        return x, targets, labels

    def data(self, dtype=torch.float64): return TensorDataset(*self.samples(self.n, 0, dtype)[:2])

    @cached_property
    def batches(self):
        "Index batches without repetition; `unused` of the samples are in none of them."
        g = self.numbers(1)
        pool = torch.randperm(self.n, generator=g)[self.unused:]
        return [pool[torch.randperm(len(pool), generator=g)[:size]] for size in self.sizes]

    @cached_property
    def never(self): return sorted(set(range(self.n)) - {i for b in self.batches for i in b.tolist()})

    def some(self, k):
        "`k` random samples, one of them never used where there is one."
        order = torch.randperm(self.n, generator=self.numbers(2)).tolist()
        return [*self.never[:1], *(j for j in order if j not in self.never[:1])][:k]

    @cached_property
    def rates(self): return (.05 + .4 * torch.rand(len(self.sizes), self.groups, generator=self.numbers(3), dtype=torch.float64)).tolist()

    def model(self, dtype=torch.float64):
        "The model at the start of the run, with the modules' modes."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return KINDS[self.kind](self.width, ACTIVATIONS[self.act]()).to(dtype)

    def parts(self, model):
        "The trained parameters' names, one list for each parameter group."
        names = [k for k, p in model.named_parameters() if p.requires_grad]
        if self.kind == "head only": names = names[-2:]
        return [names] if self.groups == 1 else [names[1::2], names[::2]]

    def optimizer(self, model):
        "SGD; a second group has half the weight decay."
        params = dict(model.named_parameters())
        return torch.optim.SGD([{"params": [params[k] for k in names], "weight_decay": self.decay / (1 + i)}
                                for i, names in enumerate(self.parts(model))], lr=1.)

    def before_step(self, t, model, optimizer):
        "What a user's loop does before step `t`: the schedule, and for one kind of model the modes."
        for group, lr in zip(optimizer.param_groups, self.rates[t]): group["lr"] = lr
        if self.kind == "changing modes": model.train(bool(torch.rand(len(self.sizes), generator=self.numbers(4))[t] < .5))

    def record(self, dtype=torch.float64):
        "The recorded run, and the live training's parameters before every step and at the end."
        model, states = self.model(dtype), []
        optimizer = self.optimizer(model)
        with Recorder(model, optimizer, self.loss_fn, self.data(dtype), every=self.every) as rec:
            for t, idx in enumerate(self.batches):
                self.before_step(t, model, optimizer)
                states.append({k: p.detach().clone() for k, p in model.named_parameters()})
                rec.step(idx)
        states.append({k: p.detach().clone() for k, p in model.named_parameters()})
        return rec.finish(), states

    def queries(self, dtype=torch.float64):
        "One query of every kind, and a plain lambda."
        x, targets, labels = self.samples(4, 5, dtype)
        model = self.model()
        name = self.parts(model)[0][0]
        p = model.get_parameter(name)
        return [loss_query(self.loss_fn, (x, targets)), prediction_query(x, labels), prediction_query(x[:1], 1, "probability"),
                margin_query(x, labels), input_gradient_query(x[0], 2, (0, 1, 2) if x.ndim > 2 else 3),
                parameter_query(name, (0,) * p.ndim), gradient_norm_query(self.loss_fn, (x, targets)),
                lambda m: m(x).square().sum() + sum(p.sin().sum() for p in m.parameters())]


@st.composite
def cases(draw, kind):
    "Training runs of one kind of model."
    n, steps, unused = draw(st.integers(6, 20)), draw(st.integers(2, 12)), draw(st.integers(0, 2))
    return Case(kind=kind, loss=draw(st.sampled_from(list(LOSSES))), act=draw(st.sampled_from(list(ACTIVATIONS))), width=draw(st.integers(2, 6)),
                n=n, sizes=draw(st.lists(st.integers(1, n - unused), min_size=steps, max_size=steps)), unused=unused,
                every=draw(st.sampled_from([1, 2, 3, 5])), at=sorted(draw(st.sets(st.integers(1, steps), min_size=1, max_size=4))),
                groups=draw(st.integers(1, 2)), decay=draw(st.sampled_from([0., .02])), seed=draw(st.integers(0, 10**6)))


def for_cases(kind, examples, check):
    "Run `check(case)` on random cases of a kind: others for each kind, the same every time. Not shrunk: cases are small, shrinking takes minutes."
    run = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
                   phases=[Phase.generate])(given(case=cases(kind))(check))
    seed(list(KINDS).index(kind))(run)()


# References

def ask(model, queries):
    "The queries' values, in evaluation mode; the modes are put back."
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    values = [q(model) for q in queries]
    for m, was in modes: m.training = was
    return values


def plain(case, queries, weights=None):
    "`[Q, K]` queries at the boundaries of a plain training loop, with sample weights `[T, n]`."
    model, data, rows = case.model(), case.data(), []
    optimizer = case.optimizer(model)
    for t, idx in enumerate([*case.batches, None]):
        if t in case.at: rows.append([v.item() for v in ask(model, queries)])
        if t == case.at[-1]: break
        case.before_step(t, model, optimizer)
        losses = case.loss_fn(model, data[idx])
        if weights is not None: losses = weights[t, idx] * losses
        optimizer.zero_grad()
        (losses.sum() / len(idx)).backward()
        optimizer.step()
    return np.array(rows).T


def weights(case, samples=(), by=0., start=0, stop=None):
    "Sample weights `[T, n]`: 1, changed by `by` for `samples` in the steps `start .. stop - 1`."
    w = torch.ones(len(case.sizes), case.n, dtype=torch.float64)
    w[start:stop, list(samples)] += by
    return w


def difference(case, queries, j, start=0, h=4e-3):
    "`[Q, K]` derivative as sample j leaves all steps from `start` on: central differences, once extrapolated (error of order h^4)."
    def central(h): return (plain(case, queries, weights(case, [j], -h, start)) - plain(case, queries, weights(case, [j], h, start))) / (2 * h)
    return (4 * central(h / 2) - central(h)) / 3


def unrolled(case, queries):
    "`[Q, K, T, n]` derivatives as each use of a sample leaves: autograd through the whole training, by hand."
    model, data = case.model(), case.data()
    names = {id(p): k for k, p in model.named_parameters()}
    places = [(m._parameters, k, names[id(p)]) for m in model.modules() for k, p in m._parameters.items() if p is not None]
    params = {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in model.named_parameters()}
    w, parts, optimizer, rows = weights(case).requires_grad_(), case.parts(model), case.optimizer(model), []
    decays = [g["weight_decay"] for g in optimizer.param_groups]
    untrained = set(params).difference(*parts)
    for t, idx in enumerate([*case.batches, None]):
        params |= {k: params[k].detach().requires_grad_(params[k].requires_grad) for k in untrained}      # else queries with a gradient reach the past
        for place, key, name in places: place[key] = params[name]
        if t in case.at: rows.append([-torch.autograd.grad(q, w, retain_graph=True, materialize_grads=True)[0] if q.requires_grad
                                      else torch.zeros_like(w) for q in ask(model, queries)])
        if t == case.at[-1]: break
        case.before_step(t, model, optimizer)
        loss = (w[t, idx] * case.loss_fn(model, data[idx])).sum() / len(idx)
        for part, lr, decay in zip(parts, case.rates[t], decays):
            grads = torch.autograd.grad(loss, [params[k] for k in part], create_graph=True, allow_unused=True)
            params |= {k: params[k] - lr * (g + decay * params[k]) for k, g in zip(part, grads) if g is not None}
    return np.array([[g.numpy() for g in row] for row in rows]).swapaxes(0, 1)
