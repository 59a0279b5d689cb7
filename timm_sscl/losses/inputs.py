"""What a loss is shown of one training step."""
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import torch
import torch.nn as nn

__all__ = ['TrainStep']


@dataclass
class TrainStep:
    """One training step, the single argument of every registered loss.

    Attributes:
        input: Images (B, C, H, W) or event frames (B, T, C, H, W) as the student saw them.
        target: Labels (B,) or soft targets (B, K).
        step_logits: Student logits of every time step, (T, B, K).
        student: The student, for regularisers on its parameters.
        teacher_logits: Teacher logits (B, K); None where no loss needs a teacher.
        student_features: One (T, B, C, ...) tensor per tap; None where no loss needs features.
        teacher_features: One (T', B, C', ...) tensor per tap, T' = 1 for an ANN.
        firing_rates: Spikes per neuron and step of every neuron layer of the student, 0-d and differentiable, by module
            name; None where no loss needs them.
    """
    input: torch.Tensor
    target: torch.Tensor
    step_logits: torch.Tensor
    student: nn.Module
    teacher_logits: Optional[torch.Tensor] = None
    student_features: Optional[List[torch.Tensor]] = field(default=None, repr=False)
    teacher_features: Optional[List[torch.Tensor]] = field(default=None, repr=False)
    firing_rates: Optional[Dict[str, torch.Tensor]] = field(default=None, repr=False)

    @property
    def logits(self) -> torch.Tensor:
        """Student logits, the mean over time, (B, K)."""
        return self.step_logits.mean(0)
