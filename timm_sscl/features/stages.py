"""List the stages of a timm model by index and by name."""
import math
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch._dynamo
import torch.nn as nn

from .tap import per_step_keyword

__all__ = ['POOLED', 'stage_indices', 'match_by_depth', 'known_stages', 'indices_of_names', 'stage_names',
    'run_stages', 'reference_features', 'example_modules']

POOLED = 'pooled'  # name of the tap on the pooled feature, the classifier's input


def stage_indices(model: nn.Module, num_stages: int = 4) -> List[int]:
    """Return the forward_intermediates indices of the last stages' ends, from the model's feature_info.

    Layers of equal reduction (stride) form a stage. A model with only one reduction (isotropic) is cut into equal runs
    of blocks.

    Args:
        model: timm model with feature_info.
        num_stages: Number of stages, counted from the last; a model with fewer stages returns all.

    Raises:
        ValueError: The model has no feature_info.
    """
    info = getattr(model, 'feature_info', None)
    info = getattr(info, 'info', info)
    if not info or not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'{type(model).__name__} has no feature_info and forward_intermediates to find its stages by; '
                         f'name the modules to tap (taps=[...], --sscl-taps), for example '
                         f'{", ".join(example_modules(model))}.')
    reductions = [entry['reduction'] for entry in info]
    if len(set(reductions)) == 1:
        n = len(reductions)
        return sorted({math.ceil(n * k / num_stages) - 1 for k in range(1, num_stages + 1)})
    last_of = {reduction: index for index, reduction in enumerate(reductions)}
    return sorted(last_of.values())[-num_stages:]


def match_by_depth(n: int, k: int) -> Tuple[List[int], List[int]]:
    """Return the positions of the stages to compare in networks with n and k stages: those at equal relative depth."""
    few = min(n, k)
    student, teacher = ([math.ceil(m * j / few) - 1 for j in range(1, few + 1)] for m in (n, k))
    return student, teacher


def known_stages(model: nn.Module) -> Dict[str, int]:
    """Return the names of a timm model's stages, as in its feature_info, with their forward_intermediates indices."""
    try:
        indices = range(stage_indices(model)[-1] + 1)
    except ValueError:
        return {}
    return {name: i for i, name in zip(indices, stage_names(model, indices))}


def indices_of_names(model: nn.Module, names: Sequence[str]) -> List[int]:
    """Return the forward_intermediates indices of stages given by their feature_info names, in the order of the names.
    """
    known = known_stages(model)
    for name in names:
        if name != POOLED and name not in known:
            raise ValueError(f"tap '{name}' is not a stage of {type(model).__name__}; it has {', '.join(known)} "
                             f'and {POOLED}.')
    return [known[name] for name in names if name != POOLED]


def stage_names(model: nn.Module, indices: Sequence[int]) -> List[str]:
    """Return the feature_info names of stages by their indices."""
    info: Any = getattr(model.feature_info, 'info', model.feature_info)
    return [info[i].get('module') or f'stage{i}' for i in indices]


def run_stages(model: nn.Module, indices: List[int], x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Return the final feature map and the features of the stages with these indices."""
    if not indices:
        return model.forward_features(x), []
    final, stages = model.forward_intermediates(x, indices=indices, **per_step_keyword(model))
    return final, list(stages)


def reference_features(
        model: nn.Module,
        indices: List[int],
        x: torch.Tensor,
) -> Tuple[torch.Tensor, List[torch.Tensor], torch.Tensor]:
    """Return final feature map, stage features and pooled feature, (T * B, ...), computed by the model's own methods.
    """
    per_step = per_step_keyword(model)
    final, stages = run_stages(model, indices, x)
    pooled = model.forward_head(final, pre_logits=True, **per_step)
    return (final, [s.flatten(0, 1) for s in stages], pooled.flatten(0, 1)) if per_step else (final, stages, pooled)


def example_modules(model: nn.Module) -> List[str]:
    """Return a few module names to show in an error message."""
    return [name for name, module in model.named_modules() if name.count('.') < 2 and name][:8]
