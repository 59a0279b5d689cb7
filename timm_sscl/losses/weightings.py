"""Weights of the layers in the SSCL sum as objects: 1 / CKA (Eq. 20) and controls to compare it with."""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn

__all__ = ['Weighting', 'UniformWeighting', 'InverseCKAWeighting', 'CKAWeighting', 'FixedWeighting',
           'ShuffledWeighting', 'UncertaintyWeighting', 'TOTALS']

TOTALS = ('own', 'layers', 'inverse_cka')


class Weighting(nn.Module):
    """Base of all weightings: `relative` gives the ratios of the layers' weights, `total` their sum.

    With 'layers', the sum is the number of layers, as for uniform weights. With 'inverse_cka', it is the sum of 1 / CKA
    in this step. Weightings of equal total differ only in its distribution over the layers. 'own' does not scale the
    weights.

    Args:
        total: 'own', 'layers' or 'inverse_cka'.
        floor: Lower bound of CKA, so that 1 / CKA does not exceed 1 / floor.

    Attributes:
        uses_cka: Whether the weights depend on the CKA, which needs a batch of 4.

    Raises:
        ValueError: An argument is out of range.
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
        """Prepare for this number of layers. The criterion calls it once.

        Raises:
            ValueError: The weighting does not fit this number.
        """

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        """Return the weights before scaling, (L,), from the layers' CKA in [floor, inf), (L,)."""
        raise NotImplementedError

    def penalty(self, losses: torch.Tensor) -> Optional[torch.Tensor]:
        """Return a 0-d term that trains the weighting's parameters, from the layers' losses (L,); None if it has none.
        """
        return None

    def forward(self, cka: torch.Tensor) -> torch.Tensor:
        """Return the weights of the layers, (L,), without a gradient. A CKA of nan counts as the floor."""
        cka = torch.nan_to_num(cka, nan=self.floor).clamp(min=self.floor)
        weights = self.relative(cka).detach()
        if self.total == 'own':
            return weights
        weights = weights / weights.mean()
        return weights if self.total == 'layers' else weights * (1 / cka).mean()

    def extra_repr(self) -> str:
        return f'total={self.total}, floor={self.floor}'


class UniformWeighting(Weighting):
    """The same weight for every layer: 1, or the mean of 1 / CKA over the layers with total='inverse_cka'."""

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(cka)


class InverseCKAWeighting(Weighting):
    """1 / CKA, the weights of SSCL. A layer that differs more from the teacher's gets a larger weight."""

    uses_cka = True

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return 1 / cka


class CKAWeighting(Weighting):
    """CKA, the reverse. A layer that is more similar to the teacher's gets a larger weight."""

    uses_cka = True

    def __init__(self, total: str = 'inverse_cka', floor: float = 0.1):
        super().__init__(total, floor)

    def relative(self, cka: torch.Tensor) -> torch.Tensor:
        return cka


class FixedWeighting(Weighting):
    """Constant weights, for example the averages of 1 / CKA over a run, without their change over time.

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
    """1 / CKA of another layer: the same weights, assigned to the wrong layers.

    The permutation has no fixed point. It is drawn once from the current state of torch's generator, which does not
    change. It is a buffer, so that a run resumes with it.
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
    """Learned weights: e^-s with a trained s per layer (homoscedastic uncertainty, Kendall 2018).

    s_l is trained by e^-s_l L_l + s_l, whose minimum is at e^-s_l = 1 / L_l; every layer's term then has the same
    weight. Student and projections receive only the weights, scaled to the total. The value of the loss does not
    include the penalty.
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
