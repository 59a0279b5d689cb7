"""Recorder: read features by hooks, in any training loop."""
from contextlib import nullcontext
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch._dynamo
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from .second_pass import second_pass
from .tap import Tap, has_timesteps, per_step_keyword, tensor_at

__all__ = ['guard_on_hooks', 'Recorder']


# ---- reading by hooks, where the caller owns the training loop

def guard_on_hooks() -> None:
    """Make torch.compile distinguish a model with hooks from an equal model without hooks.

    By default dynamo reuses the graph of one for the other: taps then never fire, or fire for the wrong model.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # graphs compiled earlier lack the check


class _Attached:
    """Base of the hooks that pass something to a recorder.

    A copy of the model (deepcopy or pickle) holds a copy of the hook, which refers to a copy of the recorder. The
    copied recorder records only if its owner was copied together with the model.
    """

    def __init__(self, recorder: Optional['Recorder'] = None, key: Any = None):
        self.recorder = recorder
        self.key = key
        self.handle: Optional[RemovableHandle] = None

    def added(self, handle: RemovableHandle) -> None:
        """Store the handle of this hook, so that a copy of the hook can be removed, too."""
        self.handle = handle
        if self.recorder is not None:
            self.recorder.handles.append(handle)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.recorder is not None and self.handle is not None:
            self.recorder.handles.append(self.handle)


class _Hook(_Attached):
    """Forward hook that passes a module's output to a recorder."""

    def __call__(self, module: nn.Module, args: Tuple, kwargs: Dict, out: Any) -> None:
        if self.recorder is not None:
            self.recorder.record(self.key, out)


class _PreHook(_Attached):
    """Forward pre-hook of the whole model. It starts a record."""

    def __getstate__(self) -> Dict[str, Any]:
        # of a copied hook, this is the copied model
        return {**self.__dict__, 'model': getattr(self.recorder, 'model', None)}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        model = state.pop('model')
        super().__setstate__(state)
        if self.recorder is not None:
            self.recorder.model = model

    def __call__(self, module: nn.Module, args: Tuple, kwargs: Dict) -> None:
        if self.recorder is not None:
            self.recorder.begin(args, kwargs)


class _InputHook(_Attached):
    """Forward pre-hook of a tapped module. It records the module's first argument."""

    def __call__(self, module: nn.Module, args: Tuple, kwargs: Dict) -> None:
        if self.recorder is not None:
            self.recorder.record(self.key, args[0])


