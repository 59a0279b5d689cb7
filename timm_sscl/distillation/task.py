"""SSCLTask: student, teacher and named losses as a timm TrainingTask."""
import logging
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.task.classification import resolve_classification_loss
from timm.utils import unwrap_model

from timm_sscl.distributed import batch_share, world_size
from timm_sscl.features.reader import FeatureReader
from timm_sscl.features.membranes import MembraneRecorder
from timm_sscl.features.rates import RateRecorder
from timm_sscl.features.stages import match_by_depth
from timm_sscl.losses import create_loss, loss_spec

from .classes import check_classes
from .loss_terms import TermCheck
from .presets import check_loss_options, resolve_losses
from .sharing import check_nothing_shared
from .tap_reader import Reader, create_reader
from .teacher_input import TeacherInput, Transform
from .trainable import SSCLTrainableModule, read_model

__all__ = ['SSCLTrainableModule', 'SSCLTask']

_logger = logging.getLogger(__name__)


class SSCLTask(TrainingTask):
    """Classification of a student with named, weighted losses that may compare it with a frozen teacher.

        loss = task_loss_weight * criterion(output, target) + sum_name weight_name * loss_name

    The student's features are read by its methods (forward_intermediates), so torch.compile and gradient checkpointing
    work together. A loss of weight 0 is left out and has no effect.

    Args:
        student: timm model to train, spiking or not.
        teacher: Teacher; frozen and kept in evaluation mode. Required if a loss compares with it.
        losses: Preset ('sscl', 'contrastive', 'kd', 'none') or {registered name: weight}.
        loss_options: Options per loss, {'sscl': {'temperature': 0.07}}. Those of a loss that does not run are checked
            and a warning names them.
        criterion: Classification loss; by default timm creates it from criterion_kwargs.
        criterion_kwargs: Arguments of timm's create_classification_loss.
        task_loss_weight: Weight of the classification loss.
        taps: Number of stages to tap, counted from the last, besides the pooled feature; or names as in SSCLLoss: of
            the student's stages (as in its feature_info), 'pooled', and of modules, which are read by hooks.
        teacher_taps: The same for the teacher, in pairs with the student's; by default the value of taps.
        input_size: (C, H, W) of the training images, for the probe of the feature shapes.
        renormalize: (student mean, student std, teacher mean, teacher std) if the teacher was trained on images with
            another normalisation.
        teacher_size: (H, W) of the teacher's images, which are resized from the student's; None does not resize.
        device: Device of the task's tensors.
        dtype: Dtype of the task's tensors.
        verbose: Whether to log what is trained.
        teacher_transform: Function that converts a batch of the student's images to the teacher's, instead of
            renormalize and teacher_size.
        num_samples: Number of training samples. Required if a loss uses the indices of the samples.

    Raises:
        ValueError: A loss does not exist, needs a teacher or num_samples that is not given, or does not fit the models;
            student and teacher share a module, a parameter or a buffer; or a loss compares logits of different numbers
            of classes.
    """
    trainable_module: nn.Module
    teacher: Optional[nn.Module]
    teacher_reader: Optional[Reader]

    def __init__(
            self,
            student: nn.Module,
            teacher: Optional[nn.Module] = None,
            losses: Union[str, Mapping[str, float]] = 'sscl',
            loss_options: Optional[Mapping[str, Mapping[str, Any]]] = None,
            criterion: Optional[Union[nn.Module, Callable]] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            task_loss_weight: float = 1.,
            taps: Union[int, Sequence[str]] = 4,
            teacher_taps: Union[int, Sequence[str], None] = None,
            input_size: Optional[Sequence[int]] = None,
            renormalize: Optional[Tuple[Sequence[float], ...]] = None,
            teacher_size: Optional[Sequence[int]] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
            teacher_transform: Optional[Transform] = None,
            num_samples: Optional[int] = None,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.teacher_input = TeacherInput(teacher_size, renormalize, teacher_transform)
        teacher_shape = self.teacher_input.shape(input_size)
        self.weights = resolve_losses(losses)
        check_loss_options(loss_options or {}, losses)
        self._term_check = TermCheck()
        self.task_loss_weight = task_loss_weight
        specs = {name: loss_spec(name) for name in self.weights}
        self.needs_teacher = any(spec.needs_teacher for spec in specs.values())
        if self.needs_teacher and teacher is None:
            raise ValueError(f'losses {", ".join(self.weights)} compare with a teacher, but teacher is None.')
        frozen = cast(nn.Module, teacher)  # is one where a loss needs it
        if self.needs_teacher:
            check_nothing_shared(student, frozen)
            check_classes(student, frozen, self.weights, input_size, teacher_shape)

        reader = self.teacher_reader = cast(Optional[Reader], None)
        if any(spec.needs_features for spec in specs.values()):
            reader, self.teacher_reader = _readers(student, frozen, taps, teacher_taps, input_size, teacher_shape)
        self.global_losses = {name for name, spec in specs.items() if spec.global_batch}
        self.index_losses = [name for name, spec in specs.items() if spec.needs_index]
        rate_recorder = RateRecorder(student) if any(spec.needs_firing_rates for spec in specs.values()) else None
        membranes = MembraneRecorder(student) if any(spec.needs_membranes for spec in specs.values()) else None
        modules = {name: _create(name, (loss_options or {}).get(name, {}), reader, self.teacher_reader, num_samples)
                   for name in self.weights}
        head = _classifier(teacher) if teacher and any(spec.needs_teacher_head for spec in specs.values()) else None
        self.trainable_module = SSCLTrainableModule(
            student, modules, reader, rate_recorder, head, membranes).to(self.device)
        self.teacher = frozen.to(self.device).requires_grad_(False).eval() if self.needs_teacher else None
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        if verbose:
            taps = ''
            if reader and self.teacher_reader:
                pairs = [s if s == t else f'{s} - {t}' for s, t in zip(reader.names, self.teacher_reader.names)]
                taps = f' on {len(pairs)} taps ({", ".join(pairs)})'
            terms = ' + '.join(f'{weight:g} {name}' for name, weight in self.weights.items())
            terms = f' + {terms}{taps}' if terms else ''
            _logger.info(f'SSCLTask: loss = {task_loss_weight:g} classification{terms}')

    @property
    def student(self) -> nn.Module:
        """The student without wrappers."""
        return unwrap_model(self.trainable_module).student

    @property
    def stats(self) -> Dict[str, Dict[str, float]]:
        """Statistics per layer of the last step, from all losses that have some."""
        merged: Dict[str, Dict[str, float]] = {}
        for loss in unwrap_model(self.trainable_module).losses.values():
            for layer, values in getattr(loss, 'stats', {}).items():
                merged.setdefault(layer, {}).update(values)
        return merged

    @property
    def device_stats(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """The values of `stats` as 0-d tensors, without waiting for the device."""
        merged: Dict[str, Dict[str, torch.Tensor]] = {}
        for loss in unwrap_model(self.trainable_module).losses.values():
            for layer, values in _device_stats(loss, self.device).items():
                merged.setdefault(layer, {}).update(values)
        return merged

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            taught: Optional[Tuple[Optional[torch.Tensor], Optional[List[torch.Tensor]]]] = None,
            index: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """Return the losses of one training step.

        Args:
            input: Images (B, C, H, W) or event frames (B, T, C, H, W).
            target: Labels (B,) or soft targets (B, K).
            taught: Teacher outputs: the result of `teach` for these images. None calls `teach`.
            index: Indices of the samples in the training set, (B,) int64, 0 to num_samples - 1. Required if a loss uses
                them (`step.index`). Under mixup, the index of the first of both images.

        Returns:
            'loss' (weighted sum), 'output' (student logits (B, K)), 'task_loss', and '<name>_loss' per loss, not
            weighted. With several processes, the terms are means over the process's own samples or, for losses
            registered with global_batch, over the global batch. In 'loss' the former are weighted by the number of
            samples, so that the mean of gradients over processes, as DDP computes it, is the gradient of the global
            batch's loss.

        Raises:
            ValueError: A loss uses the indices, and index is not one whole number per sample.
        """
        inputs: List[Any] = [input, target, *(self.teach(input) if taught is None else taught)]
        if self.index_losses:
            inputs.append(self._check_index(index, input))
        result = self.trainable_module(*inputs)
        output = result.pop('output')
        self._term_check(result, self.student)
        task_loss = self.criterion(output, target)
        share = self._batch_share(output)
        loss = self.task_loss_weight * share * task_loss
        for name, term in result.items():
            loss = loss + self.weights[name] * (term if name in self.global_losses else share * term)
        terms = {f'{name}_loss': term for name, term in result.items()}
        return {'loss': loss, 'output': output, 'task_loss': task_loss, **terms}

    def _check_index(self, index: Optional[torch.Tensor], input: torch.Tensor) -> torch.Tensor:
        if index is None or index.shape != input.shape[:1] or index.dtype != torch.int64:
            given = 'None' if index is None else f'{tuple(index.shape)} {index.dtype}'
            raise ValueError(f'index={given}: loss {", ".join(self.index_losses)} uses the indices of the samples in '
                             f'the training set, ({len(input)},) torch.int64.')
        return index

    @staticmethod
    def _batch_share(output: torch.Tensor) -> Union[int, torch.Tensor]:
        """Return the factor for means over a process's own samples, since DDP averages over processes, not samples."""
        return batch_share(output.shape[0], output) if world_size() > 1 else 1

    @torch.no_grad()
    def teach(self, input: torch.Tensor) -> Tuple[Optional[torch.Tensor], Optional[List[torch.Tensor]]]:
        """Return teacher logits (B, K) and features. Images need one forward; event frames need one per frame."""
        if self.teacher is None:
            return None, None
        self.teacher.eval()  # needed if the user called teacher.train(): its batch norms would update
        step_logits, features = read_model(self.teacher, self.teacher_reader, self.teacher_input(input))
        return step_logits.mean(0), features

    def set_progress(self, progress: float) -> None:
        """Set the completed share of the training, which losses read as `step.progress`. Call it when an epoch begins.

        Args:
            progress: 0 to 1.

        Raises:
            ValueError: progress is not between 0 and 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f'progress={progress}: must be a share of the training, 0 to 1.')
        trained = unwrap_model(self.trainable_module)
        trained.progress.fill_(progress)
        trained.has_progress = True

    def train(self, mode: bool = True) -> 'SSCLTask':
        """Set the training mode. The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'SSCLTask':
        """Wrap the trainable module in DistributedDataParallel. The teacher is not wrapped."""
        from torch.nn.parallel import DistributedDataParallel as DDP
        self.trainable_module = DDP(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # timm's TrainingTask.compile differs from nn.Module's alike
            self,
            backend: str = 'inductor',
            mode: Optional[str] = None,
            **compile_kwargs,
    ) -> nn.Module:
        """Compile the student (for validation) and the trainable module. Call this before DDP or Accelerate's prepare.
        """
        options: Dict[str, Any] = dict(backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = cast(nn.Module, torch.compile(self.student, **options))
        self.trainable_module = cast(nn.Module, torch.compile(self.trainable_module, **options))
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = unwrap_model(resolved) if resolved is not None else None
        return trainable.student if isinstance(trainable, SSCLTrainableModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False):
        trainable = unwrap_model(self.trainable_module)
        parameters = list(trainable.student.parameters())
        return (parameters[:-2] if exclude_head else parameters) + list(trainable.losses.parameters())

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return the state of the losses: projections and running CKA."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        state = unwrap_model(module).losses.state_dict() if module is not None else {}
        return {'losses': state} if state else {}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError(f'Cannot load {"EMA " if ema else ""}task state: there is no such module yet.')
        if state and 'losses' in state:
            unwrap_model(module).losses.load_state_dict(state['losses'], strict=strict)


def _classifier(teacher: nn.Module) -> nn.Module:
    """Return the teacher's classifier."""
    teacher = unwrap_model(teacher)
    head = teacher.get_classifier() if hasattr(teacher, 'get_classifier') else None
    if not isinstance(head, nn.Module) or isinstance(head, nn.Identity):
        raise ValueError(f"a loss uses the teacher's classifier, but {type(teacher).__name__} has none that "
                         f'get_classifier() returns.')
    return head


def _readers(
        student: nn.Module,
        teacher: nn.Module,
        taps: Union[int, Sequence[str]],
        teacher_taps: Union[int, Sequence[str], None],
        input_size: Optional[Sequence[int]],
        teacher_shape: Optional[Sequence[int]],
) -> Tuple[Reader, Reader]:
    """Create the readers of both models' features."""
    teacher_taps = taps if teacher_taps is None else teacher_taps
    if isinstance(taps, int) != isinstance(teacher_taps, int):
        raise ValueError(f'taps={taps} and teacher_taps={teacher_taps}: give numbers of stages, or names, of both.')
    readers = create_reader(student, taps, input_size), create_reader(teacher, teacher_taps, teacher_shape)
    _match(*readers, cut=isinstance(taps, int))
    return readers


def _device_stats(loss: nn.Module, device: Optional[torch.device]) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Return the statistics of a loss as tensors. A loss of a user's own may have `stats` alone, which are numbers."""
    if hasattr(loss, 'device_stats'):
        return cast(Any, loss).device_stats
    return {layer: {key: torch.full((), value, dtype=torch.float64, device=device) for key, value in values.items()}
            for layer, values in getattr(loss, 'stats', {}).items()}


def _match(student: Reader, teacher: Reader, cut: bool) -> None:
    """Pair the taps of both models: stages by relative depth, names one to one."""
    if cut and isinstance(student, FeatureReader) and isinstance(teacher, FeatureReader):
        for reader, kept in zip((student, teacher), match_by_depth(len(student.indices), len(teacher.indices))):
            reader.keep(kept)
    if len(student.names) != len(teacher.names):
        raise ValueError(f'taps are compared in pairs: {", ".join(student.names)} of the student, '
                         f'{", ".join(teacher.names)} of the teacher.')


def _create(
        name: str,
        options: Mapping[str, Any],
        student: Optional[Reader],
        teacher: Optional[Reader],
        num_samples: Optional[int],
) -> nn.Module:
    """Build a loss for the taps of both readers and for a training set of this size."""
    spec = loss_spec(name)
    taps: Dict[str, Any] = {}
    if spec.needs_index:
        if num_samples is None or num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: loss '{name}' uses the indices of the samples and needs the "
                             f'number of training samples.')
        taps.update(num_samples=num_samples)
    if spec.needs_features and student is not None and teacher is not None:
        taps.update(names=student.names, student_channels=student.channels, teacher_channels=teacher.channels)
        if spec.needs_shapes:
            taps.update(student_shapes=student.shapes, teacher_shapes=teacher.shapes)
    return create_loss(name, **taps, **options)
