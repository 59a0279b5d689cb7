"""Check by execution that at every activation sample i of the batch changes only the rows of sample i.

Time is folded into axis 0, so a neuron treats rows as timesteps. The probe sets one sample of a batch to NaN and looks
where the NaN arrives. What this leaves open is decided with other values for the sample.
"""
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, cast

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from ..finding.function_calls import FunctionCalls, WatchFunctions, merge_modes
from ..finding.functional_calls import called_activations
from timm_sscl.fused_paths import without_fused_paths
from timm_sscl.probing import Example, ProbeError, as_example, probe, undisturbed

__all__ = ['BatchAxis', 'find_batch_axis', 'PENDING']

PENDING = 'batch axis pending (meta device)'  # part of a record's reason

_OUTPUT = 'the output'
_SAMPLES = 4  # minimum batch size; a batch of 1 would broadcast
_FRAMES = 5  # number of axes of event frames, (B, T, C, H, W)
_CHANGED = 1  # index of the changed sample; neither the first nor the middle of the batch


class BatchAxis(NamedTuple):
    """Result of the probe."""
    unbatched: Set[str]  # activations whose input depends on no sample and does not grow with the batch
    calls: Dict[str, FunctionCalls]  # activations that each module called as functions
    pending: bool  # whether only shapes were compared (meta device)


class _WrongAxis(ProbeError):
    """Axis 0 of an activation is not the batch, or samples mix."""


class _RowHits(NamedTuple):
    """Which rows of a tensor changed: the length of axis 0, and a mask of changed rows for each of the first axes."""
    length: int
    hit: Tuple[torch.Tensor, ...]

    def is_own(self, batch: int) -> bool:
        """Return whether rows of axis 0 changed, and only rows of the changed sample."""
        rows = self.hit[0].nonzero().flatten() if self.hit else torch.zeros(0)
        if self.length % batch or not len(rows):
            return False
        k = self.length // batch
        return bool((rows >= _CHANGED * k).all() and (rows < (_CHANGED + 1) * k).all())

    def is_hit(self) -> bool:
        return any(bool(hit.any()) for hit in self.hit)

    def where(self, batch: int) -> str:
        """Describe in words which rows changed."""
        for axis, hit in enumerate(self.hit[1:], 1):
            if len(hit) == batch and hit.sum() == 1 and hit[_CHANGED]:
                return f'the samples are on axis {axis}, not on axis 0'
        if not self.hit:
            return 'it is a single number for the whole batch'
        rows = self.hit[0].nonzero().flatten().tolist()
        shown = ', '.join(map(str, rows[:4])) + (', ...' if rows[4:] else '')
        return f'sample {_CHANGED} of {batch} moves rows {shown} of {self.length}'


_Run = Dict[str, List[torch.Tensor]]  # activation -> its inputs, one per call
_Runner = Callable[[Example], Tuple[_Run, Dict[str, FunctionCalls]]]


