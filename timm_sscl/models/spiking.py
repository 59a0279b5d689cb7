"""Register `spiking_<name>` for every timm architecture in timm's registry, with its tags and pretrained configs."""
import os
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Set, Tuple

import torch
import torch.nn as nn

import timm.models._registry as _registry
from timm.models import list_models, load_state_dict, model_entrypoint, register_model
from timm.models._hub import load_state_dict_from_hf, load_state_dict_from_path
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models._registry import _model_default_cfgs, _model_pretrained_cfgs, is_model

from timm_sscl.closest import closest
from timm_sscl.conversion.convert import convert_to_spiking
from timm_sscl.conversion.description import PREFIX
from timm_sscl.conversion.settings import ARGUMENTS, SETTINGS_KEY, WITH_OPTIONS, SpikingSettings, option_key
from timm_sscl.conversion.state import split_spiking_state

__all__ = ['register_spiking_models', 'names_of_saved', 'PREFIX']

default_cfgs: Dict[str, DefaultCfg] = {}  # read by timm's register_model


def _spiking_default_cfg(base: str) -> Optional[DefaultCfg]:
    """Return the pretrained configs of an ANN architecture for its spiking version, with resolved hub ids; None if it
    has none.

    timm completes a hub id 'timm/' with the model's name. For the spiking name there is no such repository.
    """
    default: Any = _model_default_cfgs.get(base)
    if default is None:
        return None
    cfgs = {tag: _model_pretrained_cfgs.get(f'{base}.{tag}' if tag else base, cfg) for tag, cfg in default.cfgs.items()}
    return DefaultCfg(tags=deque(default.tags), cfgs=cfgs, is_pretrained=default.is_pretrained)


def _named_state_dict(cfg: Dict[str, Any], cache_dir: Any) -> Optional[Dict[str, Any]]:
    """Return the state dict that a pretrained config refers to, which may be spiking; None for timm's own ANN weights.
    """
    file = cfg.get('file')
    if cfg.get('source') == 'local-dir':
        return load_state_dict_from_path(Path(str(file)))
    if cfg.get('source') == 'hf-hub':
        return load_state_dict_from_hf(cfg['hf_hub_id'], weights_only=True, cache_dir=cache_dir)
    if cfg.get('state_dict'):
        return dict(cfg['state_dict'])
    if file and os.path.isfile(file) and os.path.splitext(file)[1] not in ('.npz', '.npy'):
        return load_state_dict(file)
    return None


def _split_pretrained(
        pretrained_cfg: Any,
        overlay: Optional[Dict[str, Any]],
        cache_dir: Any,
) -> Tuple[Optional[Dict[str, Any]], Optional[Dict[str, Any]]]:
    """Split the spiking state off a checkpoint that is given as pretrained weights, since the ANN loads the checkpoint
    first.

    Returns:
        The overlay for the ANN's config, and the spiking state (None if the checkpoint has none).
    """
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = vars(pretrained_cfg)
    overlay = overlay or {}
    config = {**(pretrained_cfg if isinstance(pretrained_cfg, dict) else {}), **overlay}
    state_dict = _named_state_dict(config, cache_dir)
    if not isinstance(state_dict, dict) or SETTINGS_KEY not in state_dict:
        return overlay or None, None
    spiking_state = split_spiking_state(state_dict)
    return {**overlay, 'state_dict': state_dict, 'source': ''}, spiking_state


def _make_ann_state(base: str, kwargs: Dict[str, Any], state_dict: Dict[str, Any], stored: Dict[str, Any]) -> None:
    """Convert a spiking checkpoint in place to one that the ANN loads strictly.

    Parameters of activations that neurons replaced are added. State that only the spiking model has moves to `stored`.
    """
    kwargs = {k: v for k, v in kwargs.items() if k not in ('features_only', 'out_indices', 'feature_cls')}
    with torch.device('meta'):
        ann = model_entrypoint(base)(**kwargs)
    shapes = {name: value.shape for name, value in ann.state_dict().items()}
    settings = SpikingSettings.from_tensor(stored[SETTINGS_KEY])
    convert_to_spiking(
        ann, include=settings.include, exclude=settings.exclude, allow_analog=True, neuron=settings.neuron,
        neuron_kwargs=dict(settings.neuron_kwargs), norm=settings.norm, norm_kwargs=dict(settings.norm_kwargs),
        residual=settings.residual, residual_kwargs=dict(settings.residual_kwargs))
    spiking = {name: value.shape for name, value in ann.state_dict().items()}
    for name, shape in spiking.items():
        if shapes.get(name) != shape and name in state_dict:
            stored[name] = state_dict.pop(name)
    for name, shape in shapes.items():
        if spiking.get(name) != shape:
            state_dict.setdefault(name, torch.ones(shape))


