"""Surrogate gradients from the literature besides the rectangle, as functions of z = U - v_threshold.

The formulas are dO/dU. Their integral is 1 unless the docstring gives another one.
"""
import math

import torch

from .surrogate import register_surrogate

__all__ = ['triangle', 'damped_triangle', 'sigmoid', 'atan', 'fast_sigmoid', 'superspike', 'erf', 'gaussian',
           'multi_gaussian', 'dspike', 'evaf']


def _normal(z: torch.Tensor, sigma: float, mean: float = 0.) -> torch.Tensor:
    """Density of the normal distribution."""
    return torch.exp(-.5 * ((z - mean) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def _sech_squared(z: torch.Tensor) -> torch.Tensor:
    return 1 - torch.tanh(z) ** 2


@register_surrogate('triangle')
def triangle(u: torch.Tensor, v_threshold: float, gamma: float = 1.) -> torch.Tensor:
    """max(gamma - |z|, 0) / gamma^2: TET, TEBN, TAB, QCFS; SpikingJelly's PiecewiseQuadratic(1 / gamma)."""
    return (gamma - (u - v_threshold).abs()).clamp(min=0) / gamma ** 2


@register_surrogate('damped_triangle')
def damped_triangle(u: torch.Tensor, v_threshold: float, gamma: float = .3) -> torch.Tensor:
    """gamma * max(1 - |z / v_threshold|, 0) / v_threshold, integral gamma: LSNN, Diet-SNN, BNTT."""
    return gamma * (1 - ((u - v_threshold) / v_threshold).abs()).clamp(min=0) / v_threshold


@register_surrogate('sigmoid')
def sigmoid(u: torch.Tensor, v_threshold: float, alpha: float = 4.) -> torch.Tensor:
    """Derivative of sigmoid(alpha * z): SpikingJelly's Sigmoid; snnTorch's has alpha 25."""
    s = torch.sigmoid(alpha * (u - v_threshold))
    return alpha * s * (1 - s)


@register_surrogate('atan')
def atan(u: torch.Tensor, v_threshold: float, alpha: float = 2.) -> torch.Tensor:
    """Derivative of an arc tangent, (alpha / 2) / (1 + (pi / 2 * alpha * z)^2), peak alpha / 2: PLIF, SEW."""
    return alpha / 2 / (1 + (math.pi / 2 * alpha * (u - v_threshold)) ** 2)


@register_surrogate('fast_sigmoid')
def fast_sigmoid(u: torch.Tensor, v_threshold: float, k: float = 25.) -> torch.Tensor:
    """1 / (1 + k * |z|)^2, integral 2 / k: snnTorch's fast_sigmoid."""
    return 1 / (1 + k * (u - v_threshold).abs()) ** 2


@register_surrogate('superspike')
def superspike(u: torch.Tensor, v_threshold: float, alpha: float = 1.) -> torch.Tensor:
    """alpha / (1 + |z|)^2, integral 2 * alpha: SpikingJelly's SuperSpike."""
    return alpha / (1 + (u - v_threshold).abs()) ** 2


@register_surrogate('erf')
def erf(u: torch.Tensor, v_threshold: float, alpha: float = 2.) -> torch.Tensor:
    """Derivative of an error function, (alpha / sqrt(pi)) * exp(-alpha^2 * z^2): SpikingJelly's Erf."""
    return alpha / math.sqrt(math.pi) * torch.exp(-(alpha * (u - v_threshold)) ** 2)


@register_surrogate('gaussian')
def gaussian(u: torch.Tensor, v_threshold: float, sigma: float = .5, gamma: float = .5) -> torch.Tensor:
    """gamma * N(z; 0, sigma), integral gamma: Yin et al. 2020."""
    return gamma * _normal(u - v_threshold, sigma)


@register_surrogate('multi_gaussian')
def multi_gaussian(
        u: torch.Tensor,
        v_threshold: float,
        sigma: float = .5,
        gamma: float = .5,
        q: float = .15,
        s: float = 6.,
) -> torch.Tensor:
    """gamma * [(1 + q) N(z; 0, sigma) - q N(z; sigma, s sigma) - q N(z; -sigma, s sigma)], integral gamma (1 - q).

    It is negative far from the threshold: Yin et al. 2021.
    """
    z = u - v_threshold
    sides = _normal(z, s * sigma, sigma) + _normal(z, s * sigma, -sigma)
    return gamma * ((1 + q) * _normal(z, sigma) - q * sides)


@register_surrogate('dspike')
def dspike(u: torch.Tensor, v_threshold: float, b: float = 3.) -> torch.Tensor:
    """b * sech^2(b z) / (2 tanh(b / 2)) if |z| <= 1/2, else 0: Dspike with a fixed b, as in IM-Loss and MPBN.

    The paper's window is [0, 1], with v_threshold 1/2.
    """
    z = u - v_threshold
    return b * _sech_squared(b * z) / (2 * math.tanh(b / 2)) * (z.abs() <= .5)


@register_surrogate('evaf')
def evaf(
        u: torch.Tensor,
        v_threshold: float,
        k_min: float = 1.,
        k_max: float = 10.,
        *,
        progress: torch.Tensor,
) -> torch.Tensor:
    """(K / 2) sech^2(K z), where K grows from k_min to k_max over the epochs: the evolving surrogate of IM-Loss.

        K = ((10^p - 1) * k_max + (10 - 10^p) * k_min) / 9

    Args:
        u: Potential before the reset.
        v_threshold: Firing threshold.
        k_min: K at the start of training.
        k_max: K at the end of training.
        progress: p, the fraction of the epochs that is done.
    """
    grown = 10 ** progress
    k = ((grown - 1) * k_max + (10 - grown) * k_min) / 9
    return k / 2 * _sech_squared(k * (u - v_threshold))
