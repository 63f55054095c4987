"""Random training runs in float64, and a plain training loop that shares no code with `dit_nb`'s sweeps."""
import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from torch import nn, optim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, TensorDataset, default_collate

from dit_nb import (Recorder, gradient_norm_query, influence, input_gradient_query, leave_one_out, loss_query, margin_query,
                    parameter_query, prediction_query, supervised)

CLASSES, LENGTH, VOCABULARY = 3, 4, 5
ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU, "softplus": nn.Softplus, "silu": nn.SiLU}


# Networks

class Moody(nn.Module):
    "A layer that halves its input in training mode: wrong modes give wrong numbers."
    def forward(self, x): return x / 2 if self.training else x


class Idle(nn.Linear):
    "A linear layer with a parameter that no loss ever meets: optimizers leave it alone, also with weight decay."
    def __init__(self, d, c):
        super().__init__(d, c)
        self.idle = nn.Parameter(torch.randn(2))


class Rare(Idle):
    "A linear layer with a parameter that only batches of an even size meet."
    def forward(self, x): return super().forward(x) + (0 if len(x) % 2 else self.idle.prod())


class Then(nn.Module):
    "A function between modules."
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x): return self.fn(x, self.training)


class Residual(nn.Module):
    "A block with a skip connection around convolution and BatchNorm."
    def __init__(self, act):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), act

    def forward(self, x): return x + self.act(self.norm(self.conv(x)))


class Attention(nn.Module):
    "Two heads through torch's function: `dropout` on their weights, `causal` or not."
    def __init__(self, dropout=0., causal=False):
        super().__init__()
        self.qkv, self.out, self.dropout, self.causal = nn.Linear(4, 12), nn.Linear(4, 4), dropout, causal

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (2, 2)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    "torch's own module, attending to itself."
    def __init__(self, dropout=0.):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, x): return self.heads(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    "The last state of an RNN."
    def __init__(self, kind, h):
        super().__init__()
        self.rnn = kind(4, h, batch_first=True)

    def forward(self, x): return self.rnn(x)[0][:, -1]


class Block(nn.Module):
    "A transformer's block: attention, then a small network, each with its norm and its skip connection."
    def __init__(self, attention, act):
        super().__init__()
        self.attention, self.norms = attention, nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.mlp = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 4))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    "A causal language model: the logits of every next token; head and embedding share their weight if `tied`."
    def __init__(self, act, tied, dropout):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 4), nn.Parameter(torch.randn(LENGTH, 4))
        self.block, self.drop, self.head = Block(Attention(dropout, causal=True), act), nn.Dropout(dropout), nn.Linear(4, VOCABULARY, bias=False)
        if tied: self.head.weight = self.tokens.weight

    def forward(self, x): return self.head(self.block(self.drop(self.tokens(x) + self.places)))


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


def batch_norms(h, act):
    "BatchNorm with averages instead of decay, without a scale of its own, and without running statistics; one layer is used twice."
    average, bare = nn.BatchNorm1d(h, momentum=None), nn.BatchNorm1d(h, affine=False, momentum=.4)
    return nn.Sequential(nn.Linear(4, h, bias=False), average, act, nn.Linear(h, h), bare, act, nn.Linear(h, h),
                         nn.BatchNorm1d(h, track_running_stats=False), act, bare, nn.Linear(h, CLASSES))


def two_layers(*middle): return lambda h, act: nn.Sequential(nn.Linear(4, h), *[m(h, act) for m in middle], nn.Linear(h, CLASSES))


def pooled(make): return lambda h, act: nn.Sequential(make(h, act), Then(lambda x, _: x.mean(1)), nn.Linear(4, CLASSES))


ACT = lambda h, act: act
DROP = lambda h, act: nn.Dropout(.3)
NORM = lambda h, act: nn.BatchNorm1d(h)