def find_batch_axis(
        model: nn.Module,
        activations: Dict[str, nn.Module],
        callers: Dict[str, nn.Module],
        input_size: Optional[Sequence[int]] = None,
        example_inputs: Any = None,
) -> BatchAxis:
    """Check that axis 0 is the batch at every activation, including those called as functions, and at the output.

    A position-bias network runs on a table of coordinates. A neuron in it would treat rows of the table as timesteps.

    Args:
        model: The ANN, before its conversion.
        activations: Activation modules by name.
        callers: Modules that may call activations as functions, by name.
        input_size: Shape of one sample; guessed from the model by default.
        example_inputs: Input of the model; see `probing.examples`.

    Raises:
        ProbeError: The model does not run on the guessed or given input, or a sample changes rows of another.
    """
    run = partial(_run, model, activations, callers)
    if any(p.is_meta for p in model.parameters()):
        try:
            return probe(model, partial(_by_shapes, run), _SAMPLES, input_size, example_inputs)
        except ProbeError:
            return BatchAxis(set(), {}, True)
    batch = _SAMPLES
    if example_inputs is not None:  # a multiple of the given batch size, since some models split the batch into groups
        given = as_example(example_inputs).batch or 1
        batch = given * -(-_SAMPLES // given)
    found = probe(model, partial(_check, model, run), batch, input_size, example_inputs)
    return found._replace(calls=_in_training_too(model, callers, found.calls, batch, input_size, example_inputs))


def _in_training_too(
        model: nn.Module,
        callers: Dict[str, nn.Module],
        calls: Dict[str, FunctionCalls],
        batch: int,
        input_size: Optional[Sequence[int]],
        example_inputs: Any,
) -> Dict[str, FunctionCalls]:
    """Return the function calls of both modes. Modules that ran in neither are left to the source analysis."""
    if not any(called.names for called in calls.values()) and not any(map(called_activations, callers.values())):
        return calls

    def run(example: Example) -> Dict[str, FunctionCalls]:
        return _run(model, {}, callers, example, training=True)[1]
    try:
        training = probe(model, run, batch, input_size, example_inputs)
    except ProbeError:
        training = {}
    evaluation = {**training, **calls}  # a module that ran in one mode only has the calls of that mode
    return {name: merge_modes(name, evaluation[name], called) for name, called in {**calls, **training}.items()}


def _batch(example: Example) -> int:
    """Return the number of samples. The examples of a probe hold a tensor."""
    return cast(int, example.batch)


def _by_shapes(run: _Runner, example: Example) -> BatchAxis:
    """Find activations whose input does not grow with the batch, by shapes alone."""
    small, calls = run(example)
    large, _ = run(example.with_batch(2 * _batch(example)))
    unbatched = {name for name, inputs in small.items() if name != _OUTPUT and not _grows(inputs, large.get(name, []))}
    return BatchAxis(unbatched, calls, True)


def _grows(small: Sequence[torch.Tensor], large: Sequence[torch.Tensor]) -> bool:
    """Return whether all inputs have twice as many rows with twice the batch."""
    return [2 * x.shape[0] if x.ndim else None for x in small] == [x.shape[0] if x.ndim else 0 for x in large]


def _check(model: nn.Module, run: _Runner, example: Example) -> BatchAxis:
    """Run the model with one sample changed and check which rows change at each activation.

    Raises:
        _WrongAxis: Rows of other samples change, or the input has five axes.
    """
    batch = _batch(example)
    if example.tensors() and example.tensors()[0].ndim == _FRAMES:
        raise _WrongAxis(
            f'{type(model).__name__} takes {example}, five axes with the batch: a spiking model takes those for event '
            f'frames (B, T, C, H, W), axis 1 for time. Volumes and videos are not supported.')
    plain, calls = run(example)
    own = dict.fromkeys(plain, False)
    poisoned = _try(run, _changed(example, lambda x: torch.full_like(x, torch.nan)))
    if poisoned is not None:
        seen = {name: [_row_hits(x.isnan()) for x in inputs] for name, inputs in poisoned.items()}
        own.update((name, all(s.is_own(batch) for s in seen[name])) for name in plain if seen.get(name))
    rest = [name for name in plain if not own[name]]
    if not rest:
        return BatchAxis(set(), calls, False)
    # A comparison stops a NaN, and a NaN passes through a multiplication by 0, so try other values.
    moved, _ = run(_changed(example, _other_values))
    larger, _ = run(example.with_batch(2 * batch))
    unbatched = set()
    for name in rest:
        hits = [_row_hits(_differ(x, y)) for x, y in zip(plain[name], moved.get(name, []))]
        wrong = [s for s in hits if s.is_hit() and not s.is_own(batch)]
        if name == _OUTPUT:
            wrong = [s for s in wrong if s.length % batch == 0]
        if wrong:
            raise _WrongAxis(_complaint(model, name, wrong[0].where(batch), example))
        if name != _OUTPUT and not any(s.is_hit() for s in hits) and not _grows(plain[name], larger.get(name, [])):
            unbatched.add(name)
    return BatchAxis(unbatched, calls, False)


def _complaint(model: nn.Module, name: str, where: str, example: Example) -> str:
    cure = '' if name == _OUTPUT else f", exclude='{name}' leaves it analog"
    return (f'{type(model).__name__}: the batch is not axis 0 at {name} (for {example}): {where}. Time is folded into '
            f'axis 0, so that samples would be taken for time steps. example_inputs=... says what the model takes '
            f'where that was guessed wrongly{cure}.')


def _run(
        model: nn.Module,
        activations: Dict[str, nn.Module],
        callers: Dict[str, nn.Module],
        example: Example,
        training: bool = False,
) -> Tuple[_Run, Dict[str, FunctionCalls]]:
    """Return the inputs of all activations and the output in one forward, and which activations were called as
    functions.
    """
    seen: _Run = {}
    with undisturbed(model), without_fused_paths():
        model.train(training)
        watch = WatchFunctions(model, callers)
        for name, module in activations.items():
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach().clone()))
        with watch:
            out = example(model)
    calls = watch.result()
    for called in calls.values():
        seen.update(zip(called.names, called.inputs))
    seen[_OUTPUT] = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    return seen, calls


def _try(run: _Runner, example: Example) -> Optional[_Run]:
    """Return the activations' inputs, or None if the model refuses NaN or has no floating point input."""
    if not any(x.is_floating_point() and x.isnan().any() for x in example.tensors()):
        return None
    try:
        return run(example)[0]
    except Exception:  # a model may raise anything on NaN
        return None


def _changed(example: Example, change: Callable[[torch.Tensor], torch.Tensor]) -> Example:
    """Return the example with one sample changed in every tensor that has the batch axis and is no mask."""
    def with_change(x: torch.Tensor) -> torch.Tensor:
        is_mask = x.dtype == torch.bool
        if not x.ndim or x.shape[0] != example.batch or is_mask:
            return x
        rows = x.clone()
        new = change(x[_CHANGED]) if x.is_floating_point() else _other_values(x[_CHANGED])
        rows[_CHANGED] = new
        return rows
    return example.map(with_change)


def _other_values(x: torch.Tensor) -> torch.Tensor:
    """Return different values of the same dtype and range as x."""
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        return noise * (x.std() if x.numel() > 1 and x.std() > 0 else 1.) + x.mean()
    return x.flip(-1).roll(1, -1) if x.ndim else x


def _differ(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compare exactly, since rows of other samples go through the same arithmetic."""
    return x != y if x.shape == y.shape else torch.ones_like(x, dtype=torch.bool)


def _row_hits(hit: torch.Tensor) -> _RowHits:
    axes = [hit.movedim(axis, 0).flatten(1).any(1) if hit.ndim > 1 else hit for axis in range(min(hit.ndim, 4))]
    return _RowHits(hit.shape[0] if hit.ndim else 0, tuple(axes))
