"""Load weights from a file or a folder, strictly and without unpickling code."""
import os
import zipfile
from pathlib import Path

import torch.nn as nn
from timm.models import load_checkpoint

from timm_sscl.models.finite import check_finite

from .checkpoint import LAST, why_damaged
from .weights_file import check_file_exists, check_weights_file

__all__ = ['load_weights']

# ---- models and their weights

# file names in a folder, as hubs and this script write them
_WEIGHT_FILES = 'model.safetensors', 'pytorch_model.bin', LAST


def load_weights(model: nn.Module, file: str, option: str) -> None:
    """Load weights strictly from a file, or from the weights file in a folder, without unpickling code.

    Args:
        model: Model to load into.
        file: File or folder.
        option: Option that named it, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, unsafe, or holds values that are not finite or the weights of another model.
    """
    if os.path.isdir(file):
        found = [name for name in _WEIGHT_FILES if os.path.isfile(os.path.join(file, name))]
        if not found:
            raise FileNotFoundError(f"{option}: folder '{file}' holds none of {', '.join(_WEIGHT_FILES)}.")
        file = os.path.join(file, found[0])
    check_file_exists(file, option)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if zipfile.is_zipfile(file) and why_damaged(Path(file)):
        raise ValueError(f"{option}: '{file}' is damaged ({why_damaged(Path(file))}).")
    try:
        load_checkpoint(model, file)
    except Exception as error:  # torch, pickle and safetensors raise many types
        check_weights_file(file, option)
        text = ' '.join(str(error).split())
        if 'state_dict' in text:
            raise ValueError(f"{option}: '{file}' holds the weights of another model than {type(model).__name__} with "
                             f'{len(expected)} tensors and {getattr(model, "num_classes", "?")} classes: {text[:300]}'
                             ) from error
        raise ValueError(f"{option}: '{file}' is no weights file that can be read safely ({text[:200]}).") from error
    check_finite(model.state_dict(), f"{option}: '{file}'")