KINDS = {
    "logistic": lambda h, act: nn.Linear(4, CLASSES),
    "one hidden layer": two_layers(ACT),
    "two hidden layers": two_layers(ACT, lambda h, act: nn.Linear(h, h), ACT),
    "convolution": lambda h, act: nn.Sequential(nn.Conv2d(1, 2, 2), act, nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(2, CLASSES)),
    "group norm": lambda h, act: nn.Sequential(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), act, nn.Flatten(), nn.Linear(8, CLASSES)),
    "layer norm": lambda h, act: nn.Sequential(nn.Linear(4, h + 2), nn.LayerNorm(h + 2), act, nn.Linear(h + 2, CLASSES)),    # of 2 values: a step
    "tied weights": tied,
    "frozen layer": frozen,
    "idle parameter": lambda h, act: nn.Sequential(nn.Linear(4, h), act, Idle(h, CLASSES)),
    "rare parameter": lambda h, act: nn.Sequential(nn.Linear(4, h), act, Rare(h, CLASSES)),
    "head only": two_layers(ACT),
    "changing modes": two_layers(lambda h, act: Moody(), ACT),
    "batch norm, evaluating": batch_norm,
    "batch norm": two_layers(NORM, ACT),
    "batch norm, images": lambda h, act: nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2, momentum=.3), act, nn.Flatten(), nn.Linear(8, CLASSES)),
    "batch norms": batch_norms,
    "batch norm, changing modes": two_layers(NORM, ACT, DROP),
    "dropout": two_layers(DROP, ACT, DROP),
    "dropout function": two_layers(ACT, lambda h, act: Then(lambda x, training: F.dropout(x, .3, training))),
    "batch norm and dropout": two_layers(DROP, NORM, ACT),
    "residual": lambda h, act: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), Residual(act), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, CLASSES)),
    "attention": pooled(lambda h, act: Attention()),
    "attention, dropout": pooled(lambda h, act: Attention(.2)),
    "multi-head": pooled(lambda h, act: MultiHead()),
    "transformer layer": pooled(lambda h, act: nn.TransformerEncoderLayer(4, 2, 6, dropout=.2, activation=F.gelu, batch_first=True)),
    "embedding": pooled(lambda h, act: nn.Sequential(nn.Embedding(VOCABULARY, 4), act)),
    "GRU": lambda h, act: nn.Sequential(Recurrent(nn.GRU, h), nn.Linear(h, CLASSES)),
    "LSTM": lambda h, act: nn.Sequential(Recurrent(nn.LSTM, h), nn.Linear(h, CLASSES)),
    "vision transformer": lambda h, act: nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(2), Then(lambda x, _: x.mT), *pooled(lambda h, act: Block(MultiHead(), act))(h, act)),
    "GPT": lambda h, act: GPT(act, tied=False, dropout=0.),
    "GPT, tied, dropout": lambda h, act: GPT(act, tied=True, dropout=.2),
}
IMAGES = {"convolution", "group norm", "batch norm, images", "residual", "vision transformer"}
SEQUENCES = {"attention", "attention, dropout", "multi-head", "transformer layer", "GRU", "LSTM"}
TOKENS = {"embedding", "GPT", "GPT, tied, dropout"}
NORMED = {k for k in KINDS if k.startswith("batch norm") and k != "batch norm, evaluating"} | {"residual"}
DRAWING = {k for k in KINDS if "dropout" in k} | {"transformer layer", "batch norm, changing modes"}
LOOPED = {"transformer layer"}                               # vmap draws other numbers: dropout on a transposed tensor follows the memory's order


# Losses, and the forms that data come in

def with_l2(model, batch):
    "Cross entropy with a penalty on the model's parameters inside every sample's loss."
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none") + .05 * sum(p.square().sum() for p in model.parameters())


def coupled(model, batch):
    "A loss in which each sample meets the others of its batch."
    x, y = batch
    z = model(x)
    return F.cross_entropy(z - z.mean(0) / 2, y, reduction="none")


def next_token(model, batch):
    "One loss per token."
    x, y = batch
    return F.cross_entropy(model(x).mT, y, reduction="none")


LOSSES = {"cross entropy": supervised(F.cross_entropy), "squares": supervised(nn.MSELoss()), "with l2": with_l2, "coupled": coupled}


class Augmented(Dataset):
    "Every reading of a sample draws from the generators of torch, numpy and Python."
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        x, shift, scale, noise = self.x[i], random.randrange(LENGTH), np.random.uniform(.8, 1.2), torch.randn(self.x[i].shape, dtype=torch.float64)
        return (x * scale + .2 * noise.to(x) if x.is_floating_point() else x.roll(shift)), self.y[i]


