"""PSN: parallel spiking neurons, which weight all timesteps instead of using a recursion; also masked and sliding ones.
"""
import math
import warnings
from dataclasses import dataclass
from typing import Any, Tuple

import torch
import torch.nn as nn

from timm_sscl.knobs import knob

from .base import SpikingNeuron
from .kernels.recursion import membrane_dtype
from .kernels.scan import settings_at
from .registry import register_neuron
from .settings import NeuronSettings

__all__ = ['PSN', 'MaskedPSN', 'SlidingPSN']


class _Parallel(SpikingNeuron):
    """Base of neurons without a reset: S = (W X + B >= 0), with W of shape (T, T).

    It needs T multiplications per neuron and timestep, which `estimate_energy` counts.
    """

    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        """Settings of a parallel spiking neuron."""
        surrogate: str = knob('atan', 'surrogate gradient of the spike, by name', kw_only=True)

    def matrix(self) -> torch.Tensor:
        """Return W for the current T, (T, T)."""
        raise NotImplementedError

    def offset(self) -> torch.Tensor:
        """Return B, which broadcasts against (T, 1)."""
        raise NotImplementedError

    def run(self, x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
        dtype, gain = membrane_dtype(x.dtype), self.gain
        current = x.to(dtype) if gain is None else x.to(dtype) * gain.to(dtype)
        h = self.matrix().to(dtype) @ current.flatten(1) + self.offset().to(dtype)
        spikes = settings_at(self.settings, self._buffers.get('progress'), dtype).spike(h, 0.)
        return spikes.view(x.shape).to(x.dtype)


def _uniform(timesteps: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(timesteps, timesteps).uniform_(-1, 1) / math.sqrt(timesteps))


@register_neuron('psn')
class PSN(_Parallel):
    """Parallel spiking neuron (Fang et al. 2023): S = Theta(W X + B) over T, with W and B learned per layer.

    A timestep also depends on later ones. With fewer timesteps than it was created for, it uses the first rows and
    columns of W, which is another function of them. It cannot run more.
    """
    per_step = 'step_weight', 'step_bias'

    def build(self, shape: Tuple[int, ...]) -> None:
        self.step_weight = _uniform(self.timesteps)
        self.step_bias = nn.Parameter(torch.full((self.timesteps, 1), -1.))

    def shape_of(self, name: str, timesteps: int) -> Tuple[int, ...]:
        return timesteps, timesteps if name == 'step_weight' else 1

    def check_steps(self, timesteps: int) -> None:
        super().check_steps(timesteps)
        trained = len(self.step_weight)
        if timesteps > trained:
            raise ValueError(f'timesteps={timesteps}: {type(self).__name__} has weights for {trained} time steps and '
                             f'runs no more; convert the model with timesteps={timesteps}.')

    def configure(self, timesteps: int, **settings) -> None:
        super().configure(timesteps, **settings)
        if timesteps < len(self.step_weight) and not self.is_causal:
            warnings.warn(f'{type(self).__name__} was made for {len(self.step_weight)} time steps, each of which sees '
                          f'all; with timesteps={timesteps} it is another neuron.', stacklevel=2)

    @property
    def is_causal(self) -> bool:
        """Whether no timestep depends on a later one, so that fewer timesteps give the same output at those."""
        return False

    def matrix(self) -> torch.Tensor:
        self.check_steps(self.timesteps)
        return self.step_weight[:self.timesteps, :self.timesteps]

    def offset(self) -> torch.Tensor:
        return self.over_time(self.step_bias)


@register_neuron('masked_psn')
class MaskedPSN(PSN):
    """Masked parallel spiking neuron: a timestep depends on itself and the k - 1 before it; W is masked by a band.

        W (m M + (1 - m) J), M the band, J all ones

    The authors raise m from 0 to 1 during training. Here `mask_warmup` does it: m = mask * progress / mask_warmup, at
    most mask, with the progress of `set_progress`. The progress is then part of the state dict, since the output
    depends on it.
    """

    @dataclass(frozen=True)
    class Settings(_Parallel.Settings):
        """Settings of a masked PSN."""
        k: int = knob(2, 'number of steps that a step sees, itself included')
        mask: float = knob(1., 'm, from 0 (no mask) to 1')
        mask_warmup: float = knob(0., 'share of the training in which m rises from 0 to mask, below 1; 0: m is mask')

        def check(self) -> None:
            _check_k(self.k)
            if not 0 <= self.mask <= 1:
                raise ValueError(f'mask={self.mask}: must lie in [0, 1].')
            if not 0 <= self.mask_warmup < 1:
                raise ValueError(f'mask_warmup={self.mask_warmup}: is a share of the training and must lie in [0, 1); '
                                 f'at 1 the mask would never be whole.')

    def _keep_progress(self) -> None:
        super()._keep_progress()
        if not self.settings.mask_warmup:
            self._buffers.pop('mask_progress', None)
        elif 'mask_progress' not in self._buffers:
            # in millionths: averaged copies of a model copy whole numbers and average others
            like = next((b for b in self._buffers.values() if b is not None), torch.empty(()))
            self.register_buffer('mask_progress', torch.zeros((), dtype=torch.int64, device=like.device))

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        if 'mask_progress' in self._buffers:
            self.mask_progress.fill_(round(progress * 1e6))

    def mask_now(self) -> Any:
        """Return m at the current progress of the training, a number or a 0-d tensor."""
        if not self.settings.mask_warmup:
            return self.settings.mask
        return self.settings.mask * (self.mask_progress / (1e6 * self.settings.mask_warmup)).clamp(max=1.)

    @property
    def is_causal(self) -> bool:
        return float(self.mask_now()) == 1

    def matrix(self) -> torch.Tensor:
        weight, m = super().matrix(), self.mask_now()
        band = torch.ones_like(weight).tril().triu(1 - self.settings.k)
        return weight * (m * band + (1 - m))


@register_neuron('sliding_psn')
class SlidingPSN(_Parallel):
    """Sliding parallel spiking neuron: a causal filter over k timesteps, the same at every timestep, and a bias per
    layer.
    """
    built_from = ('k',)

    @dataclass(frozen=True)
    class Settings(_Parallel.Settings):
        """Settings of a sliding PSN."""
        k: int = knob(2, 'number of steps that a step sees, itself included')

        def check(self) -> None:
            _check_k(self.k)

    def build(self, shape: Tuple[int, ...]) -> None:
        # the last entry is for the timestep itself
        self.filter = nn.Parameter(.5 ** torch.arange(self.settings.k - 1, -1, -1.))
        self.filter_bias = nn.Parameter(torch.tensor(-1.))

    def matrix(self) -> torch.Tensor:
        k, steps = self.settings.k, torch.arange(self.timesteps, device=self.filter.device)
        place = k - 1 - (steps[:, None] - steps)  # position in the filter of timestep j, for the output at timestep i
        inside = (place >= 0) & (place < k)
        return self.filter[place.clamp(0, k - 1)] * inside

    def offset(self) -> torch.Tensor:
        return self.filter_bias


def _check_k(k: int) -> None:
    """Raise ValueError if k is not a positive whole number."""
    if not (isinstance(k, int) and k >= 1):
        raise ValueError(f'k={k!r}: must be a whole number of time steps, 1 or more.')