def names_of_saved(given: Dict[str, Any], saved: Dict[str, Any]) -> Set[str]:
    """Return the names of the settings that come from a saved model's config, so that the user did not ask for them."""
    names = set()
    for argument, value in given.items():
        if argument in saved and saved[argument] == value:
            of = argument.removesuffix('_kwargs') if argument.endswith('_kwargs') else ''
            names.update({option_key(name, of) for name in value} if of in ('neuron', *WITH_OPTIONS) else {argument})
    return names


def _unknown_argument(error: TypeError, kwargs: Dict[str, Any]) -> Optional[str]:
    """Return the given argument that a call refused; None for another TypeError."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found.group(1) if found and found.group(1) in kwargs else None


def _why_unknown(base: str, argument: str) -> str:
    close = closest(argument, ARGUMENTS)
    hint = f"Did you mean '{close[0]}'?" if close else f'Settings are {", ".join(ARGUMENTS)}.'
    return f"{PREFIX}{base}: neither timm's {base} nor the spiking settings have an argument '{argument}'. {hint}"


def _entrypoint(base: str) -> Callable[..., nn.Module]:
    """Return the timm entrypoint function that creates the spiking version of an architecture."""
    def create(
            pretrained: bool = False,
            pretrained_cfg: Any = None,
            pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
            **kwargs,
    ) -> nn.Module:
        stored, saved = None, dict(kwargs.get('pretrained_model_args') or {})
        options = {name: kwargs.pop(name, None) for name in ARGUMENTS}
        if pretrained:
            pretrained_cfg_overlay, stored = _split_pretrained(
                pretrained_cfg, pretrained_cfg_overlay, kwargs.get('cache_dir'))
            if stored is not None and pretrained_cfg_overlay is not None:
                _make_ann_state(base, kwargs, pretrained_cfg_overlay['state_dict'], stored)
                if options['allow_analog'] is None:
                    options['allow_analog'] = SpikingSettings.from_tensor(stored[SETTINGS_KEY]).allow_analog
                    saved.update(allow_analog=options['allow_analog'])
        try:
            model = model_entrypoint(base)(
                pretrained=pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay,
                **kwargs)
        except TypeError as error:
            unknown = _unknown_argument(error, kwargs)
            if unknown is None:
                raise
            raise TypeError(_why_unknown(base, unknown)) from error
        given = {name: value for name, value in options.items() if value is not None}
        convert_to_spiking(model, **given)
        model._explicit -= names_of_saved(given, saved)
        if stored is not None:
            model.load_spiking_state(stored)
        return model

    create.__name__ = create.__qualname__ = PREFIX + base
    create.__module__ = __name__
    create.__doc__ = f'Spiking {base}: see timm_sscl.convert_to_spiking for the neuron options.'
    return create


class _Entrypoints(dict):
    """timm's table of architectures that adds spiking versions of later registered ones at the next look-up."""
    grown = False

    def __setitem__(self, name: str, entrypoint: Callable[..., nn.Module]) -> None:
        super().__setitem__(name, entrypoint)
        self.grown = self.grown or not name.startswith(PREFIX)

    def _add_twins(self) -> None:
        if self.grown:
            register_spiking_models()

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name):
            self._add_twins()
        return super().__contains__(name)

    def __missing__(self, name: str) -> Callable[..., nn.Module]:
        self._add_twins()
        if name not in self:
            raise KeyError(name)
        return self[name]

    def keys(self):
        self._add_twins()
        return super().keys()


def _watch_timms_registry() -> None:
    if not isinstance(_registry._model_entrypoints, _Entrypoints):
        _registry._model_entrypoints = _Entrypoints(_registry._model_entrypoints)


def register_spiking_models() -> int:
    """Register `spiking_<name>` for every architecture of timm that has none yet.

    Runs at import, and automatically when a name is looked up after models were registered.

    Returns:
        Number of names added.
    """
    if isinstance(_registry._model_entrypoints, _Entrypoints):
        _registry._model_entrypoints.grown = False
    names = [n for n in list_models() if not n.startswith(PREFIX) and not is_model(PREFIX + n)]
    module = sys.modules[__name__]
    for base in names:
        fn = _entrypoint(base)
        default_cfg = _spiking_default_cfg(base)
        if default_cfg is not None:
            default_cfgs[fn.__name__] = default_cfg
        setattr(module, fn.__name__, fn)
        register_model(fn)
    return len(names)


register_spiking_models()
_watch_timms_registry()
