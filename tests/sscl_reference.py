"""A student and a teacher, and the SSCL loss between them recomputed with loops from features that hooks collect."""
import io
import logging
import math
from contextlib import contextmanager

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss

T = 2
STAGES = ['layer1', 'layer2', 'layer3', 'layer4']
BATCH_ONLY = dict(cka_momentum=1.)  # the loss then depends on this step's features alone


def images_of(n=8, seed=0, size=32, dtype=torch.float64):
    """Noisy copies of three prototypes, so that features of two networks are similar at all."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return (prototypes[torch.arange(n) % 3] + 0.3 * noise).to(dtype)


def create(name, seed=0, dtype=torch.float64, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith('spiking_'):
            kwargs.setdefault('timesteps', T)
        if name.endswith('test_resnet'):
            # else a block is an identity at first, its convolutions without gradient
            kwargs.setdefault('zero_init_last', False)
        return timm.create_model(name, num_classes=5, **kwargs).to(dtype)


def resnets(seed=0, dtype=torch.float64, layers=(2, 1, 1, 2)):
    """A spiking student in training mode and a teacher whose weights it starts from; stages 1 and 4 hold two blocks."""
    student = create('spiking_test_resnet', seed, dtype, layers=layers).train()
    return student, create('test_resnet', seed, dtype, layers=layers)


def attach(student, teacher, **options):
    dtype = next(student.parameters()).dtype
    return SSCLLoss(student, teacher, **{'temperature': 0.1, **options}).to(dtype)  # as nce_by_hand's


def tapped(model):
    return [getattr(model, stage)[-1] for stage in STAGES] + [model.global_pool]


@contextmanager
def outputs_of(*modules):
    """Outputs of modules during the block, by the test's own hooks; removed afterwards."""
    outputs = [None] * len(modules)
    handles = [m.register_forward_hook(lambda _m, _a, out, i=i: outputs.__setitem__(i, out))
               for i, m in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def teacher_features(teacher, x):
    with torch.no_grad(), outputs_of(*tapped(teacher)) as seen:
        teacher.eval()(x)
    return seen


def gradients(*modules):
    return [p.grad for m in modules for p in m.parameters()]


def num_hooks(model):
    names = ('_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
             '_forward_hooks_always_called', '_backward_hooks', '_backward_pre_hooks')
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


# ---- the reference, in loops

def rows(feature, timesteps):
    """(T * B, ...), time-major, as a list of B vectors with time flattened in."""
    f = feature.detach().double().unflatten(0, (timesteps, -1))
    return [f[:, i].flatten() for i in range(f.shape[1])]


def hsic(k, l):
    n = len(k)
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    totals = sum(map(sum, k)) * sum(map(sum, l)) / ((n - 1) * (n - 2))
    cross = sum(k[i][j] * l[j][m] for i in range(n) for j in range(n) for m in range(n)) * 2 / (n - 2)
    return (trace + totals - cross) / (n * (n - 3))


def hsic_terms(s_rows, a_rows):
    k, l = ([[0. if i == j else float(u @ v) for j, v in enumerate(rows)] for i, u in enumerate(rows)]
            for rows in (s_rows, a_rows))
    return hsic(k, l), hsic(k, k), hsic(l, l)


def project(feature, timesteps, g):
    """Mean over time and space, the linear map, and unit length, row by row."""
    rows = []
    f = feature.detach().double().unflatten(0, (timesteps, -1))
    for i in range(f.shape[1]):
        pooled = f[:, i].flatten(2).mean(2).mean(0) if f.ndim > 3 else f[:, i].mean(0)
        v = g.weight.detach().double() @ pooled + g.bias.detach().double()
        rows.append(v / math.sqrt(float(v @ v)))
    return rows


def nce_by_hand(s, a, critic, t=0.1):
    n = len(s)
    e = [[math.exp(float(u @ v) / t) for v in a] for u in s]
    if critic == 'infonce':
        rows = [-math.log(e[i][i] / sum(e[i])) for i in range(n)]
        columns = [-math.log(e[i][i] / sum(e[j][i] for j in range(n))) for i in range(n)]
        return (sum(rows) + sum(columns)) / (2 * n)
    if critic == 'literal':
        c = n / n ** 2  # N / M, M = N^2 pairs
    else:
        c = (n - 1) * sum(e[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    # log h and log(1 - h) of h = e / (e + c)
    return -sum(math.log(e[i][j] / (e[i][j] + c)) if i == j else math.log(c / (e[i][j] + c))
                for i in range(n) for j in range(n)) / n


def reference(sscl, steps, critic='infonce', weighting='cka', floor=0.1, momentum=0.1):
    """Loss of the last of the steps, and per layer (cka, running cka, weight, nce); steps: (student, teacher)."""
    layers = []
    for i in range(len(steps[-1][0])):
        terms = [hsic_terms(rows(s[i], T), rows(a[i], 1)) for s, a in steps]
        shares = [momentum * (1 - momentum) ** (len(steps) - 1 - step) for step in range(len(steps))]
        means = [sum(w * t[k] for w, t in zip(shares, terms)) / sum(shares) for k in range(3)]
        last = terms[-1]
        cka, running = last[0] / math.sqrt(last[1] * last[2]), means[0] / math.sqrt(means[1] * means[2])
        s, a = steps[-1][0][i], steps[-1][1][i]
        g_student, g_teacher = sscl.criterion.g_student[i], sscl.criterion.g_teacher[i]
        nce = nce_by_hand(project(s, T, g_student), project(a, 1, g_teacher), critic)
        weight = 1 / max(running, floor) if weighting == 'cka' else 1.
        layers.append((cka, running, weight, nce))
    return sum(weight * nce for _, _, weight, nce in layers), layers


# The reference keeps the features as they are, uncentred: float64's 1e-16 grows by the 1e6 that HSIC cancels out of its
# Gram matrices. A wrong formula would be off by 1e-3 and more.
REFERENCE_TOL = dict(rel=1e-8, abs=1e-12)


def messages(caplog, words):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and words in r.getMessage()]


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---- any nn.Module

class Cnn(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2))
        self.neck = nn.Linear(2 * width, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(F.relu(self.neck(self.body(F.relu(self.stem(x))).mean((2, 3)))))


def plain(cls, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().double()
