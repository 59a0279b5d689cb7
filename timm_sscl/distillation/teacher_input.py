"""Transform the student's images to the teacher's: size and normalisation."""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = ['TeacherInput']


class TeacherInput:
    """Transform a batch of the student's images to the teacher's.

    Args:
        size: (H, W) of the teacher's images; None keeps the student's.
        renormalize: (student mean, student std, teacher mean, teacher std), each per channel; None keeps the values.

    Raises:
        ValueError: size or renormalize does not have this form.
    """

    def __init__(
            self,
            size: Optional[Sequence[int]] = None,
            renormalize: Optional[Tuple[Sequence[float], ...]] = None,
    ):
        if size is not None and (len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size)):
            raise ValueError(f'teacher_size={size}: must be (height, width) in pixels.')
        if renormalize is not None and len(renormalize) != 4:
            raise ValueError(f'renormalize holds {len(renormalize)} entries: must be student mean, student std, '
                             f'teacher mean, teacher std.')
        self.size = None if size is None else tuple(size)
        self.renormalize = renormalize
        self.scale_shift = None if renormalize is None else _scale_shift(*renormalize)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W) renormalised and resized to (B, C, *size), bicubic with antialiasing.

        Event frames (B, T, C, H, W) are transformed alike.
        """
        if x.ndim == 5:
            return self(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.scale_shift is not None:
            scale, shift = (t.to(x) for t in self.scale_shift)
            x = x * scale + shift
        if self.size is not None and x.shape[-2:] != self.size:
            dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
            x = F.interpolate(x.to(dtype), self.size, mode='bicubic', antialias=True, align_corners=False).to(x.dtype)
        return x

    def __repr__(self) -> str:
        return f'TeacherInput(size={self.size}, renormalize={self.renormalize})'


def _scale_shift(
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """Return scale and shift that convert one normalisation to the other; None if they are equal."""
    mean, std, teacher_mean, teacher_std = (
        torch.tensor(s, dtype=torch.float64).view(-1, 1, 1) for s in (mean, std, teacher_mean, teacher_std))
    if torch.equal(mean, teacher_mean) and torch.equal(std, teacher_std):
        return None
    return std / teacher_std, (mean - teacher_mean) / teacher_std
