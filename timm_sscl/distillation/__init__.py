"""Train a student with a teacher: SSCLLoss for any training loop, SSCLTask for timm's TrainingTask, the teacher's
input.
"""
from .frames_ann import accept_frames
from .sscl import SSCLLoss
from .presets import PRESETS
from .task import SSCLTask
from .teacher_input import TeacherInput

__all__ = ['PRESETS', 'SSCLLoss', 'SSCLTask', 'TeacherInput', 'accept_frames']
