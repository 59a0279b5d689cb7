"""Find taps of timm's features_only wrappers, which return feature maps and have no classifier."""
from typing import List, Optional, Sequence

import torch.nn as nn
from timm.models._features import FeatureDictNet, FeatureGetterNet

from .finding import named_taps
from .tap import Tap

__all__ = ['find_output_taps']


def find_output_taps(
        model: nn.Module,
        num_stages: int = 4,
        input_size: Optional[Sequence[int]] = None,
) -> Optional[List[Tap]]:
    """Return taps on the last outputs of a features_only wrapper; None for other models.

    Wrappers that read features by hooks of their own (timm's FeatureHookNet and the like) are among the others, since
    theirs may be inputs of modules.
    """
    if isinstance(model, FeatureDictNet):
        return named_taps(model, list(model.return_layers)[-num_stages:], input_size)
    if isinstance(model, FeatureGetterNet):
        names = [f'model.{name}' for name in model.feature_info.module_name()][-num_stages:]
        prefix = getattr(model.model, 'num_prefix_tokens', 0)  # their outputs are without
        return [tap._replace(prefix_tokens=prefix) if tap.channel_axis == -1 else tap
                for tap in named_taps(model, names, input_size)]
    return None
