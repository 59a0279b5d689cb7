"""Critics of the SSCL sum as objects: contrastive losses of a layer's projected rows, and a queue of negatives."""
from typing import Dict, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .critics import info_nce_loss, mi_lower_bound, nce_loss

__all__ = ['Critic', 'InfoNCECritic', 'NCECritic', 'QueuedCritic']

Count = Union[int, torch.Tensor]


class Critic(nn.Module):
    """Base of all critics.

    Args:
        temperature: Temperature t of the scores.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(self, temperature: float = 0.2):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f'temperature={temperature}: must be positive.')
        self.temperature = temperature

    def bind(self, layers: int, dim: int) -> None:
        """Prepare for this number of layers and this length of rows. The criterion calls it once."""

    def contrast(self, s: torch.Tensor, a: torch.Tensor, columns: Count, **negatives: torch.Tensor):
        """Return the loss of projected rows (N, d) and the lower bound on the mutual information, 0-d each.

        Args:
            s: Student rows.
            a: Teacher rows.
            columns: Number of teacher rows with which each student row is compared.
            negatives: `queue` and `queue_mask` as in `info_nce_loss`.
        """
        raise NotImplementedError

    def forward(self, s: torch.Tensor, a: torch.Tensor, layer: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a layer's rows (N, d), and its lower bound on the mutual information without a gradient.
        """
        return self.contrast(s, a, s.shape[0])

    def push(self, rows: Sequence[torch.Tensor]) -> None:
        """Store the teacher rows of a training step, one tensor per layer."""

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}'


class InfoNCECritic(Critic):
    """Critic that uses `info_nce_loss`."""

    def contrast(self, s, a, columns, **negatives):
        loss = info_nce_loss(s, a, self.temperature, **negatives)
        mean_of_both_directions = (s.shape[0] * columns) ** 0.5  # its log is the mean of both directions' logs
        return loss, mi_lower_bound(loss.detach(), mean_of_both_directions, info_nce=True)


class NCECritic(Critic):
    """The paper's critic, `nce_loss`.

    Args:
        temperature: Temperature t of the scores.
        normalize: Whether to use the normalised form of the critic's source instead of the paper's formula.
    """

    def __init__(self, temperature: float = 0.2, normalize: bool = True):
        super().__init__(temperature)
        self.normalize = normalize

    def contrast(self, s, a, columns, **negatives):
        loss = nce_loss(s, a, self.temperature, normalize=self.normalize, **negatives)
        return loss, mi_lower_bound(loss.detach(), columns)

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, normalize={self.normalize}'


class QueuedCritic(Critic):
    """Critic with further negatives: the last teacher rows of every layer, as projected at their time.

    Args:
        critic: Critic that uses them.
        size: Number of rows.

    Raises:
        ValueError: size is not a positive whole number.
    """

    def __init__(self, critic: Critic, size: int):
        super().__init__(critic.temperature)
        if size != int(size) or size < 1:
            raise ValueError(f'queue_size={size}: must be a whole number of rows, 0 for no queue.')
        self.critic = critic
        self.size = int(size)

    def bind(self, layers: int, dim: int) -> None:
        # buffers, so that a run resumes with its negatives; newest first
        self.register_buffer('queue', torch.zeros(layers, self.size, dim))
        self.register_buffer('queue_filled', torch.zeros((), dtype=torch.int64))

    def forward(self, s: torch.Tensor, a: torch.Tensor, layer: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
        mask = torch.arange(self.size, device=s.device) < self.queue_filled  # a mask, so that no size depends on it
        negatives: Dict[str, torch.Tensor] = dict(queue=self.queue[layer], queue_mask=mask)
        return self.critic.contrast(s, a, s.shape[0] + self.queue_filled, **negatives)

    @torch.no_grad()
    def push(self, rows: Sequence[torch.Tensor]) -> None:
        """Store the teacher rows of all processes, the same on each, and drop the oldest."""
        newest = torch.stack([row.to(self.queue.dtype) for row in rows])
        self.queue.copy_(torch.cat([newest, self.queue], 1)[:, :self.size])
        self.queue_filled.add_(newest.shape[1]).clamp_(max=self.size)

    def extra_repr(self) -> str:
        return f'size={self.size}'