class Ragged(Augmented):
    "Sequences of 2, 3 or 4 places, which `padded` makes batches of."
    def __getitem__(self, i): return self.x[i][:2 + i % 3], self.y[i]


def padded(rows):
    x, y = zip(*rows)
    return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.stack(y)


FORMS = {
    "tensors": TensorDataset,
    "dict": lambda x, y: {"x": x, "y": y},
    "nested": lambda x, y: (x, {"targets": [y]}),
    "rows": lambda x, y: list(zip(x, y)),
    "augmented": Augmented,
    "ragged": Ragged,
}


def pair(batch):
    "Inputs and targets of a batch of any form."
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return x, y["targets"][0] if isinstance(y, dict) else y


# Optimizers: class, learning rate, settings

OPTIMIZERS = {
    "SGD": (optim.SGD, .4, {}),
    "momentum": (optim.SGD, .2, dict(momentum=.9)),
    "dampening": (optim.SGD, .3, dict(momentum=.8, dampening=.3)),
    "Nesterov": (optim.SGD, .2, dict(momentum=.8, nesterov=True)),
    "weight decay": (optim.SGD, .4, dict(momentum=.5, weight_decay=.1)),
    "maximize": (optim.SGD, .05, dict(momentum=.5, weight_decay=.05, maximize=True)),
    "Adam": (optim.Adam, .03, dict(eps=1e-3, betas=(.8, .9))),
    "AdamW": (optim.AdamW, .03, dict(eps=1e-4, weight_decay=.1)),
    "AMSGrad": (optim.Adam, .03, dict(eps=1e-4, betas=(.7, .8), weight_decay=.05, amsgrad=True)),
    "NAdam": (optim.NAdam, .03, dict(eps=1e-3, weight_decay=.05, decoupled_weight_decay=True)),
    "RMSprop": (optim.RMSprop, .02, dict(eps=1e-3, alpha=.9)),
    "RMSprop, centered": (optim.RMSprop, .02, dict(eps=1e-2, alpha=.9, centered=True, momentum=.5, weight_decay=.05)),
    "Adagrad": (optim.Adagrad, .05, dict(eps=1e-4, lr_decay=.1, initial_accumulator_value=.01)),
    "RAdam": (optim.RAdam, .03, dict(eps=1e-3, betas=(.8, .99), weight_decay=.05)),
    "Adamax": (optim.Adamax, .03, dict(eps=1e-4, betas=(.8, .9))),
    "Adadelta": (optim.Adadelta, 1., dict(rho=.8, eps=1e-4, weight_decay=.05)),
    "ASGD": (optim.ASGD, .3, dict(lambd=.1, alpha=.6, t0=2, weight_decay=.05)),
}


# Cases

