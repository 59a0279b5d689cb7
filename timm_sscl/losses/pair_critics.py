"""Critics of the SSCL sum as objects: the contrastive loss of a layer's projected rows, and a queue of negatives."""
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
        """Prepare for this number of layers, of rows with so many numbers; called once, by the criterion."""

    def contrast(self, s: torch.Tensor, a: torch.Tensor, columns: Count, **negatives: torch.Tensor):
        """Loss of projected rows (N, d), and the lower bound that it gives, 0-d each.

        Args:
            s: Student rows.
            a: Teacher rows.
            columns: Number of teacher rows that a student row is compared with.
            negatives: `queue` and `queue_mask` of the critics' functions.
        """
        raise NotImplementedError

    def forward(self, s: torch.Tensor, a: torch.Tensor, layer: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
        """Loss of a layer's rows (N, d), and its lower bound on the mutual information without a gradient."""
        return self.contrast(s, a, s.shape[0])

    def push(self, rows: Sequence[torch.Tensor]) -> None:
        """Take in the teacher rows of a training step, one tensor per layer."""

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}'


class InfoNCECritic(Critic):
    """`info_nce_loss`."""

    def contrast(self, s, a, columns, **negatives):
        loss = info_nce_loss(s, a, self.temperature, **negatives)
        mean_of_both_directions = (s.shape[0] * columns) ** 0.5  # its log is the mean of their logs
        return loss, mi_lower_bound(loss.detach(), mean_of_both_directions, info_nce=True)


class NCECritic(Critic):
    """`nce_loss`, the paper's critic.

    Args:
        temperature: Temperature t of the scores.
        normalize: The normalised form of the critic's source, or the paper's formula to the letter.
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
    """A critic with further negatives: the last teacher rows of every layer, as they were projected then.

    Args:
        critic: The critic that is given them.
        size: Number of rows.

    Raises:
        ValueError: size is no whole number of rows.
    """

    def __init__(self, critic: Critic, size: int):
        super().__init__(critic.temperature)
        if size != int(size) or size < 1:
            raise ValueError(f'queue_size={size}: must be a whole number of rows, 0 for no queue.')
        self.critic = critic
        self.size = int(size)

    def bind(self, layers: int, dim: int) -> None:
        # buffers, so that a run resumes with the negatives it had; newest first
        self.register_buffer('queue', torch.zeros(layers, self.size, dim))
        self.register_buffer('queue_filled', torch.zeros((), dtype=torch.int64))

    def forward(self, s: torch.Tensor, a: torch.Tensor, layer: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
        mask = torch.arange(self.size, device=s.device) < self.queue_filled  # no size depends on it
        negatives: Dict[str, torch.Tensor] = dict(queue=self.queue[layer], queue_mask=mask)
        return self.critic.contrast(s, a, s.shape[0] + self.queue_filled, **negatives)

    @torch.no_grad()
    def push(self, rows: Sequence[torch.Tensor]) -> None:
        """Take in the teacher rows of all processes, the same on each; the oldest go."""
        newest = torch.stack([row.to(self.queue.dtype) for row in rows])
        self.queue.copy_(torch.cat([newest, self.queue], 1)[:, :self.size])
        self.queue_filled.add_(newest.shape[1]).clamp_(max=self.size)

    def extra_repr(self) -> str:
        return f'size={self.size}'
