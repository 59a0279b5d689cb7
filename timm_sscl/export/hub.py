"""Save a spiking model in a folder as the Hugging Face hub takes it: config, safetensors, model card."""
import copy
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.models._hub import generate_readme

from timm_sscl.conversion.description import PREFIX, describe_model
from timm_sscl.conversion.model import SpikingModule
from timm_sscl.conversion.settings import SETTINGS_KEY
from timm_sscl.models.finite import check_finite

__all__ = ['LICENCE', 'model_card', 'save_for_hub']

LICENCE = 'apache-2.0'  # that of timm_sscl and of most of timm's weights

_CITATION = """@inproceedings{zhang2024sscl,
  title = {Enhancing Representation of Spiking Neural Networks via Similarity-Sensitive Contrastive Learning},
  author = {Zhang, Yuhan and Liu, Xiaode and Chen, Yuanpei and Peng, Weihang and Guo, Yufei and Huang, Xuhui and
            Ma, Zhe},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2024}
}"""
_USAGE = """
```python
import timm
import timm_sscl  # registers the spiking models

model = timm.create_model('hf-hub:USER/NAME', pretrained=True){cast}.eval()  # a folder: 'local-dir:FOLDER'
logits = model(images)                  # {input}; the mean over {timesteps} timesteps
steps = model(images, per_step=True)    # every timestep, ({timesteps}, B, {classes})
```
"""


def model_card(
        model: SpikingModule,
        details: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        licence: str = LICENCE,
) -> Dict[str, Any]:
    """Return the content of a spiking model's card, for `timm.models.push_to_hf_hub(model, ..., model_card=card)`.

    Args:
        model: Spiking model that timm created.
        details: Further facts by their title, such as dict(Accuracy='93.1 top-1 on the validation split').
        data_config: Preprocessing of the images, see `save_for_hub`.
        licence: Licence of the weights, by its name on the hub.

    Raises:
        ValueError: The model is not spiking, or timm did not create it.
    """
    described, settings = _check(model), model.settings
    base, dtype = described['architecture'].removeprefix(PREFIX), next(model.parameters()).dtype
    preprocessing = resolve_model_data_config(model, data_config)
    channels, *size = preprocessing['input_size']
    neurons = model.spiking_report().neurons
    facts = {
        'Model type': 'spiking neural network (SNN), image classification', 'Timesteps': settings.timesteps,
        'Neurons': f'{len(neurons)} layers of {settings.neuron_class_name}',
        'Spiking settings': _text(settings.arguments()), 'Model arguments': _text(described['args']),
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}', 'Preprocessing': _text(preprocessing),
        **(details or {})}
    return dict(
        tags=['image-classification', 'timm', 'spiking-neural-network', 'timm_sscl'], license=licence,
        description=f'A spiking version of `{base}` of timm: its activations are spiking neurons that run for '
                    f'T={settings.timesteps} timesteps. Made with timm_sscl.',
        details=facts, citation=_CITATION,
        usage=_USAGE.format(
            timesteps=settings.timesteps, classes=model.num_classes, input=f'(B, {channels}, {size[0]}, {size[1]})',
            cast='' if dtype == torch.float32 else f'.to({dtype})'))


def save_for_hub(
        model: SpikingModule,
        folder: Union[str, Path],
        details: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        licence: str = LICENCE,
        **config: Any,
) -> Path:
    """Write config.json, model.safetensors and the model card README.md into a new folder.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` gives the same model from it, with its settings, gains and
    variants, and so does 'hf-hub:USER/NAME' once the folder is uploaded (`hf upload USER/NAME FOLDER`). The folder is
    loaded once before it gets its name: a model that it does not hold completely is refused.

    Args:
        model: Spiking model that timm.create_model created. It stays as it is.
        folder: Folder that does not exist yet or is empty. Its name is the title of the card.
        details: Further facts for the card by their title, see `model_card`.
        data_config: Preprocessing of the images that the model was trained on: mean, std, input_size, crop_pct, ...
        licence: Licence of the weights, by its name on the hub.
        **config: Further entries of config.json, as for timm's save_for_hf: label_names=[...].

    Returns:
        The folder.

    Raises:
        ValueError: The model is not spiking, timm did not create it, it was changed since in a way that timm does not
            record, it has an argument that JSON cannot hold, or weights that are not finite.
        FileExistsError: The folder holds something.
    """
    card, folder = model_card(model, details, data_config, licence), Path(folder).resolve()
    check_finite(model.state_dict(), type(model).__name__)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' holds something already; name a new folder.")
    written = folder.with_name(f'.{folder.name}.{os.getpid()}.part')
    written.mkdir(parents=True)
    try:
        plain: Any = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        save_for_hf(plain, str(written), model_config=config, safe_serialization=True, data_config=data_config)
        (written / 'README.md').write_text(generate_readme(card, folder.name), encoding='utf-8')
        _check_loads(written, plain)
        if folder.exists():
            folder.rmdir()
        written.rename(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return folder


def _text(arguments: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value}' for name, value in arguments.items())


def _check(model: nn.Module) -> Dict[str, Any]:
    """Return how timm builds a spiking model."""
    if not isinstance(model, SpikingModule):
        raise ValueError(f'{type(model).__name__} does not spike; timm.models.save_for_hf saves ANNs.')
    described = describe_model(model)
    if not described:
        raise ValueError(f'{type(model).__name__} was not created by timm.create_model, so that no config can say how '
                         f'to build it. Register it with timm (timm.models.register_model) and create it by its name.')
    if 'objects' in described:
        texts = ', '.join(f'{name}={text}' for name, text in described['objects'].items())
        raise ValueError(f'{described["architecture"]} was created with {texts}, which a config cannot hold.')
    return described


def _check_loads(folder: Path, model: SpikingModule) -> None:
    """Check that a folder gives the model.

    Raises:
        ValueError: It does not.
    """
    kind, state = type(model).__name__, model.state_dict()
    try:
        loaded: Any = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:  # timm and torch raise many types
        raise ValueError(f'{kind} cannot be built from its config, as after changes by hand: '
                         f'{" ".join(str(error).split())[:300]}') from error
    loaded = loaded.to(next(model.parameters()).dtype)
    again = loaded.state_dict()
    differ = [name for name in {**state, **again} if name != SETTINGS_KEY and not (
        name in state and name in again and torch.equal(state[name], again[name]))]
    layers, made = _layers(model), _layers(loaded)
    differ += [name for name in layers if layers[name] != made.get(name)]
    if differ or loaded.settings != model.settings:
        raise ValueError(f'{kind} was changed since timm.create_model in a way that its config does not say: '
                         f'{", ".join(differ[:5]) or "its settings"} would not be the same after loading.')


def _layers(model: nn.Module) -> Dict[str, str]:
    """Return what torch shows of every layer: strides, eps, ... A config does not hold drop rates."""
    return {name: f'{type(module).__name__}({module.extra_repr()})' for name, module in model.named_modules()
            if 'drop' not in type(module).__name__.lower()}
