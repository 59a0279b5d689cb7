"""SSCLLoss: the loss for any training loop. It compares features of student and teacher that hooks recorded."""
import logging
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from timm_sscl.features.finding import tap_shapes
from timm_sscl.features.recorder import Recorder, guard_on_hooks
from timm_sscl.features.tap import Tap, fold_feature
from timm_sscl.losses.pair_critics import Critic
from timm_sscl.losses.projections import Projection
from timm_sscl.losses.sscl import SSCLCriterion
from timm_sscl.losses.sscl_parts import create_projection
from timm_sscl.losses.weightings import Weighting
from timm_sscl.time_axis import mean_over_time

from .frames_ann import as_mean_frame, fold_frames, takes_frames_folded
from .sharing import check_nothing_shared
from .tap_pairs import pair_taps
from .teacher_input import TeacherInput, Transform
from .trained_check import SyncedCheck, TrainedCheck

__all__ = ['SSCLLoss']

_logger = logging.getLogger(__name__)
_TrainedCheck = TrainedCheck  # name in pickles of version 0.1.0


class SSCLLoss(nn.Module):
    """Similarity-sensitive contrastive loss between two models, in two lines of any training loop.

        loss = sum_l w_l L_l,   w_l = 1 / max(CKA_l, cka_floor)

    L_l is `info_nce_loss` of the rows g_S(S) and g_A(A) of the features pooled over time and space. CKA_l is unbiased
    and sees the whole features, of the student all T*C*H*W numbers per image.

    The constructor taps the last four stages and the pooled feature of both models (timm models; of features_only
    wrappers the last four outputs), or named modules (any nn.Module), freezes the teacher, and creates the projections
    g_S and g_A. In a training step, `sscl(x)` runs the teacher on x and compares its features with those recorded
    during `student(x)`.

    Add the parameters (g_S, g_A) to the optimizer. Student and teacher are not submodules: their parameters are not
    among these, and the state_dict contains neither. `.to(device)` also moves the teacher. With
    DistributedDataParallel, wrap both this module and the student; the hooks are on the wrapped models.

    A copy that is made together with both models (deepcopy or pickle of a module that contains all three) is attached
    to the copied models. A copy of the loss alone has the projections but no taps. `set_timesteps` on a spiking student
    also applies to its loss.

    Args:
        student: Student, spiking or not; not compiled yet.
        teacher: Teacher. It is frozen and set to evaluation mode.
        taps: Names of the student's modules to tap ('pooled' is a timm model's pooled feature); None finds the stages.
        teacher_taps: Names of the teacher's modules, in the same order; by default the student's names.
        timesteps: T of the student; None reads student.timesteps, else 1.
        input_size: (C, H, W) of the image that probes the shapes of features; None takes the models' own.
        teacher_size: (H, W) of the teacher's images, which are resized from the student's; None does not resize.
        renormalize: (student mean, student std, teacher mean, teacher std) if the teacher was trained on images with
            another normalisation.
        teacher_transform: Function that converts a batch of the student's images to the teacher's, instead of
            teacher_size and renormalize.
        dim: Common dimension of the projections g_S and g_A.
        temperature: Temperature of the critic.
        critic: 'infonce', 'normalized' (the paper's critic in the form of its source), 'literal' (Eq. 19 as printed);
            or a `Critic`.
        weighting: 'cka' for 1 / CKA, 'uniform', 'cka_mean1', 'uniform_matched', 'reverse', 'fixed', 'shuffled',
            'uncertainty'; or a `Weighting`.
        cka_floor: Lower bound of CKA in the weights.
        cka_momentum: Share of the newest batch in the running CKA; 1 uses only this batch.
        projection: 'pooled' over space and time, or 'flattened', which fixes T and the image size; or a `Projection`.
        cka_scope: With several processes: CKA's terms averaged over every 'process', or of the 'global' batch.
        queue_size: Number of past teacher rows that are further negatives.
        layer_weights: Weights of the layers with weighting='fixed', one per tap.

    Raises:
        ValueError: A tap does not exist, a model is compiled, student and teacher are the same or share a module, a
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
            teacher_transform: Optional[Transform] = None,
            *,
            dim: int = 128,
            temperature: float = 0.2,
            critic: Union[str, Critic] = 'infonce',
            weighting: Union[str, Weighting] = 'cka',
            cka_floor: float = 0.1,
            cka_momentum: float = 0.1,
            projection: Union[str, Projection] = 'pooled',
            cka_scope: str = 'process',
            queue_size: int = 0,
            layer_weights: Optional[Sequence[float]] = None,
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
        self.teacher_input = TeacherInput(teacher_size, renormalize, teacher_transform)
        shape = self.teacher_input.shape(input_size)
        of_student, of_teacher = pair_taps(inner_student, inner_teacher, taps, teacher_taps, input_size, shape)
        shapes = {}
        if create_projection(projection).needs_shapes:
            shapes = dict(student_shapes=tap_shapes(inner_student, of_student, input_size),
                          teacher_shapes=tap_shapes(inner_teacher, of_teacher, shape))
        device = next((p.device for p in inner_student.parameters()), torch.device('cpu'))
        self.criterion = SSCLCriterion(
            [tap.name for tap in of_student],
            [tap.channels for tap in of_student],
            [tap.channels for tap in of_teacher],
            dim=dim, temperature=temperature, critic=critic, weighting=weighting, cka_floor=cka_floor,
            cka_momentum=cka_momentum, projection=projection, cka_scope=cka_scope, queue_size=queue_size,
            layer_weights=layer_weights, **shapes,
        ).to(device)
        teacher.requires_grad_(False)
        # not registered as submodules, so that their parameters and keys are not part of this loss
        self.__dict__['_wrapped_teacher'] = teacher
        self.__dict__['_student_recorder'] = Recorder(inner_student, of_student)
        self.__dict__['_teacher_recorder'] = Recorder(inner_teacher, of_teacher, training_only=False)
        # enabled only inside this loss; other calls of the teacher are not recorded
        self._teacher_recorder.enabled = False
        self.__dict__['_trained'] = TrainedCheck()
        self.__dict__['_synced'] = SyncedCheck()
        _logger.info(f'SSCLLoss: {len(of_student)} pairs of taps: ' + ', '.join(
            f'{s.module} - {a.module}' for s, a in zip(of_student, of_teacher)))

    @property
    def timesteps(self) -> int:
        """T of the student's features: the student's own T if it has one."""
        return self._student_recorder.timesteps if self._timesteps is None else self._timesteps

    @property
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Statistics of the last step per layer: cka (this batch), cka_running, weight, nce and mi_bound (nats)."""
        return self.criterion.stats

    @property
    def device_stats(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """The values of `stats` as 0-d tensors on the device, for loggers: reading `stats` waits for the device."""
        return self.criterion.device_stats

    @property
    def taps(self) -> List[Tap]:
        """The student's taps."""
        return list(self._student_recorder.taps)

    def forward(self, x: torch.Tensor, teacher_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return the loss between the features recorded during student(x) and the teacher's on the same images.

        Args:
            x: The tensor on which the student was called in this step, (B, ...), or event frames (B, T, ...). An ANN
                teacher processes each frame as an image.
            teacher_input: The teacher's input if it is not x, resized and renormalised as configured.

        Returns:
            0-d tensor, the weighted sum over the layers.

        Raises:
            RuntimeError: The student was not called on x in training mode since the last call (see `record_in_eval`), a
                tap did not run or ran without gradients, the hooks were removed, or this is a copy without the models.
            ValueError: teacher_input has another number of samples, the batch of a feature is neither B nor timesteps *
                B, or B is too small for CKA weights.
        """
        student_features = self._student_recorder.take(x)
        training = self._student_recorder.took_training
        if teacher_input is not None and len(teacher_input) != len(x):
            raise ValueError(f'teacher_input holds {len(teacher_input)} samples, x holds {len(x)}: row i of both must '
                             f'be of one image.')
        teacher_features = self._run_teacher(self.teacher_input(x) if teacher_input is None else teacher_input)
        if self.training and training:
            self._trained(self._student_recorder.model, self.criterion)
            self._synced(self.criterion)
            self._warn_frozen(student_features)
            return self.from_features(student_features, teacher_features)
        with _evaluating(self.criterion):  # an evaluation does not change the running CKA
            return self.from_features(student_features, teacher_features)

    def record_in_eval(self, enabled: bool = True) -> ExitStack:
        """Let `sscl(x)` also compare evaluation forwards of the student, with or without gradients, from now on.

        The running CKA and the queue do not change. Before the first training step, the weights are those of the batch.

        Args:
            enabled: Whether to record evaluation forwards.

        Returns:
            A context manager that restores the previous setting at its end, if used as one.

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
        """Return the same loss for given features, in the shape in which the tapped modules return them.

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
        """Remove all hooks from both models."""
        self._student_recorder.close()
        self._teacher_recorder.close()

    @property
    def _teacher(self) -> Optional[nn.Module]:
        """The teacher as passed to the constructor; None in a copy made without it."""
        return self._teacher_recorder.model if self._wrapped_teacher is None else self._wrapped_teacher

    def _warn_frozen(self, features: Sequence[torch.Tensor]) -> None:
        """Warn once of taps before which no parameter of the student is trained."""
        frozen = [tap.name for tap, f in zip(self._student_recorder.taps, features) if not f.requires_grad]
        if frozen and not self.__dict__.get('_frozen_said') and not torch.compiler.is_compiling():
            self.__dict__['_frozen_said'] = True
            _logger.warning(f'SSCLLoss: no parameter before {", ".join(frozen)} of the student is trained '
                            f'(requires_grad=False), so the loss trains only the projections there.')

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_wrapped_teacher': None}  # the models are not part of a copy of the loss

    def __setstate__(self, state: Dict[str, Any]) -> None:
        state = dict(state)
        if 'timesteps' in state:  # a pickle of version 0.1.0
            state['_timesteps'] = state.pop('timesteps')
            state['_wrapped_teacher'] = None
            del state['_teacher']
        state.setdefault('_synced', SyncedCheck())  # not in pickles of version 0.1.0
        super().__setstate__(state)
        self._student_recorder.enabled = True  # it has a model if that was copied, too
        guard_on_hooks()

    def _run_teacher(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Run the teacher without gradients and return its features, averaged over event frames for an ANN."""
        self._teacher_recorder.check_attached()
        teacher: Any = self._teacher  # an attached loss has one
        teacher.eval()
        x = as_mean_frame(unwrap_model(teacher), x)
        self._teacher_recorder.enabled = True
        try:
            with torch.no_grad():
                if not takes_frames_folded(unwrap_model(teacher), x):
                    teacher(x)
                    return self._teacher_recorder.take(x)
                frames = fold_frames(x)  # the features of an ANN are means over the frames
                teacher(frames)
                return [mean_over_time(a.unflatten(0, (x.shape[1], -1))) for a in self._teacher_recorder.take(frames)]
        finally:
            self._teacher_recorder.enabled = False

    def _fold(self, tap: Tap, s: torch.Tensor, teacher_tap: Tap, a: torch.Tensor):
        """Reshape a pair of features to (T, B, C, ...)."""
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
    """Set evaluation mode inside, and restore the modes afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def _refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError if a module of the model is compiled."""
    for name, module in model.named_modules():
        if hasattr(module, '_orig_mod') or module._compiled_call_impl is not None:
            raise ValueError(f"{name or type(model).__name__} is compiled, and torch.compile ignores hooks added after "
                             f'it: build the loss first, then compile.')
