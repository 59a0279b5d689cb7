"""FeatureReader: features by the model's own methods, for a task that owns its student."""
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch._dynamo
import torch.nn as nn

from .finding import module_calls, run_probe
from .second_pass import second_pass
from .stages import POOLED, indices_of_names, reference_features, run_stages, stage_indices, stage_names
from .tap import per_step_keyword

__all__ = ['FeatureReader']


# ---- reading functionally, where the caller owns the model

class FeatureReader:
    """Reads logits, stage features and the pooled feature of a timm model in one functional pass, no hooks.

    Safe under torch.compile and gradient checkpointing together.

    Args:
        model: timm model, spiking or not.
        taps: How many of the last stages, the pooled feature besides; or the names of stages as in model.feature_info,
            and 'pooled'.
        input_size: (C, H, W) of the probe image that tells the channels.

    Raises:
        ValueError: A stage does not exist, or the model has none to find.
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
            self.order = list(range(len(self.names)))  # names may be the same: crossvit's two branches
        else:
            self.names = [taps] if isinstance(taps, str) else list(taps)
            self.indices = sorted(set(indices_of_names(model, self.names)))
            self.pooled = POOLED in self.names
            read = stage_names(model, self.indices) + [POOLED] * self.pooled
            self.order = [read.index(name) for name in self.names]  # of what is read: names may come in any, or twice

        def run(x: torch.Tensor) -> Tuple[List[Tuple[int, ...]], List[str]]:
            final, stages, pooled = reference_features(model, self.indices, x)
            _, seen = module_calls(model, lambda: model.forward_head(final, pre_logits=True))
            shapes = [tuple(f.shape) for f in stages] + [tuple(pooled.shape)] * self.pooled
            return [shapes[i] for i in self.order], list(dict.fromkeys(call.module for call in seen))

        # (T, C, ...) of the one image's features, and the modules that make the pooled one
        self.shapes, self.head = run_probe(model, input_size, run)

    @property
    def channels(self) -> List[int]:
        """Channels of every feature."""
        return [shape[1] for shape in self.shapes]

    def keep(self, stages: Sequence[int]) -> None:
        """Read only these of the stages, by their positions; the pooled feature stays."""
        kept = [*stages, *range(len(self.indices), len(self.names))]
        self.indices = [self.indices[i] for i in stages]
        self.names, self.shapes = [self.names[i] for i in kept], [self.shapes[i] for i in kept]
        self.order = list(range(len(kept)))

    def __call__(self, model: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """One forward.

        Returns:
            Logits per step (T, B, K) and features, each (T, B, C, ...); T = 1 for a network without time.
        """
        per_step = per_step_keyword(model)
        final, stages = run_stages(model, self.indices, x)
        logits = model.forward_head(final, **per_step)
        # the head has run, and counts once; the pooled feature is the one before dropout
        with second_pass([model, *(model.get_submodule(name) for name in self.head)]):
            features = stages + [model.forward_head(final, pre_logits=True, **per_step)] * self.pooled
        features = [features[i] for i in self.order]
        return (logits, features) if per_step else (logits.unsqueeze(0), [f.unsqueeze(0) for f in features])
