"""SSCLTrainableModule: student and losses in one forward, and how logits and features of a model are read."""
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm.models import group_parameters

from timm_sscl.features.membranes import MembraneRecorder
from timm_sscl.features.rates import RateRecorder
from timm_sscl.losses import TrainStep

from .frames_ann import as_mean_frame, fold_frames, takes_frames_folded
from .loss_terms import compute_terms
from .tap_reader import Reader

__all__ = ['SSCLTrainableModule', 'read_model']


class SSCLTrainableModule(nn.Module):
    """Everything that is trained: the student and the losses' parameters (projections). It has one forward, as DDP
    requires.
    """

    def __init__(
            self,
            student: nn.Module,
            losses: Mapping[str, nn.Module],
            reader: Optional[Reader],
            rate_recorder: Optional[RateRecorder] = None,
            teacher_head: Optional[nn.Module] = None,
            membrane_recorder: Optional[MembraneRecorder] = None,
    ):
        super().__init__()
        self.__dict__['teacher_head'] = teacher_head  # not registered as a submodule: it is not trained
        self.register_buffer('progress', torch.full((), torch.nan), persistent=False)
        self.has_progress = False
        self.student = student
        self.losses = nn.ModuleDict(losses)
        self.reader = reader
        self.rate_recorder = rate_recorder
        self.membrane_recorder = membrane_recorder

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            teacher_logits: Optional[torch.Tensor] = None,
            teacher_features: Optional[List[torch.Tensor]] = None,
            index: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """Return student logits (B, K) as 'output', and every loss by its name, not weighted."""
        recorders = dict(firing_rates=self.rate_recorder, membranes=self.__dict__.get('membrane_recorder'))
        for recorder in recorders.values():
            if recorder is not None:
                recorder.begin()
        step_logits, features = read_model(self.student, self.reader, input)
        recorded = {name: None if recorder is None else recorder.take() for name, recorder in recorders.items()}
        wanted: Dict[str, Any] = dict(  # None is what no loss asked for
            teacher_logits=teacher_logits, student_features=features, teacher_features=teacher_features,
            **recorded, teacher_head=self.__dict__.get('teacher_head'), index=index,
            progress=self.progress if self.__dict__.get('has_progress') else None)
        step = TrainStep(input, target, step_logits, self.student, **wanted)
        return {'output': step.logits, **compute_terms(self.losses, step)}

    def no_weight_decay(self):
        """Return the names of parameters without weight decay: those of the student, with the prefix 'student.'."""
        student = self.student
        names = student.no_weight_decay() if hasattr(student, 'no_weight_decay') else set()
        return {f'student.{name}' for name in names}

    def group_matcher(self, coarse: bool = False):
        """Return layer groups for layer decay: the student's own. The losses' parameters belong to its last group."""
        layer_map = group_parameters(self.student, self.student.group_matcher(coarse=coarse), reverse=True)
        last = max(layer_map.values(), default=0)
        return lambda name: layer_map.get(name[len('student.'):], last) if name.startswith('student.') else last


def read_model(
        model: nn.Module,
        reader: Optional[Reader],
        input: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[List[torch.Tensor]]]:
    """Return logits of every timestep (T, B, K), and the features if there is a reader.

    An ANN has T = 1. On event frames its logits and features are means over the frames, or those of the mean frame.
    """
    input = as_mean_frame(model, input)
    if takes_frames_folded(model, input):
        logits, features = read_model(model, reader, fold_frames(input))
        logits, *features = (_mean_over_frames(x, input.shape[1]) for x in (logits, *(features or ())))
        return logits, features if reader is not None else None
    if reader is not None:
        logits, features = reader(model, input)
        return _check_logits(model, logits), features
    if hasattr(model, 'set_timesteps'):
        return _check_logits(model, model(input, per_step=True)), None
    return _check_logits(model, model(input)).unsqueeze(0), None


def _check_logits(model: nn.Module, logits: Any) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f'{type(model).__name__} returns a {type(logits).__name__} and no tensor of logits (B, K); of '
                        f"timm's distilled models set_distilled_training(False) returns one.")
    return logits


def _mean_over_frames(x: torch.Tensor, timesteps: int) -> torch.Tensor:
    """Average over frames: (1, T * B, ...) to (1, B, ...)."""
    return x.squeeze(0).unflatten(0, (timesteps, -1)).mean(0, keepdim=True)
