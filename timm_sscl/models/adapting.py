"""Adapt the weights of a file to other arguments than the file's, as timm.create_model adapts pretrained weights."""
import logging
from typing import Any, Mapping, Tuple

import timm
from timm.models import get_pretrained_cfg

from timm_sscl.conversion.description import PREFIX

__all__ = ['create_adapted']

_logger = logging.getLogger(__name__)


def create_adapted(described: Mapping[str, Any], given: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """Create a model with weights that are adapted to its arguments.

    As in timm, features_only drops the classifier, so does another num_classes, in_chans adapts the first convolution,
    and img_size resizes position embeddings. A warning names the parameters that start at random.

    Args:
        described: Architecture and keyword arguments of the model that the weights are of.
        given: Further keyword arguments of timm.create_model, which take precedence.
        state: State dict.

    Raises:
        RuntimeError: The weights do not fit.
    """
    name, args = described['architecture'], {**described['args'], **given}
    config: Any = get_pretrained_cfg(name.removeprefix(PREFIX))
    classes: int = getattr(config, 'num_classes', None) or 1000
    size: Tuple[int, ...] = getattr(config, 'input_size', None) or (3, 224, 224)
    of_file = described['args']
    overlay = dict(
        state_dict=dict(state), source='', label_offset=0, num_classes=of_file.get('num_classes', classes),
        input_size=(of_file.get('in_chans', size[0]), *size[1:]))
    model: Any = timm.create_model(name, **{**args, 'pretrained': True, 'pretrained_cfg_overlay': overlay})
    heads = getattr(config, 'classifier', None) or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    other_head = not args.get('features_only') and model.num_classes != overlay['num_classes']
    dropped = tuple(f'{head}.' for head in heads) if other_head else ()
    known = {_plain(key) for key in state}
    random = [key for key, _ in model.named_parameters() if _plain(key) not in known or key.startswith(dropped)]
    if random:
        classes_too = ', or of other classes there,' if dropped else ''
        _logger.warning(f'{type(model).__name__}: {", ".join(random)} are not in the file{classes_too} and start at '
                        f'random.')
    return model


def _plain(key: str) -> str:
    """Return a parameter's name as it is with and without timm's wrappers of features, which write '_' for '.'."""
    return key.removeprefix('model.').replace('_', '.')
