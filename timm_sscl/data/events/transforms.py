"""Augmentation of event frames: drawn once for a sequence, the same for all of its frames."""
import torch

__all__ = ['EventAugment']


class EventAugment:
    """Mirrors a sequence left to right and moves it, pixels that leave on one side coming back on the other.

    Draws from torch's global generator.

    Args:
        hflip: Probability of mirroring.
        roll: Largest shift in pixels, in each direction of both axes, drawn uniformly from the whole numbers.

    Raises:
        ValueError: hflip is no probability, or roll is negative.
    """

    def __init__(self, hflip: float = 0.5, roll: int = 5):
        if not 0 <= hflip <= 1:
            raise ValueError(f'hflip={hflip}: must be a probability, 0 to 1.')
        if roll < 0:
            raise ValueError(f'roll={roll}: must be 0 pixels or more.')
        self.hflip = hflip
        self.roll = roll

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(T, C, H, W) -> (T, C, H, W)"""
        if torch.rand(()) < self.hflip:
            frames = frames.flip(-1)
        shift = torch.randint(-self.roll, self.roll + 1, (2,)).tolist()
        return frames.roll(shift, (-2, -1))

    def __repr__(self) -> str:
        return f'EventAugment(hflip={self.hflip}, roll={self.roll})'
