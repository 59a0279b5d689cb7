"""Readers of features for a task: by methods for a timm model's stages, by hooks for named modules."""
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from timm_sscl.features.stages import POOLED, known_stages
from timm_sscl.features.reader import FeatureReader
from timm_sscl.features.recorder import Recorder
from timm_sscl.features.tap import Tap, fold_feature
from timm_sscl.features.finding import named_taps, tap_shapes

__all__ = ['TapReader', 'Reader', 'create_reader']


class TapReader:
    """Read logits and the features of named modules in one forward, by hooks on this model.

    It works with any nn.Module. Under torch.compile and gradient checkpointing together, a hook inside a checkpointed
    region fails; `FeatureReader`, which reads stages, does not.

    Args:
        model: Model to read. Hooks are added to it; create the reader before compiling it.
        names: Names of modules or stages, and 'pooled', as in `named_taps`.
        input_size: (C, H, W) of the probe image that determines the number of channels.

    Raises:
        ValueError: A module does not exist, does not run, or returns no tensor.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], input_size: Optional[Sequence[int]] = None):
        self.names = list(names)
        self.taps = named_taps(model, self.names, input_size)
        self.shapes = tap_shapes(model, self.taps, input_size)  # (T, C, ...) of one image's features
        self.recorder = Recorder(model, self.taps, training_only=False)
        self.recorder.enabled = False

    @property
    def channels(self) -> List[int]:
        """Number of channels of every feature."""
        return [shape[1] for shape in self.shapes]

    def __call__(self, model: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run one forward.

        Returns:
            Logits of every timestep (T, B, K) and features, each (T, B, C, ...). T = 1 for a network without time, and
            for a feature before the input is repeated over time.

        Raises:
            RuntimeError: The model is not the hooked one, or a tap did not run or ran without gradients.
            ValueError: The rows of a feature are not samples.
        """
        if self.recorder.model is not model:
            raise RuntimeError(f'these taps are on another {type(model).__name__} than the one that runs; read it by '
                               f'a TapReader of its own.')
        per_step = dict(per_step=True) if hasattr(model, 'set_timesteps') else {}
        self.recorder.enabled = True
        try:
            logits = model(x, **per_step)
            features = self.recorder.take(x)
        finally:
            self.recorder.enabled = False
        logits = logits if per_step else logits.unsqueeze(0)
        return logits, [_fold(tap, f, *logits.shape[:2]) for f, tap in zip(features, self.taps)]


def _fold(tap: Tap, feature: torch.Tensor, timesteps: int, batch: int) -> torch.Tensor:
    if feature.shape[0] not in (batch, timesteps * batch):
        raise ValueError(f"tap '{tap.name}' holds {feature.shape[0]} rows for {batch} samples and {timesteps} time "
                         f'steps: expected {batch} or {timesteps * batch}. Its rows are no samples; tap another one.')
    return fold_feature(feature, feature.shape[0] // batch, tap.channel_axis, tap.prefix_tokens)


Reader = Union[FeatureReader, TapReader]


def create_reader(
        model: nn.Module,
        taps: Union[int, str, Sequence[str]],
        input_size: Optional[Sequence[int]] = None,
) -> Reader:
    """Create a reader for the last stages and the pooled feature, or for named taps.

    Args:
        model: Model to read.
        taps: Number of stages, counted from the last; or names of stages, of modules, and 'pooled'.
        input_size: (C, H, W) of the probe image.

    Raises:
        ValueError: A name does not exist, or the model has no stages.
    """
    if isinstance(taps, int):
        return FeatureReader(model, taps, input_size)
    taps = [taps] if isinstance(taps, str) else list(taps)
    if not taps:
        raise ValueError('taps=[]: at least one must be named.')
    stages = known_stages(model)
    if all(name == POOLED or name in stages for name in taps) and stages:
        return FeatureReader(model, taps, input_size)
    return TapReader(model, taps, input_size)
