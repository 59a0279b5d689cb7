"""Describe how timm.create_model builds a model: its architecture and keyword arguments."""
import json
from typing import Any, Dict, Mapping

import torch.nn as nn
from timm.models import get_model_args

from timm_sscl.class_swap import Mixin

from .settings import ARGUMENTS, SpikingSettings

__all__ = ['MODEL_KEY', 'PREFIX', 'Described', 'describe_model', 'spiking_name']

MODEL_KEY = 'model'  # key of the description beside the settings in a checkpoint
PREFIX = 'spiking_'  # of the names of spiking architectures


def spiking_name(architecture: str) -> str:
    """Return the name of the spiking version of an architecture."""
    return architecture if architecture.startswith(PREFIX) else PREFIX + architecture


def describe_model(model: nn.Module) -> Dict[str, Any]:
    """Return how timm.create_model builds a model, as a dict that JSON can hold; {} if timm did not create it.

    Returns:
        architecture: Name, with the prefix if the model spikes.
        args: Keyword arguments, with later changes that timm knows of (classes, pooling, image size). Settings of a
            spiking model are not among them.
        objects: Arguments that JSON cannot hold, as text. Missing if there are none.
        frames: How an ANN processes event frames, see `accept_frames`. Missing if it takes none.
    """
    config = getattr(model, 'pretrained_cfg', None)
    architecture = config.get('architecture') if isinstance(config, Mapping) else None
    if architecture is None or '_model_args' not in vars(model):
        return {}
    described: Dict[str, Any] = dict(architecture=architecture, args={})
    args = get_model_args(model)
    if isinstance(model, Described):
        described['architecture'] = spiking_name(architecture)
        args = {name: value for name, value in args.items() if name not in ARGUMENTS}
    elif hasattr(model, 'frames_as'):
        described['frames'] = model.frames_as
    for name, value in args.items():
        try:
            described['args'][name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            described.setdefault('objects', {})[name] = str(value)
    return described


class Described(Mixin):
    """Mixin for a converted model: timm's record of its keyword arguments includes the current settings.

    `timm.models.save_for_hf` and `push_to_hf_hub` write this record into config.json.
    """
    settings: SpikingSettings

    @property
    def _model_args(self) -> Dict[str, Any]:
        recorded = self.__dict__.get('_model_args', {})
        others = {name: value for name, value in recorded.items() if name not in ARGUMENTS}
        return {**others, **self.settings.arguments()}

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self.__dict__['_model_args'] = args
        self._describe_again()

    def _describe_again(self) -> None:
        """Write the description to where the model keeps it."""
        raise NotImplementedError
