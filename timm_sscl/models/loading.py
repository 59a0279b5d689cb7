"""load: a model from a checkpoint file alone."""
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.data.loader import adapt_to_chs
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, is_model, load_state_dict, resolve_model_input_args
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_sscl.conversion.description import MODEL_KEY, describe_model
from timm_sscl.conversion.settings import ARGUMENTS, SETTINGS_KEY, SpikingSettings, decode_tensor
from timm_sscl.distillation.frames_ann import accept_frames

from .adapting import create_adapted
from .finite import find_non_finite, text_of_non_finite
from .spiking import names_of_saved

__all__ = ['BEST_FILE', 'DESCRIPTION_KEY', 'describe_model', 'load']

_logger = logging.getLogger(__name__)

BEST_FILE = 'model_best.pth.tar'  # checkpoint of a run's best epoch
DESCRIPTION_KEY = 'timm_model'  # key of a checkpoint of train.py
_TAKES = ('load takes a checkpoint of train.py (NAME.pth.tar), a state dict that torch.save or safetensors wrote, or a '
          'folder with a config.json, as save_for_hub writes it')
_PREPROCESSING = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'  # of timm's data configuration


def load(file: Union[str, Path], use_ema: bool = True, **kwargs: Any) -> nn.Module:
    """Load a model from a file alone: a checkpoint of train.py, or the state dict of a spiking model.

    The file says which architecture it holds, with which keyword arguments timm.create_model built it (width, classes,
    image size), and its spiking settings: T, neuron, variants, gains, thresholds. Checkpoints of version 0.1.0 that
    train.py wrote are understood by the options in them.

    Args:
        file: File as written by torch.save(model.state_dict(), file), by safetensors or by train.py; or a folder with a
            config.json, as for timm.create_model('local-dir:FOLDER', pretrained=True); or the folder of a run, of which
            the best epoch is taken (model_best.pth.tar).
        use_ema: Whether to take the averaged weights (--model-ema) if the file has them, as timm does.
        **kwargs: Arguments of timm.create_model, which take precedence over the file's: timesteps=8. Weights are
            adapted as timm adapts pretrained ones: features_only=True and another num_classes drop the classifier,
            in_chans changes the first convolution. Arguments that no file can hold, such as norm_layer=MyNorm, must be
            given again.

    Returns:
        The model in evaluation mode, in the precision of its weights. Of a run of train.py, pretrained_cfg has the
        preprocessing, for timm.data.resolve_model_data_config. A warning names weights that are not finite.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no weights that can be read safely, or does not say which model they belong to; a
            plug-in that it needs is not imported; the weights do not fit the model that it describes.
    """
    path = Path(file)
    if path.is_dir() and not (path / 'config.json').is_file() and (path / BEST_FILE).is_file():
        path = path / BEST_FILE
        _logger.info(f"Loads '{path}', the checkpoint of the best epoch.")
    model = _load_folder(path, kwargs) if path.is_dir() else _load_file(path, use_ema, kwargs)
    broken = find_non_finite(model.state_dict())
    if broken:
        _logger.warning(f"'{path}' holds {text_of_non_finite(broken)}. A neuron whose current is NaN does not fire.")
    return model.eval()


