"""Dropout and stochastic depth with one mask over time: drawn once per sample and repeated for its T timesteps.

Each class here replaces the class of an existing module in place, so that names, hooks and settings stay. Axis 0 of
their input is time-major, (T * B, ...).
"""
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple, Type, cast

import torch
import torch.nn as nn

from timm.layers import DropPath, PatchDropout
from timm.layers.drop import DropBlock2d
from timm.layers.patch_dropout import PatchDropoutWithIndices, patch_dropout_forward
from torchvision.ops import StochasticDepth

from timm_sscl.neurons.folding import require_fold

__all__ = ['share_mask_over_time', 'dropout_over_time', 'rand_over_time', 'OverTime']


def repeat_over_time(mask: torch.Tensor, timesteps: int) -> torch.Tensor:
    """Repeat (B, ...) over time to (T * B, ...), time-major."""
    return mask.expand(timesteps, *mask.shape).reshape(timesteps * mask.shape[0], *mask.shape[1:])


def _keep_mask(x: torch.Tensor, shape: Tuple[int, ...], p: float) -> torch.Tensor:
    """Draw a mask that is 0 with probability p, else 1 / (1 - p)."""
    mask = x.new_empty(shape).bernoulli_(1 - p)
    return mask.div_(1 - p) if p < 1 else mask


if TYPE_CHECKING:
    _Base = nn.Module  # the base that the mixins have in every class here
else:
    _Base = object


class OverTime(_Base):
    """Mixin for a module that draws one mask per sample. The conversion sets `timesteps`."""
    timesteps: int = 1
    part_of_model = False  # whether it may run only inside a call of its model

    def _samples(self, x: torch.Tensor) -> int:
        """Return B of x (T * B, ...).

        Raises:
            ValueError: The first axis is not divisible by T.
        """
        if self.part_of_model:
            require_fold(type(self).__name__)
        if x.shape[0] % self.timesteps:
            raise ValueError(f'{type(self).__name__}: the first axis of {tuple(x.shape)} does not hold '
                             f'timesteps={self.timesteps} equal steps.')
        return x.shape[0] // self.timesteps


class _DropoutOverTime(OverTime):
    """Mixin for nn.Dropout and its spatial forms, with one mask per sample."""
    spatial = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (self._samples(x),) + x.shape[1:2] + (1,) * (x.ndim - 2) if self.spatial else (
            self._samples(x), *x.shape[1:])
        return x * repeat_over_time(_keep_mask(x, shape, self.p), self.timesteps)


class DropoutOverTime(_DropoutOverTime, nn.Dropout):
    """nn.Dropout with one mask per sample."""


class Dropout1dOverTime(_DropoutOverTime, nn.Dropout1d):
    """nn.Dropout1d with one mask per sample."""
    spatial = True


class Dropout2dOverTime(_DropoutOverTime, nn.Dropout2d):
    """nn.Dropout2d with one mask per sample."""
    spatial = True


class Dropout3dOverTime(_DropoutOverTime, nn.Dropout3d):
    """nn.Dropout3d with one mask per sample."""
    spatial = True


class DropPathOverTime(OverTime, DropPath):
    """timm's DropPath with one decision per sample."""
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        ones = x.new_ones((self._samples(x),) + (1,) * (x.ndim - 1))
        return x * repeat_over_time(super().forward(ones), self.timesteps)


class StochasticDepthOverTime(OverTime, StochasticDepth):
    """torchvision's StochasticDepth with one decision per sample."""
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return input
        ones = input.new_ones((self._samples(input),) + (1,) * (input.ndim - 1))
        return input * repeat_over_time(super().forward(ones), self.timesteps)


class DropBlock2dOverTime(OverTime, DropBlock2d):
    """timm's DropBlock2d with one mask per sample."""
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.drop_prob:
            return x
        return x * repeat_over_time(super().forward(torch.ones_like(x[:self._samples(x)])), self.timesteps)