@dataclass
class Case:
    "A training run: structure drawn by hypothesis, numbers by torch from `seed`."
    kind: str
    optimizer: str
    form: str
    loss: str
    act: str
    width: int
    n: int
    sizes: list
    micro: int | None
    clip: dict
    unused: int
    again: bool
    warm: int
    every: int
    at: list
    groups: int
    seed: int

    @property
    def length(self): return LENGTH if self.kind.startswith("GPT") else None

    @property
    def loss_fn(self):
        loss = next_token if self.length else LOSSES[self.loss]
        return lambda model, batch: loss(model, pair(batch))

    def numbers(self, stream):
        "A generator for one purpose, so that no two purposes share numbers."
        return torch.Generator().manual_seed(100 * self.seed + stream)

    def samples(self, n, stream, dtype):
        "Inputs `[n, ...]`, targets of the loss, and class labels `[n]`."
        g, shape = self.numbers(stream), (1, 3, 3) if self.kind in IMAGES else (LENGTH, 4) if self.kind in SEQUENCES else (4,)
        x = torch.randint(VOCABULARY, (n, LENGTH), generator=g) if self.kind in TOKENS else torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)
        labels = torch.randint(CLASSES, (n,), generator=g)
        if self.length: return x, torch.randint(VOCABULARY, (n, LENGTH), generator=g), labels
        return x, torch.randn(n, CLASSES, generator=g, dtype=torch.float64).to(dtype) if self.loss == "squares" else labels, labels

    def data(self, dtype=torch.float64): return FORMS[self.form](*self.samples(self.n, 0, dtype)[:2])

    @property
    def collate_fn(self): return padded if self.form == "ragged" else None

    def fetch(self, data, idx):
        "The batch of the samples `idx`, without `dit_nb`."
        if self.form in ("rows", "augmented", "ragged"): return (self.collate_fn or default_collate)([data[i] for i in idx.tolist()])
        return data[idx] if self.form == "tensors" else tree_map(lambda v: v[idx], data)

    @cached_property
    def batches(self):
        "Index batches; `unused` of the samples are in none of them; samples may come `again` in the same batch."
        g = self.numbers(1)
        pool = torch.randperm(self.n, generator=g)[self.unused:]
        def draw(size): return torch.randint(len(pool), (size,), generator=g) if self.again else torch.randperm(len(pool), generator=g)[:size]
        return [pool[draw(size)] for size in self.sizes]

    @cached_property
    def never(self): return sorted(set(range(self.n)) - {i for b in self.batches for i in b.tolist()})

    def some(self, k):
        "`k` random samples, one of them never used where there is one."
        order = torch.randperm(self.n, generator=self.numbers(2)).tolist()
        return [*self.never[:1], *(j for j in order if j not in self.never[:1])][:k]

    @cached_property
    def rates(self): return (.2 + torch.rand(len(self.sizes), self.groups, generator=self.numbers(3), dtype=torch.float64)).tolist()

    @cached_property
    def flags(self): return (torch.rand(len(self.sizes), generator=self.numbers(4)) < .5).tolist()

    def model(self, dtype=torch.float64):
        "The model as it is initialised."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return KINDS[self.kind](self.width, ACTIVATIONS[self.act]()).to(dtype)

    def parts(self, model):
        "The trained parameters' names, one list for each parameter group."
        names = [k for k, p in model.named_parameters() if p.requires_grad]
        if self.kind == "head only": names = names[-2:]
        return [names] if self.groups == 1 else [names[1::2], names[::2]]

    def build(self, params, **kw):
        "The optimizer of parameters `{name: tensor}`; a second group decays its weights more, and has other momenta."
        kind, lr, chosen = OPTIMIZERS[self.optimizer]
        other = {**chosen, "weight_decay": chosen.get("weight_decay", 0) + .03}
        if "momentum" in other: other["momentum"] *= .7
        if "betas" in other: other["betas"] = (.6, .85)
        return kind([{"params": [params[k] for k in names], "lr": lr, **own} for names, own in zip(self.parts(self.model()), (chosen, other))], **chosen, **kw)

    def before_step(self, t, model, optimizer, reseed=True):
        "What a user's loop does before step `t`: the schedule, of momenta too; for some models the modes; and random numbers that are the same in each run."
        for group, rate in zip(optimizer.param_groups, self.rates[t]):
            group.setdefault("initial", {k: group[k] for k in ("lr", "momentum", "betas") if k in group})
            start = group["initial"]
            group["lr"] = start["lr"] * rate
            if start.get("momentum"): group["momentum"] = start["momentum"] * (1 - .2 * rate)
            if "betas" in start and self.flags[t]: group["betas"] = (start["betas"][0] * (1 - .1 * rate), start["betas"][1])
        if self.kind.endswith("changing modes"): model.train(self.flags[t])
        if reseed: torch.default_generator.manual_seed(10**6 * (t + 9) + self.seed), np.random.seed(self.seed + t + 9), random.seed(f"{self.seed} {t}")

    def clip_gradients(self, model, optimizer):
        "What a user's loop does before `optimizer.step()`, to the trained parameters in the model's order: that of the sum decides the norm's last bit."
        trained = {p for g in optimizer.param_groups for p in g["params"]}
        params = [p for p in model.parameters() if p in trained]
        if "norm" in self.clip: nn.utils.clip_grad_norm_(params, self.clip["norm"])
        if "value" in self.clip: nn.utils.clip_grad_value_(params, self.clip["value"])

    def start(self, dtype=torch.float64):
        "Model and optimizer where the recording begins: at the initial state, or after `warm` steps of plain training."
        if dtype not in (starts := vars(self).setdefault("_starts", {})):
            model = self.model(dtype)
            optimizer, data = self.build(dict(model.named_parameters())), self.data(dtype)
            for t in range(-self.warm, 0): train(self, t, model, optimizer, data)
            optimizer.zero_grad()
            starts[dtype] = model, optimizer
        return copy.deepcopy(starts[dtype])

    def recorder(self, model, optimizer, dtype=torch.float64, data=None):
        return Recorder(model, optimizer, self.loss_fn, data or self.data(dtype), every=self.every, collate_fn=self.collate_fn, per_token=bool(self.length),
                        **{f"clip_{k}": v for k, v in self.clip.items()})

    def record(self, dtype=torch.float64):
        "The recorded run, and the live training's tensors before every step and at the end."
        model, optimizer = self.start(dtype)
        with self.recorder(model, optimizer, dtype) as rec:
            states = [tensors(model, optimizer)]
            for t, idx in enumerate(self.batches):
                self.before_step(t, model, optimizer)
                rec.step(idx, micro=self.micro)
                states.append(tensors(model, optimizer))
        return rec.finish(), states

    def queries(self, dtype=torch.float64):
        "One query of every kind that the model can answer, and a plain lambda."
        x, targets, labels = self.samples(4, 5, dtype)
        model = self.model()
        name = self.parts(model)[0][0]
        p = model.get_parameter(name)
        found = [loss_query(self.loss_fn, (x, targets)), lambda m: m(x).square().sum() + sum(p.sin().sum() for p in m.parameters()),
                 parameter_query(name, (0,) * p.ndim), gradient_norm_query(self.loss_fn, (x, targets))]
        if not self.length: found += [prediction_query(x, labels), margin_query(x, labels)]
        if self.kind == "batch norms": return found          # it asks for several samples at once
        if not self.length: found += [prediction_query(x[:1], 1, "probability")]
        if x.is_floating_point(): found += [input_gradient_query(x[0], 2, (0, 1, 2) if self.kind in IMAGES else (1, 2) if self.kind in SEQUENCES else 3)]
        return found


