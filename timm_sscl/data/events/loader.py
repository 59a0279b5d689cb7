"""Loader of event frames: timm's create_loader would put transforms of images in front of them."""
from typing import Callable, Optional

from torch.utils.data import DataLoader, Dataset

__all__ = ['create_event_loader']


def create_event_loader(
        dataset: Dataset,
        batch_size: int,
        is_training: bool = False,
        transform: Optional[Callable] = None,
        num_workers: int = 0,
        pin_memory: bool = False,
) -> DataLoader:
    """Batches of (frames (B, T, 2, H, W), targets (B,)) of an event data set, not sharded.

    Args:
        dataset: Event data set, or a data set around one; its `transform` is set, as timm's create_loader does.
        batch_size: Samples per batch; a last batch that is smaller is left out in training.
        is_training: Whether to shuffle.
        transform: Applied to the frames of a sample (`EventAugment` in training).
        num_workers: Processes that read.
        pin_memory: Whether batches lie in pinned memory.
    """
    dataset.transform = transform
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=is_training, drop_last=is_training, num_workers=num_workers,
        persistent_workers=num_workers > 0, pin_memory=pin_memory)
