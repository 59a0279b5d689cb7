"""Check that a file holds weights that can be read without executing code, and that a model loaded them."""
import os
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import List, Tuple

import torch
import torch.nn as nn
from timm.models import load_state_dict

from .checkpoint import why_damaged

__all__ = ['check_file_exists', 'check_weights_file', 'match_with_file']


def check_file_exists(file: str, option: str) -> None:
    """Check that a file exists.

    Raises:
        FileNotFoundError: It does not. The message names the option.
    """
    if os.path.isdir(file):
        raise FileNotFoundError(f"{option}: '{file}' is a folder; name the file of weights in it.")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{option}: file '{file}' does not exist.")


def check_weights_file(file: str, option: str) -> None:
    """Check that a file holds undamaged weights that can be read without unpickling code.

    Args:
        file: File of weights as written by torch.save or safetensors.
        option: Option that named it, for the message.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no weights that can be read safely.
    """
    check_file_exists(file, option)
    if file.lower().endswith(('.npz', '.npy')):
        return  # formats that models read themselves
    if zipfile.is_zipfile(file) and why_damaged(Path(file)):
        raise ValueError(f"{option}: '{file}' is damaged ({why_damaged(Path(file))}).")
    try:
        weights = load_state_dict(file)
    except AttributeError as error:  # something without items(), such as a tuple of tensors
        raise ValueError(f"{option}: '{file}' holds no weights by name; save model.state_dict().") from error
    except Exception as error:  # torch, pickle and safetensors raise many types
        raise ValueError(f"{option}: '{file}' is no weights file that can be read safely; save model.state_dict(), not "
                         f"the model ({' '.join(str(error).split())[:200]}).") from error
    if not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{option}: '{file}' holds no weights by name.")


def match_with_file(model: nn.Module, file: str) -> Tuple[List[str], List[str]]:
    """Return the names of a model's parameters whose values are in a weights file, and of those whose values are not.

    timm silently skips pretrained weights whose names do not fit the model, and keeps the random ones. Values are
    compared, since some models rename what they load. Constant parameters are left out, since they prove nothing.

    Args:
        model: Model that was created with the file as its pretrained weights.
        file: File as written by torch.save or safetensors.
    """
    by_shape = defaultdict(list)
    for tensor in load_state_dict(file).values():
        if isinstance(tensor, torch.Tensor):
            by_shape[tensor.shape].append(tensor)
    found: List[str] = []
    missing: List[str] = []
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.numel() > 1 and bool((value != value.flatten()[0]).any()):
            same = any(torch.equal(value, tensor.to(value)) for tensor in by_shape[value.shape])
            (found if same else missing).append(name)
    return found, missing