class _PatchDropoutOverTime(OverTime):
    """Mixin for timm's patch dropout that keeps the same patches at all timesteps of a sample."""
    def _drop(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        if not self.training or self.prob == 0.:
            return x, None
        prefix, patches = x[:, :self.num_prefix_tokens], x[:, self.num_prefix_tokens:]
        positions = torch.arange(patches.shape[1], device=x.device).expand(self._samples(x), -1).unsqueeze(-1)
        _, indices = patch_dropout_forward(positions, self.prob, 0, self.ordered, True)
        keep = repeat_over_time(cast(torch.Tensor, indices), self.timesteps)
        patches = patches.gather(1, keep.unsqueeze(-1).expand((-1, -1) + patches.shape[2:]))
        return torch.cat((prefix, patches), dim=1), keep


class PatchDropoutOverTime(_PatchDropoutOverTime, PatchDropout):
    """timm's PatchDropout with the same patches at all timesteps."""
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._drop(x)[0]


class PatchDropoutWithIndicesOverTime(_PatchDropoutOverTime, PatchDropoutWithIndices):
    """timm's PatchDropoutWithIndices with the same patches at all timesteps."""
    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        return self._drop(x)


_OVER_TIME: Dict[Type[nn.Module], Type[nn.Module]] = {
    nn.Dropout: DropoutOverTime,
    nn.Dropout1d: Dropout1dOverTime,
    nn.Dropout2d: Dropout2dOverTime,
    nn.Dropout3d: Dropout3dOverTime,
    DropPath: DropPathOverTime,
    StochasticDepth: StochasticDepthOverTime,
    DropBlock2d: DropBlock2dOverTime,
    PatchDropout: PatchDropoutOverTime,
    PatchDropoutWithIndices: PatchDropoutWithIndicesOverTime,
}


OVER_TIME_MODULES = tuple(_OVER_TIME.values())


def why_no_shared_mask(module: nn.Module) -> Optional[str]:
    """Return why a module's noise cannot be repeated over time; None if it can, or if there is none."""
    if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)) and module.p > 0:
        return 'alpha dropout would draw another mask at every time step.'
    if isinstance(module, DropBlock2d) and module.drop_prob and module.with_noise:
        return 'with_noise=True would draw other noise at every time step.'
    if not isinstance(module, OverTime) and isinstance(module, tuple(_OVER_TIME)) and _over_time_class(module) is None:
        return 'its own forward may draw another mask at every time step.'
    return None


def _over_time_class(module: nn.Module) -> Optional[Type[nn.Module]]:
    """Return the OverTime class for a dropout module or a subclass with the same forward, or None."""
    for base, over_time in _OVER_TIME.items():
        if type(module) is base or (isinstance(module, base) and type(module).forward is base.forward):
            return over_time
    return None


def share_mask_over_time(module: nn.Module, timesteps: int) -> None:
    """Give a dropout module the OverTime form of its class, in place. Other modules stay."""
    over_time = None if isinstance(module, OverTime) else _over_time_class(module)
    if over_time is not None:
        module.__class__ = over_time
        module.timesteps = timesteps


# ---- replacements of functions that modules call in their forward

def dropout_over_time(
        timesteps: int,
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool = True,
        spatial: bool = False,
) -> torch.Tensor:
    """Apply F.dropout or torch.dropout to (T * B, ...) with one mask per sample. spatial drops whole channels
    (F.dropout2d).
    """
    if not (training and train) or p == 0:
        return input
    alike = input.shape[2:] if not spatial else (1,) * (input.ndim - 2)
    shape = (input.shape[0] // timesteps, *input.shape[1:2], *alike)
    return input * repeat_over_time(_keep_mask(input, shape, p), timesteps)


def rand_over_time(timesteps: int, *size: Any, **kwargs: Any) -> torch.Tensor:
    """Return torch.rand for a size (T * B, ...), drawn once per sample. A first axis not divisible by T is drawn as is.
    """
    size = tuple(kwargs.pop('size', size))
    size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    steps = 1 if not size or size[0] % timesteps else timesteps
    generator = kwargs.pop('generator', None)
    # torch.rand would be intercepted again by the enclosing mode
    drawn = torch.empty((size[0] // steps, *size[1:]) if size else (), **kwargs).uniform_(generator=generator)
    return repeat_over_time(drawn, steps) if steps > 1 else drawn
