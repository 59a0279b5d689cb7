"""The student learns from its teacher: SSCLLoss for anybody's loop, SSCLTask for timm's seam, what the teacher
sees."""
from .frames_ann import accept_frames
from .sscl import SSCLLoss
from .presets import PRESETS
from .task import SSCLTask
from .teacher_input import TeacherInput

__all__ = ['PRESETS', 'SSCLLoss', 'SSCLTask', 'TeacherInput', 'accept_frames']
