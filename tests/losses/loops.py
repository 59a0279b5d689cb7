"""Losses written as loops over numbers of tensors, whose gradients autograd knows; shared by the tests of losses."""
import torch
import torch.nn as nn

from timm_sscl.losses import TrainStep

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def randn(*shape, seed=0):
    """Normal numbers in float64 from their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_step(logits, teacher_logits=None, target=LABELS, **fields):
    """A TrainStep of these logits."""
    return TrainStep(torch.zeros(logits.shape[1], 3, 8, 8), target, logits, nn.Linear(2, 2), teacher_logits, **fields)


def softmax(row, temperature=1.):
    """Probabilities of a list of numbers."""
    exponentials = [torch.exp(v / temperature) for v in row]
    return [v / sum(exponentials) for v in exponentials]


def kl(p, q):
    """KL divergence of two lists of probabilities."""
    return sum(x * torch.log(x / y) for x, y in zip(p, q))


def cross_entropy(p, q):
    """Cross-entropy of two lists of probabilities."""
    return -sum(x * torch.log(y) for x, y in zip(p, q))


def assert_equal_with_gradient(loss, expected, inputs):
    """Value and gradients are those of the loops, to what sums in another order leave in float64."""
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    got, want = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (loss, expected))
    for g, w in zip(got, want):
        assert w.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
