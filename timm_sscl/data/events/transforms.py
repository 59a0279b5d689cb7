"""Augment event frames; all frames of a sequence are transformed alike."""
import torch

__all__ = ['EventAugment']


class EventAugment:
    """Mirror a sequence left to right at random and roll it; pixels that leave on one side return on the other.

    Draws from torch's global generator.

    Args:
        hflip: Probability of mirroring.
        roll: Largest shift in pixels; each axis is shifted by a uniform whole number in [-roll, roll].

    Raises:
        ValueError: hflip is not a probability, or roll is negative.
    """

    def __init__(self, hflip: float = 0.5, roll: int = 5):
        if not 0 <= hflip <= 1:
            raise ValueError(f'hflip={hflip}: must be a probability, 0 to 1.')
        if roll < 0:
            raise ValueError(f'roll={roll}: must be 0 pixels or more.')
        self.hflip = hflip
        self.roll = roll

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Augment frames (T, C, H, W); the shape stays."""
        if torch.rand(()) < self.hflip:
            frames = frames.flip(-1)
        shift = torch.randint(-self.roll, self.roll + 1, (2,)).tolist()
        return frames.roll(shift, (-2, -1))

    def __repr__(self) -> str:
        return f'EventAugment(hflip={self.hflip}, roll={self.roll})'
