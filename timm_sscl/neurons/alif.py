"""ALIF: a LIF whose threshold rises with its own spikes, from LSNN, and Yin's version with learned time constants."""
import math
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .registry import register_neuron
from .settings import NeuronSettings, check_decay, check_reset

__all__ = ['ALIF', 'MultiGaussianALIF']


def _integrate(x, state, decay, decay_b, settings):
    """Return the potential before the spike, the threshold, and its adaptation b."""
    u, b, s = state
    b = decay_b * b + (1 - decay_b) * s
    v_threshold = settings.v_threshold + settings.beta * b
    return decay * u + (1 - decay) * x - v_threshold * s, v_threshold, b


class _Adaptive:
    """Settings of both adaptive neurons, whose defaults differ."""
    v_threshold: float
    beta: float


@dataclass(frozen=True)
class _AdaptiveSettings(_Adaptive, NeuronSettings):
    """Common settings of both adaptive neurons."""
    detach_reset: bool = knob(False, 'no gradient through the reset')

    def check(self) -> None:
        check_reset(self.v_threshold, None)
        if not self.beta >= 0:
            raise ValueError(f'beta={self.beta}: spikes raise the threshold by it; must be 0 or more.')


@register_neuron('alif')
class ALIF(SpikingNeuron):
    """Adaptive LIF of LSNN (Bellec et al. 2018): the threshold A_t rises with the neuron's own spikes.

        b_t = rho b_{t-1} + (1 - rho) S_{t-1}       A_t = v_threshold + beta b_t
        u_t = tau u_{t-1} + (1 - tau) x_t - A_t S_{t-1}       S_t = u_t >= A_t

    The released code compares the previous timestep's potential with the threshold, which delays every layer by a
    timestep. Here the new potential is compared. The surrogate is a function of (u - A) / A; its gradient by A is -h u
    / A^2.
    """
    elementwise = True

    @dataclass(frozen=True)
    class Settings(_AdaptiveSettings):
        """Settings of an ALIF; defaults are the authors'."""
        tau: float = knob(math.exp(-1 / 20), 'decay factor of the membrane')
        rho: float = knob(math.exp(-1 / 200), 'decay factor of the threshold')
        beta: float = knob(1.6, 'how far spikes raise the threshold')
        v_threshold: float = knob(.01, 'firing threshold of a neuron that has not fired')
        surrogate: str = knob('damped_triangle', 'surrogate gradient of the spike, by name', kw_only=True)

        def check(self) -> None:
            super().check()
            check_decay(self.tau)
            check_decay(self.rho)
            if self.tau == 1:
                raise ValueError('tau=1: the current enters times 1 - tau, so that nothing would fire.')

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)

    @staticmethod
    def step(x, state, constants, t, settings):
        u, v_threshold, b = _integrate(x, state, settings.tau, settings.rho, settings)
        spikes = settings.spike(u / v_threshold, 1.)
        return spikes, (u, b, spikes.detach() if settings.detach_reset else spikes)

    def threshold(self) -> float:
        return self.settings.v_threshold / (1 - self.settings.tau)


@register_neuron('multi_gaussian_alif')
class MultiGaussianALIF(SpikingNeuron):
    """Adaptive LIF of Yin, Corradi and Bohte (2020) with time constants learned per channel.

    As `ALIF`, with decay factors exp(-1 / tau_m) and exp(-1 / tau_a). Each is the sigmoid of a parameter, so that it
    stays below 1. b_0 = v_threshold, and the surrogate is the multi-Gaussian of u - A. The authors have parameters per
    neuron.
    """
    needs_channels = True
    built_from = 'tau_m', 'tau_m_std', 'tau_a', 'tau_a_std'

    @dataclass(frozen=True)
    class Settings(_AdaptiveSettings):
        """Settings of Yin's neuron. The time constants are initialised at random from normal distributions."""
        tau_m: float = knob(20., 'time constant of the membrane, in steps: mean at the start of training')
        tau_m_std: float = knob(5., 'and its deviation')
        tau_a: float = knob(200., 'time constant of the threshold, in steps: mean at the start of training')
        tau_a_std: float = knob(5., 'and its deviation')
        beta: float = knob(1.8, 'how far spikes raise the threshold')
        v_threshold: float = knob(.01, 'firing threshold of a neuron that has not fired, and the start of b')
        surrogate: str = knob('multi_gaussian', 'surrogate gradient of the spike, by name', kw_only=True)

        def check(self) -> None:
            super().check()
            for name in ('tau_m', 'tau_a'):
                if not (getattr(self, name) > 0 and getattr(self, f'{name}_std') >= 0):
                    raise ValueError(f'{name}={getattr(self, name)}: a time constant must be positive, and the '
                                     f'deviation 0 or more.')

    def build(self, shape: Tuple[int, ...]) -> None:
        def parameter(mean: float, std: float) -> nn.Parameter:
            tau = (mean + std * torch.randn(shape)).clamp(min=.1)
            return nn.Parameter(torch.exp(-1 / tau).logit())

        self.w_m = parameter(self.settings.tau_m, self.settings.tau_m_std)
        self.w_a = parameter(self.settings.tau_a, self.settings.tau_a_std)

    def constants(self) -> Tuple[torch.Tensor, ...]:
        return self.w_m.sigmoid(), self.w_a.sigmoid()

    def start(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return torch.zeros_like(x), torch.full_like(x, self.settings.v_threshold), torch.zeros_like(x)

    @staticmethod
    def step(x, state, constants, t, settings):
        u, v_threshold, b = _integrate(x, state, *constants, settings)
        spikes = settings.spike(u, v_threshold)
        return spikes, (u, b, spikes.detach() if settings.detach_reset else spikes)

    def threshold(self) -> float:
        with torch.no_grad():
            decay, decay_a = self.constants()
            v_threshold = self.settings.v_threshold * (1 + self.settings.beta * decay_a)
            return float((v_threshold / (1 - decay)).mean())
