"""Warn of a training that can hardly work: only warm-up epochs, or a teacher at chance."""
import logging
import math
from typing import Optional

import torch
from timm.task.evaluator import ClassificationEvaluator

__all__ = ['warn_long_warmup', 'warn_teacher_at_chance', 'LabelCountingEvaluator']

_logger = logging.getLogger('train')


def warn_long_warmup(name: str, sched: str, warmup_epochs: int, epochs: int, warmup_prefix: bool = False) -> None:
    """Warn if a training ends before its warm-up.

    Args:
        name: Name of the training, for the message.
        sched: --sched; 'none' has no warm-up.
        warmup_epochs: --warmup-epochs.
        epochs: Epochs of the training.
        warmup_prefix: Whether the warm-up precedes these epochs.
    """
    if warmup_epochs and warmup_epochs >= epochs and sched != 'none' and not warmup_prefix:
        _logger.warning(
            f'{name}: --warmup-epochs {warmup_epochs} is no less than its {epochs} epochs, so the learning rate never '
            f'reaches its full value; --warmup-epochs 0 leaves the warm-up out.')


def warn_teacher_at_chance(name: str, top1: float, samples: int, most_frequent: int) -> None:
    """Warn if a teacher is no better on the validation set than always predicting the most frequent class.

    Args:
        name: Name of the teacher.
        top1: Its top-1 accuracy in percent.
        samples: Number of validation samples.
        most_frequent: Number of samples of the most frequent class.
    """
    chance = most_frequent / samples
    error = math.sqrt(chance * (1 - chance) / samples)
    if top1 / 100 > chance + 2 * error:
        return
    below = top1 / 100 < chance - 2 * error
    _logger.warning(
        f'Teacher {name}: {top1:.2f} top-1 is {"below" if below else "within two standard errors of"} chance '
        f'({100 * chance:.2f} ± {100 * error:.2f}: the share of the most frequent class among {samples} validation '
        f'samples), so it teaches nothing. '
        f'{"Do its labels mean the classes of this data? " if below else ""}More --teacher-epochs, a shorter '
        f'--warmup-epochs or --teacher-checkpoint FILE may help.')


class LabelCountingEvaluator(ClassificationEvaluator):
    """timm's evaluator that also counts the samples of every class in `label_counts` (K,)."""

    label_counts: Optional[torch.Tensor] = None

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        super().update(output, target)
        counts = torch.bincount(target, minlength=output.shape[-1])
        self.label_counts = counts if self.label_counts is None else self.label_counts + counts
