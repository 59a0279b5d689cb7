"""Weights of the layers in the SSCL sum, as objects: 1 / CKA (Eq. 20), and the controls that it is compared with."""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn

__all__ = ['Weighting', 'UniformWeighting', 'InverseCKAWeighting', 'CKAWeighting', 'FixedWeighting',
           'ShuffledWeighting', 'UncertaintyWeighting', 'TOTALS']

TOTALS = ('own', 'layers', 'inverse_cka')


class Weighting(nn.Module):
    """Base of all weightings: `relative` gives the weights of the layers, `total` what they add up to.

    Weightings of equal total differ in nothing but how they share it out: 'layers' is the total of the uniform
    weights, the number of layers; 'inverse_cka' is the sum of 1 / CKA at this step. 'own' leaves the weights as they
    are.

    Args:
        total: 'own', 'layers' or 'inverse_cka'.
        floor: CKA is not taken below this, so that 1 / CKA does not exceed 1 / floor.

    Attributes:
        uses_cka: Whether the weights depend on the CKA, which needs a batch of 4.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, total: str = 'own', floor: float = 0.1):
        super().__init__()
        if total not in TOTALS:
            raise ValueError(f"total='{total}': must be one of {', '.join(TOTALS)}.")
        if not 0 < floor <= 1:
            raise ValueError(f'cka_floor={floor}: must lie in (0, 1].')
        self.total = total
        self.floor = floor

    @property
    def uses_cka(self) -> bool:
        return self.total == 'inverse_cka'

    def bind(self, layers: int) -> None:
        """Prepare for this number of layers; called once, by the criterion.

        Raises:
            ValueError: The weighting does not fit this number.
        """

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        """Weights before they are scaled to the total, (L,), from the layers' CKA in [floor, inf), (L,)."""
        raise NotImplementedError

    def penalty(self, losses: torch.Tensor) -> Optional[torch.Tensor]:
        """What trains parameters of the weighting, 0-d, from the layers' losses (L,); None where it has none."""
        return None

    def forward(self, cka: torch.Tensor) -> torch.Tensor:
        """Weights of the layers, (L,), without a gradient; nan counts as the floor."""
        cka = torch.nan_to_num(cka, nan=self.floor).clamp(min=self.floor)
        weights = self.relative(cka).detach()
        if self.total == 'own':
            return weights
        weights = weights / weights.mean()
        return weights if self.total == 'layers' else weights * (1 / cka).mean()

    def extra_repr(self) -> str:
        return f'total={self.total}, floor={self.floor}'


class UniformWeighting(Weighting):
    """Every layer the same: 1, or the mean of 1 / CKA over the layers with total='inverse_cka'."""

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(cka)


class InverseCKAWeighting(Weighting):
    """1 / CKA, the weights of SSCL: a layer that differs from the teacher's counts more."""

    uses_cka = True

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return 1 / cka


class CKAWeighting(Weighting):
    """CKA, the reverse: a layer that is like the teacher's counts more."""

    uses_cka = True

    def __init__(self, total: str = 'inverse_cka', floor: float = 0.1):
        super().__init__(total, floor)

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return cka


class FixedWeighting(Weighting):
    """Weights that stay, for example the averages of 1 / CKA over a run: what is left of 1 / CKA without its course.

    Args:
        weights: One per layer, positive.
        total: See `Weighting`.
        floor: See `Weighting`.
    """

    def __init__(self, weights: Sequence[float], total: str = 'inverse_cka', floor: float = 0.1):
        super().__init__(total, floor)
        self.weights: Tuple[float, ...] = tuple(float(weight) for weight in weights)
        if not all(weight > 0 for weight in self.weights):
            raise ValueError(f'layer_weights={self.weights}: must be positive.')

    def bind(self, layers: int) -> None:
        if len(self.weights) != layers:
            raise ValueError(f'layer_weights={self.weights}: there are {len(self.weights)} for {layers} layers.')
        self.register_buffer('shares', torch.tensor(self.weights), persistent=False)

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return self.shares.to(cka.dtype)


class ShuffledWeighting(Weighting):
    """1 / CKA of another layer: the same weights at the wrong places.

    The permutation leaves no layer in its place. It is drawn once, from torch's generator as it stands, whose state
    stays; it is a buffer, so that a run goes on with its own.
    """

    uses_cka = True

    def bind(self, layers: int) -> None:
        if layers < 2:
            raise ValueError("weighting='shuffled': needs 2 layers or more.")
        places = torch.arange(layers)
        with torch.random.fork_rng(devices=[]):
            order = torch.randperm(layers)
            while (order == places).any():
                order = torch.randperm(layers)
        self.register_buffer('order', order)

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return (1 / cka).index_select(0, self.order)


class UncertaintyWeighting(Weighting):
    """Weights that are learned: e^-s of a trained s per layer (homoscedastic uncertainty, Kendall 2018).

    s_l is trained by e^-s_l L_l + s_l, which is least at e^-s_l = 1 / L_l, so that every layer's term weighs the same.
    The student and the projections see the weights only, scaled to the total; the loss's value does not hold the
    penalty.
    """

    def __init__(self, total: str = 'inverse_cka', floor: float = 0.1):
        super().__init__(total, floor)

    def bind(self, layers: int) -> None:
        self.log_variance = nn.Parameter(torch.zeros(layers))

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return (-self.log_variance).exp().to(cka.dtype)

    def penalty(self, losses: torch.Tensor) -> torch.Tensor:
        objective = ((-self.log_variance).exp() * losses.detach() + self.log_variance).sum()
        return objective - objective.detach()
