"""FeatureReader: read features by calling the model's own methods, for a task that owns its student."""
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch._dynamo
import torch.nn as nn

from timm_sscl.neurons.folding import enter_fold, leave_fold

from .finding import module_calls, neuron_behind, run_probe
from .second_pass import second_pass
from .stages import POOLED, indices_of_names, reference_features, run_stages, stage_indices, stage_names
from .tap import per_step_keyword

__all__ = ['FeatureReader']


# ---- reading by the model's methods, where the caller owns the model

class FeatureReader:
    """Read logits, stage features and the pooled feature of a timm model in one pass without hooks.

    It works under torch.compile and gradient checkpointing together. Where a stage's output is not spikes and a neuron
    behind the stage takes it (residual='ms'), that neuron's output is read.

    Args:
        model: timm model, spiking or not.
        taps: Number of stages, counted from the last, to read besides the pooled feature; or a list of stage names as
            in model.feature_info and 'pooled'.
        input_size: (C, H, W) of the probe image that determines the number of channels.

    Raises:
        ValueError: A stage does not exist, or the model has none.
    """

    def __init__(
            self,
            model: nn.Module,
            taps: Union[int, Sequence[str]] = 4,
            input_size: Optional[Sequence[int]] = None,
    ):
        if isinstance(taps, int):
            if taps < 1:
                raise ValueError(f'taps={taps}: at least one stage must be tapped.')
            self.indices = stage_indices(model, taps)
            self.pooled = True
            self.names = stage_names(model, self.indices) + [POOLED]
            self.order = list(range(len(self.names)))  # no lookup by name: crossvit's two branches share theirs
        else:
            self.names = [taps] if isinstance(taps, str) else list(taps)
            self.indices = sorted(set(indices_of_names(model, self.names)))
            self.pooled = POOLED in self.names
            read = stage_names(model, self.indices) + [POOLED] * self.pooled
            self.order = [read.index(name) for name in self.names]  # where each requested feature is among those read

        def run(x: torch.Tensor) -> Tuple[List[Tuple[int, ...]], List[str], Dict[int, str]]:
            final, stages, pooled = reference_features(model, self.indices, x)
            forward_calls = module_calls(model, lambda: model(x))[1]
            behind = {i: neuron_behind(model, name, feature, forward_calls)
                      for i, (name, feature) in enumerate(zip(stage_names(model, self.indices), stages))}
            _, calls = module_calls(model, lambda: model.forward_head(final, pre_logits=True))
            shapes = [tuple(f.shape) for f in stages] + [tuple(pooled.shape)] * self.pooled
            head = list(dict.fromkeys(call.module for call in calls))
            return [shapes[i] for i in self.order], head, {i: n for i, n in behind.items() if n is not None}

        # shapes (T, C, ...) of one image's features; modules that compute the pooled feature; position of a stage among
        # those read -> neuron behind it
        self.shapes, self.head, self.behind = run_probe(model, input_size, run)

    @property
    def channels(self) -> List[int]:
        """Number of channels of every feature."""
        return [shape[1] for shape in self.shapes]

    def keep(self, stages: Sequence[int]) -> None:
        """Read only the stages at these positions from now on, and the pooled feature."""
        kept = [*stages, *range(len(self.indices), len(self.names))]
        self.indices = [self.indices[i] for i in stages]
        self.behind = {new: self.behind[old] for new, old in enumerate(stages) if old in self.behind}
        self.names, self.shapes = [self.names[i] for i in kept], [self.shapes[i] for i in kept]
        self.order = list(range(len(kept)))

    def __call__(self, model: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run one forward.

        Args:
            model: The model, or a wrapper of it (compiled, DDP).
            x: Images (B, C, H, W).

        Returns:
            Logits of every timestep (T, B, K) and features, each (T, B, C, ...); T = 1 for a network without time.
        """
        per_step = per_step_keyword(model)
        final, stages = run_stages(model, self.indices, x)
        for i, name in self.behind.items():
            stages[i] = _fire(model, name, stages[i])
        logits = model.forward_head(final, **per_step)
        # The head ran above and updated its statistics once. This pass only reads the pooled feature, before dropout.
        with second_pass([model, *(model.get_submodule(name) for name in self.head)]):
            features = stages + [model.forward_head(final, pre_logits=True, **per_step)] * self.pooled
        features = [features[i] for i in self.order]
        return (logits, features) if per_step else (logits.unsqueeze(0), [f.unsqueeze(0) for f in features])


def _fire(model: nn.Module, name: str, current: torch.Tensor) -> torch.Tensor:
    """Return the output (T, B, ...) of a neuron of a spiking model for a current (T, B, ...), a second time in a
    forward: hooks do not run, and statistics do not move.
    """
    neuron = model.get_submodule(name)
    before = enter_fold(model)
    try:
        with second_pass(neuron.modules()):
            return neuron.forward(current.flatten(0, 1)).unflatten(0, current.shape[:2])
    finally:
        leave_fold(before)