def tensors(model, optimizer):
    "Copies of a model's parameters and buffers and of its optimizer's slots, `{name: tensor}`."
    slots = {f"{k}.{s}": v for k, p in model.named_parameters() for s, v in optimizer.state.get(p, {}).items()}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers()), **slots}
    return {k: v.detach().clone() for k, v in found.items() if isinstance(v, torch.Tensor)}


def draw_case(kind, choose, optimizer=None):
    "A training run of one kind of model, `choose` picking from lists."
    normed = kind in NORMED                                  # of less than four values a variance is a step, not a curve
    n, steps = choose(range(8 if normed else 6, 15)), choose(range(3, 6))
    micro = choose([None, None, 4 if normed else choose([1, 3, 4])])
    unused = choose(range(0, 3))
    sizes = [4, 8] if normed and micro else range(4 if normed else 1, n - unused + 1)
    forms = ["tensors", "dict", "nested", "rows", "augmented", *(["ragged"] if kind in SEQUENCES | {"embedding"} else [])]
    again = choose([False, True])
    if not again: sizes = [s for s in sizes if s <= n - unused]
    return Case(kind=kind, optimizer=optimizer or choose(list(OPTIMIZERS)), form=choose(forms), loss=choose(list(LOSSES)), act=choose(list(ACTIVATIONS)),
                width=choose(range(2, 6)), n=n, sizes=[choose(list(sizes)) for _ in range(steps)], micro=micro,
                clip=choose([{}, {}, {"norm": choose([.2, .5])}, {"value": choose([.03, .1])}]), unused=unused, again=again,
                warm=choose([0, 0, 3]), every=choose([1, 2, 3, 5]),
                at=sorted({steps, *(choose(range(1, steps + 1)) for _ in range(2))}), groups=choose([1, 2]), seed=choose(range(10**6)))


@st.composite
def cases(draw, kind):
    "Training runs of one kind of model, by any optimizer."
    return draw_case(kind, lambda options: draw(st.sampled_from(options)))


def crossing(kind, optimizer, seed=0):
    "One training run of a kind of model by an optimizer, the same every time."
    return draw_case(kind, random.Random(f"{kind}, {optimizer}, {seed}").choice, optimizer)


