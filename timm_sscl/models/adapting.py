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
    if not args.get('features_only'):
        heads = getattr(config, 'classifier', None) or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        dropped = tuple(f'{head}.' for head in heads) if model.num_classes != overlay['num_classes'] else ()
        random = [name for name, _ in model.named_parameters() if name not in state or name.startswith(dropped)]
        if random:
            _logger.warning(f'{type(model).__name__}: {", ".join(random)} are not in the file, or of other classes '
                            f'there, and start at random.')
    return model
