"""Create a loader of event frames. timm's create_loader would apply image transforms."""
from typing import Any, Callable, Optional

from torch.utils.data import DataLoader

__all__ = ['create_event_loader']


def create_event_loader(
        dataset: Any,
        batch_size: int,
        is_training: bool = False,
        transform: Optional[Callable] = None,
        num_workers: int = 0,
        pin_memory: bool = False,
) -> DataLoader:
    """Create a loader of batches (frames (B, T, 2, H, W), labels (B,)), not sharded over processes.

    Args:
        dataset: Event data set, or a data set that wraps one. Its `transform` is set, as timm's create_loader does.
        batch_size: Samples per batch. In training, a smaller last batch is dropped.
        is_training: Whether to shuffle.
        transform: Applied to the frames of a sample (`EventAugment` in training).
        num_workers: Number of worker processes.
        pin_memory: Whether batches are in pinned memory.
    """
    dataset.transform = transform
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=is_training, drop_last=is_training, num_workers=num_workers,
        persistent_workers=num_workers > 0, pin_memory=pin_memory)