def for_cases(kind, examples, check):
    "Run `check(case)` on random cases of a kind: others for each kind, the same every time. Not shrunk: cases are small, shrinking takes minutes."
    run = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
                   phases=[Phase.generate])(given(case=cases(kind))(check))
    seed(list(KINDS).index(kind))(run)()


# References

def train(case, t, model, optimizer, data, weights=None):
    "Step `t` of a plain training loop, with sample weights `[T, n]` or token weights `[T, n, L]`."
    case.before_step(t, model, optimizer)
    idx = case.batches[t]
    optimizer.zero_grad()
    for some in idx.split(case.micro or len(idx)):
        losses = case.loss_fn(model, case.fetch(data, some))
        if weights is not None: losses = losses * weights[t, some].view(len(some), *[-1] * (losses.ndim - 1))
        (losses.mean() if weights is None and not case.micro else losses.sum() / (len(idx) * (case.length or 1))).backward()
    case.clip_gradients(model, optimizer)
    optimizer.step()


def ask(model, queries):
    "The queries' values, in evaluation mode; the modes are put back."
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    values = [q(model) for q in queries]
    for m, was in modes: m.training = was
    return values


def plain(case, queries, weights=None):
    "`[Q, K]` queries at the boundaries of a plain training loop, with sample weights `[T, n]`."
    (model, optimizer), data, rows = case.start(), case.data(), []
    for t in range(case.at[-1] + 1):
        if t in case.at: rows.append([v.item() for v in ask(model, queries)])
        if t < case.at[-1]: train(case, t, model, optimizer, data, weights)
    return np.array(rows).T


def weights(case, samples=(), by=0., start=0, stop=None):
    "Sample weights `[T, n]`: 1, changed by `by` for `samples` in the steps `start .. stop - 1`; of `(sample, token)` pairs, token weights `[T, n, L]`."
    pairs = torch.as_tensor(samples)
    w = torch.ones(len(case.sizes), case.n, *([LENGTH] if pairs.ndim == 2 else []), dtype=torch.float64)
    if len(samples): w[(slice(start, stop), *(pairs.T if pairs.ndim == 2 else [pairs]))] += by
    return w


def difference(case, queries, j, start=0):
    """`[Q, K]` derivative as sample j (or a token) leaves all steps from `start` on: central differences, once extrapolated (error of order h^4).

    Some optimizers, and clipping, have kinks: where steps `h` and `h / 2` disagree, one lies between, and `h` shrinks."""
    def central(h): return (plain(case, queries, weights(case, [j], -h, start)) - plain(case, queries, weights(case, [j], h, start))) / (2 * h)
    tries = []
    for h in (1e-4, 1e-5, 1e-6):
        whole, half = central(h), central(h / 2)
        tries.append((np.abs(whole - half).max() / max(np.abs(half).max(), 1e-300), (4 * half - whole) / 3))
        if tries[-1][0] < 1e-6: break
    return min(tries, key=lambda found: found[0])[1]


@contextmanager
def double():
    "Within the block, new tensors are float64: torch's counts of steps too, whose powers bias corrections are made of."
    torch.set_default_dtype(torch.float64)
    try: yield
    finally: torch.set_default_dtype(torch.float32)


