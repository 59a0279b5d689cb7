"""Transform the student's images to the teacher's: size and normalisation."""
from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = ['TeacherInput', 'Transform']

Transform = Callable[[torch.Tensor], torch.Tensor]


class TeacherInput:
    """Transform a batch of the student's images to the teacher's.

    Args:
        size: (H, W) of the teacher's images; None keeps the student's.
        renormalize: (student mean, student std, teacher mean, teacher std), each per channel; None keeps the values.
        transform: Function of a batch of images, instead of size and renormalize.

    Raises:
        ValueError: size or renormalize does not have this form, or is given together with transform.
    """

    def __init__(
            self,
            size: Optional[Sequence[int]] = None,
            renormalize: Optional[Tuple[Sequence[float], ...]] = None,
            transform: Optional[Transform] = None,
    ):
        if transform is not None and not (size is None and renormalize is None):
            raise ValueError(f'teacher_transform does the whole; teacher_size={size} and renormalize={renormalize} are '
                             f'not applied beside it.')
        if size is not None and (len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size)):
            raise ValueError(f'teacher_size={size}: must be (height, width) in pixels.')
        if renormalize is not None and len(renormalize) != 4:
            raise ValueError(f'renormalize holds {len(renormalize)} entries: must be student mean, student std, '
                             f'teacher mean, teacher std.')
        self.size = None if size is None else tuple(size)
        self.renormalize = renormalize
        self.transform = transform
        self.scale_shift = None if renormalize is None else _scale_shift(*renormalize)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W) renormalised and resized to (B, C, *size), bicubic with antialiasing.

        Event frames (B, T, C, H, W) are transformed alike.
        """
        if x.ndim == 5:
            return self(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.transform is not None:
            return _transformed(self.transform, x)
        if self.scale_shift is not None:
            scale, shift = (t.to(x) for t in self.scale_shift)
            x = x * scale + shift
        if self.size is not None and x.shape[-2:] != self.size:
            dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
            x = F.interpolate(x.to(dtype), self.size, mode='bicubic', antialias=True, align_corners=False).to(x.dtype)
        return x

    def shape(self, input_size: Optional[Sequence[int]]) -> Optional[Tuple[int, ...]]:
        """Return (C, H, W) of the teacher's images, or None if the student's are unknown."""
        if input_size is None:
            return None
        if self.transform is not None:
            return tuple(_transformed(self.transform, torch.zeros(1, *input_size)).shape[1:])
        return tuple(input_size) if self.size is None else (input_size[0], *self.size)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update({'transform': None, **state})  # version 0.1.0 had no transform

    def __repr__(self) -> str:
        return f'TeacherInput(size={self.size}, renormalize={self.renormalize}, transform={self.transform})'


def _transformed(transform: Transform, x: torch.Tensor) -> torch.Tensor:
    """Return the images that the user's transform makes of x, checked."""
    out = transform(x)
    if not isinstance(out, torch.Tensor) or out.ndim != 4 or len(out) != len(x):
        given = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f'teacher_transform made {given} of images {tuple(x.shape)}: must return a tensor of as '
                         f'many images, row by row.')
    return out


def _scale_shift(
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """Return scale and shift that convert one normalisation to the other; None if they are equal."""
    m, s, teacher_m, teacher_s = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std, teacher_mean, teacher_std))
    if torch.equal(m, teacher_m) and torch.equal(s, teacher_s):
        return None
    return s / teacher_s, (m - teacher_m) / teacher_s