class _Record:
    """What one forward showed: the model's input and the recorded tensors of the tapped modules."""

    def __init__(self, inputs: Any, training: bool):
        self.training = training
        self.without_gradients: Set[Tuple[str, bool]] = set()  # places that ran without gradients
        self.inputs = [(x, _version(x)) for x in inputs if isinstance(x, torch.Tensor)]
        self.outputs: Dict[Tuple[str, bool], List[Any]] = {}  # place -> one output per call

    def has(self, tap: Tap) -> bool:
        """Return whether a tap's module ran as often as the tap needs."""
        return all(len(self.outputs.get(part.place, ())) > part.nth for part in tap.parts or (tap,))

    def tensor(self, tap: Tap) -> torch.Tensor:
        """Return the tensor that a tap refers to."""
        return tensor_at(self.outputs[tap.place][tap.nth], tap.path)

    def is_of(self, x: torch.Tensor) -> bool:
        """Return whether the model was called on x or on an equal tensor. False if the input was changed in place
        since.
        """
        for known, version in self.inputs:
            if version != _version(known):
                continue
            if known is x:
                return True
            if (known.shape, known.dtype, known.device) == (x.shape, x.dtype, x.device) and torch.equal(known, x):
                return True
        return False


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Recorder:
    """Record the tapped tensors of a model's forward calls by hooks on the tapped modules and on the model.

    Only what runs inside a call of the model is recorded; the recomputation of a checkpointed block in the backward is
    not. With `training_only`, calls in evaluation mode or without gradients are ignored. `take(x)` returns the features
    of the call on x and drops all records. At most two records are held, the first since the last take and the newest,
    to bound the memory. Nothing is recorded while `enabled` is False.

    A copy that is made together with the model is attached to the copied model and starts disabled. A copy of the
    recorder alone has no model.

    Args:
        model: Model to hook.
        taps: What to record.
        training_only: Whether to record only calls in training mode with gradients on.
        compiled: Whether the model may be compiled while hooked. This switches on dynamo's guards on hooks for the
            whole process.
    """

    def __init__(
            self,
            model: nn.Module,
            taps: Sequence[Tap],
            training_only: bool = True,
            compiled: bool = True,
    ):
        self.model: Any = model  # None in a copy of the recorder alone
        self.taps = list(taps)
        self.training_only = training_only
        self.enabled = True
        if compiled:
            guard_on_hooks()
        self.records: List[_Record] = []
        self.open: Optional[_Record] = None
        self.took_training = False  # whether the last call taken was a training step
        self.handles: List[RemovableHandle] = []
        modules = dict(model.named_modules())
        hook: Any = _PreHook(self)
        hook.added(model.register_forward_pre_hook(hook, with_kwargs=True))
        for place in dict.fromkeys(part.place for tap in self.taps for part in tap.parts or (tap,)):
            module, of_input = modules[place[0]], place[1]
            hook = _InputHook(self, place) if of_input else _Hook(self, place)
            register = module.register_forward_pre_hook if of_input else module.register_forward_hook
            hook.added(register(hook, with_kwargs=True))
        hook = _Hook(self)
        hook.added(model.register_forward_hook(hook, with_kwargs=True, always_call=True))

    @property
    def timesteps(self) -> int:
        """T of the model. In a copy without a model, T of the original's model."""
        return self._timesteps if self.model is None else getattr(self.model, 'timesteps', 1)

    def begin(self, args: Tuple, kwargs: Dict) -> None:
        """Start a record for a call of the model with these arguments, if it is to be recorded."""
        if not self.enabled:
            self.open = None
            return
        training = self.model.training and torch.is_grad_enabled()
        self.open = None if self.training_only and not training else _Record((*args, *kwargs.values()), training)

    def record(self, place: Optional[Tuple[str, bool]], out: Any) -> None:
        """Add a tapped tensor to the open record; place=None closes the record."""
        record = self.open
        if record is None:
            return
        if place is not None:
            record.outputs.setdefault(place, []).append(out)
            if record.training and not torch.is_grad_enabled():
                record.without_gradients.add(place)
            return
        self.open = None  # the model's forward hook fires last
        if out is not None:
            self.records = self.records[:1] + [record]

    def take(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the features of the call on x, one (T * B, ...) tensor per tap.

        Raises:
            RuntimeError: The hooks were removed, no call on x was recorded, a tap did not run in it, or a tap ran
                without gradients inside a call with gradients.
        """
        self.check_attached()
        records, self.records = self.records, []
        if not records:
            raise RuntimeError(
                f'no forward of {type(self.model).__name__} was recorded since the last call: run student(x) in '
                f'training mode with gradients on (and call the model itself, not its methods) before the loss.')
        for record in reversed(records):  # prefer the newest of two calls on the same images
            if record.is_of(x):
                missing = [tap.name for tap in self.taps if not record.has(tap)]
                if missing:
                    raise RuntimeError(f'taps did not run in the forward of {type(self.model).__name__}: '
                                       f'{", ".join(missing)}.')
                self.took_training = record.training
                features = [self._feature(tap, record) for tap in self.taps]
                self._check_gradients(record, features)
                return features
        raise RuntimeError(
            f'the recorded forward of {type(self.model).__name__} was not on this input: call the loss on the tensor '
            f'that the student saw (student(x), then sscl(x)), unchanged; teacher_input=... is for a teacher that sees '
            f'another.')

    def check_attached(self) -> None:
        """Raise an error if there is no model to record.

        Raises:
            RuntimeError: The hooks were removed, or this is a copy without a model.
        """
        if self.model is None or not self.handles:
            raise RuntimeError('the taps were removed (close()) or belong to a copy that was made without its model; '
                               'build a new SSCLLoss to attach again.')

    def _check_gradients(self, record: _Record, features: Sequence[torch.Tensor]) -> None:
        """Raise an error if a tap ran without gradients (reentrant checkpointing), since the loss could not train it.
        """
        lost = [tap.name for tap, feature in zip(self.taps, features) if not feature.requires_grad
                and any(part.place in record.without_gradients for part in tap.parts or (tap,))]
        if lost:
            raise RuntimeError(
                f'{", ".join(lost)} of {type(self.model).__name__} ran without gradients, as under reentrant '
                f'checkpointing or no_grad, so the loss could not train it: use checkpoint(..., use_reentrant=False), '
                f'in timm timm.layers.set_reentrant_ckpt(False), or tap other modules.')

    def _feature(self, tap: Tap, record: _Record) -> torch.Tensor:
        """Return the feature of a tap: the recorded tensor, or what the tap's call or forward_head makes of it."""
        if tap.call is not None:
            module = self.model.get_submodule(tap.call.module)
            with second_pass(module.modules()), (
                    self.model.time_folded() if has_timesteps(self.model) else nullcontext()):
                return module(record.tensor(tap), *tap.call.args, **tap.call.kwargs)
        if not tap.through_head:
            return record.tensor(tap)
        parts = [_part(part, record.tensor(part)) for part in tap.parts]
        with second_pass(self.model.modules()):
            pooled = self.model.forward_head(
                parts if tap.head_takes_list else parts[0], pre_logits=True, **per_step_keyword(self.model))
        return pooled.flatten(0, 1) if has_timesteps(self.model) else pooled

    def close(self) -> None:
        """Remove the hooks and drop all records."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.records, self.open = [], [], None

    def __getstate__(self) -> Dict[str, Any]:
        return dict(taps=self.taps, training_only=self.training_only, timesteps=self.timesteps)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        # a copied _PreHook sets the copied model
        self.model, self.enabled, self.handles = None, False, []
        self.records, self.open, self.took_training = [], None, False
        self.taps, self.training_only, self._timesteps = state['taps'], state['training_only'], state['timesteps']


def _part(part: Tap, out: torch.Tensor) -> torch.Tensor:
    """Convert a recorded output to the shape that forward_head takes."""
    if part.channel_axis == -1:
        out = out[:, part.prefix_tokens:].movedim(-1, 1) if part.prefix_tokens else out.movedim(-1, 1)
    return out.flatten(2) if part.part_ndim == 3 and out.ndim > 3 else out


def _detached(taps: Sequence[Tap], training_only: bool) -> Recorder:
    """Return a recorder without a model. Pickles of version 0.1.0 refer to this function."""
    recorder = Recorder.__new__(Recorder)
    recorder.__setstate__(dict(taps=list(taps), training_only=training_only, timesteps=1))
    return recorder