def _load_file(path: Path, use_ema: bool, kwargs: Dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist. {_TAKES}{_names(path.parent, '; the folder has ')}.")
    checkpoint = _read(path)
    state = load_state_dict(str(path), use_ema=use_ema)
    options = checkpoint.get('args') or {}
    options = vars(options) if isinstance(options, Namespace) else options
    try:
        stored = decode_tensor(state[SETTINGS_KEY]) if SETTINGS_KEY in state else {}
        saved = SpikingSettings.from_stored(stored).arguments() if stored else {}
    except ValueError as error:
        raise ValueError(f"'{path}': {error}{_plugins(options)}") from error
    described = stored.get(MODEL_KEY) or checkpoint.get(DESCRIPTION_KEY) or _from_options(path, options, state)
    given = {**saved, **kwargs}
    model = _create(path, described, given, options)
    if saved:
        model._explicit -= names_of_saved({k: v for k, v in saved.items() if k not in kwargs}, saved)
    try:
        model = _fill(model, described, given, state, adapt=bool(set(kwargs) - set(ARGUMENTS)))
    except (RuntimeError, KeyError) as error:  # KeyError: timm converts files of other projects
        why = f'of which load was given {kwargs}.' if kwargs else (
            'as after changes of the model by hand. Make the same changes, then load_state_dict:')
        raise ValueError(f"'{path}': the weights do not fit {described['architecture']} with "
                         f"{({**described['args'], **kwargs})}, {why} "
                         f'{" ".join(str(error).split())[:300]}') from error
    _set_preprocessing(model, options, kwargs)
    return model


def _fill(model: Any, described: Dict[str, Any], given: Dict[str, Any], state: Dict[str, Any], adapt: bool) -> Any:
    """Load weights into a model that is created with further arguments than the file's, and return it.

    Where they do not fit strictly, and `adapt` allows it, return another one, whose weights are adapted as timm does.
    """
    try:
        _to_dtype_of(model, state).load_state_dict(state, strict=True)
        return model
    except RuntimeError:
        if not adapt:
            raise
    adapted = create_adapted(described, given, state)
    adapted.pretrained_cfg = adapted.default_cfg = model.pretrained_cfg  # without the weights
    if hasattr(model, '_explicit'):
        adapted._explicit = model._explicit
    if 'frames' in described:
        accept_frames(adapted, described['frames'])
    return _to_dtype_of(adapted, state)


def _set_preprocessing(model: nn.Module, options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Set what timm.data.resolve_model_data_config reads to the preprocessing of the run, where its options tell it.

    It is adapted to other channels and another image size, where load was given them.
    """
    used, config = options.get('data_config') or {}, getattr(model, 'pretrained_cfg', None)
    if not used or not isinstance(config, dict):
        return
    config.update({name: used[name] for name in _PREPROCESSING if name in used})
    if hasattr(model, 'num_classes'):
        config['num_classes'] = model.num_classes
    channels, *size = used['input_size']
    channels, size = given.get('in_chans') or channels, to_2tuple(given.get('img_size') or size)
    config.update(input_size=(channels, *size), **{
        name: tuple(adapt_to_chs(used[name], channels)) for name in ('mean', 'std') if name in used})


def _load_folder(folder: Path, kwargs: Dict[str, Any]) -> nn.Module:
    if not (folder / 'config.json').is_file():
        raise FileNotFoundError(f"'{folder}' is a folder without a config.json; name a file"
                                f"{_names(folder, ' in it: ') or f'. {_TAKES}'}.")
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)


def _names(folder: Path, before: str) -> str:
    """Return which files of weights are in a folder, after other words; '' if there are none."""
    found = sorted(file.name for ending in ('*.pth.tar', '*.pth', '*.safetensors') for file in folder.glob(ending))
    return before + ', '.join(found) if found else ''


def _read(path: Path) -> Dict[str, Any]:
    """Return what a file holds beside the weights; {} for plain weights.

    Raises:
        ValueError: It is no file of weights, or holds none that can be read without executing code.
    """
    safe = path.suffix == '.safetensors'
    with open(path, 'rb') as opened:
        head = opened.read(9)
    # safetensors: 8 bytes of length, then JSON; torch.save: a zip file, before torch 1.6 a pickle
    if head[8:] != b'{' if safe else head[:2] != b'PK' and head[:1] != b'\x80':
        raise ValueError(f"'{path}' is no file of weights. {_TAKES}{_names(path.parent, '; the folder has ')}.")
    if safe:
        return {}
    try:
        content = load_checkpoint_metadata(str(path))
    except Exception as error:  # torch, pickle and zipfile raise many types
        raise ValueError(f"'{path}' is no weights file that can be read safely; save model.state_dict(), not the model "
                         f'({" ".join(str(error).split())[:200]}).') from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds no weights by name; save model.state_dict().")
    return {name: value for name, value in content.items() if not isinstance(value, torch.Tensor)}


def _create(path: Path, described: Dict[str, Any], given: Dict[str, Any], options: Mapping[str, Any]) -> Any:
    """Create the described model with further arguments."""
    architecture, lacking = described['architecture'], set(described.get('objects', ())) - set(given)
    if not is_model(architecture):
        raise ValueError(f"'{path}' holds the model '{architecture}', which is not registered. Import the plug-in that "
                         f'registers it first.{_plugins(options)}')
    if lacking:
        texts = ', '.join(f'{name}={described["objects"][name]}' for name in sorted(lacking))
        raise ValueError(f"'{path}': its {architecture} was created with {texts}, which no file can hold; give "
                         f'{"it" if len(lacking) == 1 else "them"} again: load(file, {sorted(lacking)[0]}=...).')
    model = timm.create_model(architecture, **{**described['args'], **given})
    return accept_frames(model, described['frames']) if 'frames' in described else model


def _plugins(options: Mapping[str, Any]) -> str:
    """Return which plug-ins a run imported, as an addition to an error message."""
    sources = [*(options.get('plugin') or []), *filter(None, [options.get('loss_file')])]
    return f' Its run was started with --plugin {" ".join(map(os.path.relpath, sources))}.' if sources else ''


def _from_options(path: Path, options: Mapping[str, Any], state: Dict[str, Any]) -> Dict[str, Any]:
    """Return the description of a model by the options of its run, for checkpoints of version 0.1.0.

    Raises:
        ValueError: There are none, or they do not apply.
    """
    if not options.get('model'):
        why = (f"'{path}' does not say which model it holds: it was written by version 0.1.0, or its model was not "
               f'created by timm' if SETTINGS_KEY in state else
               f"'{path}' holds weights alone, and the state dict of an ANN names no model")
        raise ValueError(f'{why}. Create the model, then load the file: model = timm.create_model(NAME, ...); '
                         f'timm.models.load_checkpoint(model, FILE).')
    names = dict(gp='global_pool', bn_momentum='bn_momentum', bn_eps='bn_eps')
    given = {to: options.get(name) for name, to in names.items()}
    args = resolve_model_input_args(
        options['model'], dict(options), num_classes=options.get('num_classes') or _count_classes(options, state),
        **{**given, **(options.get('model_kwargs') or {})})
    return dict(architecture=args.pop('model_name'), args={k: v for k, v in args.items() if k != 'pretrained_cfg'})


def _count_classes(options: Mapping[str, Any], state: Dict[str, Any]) -> Optional[int]:
    """Return the number of classes by the shape of the classifier; None if it is not in the state dict."""
    config = get_pretrained_cfg(options['model']) if is_model(options['model']) else None
    weight = state.get(f'{getattr(config, "classifier", None)}.weight')
    return None if weight is None else len(weight)


def _to_dtype_of(model: nn.Module, state: Dict[str, Any]) -> nn.Module:
    """Cast a model to the dtype of its parameters in a state dict, if they have the same."""
    dtypes = {state[name].dtype for name, _ in model.named_parameters() if name in state}
    return model.to(dtypes.pop()) if len(dtypes) == 1 else model