@sdpa_kernel(SDPBackend.MATH)                                # the one that can be differentiated twice
def unrolled(case, queries):
    """`[Q, K, T, n]` derivatives as each use of a sample leaves: autograd through the whole training, by torch's own optimizer with `differentiable=True`.

    Not for BatchNorm in training mode, whose running statistics torch does not differentiate, and not for ASGD, which writes on what autograd has saved."""
    (model, live), data, w, rows = case.start(), case.data(), weights(case).requires_grad_(), []
    names = {id(p): k for k, p in model.named_parameters()}
    places = [(m._parameters, k, names[id(p)]) for m in model.modules() for k, p in m._parameters.items() if p is not None]
    params = {k: p.detach().clone().requires_grad_(p.requires_grad).clone() for k, p in model.named_parameters()}
    trained = [k for part in case.parts(model) for k in part]
    optimizer = case.build(params, differentiable=True, foreach=False)
    optimizer.load_state_dict(live.state_dict())
    for group in optimizer.param_groups: group["differentiable"] = True
    for t in range(case.at[-1] + 1):
        at = {k: p.clone() if k in trained else p.detach().requires_grad_(p.requires_grad) for k, p in params.items()}     # the optimizer writes on its own
        for place, key, name in places: place[key] = at[name]
        for m in model.modules():
            if isinstance(m, nn.RNNBase): m._flat_weights = [getattr(m, k) for k in m._flat_weights_names]
        if t in case.at: rows.append([-torch.autograd.grad(q, w, retain_graph=True, materialize_grads=True)[0] if q.requires_grad
                                      else torch.zeros_like(w) for q in ask(model, queries)])
        if t == case.at[-1]: break
        case.before_step(t, model, optimizer)
        idx = case.batches[t]
        losses = [case.loss_fn(model, case.fetch(data, some)) for some in idx.split(case.micro or len(idx))]
        total = (torch.cat(losses) * w[t, idx].view(-1, *[1] * (losses[0].ndim - 1))).sum() / (len(idx) * (case.length or 1))
        grads = dict(zip(trained, torch.autograd.grad(total, [at[k] for k in trained], create_graph=True, allow_unused=True)))
        if "norm" in case.clip:
            size = torch.cat([g.flatten() for g in grads.values() if g is not None]).norm()
            grads = {k: None if g is None else g * (case.clip["norm"] / (size + 1e-6)).clamp(max=1.) for k, g in grads.items()}
        if "value" in case.clip: grads = {k: None if g is None else g.clamp(-case.clip["value"], case.clip["value"]) for k, g in grads.items()}
        for k, g in grads.items(): params[k].grad = g
        for group in optimizer.param_groups:
            for p in group["params"] if group.get("momentum") and isinstance(optimizer, optim.SGD) else ():
                if p.grad is None or "momentum_buffer" in optimizer.state[p]: continue
                first = (-p.grad if group["maximize"] else p.grad) + group["weight_decay"] * p                # torch detaches it, so it is put together here
                optimizer.state[p]["momentum_buffer"] = first * (group["dampening"] / group["momentum"])
        for state in optimizer.state.values(): state.update({k: v.double().clone() for k, v in state.items()})     # what a step saved, the next one writes on
        with double(): optimizer.step()
    return np.array([[g.numpy() for g in row] for row in rows]).swapaxes(0, 1)


# What every pair of model and optimizer has to show

def cross(kind, optimizer, seed=0):
    """The deviations in one training run of a kind of model by an optimizer: of the `estimate` from finite differences, and of vectorised removal (`truth`) from
    plain retraining, relative to the largest effect on the query (or 1e-4 of its value, since differences of it round); and of `recorded` from plain training.

    Estimate and truth are of two samples, the one removed from the start, the other from the last boundary but one on."""
    case = crossing(kind, optimizer, seed)
    run, states = case.record()
    queries = (lambda found: found[:2] + found[-1:])(case.queries())
    starts = [0, *case.at]
    removals = [(int(case.batches[starts[k]][0]), k) for k in (0, len(case.at) - 1)]                  # samples that the training meets from there on
    (j, k), (i, l) = removals[::1 if case.seed % 2 else -1]
    method = "auto" if kind in LOOPED else "vmap"
    estimate = np.stack([r.values for r in influence(run, queries, at=case.at, removal="window", progress=False)])
    truth = np.stack([r.values for r in leave_one_out(run, queries, [i], at=case.at, removal="window", method=method, progress=False)])[..., 0]
    whole = plain(case, queries)
    def deviation(got, reference, k): return float((np.abs(got[:, k:, k] - reference[:, k:]) / np.maximum(np.abs(estimate[:, k:, k]).max(-1), 1e-4 * np.abs(whole[:, k:]))).max())
    return {"estimate": deviation(estimate[..., j], difference(case, queries, j, starts[k]), k),
            "truth": deviation(truth, plain(case, queries, weights(case, [i], -1., starts[l])) - whole, l),
            "recorded": distance(states[-1], trained(case))}


def trained(case):
    "The tensors at the end of a plain training loop."
    (model, optimizer), data = case.start(), case.data()
    for t in range(len(case.sizes)): train(case, t, model, optimizer, data)
    return tensors(model, optimizer)


def distance(a, b):
    "The largest difference between two dicts of tensors, which must have the same names."
    assert a.keys() == b.keys()
    return max(float((v.double() - b[k].double()).abs().max()) for k, v in a.items())
