"""SSCLLoss: the loss for anybody's training loop; hooks a student and a teacher and compares what the hooks saw."""
import logging
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from timm.utils import unwrap_model

from .frames_ann import fold_frames, takes_frames_folded
from timm_sscl.losses.sscl import SSCLCriterion
from .sharing import check_nothing_shared
from timm_sscl.features.recorder import Recorder, guard_on_hooks
from timm_sscl.features.tap import Tap, fold_feature
from timm_sscl.features.finding import find_taps, named_taps, tap_shapes
from timm_sscl.features.stages import match_by_depth
from .teacher_input import TeacherInput

__all__ = ['SSCLLoss']

_logger = logging.getLogger(__name__)


class SSCLLoss(nn.Module):
    """Similarity-sensitive contrastive loss between two models, in two lines of anybody's training loop.

    Builds taps on the last four stages and the pooled feature of both models (timm models), or on the modules that are
    named (any nn.Module), freezes the teacher, and holds the projections g_S and g_A. In a step, `sscl(x)` runs the
    teacher on x and compares its features with those that `student(x)` showed.

    The parameters (g_S, g_A) belong in the optimizer. Student and teacher are no submodules: their parameters are not
    among these, and neither is in the state_dict. `.to(device)` moves the teacher along. Under
    DistributedDataParallel wrap this module as well as the student; the hooks are on the wrapped models.

    A copy made together with both models (deepcopy or pickle of a module that holds the three) is attached to the
    copies. A copy of the loss without them has their projections and no taps. `set_timesteps` on a spiking student
    reaches its loss.

    Args:
        student: Student, spiking or not; not compiled yet.
        teacher: Teacher; frozen and put in evaluation mode here.
        taps: Names of the student's modules to tap ('pooled' is a timm model's pooled feature); None finds the stages.
        teacher_taps: Names of the teacher's modules, in the same order; the student's names by default.
        timesteps: T of the student; None reads student.timesteps, else 1.
        input_size: (C, H, W) of the image that probes the models' feature shapes; None takes the models' own.
        teacher_size: (H, W) of the teacher's images, which are resized from the student's; None leaves them.
        renormalize: (student mean, student std, teacher mean, teacher std) where the teacher was trained on images
            normalised in another way.
        **options: dim, temperature, critic, weighting, cka_floor, cka_momentum, cka_scope, projection, queue_size of
            SSCLCriterion.

    Raises:
        ValueError: A tap does not exist, a model is compiled, student and teacher are one or share a module, a
            parameter or a buffer, or an option is wrong.

    Examples:
        ```python
        sscl = SSCLLoss(student, teacher)
        optimizer = torch.optim.SGD([*student.parameters(), *sscl.parameters()], lr=0.1)
        loss = F.cross_entropy(student(x), y) + sscl(x)
        ```
    """

    def __init__(
            self,
            student: nn.Module,
            teacher: nn.Module,
            taps: Optional[Sequence[str]] = None,
            teacher_taps: Optional[Sequence[str]] = None,
            timesteps: Optional[int] = None,
            input_size: Optional[Sequence[int]] = None,
            teacher_size: Optional[Sequence[int]] = None,
            renormalize: Optional[Tuple[Sequence[float], ...]] = None,
            **options: Any,
    ):
        super().__init__()
        _refuse_compiled(student)
        _refuse_compiled(teacher)
        check_nothing_shared(student, teacher)
        inner_student, inner_teacher = unwrap_model(student), unwrap_model(teacher)
        if timesteps is not None and timesteps < 1:
            raise ValueError(f'timesteps={timesteps}: must be at least 1.')
        follows = timesteps is None or timesteps == getattr(inner_student, 'timesteps', None)
        self._timesteps = None if follows else timesteps
        self.teacher_input = TeacherInput(teacher_size, renormalize)
        shape = input_size if teacher_size is None or input_size is None else (input_size[0], *teacher_size)
        student_taps, teacher_taps = _pair_taps(inner_student, inner_teacher, taps, teacher_taps, input_size, shape)
        if options.get('projection') == 'flattened':
            options = dict(options, student_shapes=tap_shapes(inner_student, student_taps, input_size),
                           teacher_shapes=tap_shapes(inner_teacher, teacher_taps, shape))
        device = next((p.device for p in inner_student.parameters()), torch.device('cpu'))
        self.criterion = SSCLCriterion(
            [tap.name for tap in student_taps],
            [tap.channels for tap in student_taps],
            [tap.channels for tap in teacher_taps],
            **options,
        ).to(device)
        teacher.requires_grad_(False)
        # not submodules: neither their parameters nor their keys are this loss's
        self.__dict__['_wrapped_teacher'] = teacher
        self.__dict__['_student_recorder'] = Recorder(inner_student, student_taps)
        self.__dict__['_teacher_recorder'] = Recorder(inner_teacher, teacher_taps, training_only=False)
        self._teacher_recorder.enabled = False  # but inside this loss: the teacher's other calls are not held
        self.__dict__['_trained'] = _TrainedCheck()
        _logger.info(f'SSCLLoss: {len(student_taps)} pairs of taps: ' + ', '.join(
            f'{s.module} - {a.module}' for s, a in zip(student_taps, teacher_taps)))

    @property
    def timesteps(self) -> int:
        """T of the student's features: the student's own, where it has one."""
        return self._student_recorder.timesteps if self._timesteps is None else self._timesteps

    @property
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Of the last step, per layer: cka (this batch), cka_running, weight, nce and mi_bound (nats)."""
        return self.criterion.stats

    @property
    def taps(self) -> List[Tap]:
        """The student's taps."""
        return list(self._student_recorder.taps)

    def forward(self, x: torch.Tensor, teacher_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Loss between the features that student(x) showed and the teacher's on the same images.

        Args:
            x: The tensor that the student was called on in this step, (B, ...), or event frames (B, T, ...), each of
                which an ANN teacher sees as an image.
            teacher_input: What the teacher sees, where that is not x, resized and renormalised as asked for.

        Returns:
            0-d tensor, the weighted sum over the layers.

        Raises:
            RuntimeError: The student was not called on x in training mode since the last call (see
                `record_in_eval`), a tap did not run or ran without gradients, the hooks were removed, or this is a
                copy made without the models.
            ValueError: teacher_input holds another number of samples, a feature's batch is neither B nor timesteps * B,
                or B is too small for CKA weights.
        """
        student_features = self._student_recorder.take(x)
        training = self._student_recorder.took_training
        if teacher_input is not None and len(teacher_input) != len(x):
            raise ValueError(f'teacher_input holds {len(teacher_input)} samples, x holds {len(x)}: row i of both must '
                             f'be of one image.')
        teacher_features = self._run_teacher(self.teacher_input(x) if teacher_input is None else teacher_input)
        if self.training and training:
            self._trained(self._student_recorder.model, self.criterion)
            self._warn_frozen(student_features)
            return self.from_features(student_features, teacher_features)
        with _evaluating(self.criterion):  # what an evaluation shows does not move the running CKA
            return self.from_features(student_features, teacher_features)

    def record_in_eval(self, enabled: bool = True) -> ExitStack:
        """Let `sscl(x)` compare evaluation forwards of the student too, with or without gradients, from here on.

        The running CKA and the queue stay as training left them; before the first training step the weights are those
        of the batch.

        Args:
            enabled: Whether to.

        Returns:
            A context manager that, where it is used as one, sets it back at its end.

        Examples:
            ```python
            with sscl.record_in_eval(), torch.no_grad():
                for x, y in loader:
                    loss = F.cross_entropy(student(x), y) + sscl(x)
            ```
        """
        recorder = self._student_recorder
        stack = ExitStack()
        stack.callback(self._set_record_in_eval, not recorder.training_only)
        self._set_record_in_eval(enabled)
        return stack

    def _set_record_in_eval(self, enabled: bool) -> None:
        recorder = self._student_recorder
        recorder.training_only, recorder.records = not enabled, []

    def from_features(
            self,
            student_features: Sequence[torch.Tensor],
            teacher_features: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The same loss on features already in hand, as the tapped modules return them.

        Args:
            student_features: Per tap (timesteps * B, ...), time-major, or (B, ...).
            teacher_features: Per tap (B, ...).

        Returns:
            0-d tensor.

        Raises:
            ValueError: There is not one pair per tap, or the batches do not fit.
        """
        student_taps, teacher_taps = self._student_recorder.taps, self._teacher_recorder.taps
        if not len(student_features) == len(teacher_features) == len(student_taps):
            raise ValueError(f'{len(student_features)} student and {len(teacher_features)} teacher features for '
                             f'{len(student_taps)} taps ({", ".join(tap.name for tap in student_taps)}).')
        folded = [self._fold(*pair) for pair in zip(student_taps, student_features, teacher_taps, teacher_features)]
        return self.criterion([s for s, _ in folded], [a for _, a in folded])

    def close(self) -> None:
        """Remove every hook from both models."""
        self._student_recorder.close()
        self._teacher_recorder.close()

    @property
    def _teacher(self) -> Optional[nn.Module]:
        """The teacher as it was given; None in a copy made without it."""
        return self._teacher_recorder.model if self._wrapped_teacher is None else self._wrapped_teacher

    def _warn_frozen(self, features: Sequence[torch.Tensor]) -> None:
        """Warn, once, of taps that no trained parameter of the student lies before."""
        frozen = [tap.name for tap, f in zip(self._student_recorder.taps, features) if not f.requires_grad]
        if frozen and not self.__dict__.get('_frozen_said') and not torch.compiler.is_compiling():
            self.__dict__['_frozen_said'] = True
            _logger.warning(f'SSCLLoss: no parameter before {", ".join(frozen)} of the student is trained '
                            f'(requires_grad=False), so the loss trains only the projections there.')

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_wrapped_teacher': None}  # the models are no part of a copy of the loss

    def __setstate__(self, state: Dict[str, Any]) -> None:
        state = dict(state)
        if 'timesteps' in state:  # written by version 0.1.0
            state['_timesteps'] = state.pop('timesteps')
            state['_wrapped_teacher'] = None
            del state['_teacher']
        super().__setstate__(state)
        self._student_recorder.enabled = True  # which has a model where that was copied along
        guard_on_hooks()

    def _run_teacher(self, x: torch.Tensor) -> List[torch.Tensor]:
        self._teacher_recorder.check_attached()
        self._teacher.eval()
        self._teacher_recorder.enabled = True
        try:
            with torch.no_grad():
                if not takes_frames_folded(unwrap_model(self._teacher), x):
                    self._teacher(x)
                    return self._teacher_recorder.take(x)
                frames = fold_frames(x)  # an ANN's features are the means over the frames
                self._teacher(frames)
                return [a.unflatten(0, (x.shape[1], -1)).mean(0) for a in self._teacher_recorder.take(frames)]
        finally:
            self._teacher_recorder.enabled = False

    def _fold(self, tap: Tap, s: torch.Tensor, teacher_tap: Tap, a: torch.Tensor):
        batch = a.shape[0] // self._teacher_recorder.timesteps
        if s.shape[0] not in (batch, self.timesteps * batch):
            raise ValueError(f"feature '{tap.name}' holds {s.shape[0]} rows, the teacher's batch is {batch}: expected "
                             f"{batch} or timesteps * batch = {self.timesteps * batch}. "
                             f'Is timesteps={self.timesteps} right?')
        return (fold_feature(s, s.shape[0] // batch, tap.channel_axis, tap.prefix_tokens),
                fold_feature(a, a.shape[0] // batch, teacher_tap.channel_axis, teacher_tap.prefix_tokens))

    def _apply(self, fn, *args, **kwargs):
        teacher = self._teacher
        if teacher is not None:
            teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, set back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, '_orig_mod') or module._compiled_call_impl is not None:
            raise ValueError(f"{name or type(model).__name__} is compiled, and torch.compile ignores hooks added after "
                             f'it: build the loss first, then compile.')


def _pair_taps(student, teacher, taps, teacher_taps, input_size, teacher_size):
    """Taps of both models, one to one: by name, or the stages at the same relative depth and the pooled feature."""
    if taps is None and teacher_taps is None:
        found = find_taps(student, input_size=input_size), find_taps(teacher, input_size=teacher_size)
        kept = match_by_depth(*(len(f) - 1 for f in found))  # without the pooled feature
        return tuple([*(f[i] for i in stages), f[-1]] for f, stages in zip(found, kept))
    if taps is None:
        raise ValueError('teacher_taps without taps: name the student\'s modules as well.')
    taps = [taps] if isinstance(taps, str) else list(taps)
    if teacher_taps is None:
        teacher_taps = taps
    teacher_taps = [teacher_taps] if isinstance(teacher_taps, str) else list(teacher_taps)
    if len(taps) != len(teacher_taps) or not taps:
        raise ValueError(f'taps names {len(taps)} modules and teacher_taps {len(teacher_taps)}; '
                         f'they are compared in pairs.')
    return named_taps(student, taps, input_size), named_taps(teacher, teacher_taps, teacher_size)


class _TrainedCheck:
    """Warns, once, when the optimizer moves the student but not the projections; looks at the first calls only."""

    def __init__(self, calls: int = 50):
        self.calls = calls
        self.before = None

    def __call__(self, student: nn.Module, criterion: nn.Module) -> None:
        if self.calls == 0 or torch.compiler.is_compiling():
            return
        self.calls -= 1
        student_parameter = next((p for p in student.parameters() if p.requires_grad), None)
        # sums, as a fused optimizer does not move the version counters
        now = [float(p.detach().double().sum()) for p in (student_parameter, criterion.g_student[0].weight)
               if p is not None]
        if self.before is not None and len(now) == 2 and now[0] != self.before[0] and now[1] == self.before[1]:
            self.calls = 0
            _logger.warning('SSCLLoss: the student is being trained but the projections g_S and g_A are not; '
                            'add sscl.parameters() to the optimizer.')
        self.before = now
