"""TrainStep: the input of every registered loss."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn

__all__ = ['TrainStep']


_ABSENT: Any = None  # default of fields computed on request; a loss that requests one gets the declared type


@dataclass
class TrainStep:
    """One training step, the single argument of every registered loss.

    Attributes:
        input: The student's input: images (B, C, H, W) or event frames (B, T, C, H, W).
        target: Labels (B,) or soft targets (B, K).
        step_logits: Student logits of every timestep, (T, B, K).
        student: The student, for regularisers on its parameters.
        teacher_logits: Teacher logits (B, K); None if no loss needs a teacher.
        student_features: One (T, B, C, ...) tensor per tap; None if no loss needs features.
        teacher_features: One (T', B, C', ...) tensor per tap, T' = 1 for an ANN.
        firing_rates: Module name -> spikes per neuron and timestep of a neuron layer of the student, 0-d,
            differentiable; None if no loss needs them.
        teacher_head: The teacher's classifier, frozen: pooled features (..., C') to logits (..., K'); None if no loss
            needs it.
        membranes: Module name -> potential before the reset of a neuron layer of the student, divided by its firing
            threshold, (T, B, ...), at least float32, differentiable; None if no loss needs them.
        index: Indices of the samples in the training set, (B,) int64; None if no loss needs them.
        progress: Share of the training completed when the epoch began, 0 to 1, 0-d; None before the first
            `SSCLTask.set_progress`.
    """
    input: torch.Tensor
    target: torch.Tensor
    step_logits: torch.Tensor
    student: nn.Module
    teacher_logits: torch.Tensor = _ABSENT
    student_features: List[torch.Tensor] = field(default=_ABSENT, repr=False)
    teacher_features: List[torch.Tensor] = field(default=_ABSENT, repr=False)
    firing_rates: Dict[str, torch.Tensor] = field(default=_ABSENT, repr=False)
    teacher_head: nn.Module = field(default=_ABSENT, repr=False)
    progress: Optional[torch.Tensor] = None
    membranes: Dict[str, torch.Tensor] = field(default=_ABSENT, repr=False)
    index: torch.Tensor = _ABSENT

    @property
    def logits(self) -> torch.Tensor:
        """Student logits averaged over time, (B, K)."""
        return self.step_logits.mean(0)
