"""End train.py for a wrong option, value or recipe before torch is imported.

What torch or a plug-in must be imported for is checked later: the keyword arguments of a neuron, combinations of
options with the model, and all registered names if a plug-in is given.
"""
import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import List, Mapping, Optional, Sequence

from timm_sscl.closest import closest
from timm_sscl.dataset_names import TIMM_NAMES, TORCH_PARTED, known_name

from .option_sources import AUTO, parse_losses, read_command_line
from .declared import constant, loss_arguments, registered
from ..errors import OptionError, end_with_line, option_text
from .option_ranges import check_values
from .option_types import not_registered

__all__ = ['end_if_wrong', 'check_at_sight']

_FILES = 'pretrained_path', 'initial_checkpoint', 'teacher_checkpoint'
_SPIKING = 'spiking_'
_SYNONYMS = ('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation')  # of timm's folders


def end_if_wrong(argv: Optional[Sequence[str]] = None) -> None:
    """End the script with one line if `check_at_sight` finds an error. A call for help is left to the whole parser.

    Args:
        argv: Arguments; None takes sys.argv's.
    """
    argv = sys.argv[1:] if argv is None else argv
    if '-h' in argv or '--help' in argv:
        return
    try:
        check_at_sight(argv)
    except OptionError as error:
        end_with_line(str(error), 2)


def check_at_sight(argv: Sequence[str]) -> None:
    """Check the command line as far as that is possible without importing torch.

    Raises:
        OptionError: An option, its value, a recipe or a name is wrong, or a file does not exist.
    """
    args = read_command_line(argv).args
    check_values(args)
    if args.plugin or args.loss_file or args.device_modules:
        return  # they may register anything
    _check_registered(args)
    for option in ('model', 'teacher'):
        if getattr(args, option):
            _check_model(option, getattr(args, option))
    _check_optimizer(args.opt)
    _check_files(args)


def _check_registered(args: argparse.Namespace) -> None:
    """Check the names of neurons, losses and so on against the decorators in the source of this package."""
    known = {
        'neuron': registered('neurons', 'register_neuron'),
        'surrogate': registered('neurons', 'register_surrogate'),
        'norm': registered('conversion', 'register_variant', 'norm'),
        'residual': registered('conversion', 'register_variant', 'residual'),
        'threshold_rule': [
            constant('conversion.scales.gains', 'RMS'), *registered('conversion', 'register_threshold_rule')],
    }
    for option, names in known.items():
        value = getattr(args, option)
        if value is not None and value not in names:
            raise not_registered(option, value, names)
    losses = registered('losses', 'register_loss')
    for name in parse_losses(args.loss) if args.loss else ():
        if name not in losses:
            raise not_registered('loss', name, losses)
    if isinstance(args.loss_kwargs, Mapping):  # a file may say anything; that is checked later
        _check_loss_options(args.loss_kwargs, losses)
    try:
        known_name(args.dataset, sorted({*registered('data', 'register_dataset'), *TIMM_NAMES}))
    except ValueError as error:
        raise OptionError(str(error)) from error
    _check_splits(args)


def _check_loss_options(texts: Mapping[str, str], losses: Sequence[str]) -> None:
    """Check the names of losses and of their options in --loss-kwargs."""
    for key, text in texts.items():
        name, _, option = key.rpartition('.')
        if name not in losses:
            raise not_registered('loss_kwargs', name, losses)
        try:
            known = loss_arguments(name)
        except LookupError:  # the loss is a function
            continue
        close = closest(option, known)
        if option not in known and close:
            raise OptionError(f"--loss-kwargs {key}={text}: loss '{name}' has no option '{option}'. "
                              f"Did you mean '{close[0]}'?")


def _check_splits(args: argparse.Namespace) -> None:
    """Check the names of the splits of the digits, of torchvision's data sets and of a folder of images."""
    known: Sequence[str] = ()
    if args.dataset == 'digits':
        known = list(constant('data.digits', '_SPLITS'))
    elif args.dataset in TORCH_PARTED:
        known = constant('data.factory', '_SPLITS_OF_PARTED')
    elif not args.dataset and args.data_dir and os.path.isdir(args.data_dir):
        known = [entry.name for entry in os.scandir(args.data_dir)]
        known += [name for names in _SYNONYMS if {*names} & {*known} for name in names]
    for option in ('val_split',) if args.eval_only else ('train_split', 'val_split'):
        split = getattr(args, option)
        name = split.partition('[')[0]  # timm takes a part of a split in brackets
        if known and name and name not in known and not os.path.exists(os.path.join(args.data_dir or '', name)):
            close = closest(split, known)
            raise OptionError(f"{option_text(option, split)}: '{args.dataset or args.data_dir}' has no split "
                              f"'{split}'." + (f" Did you mean '{close[0]}'?" if close else '')
                              + ('' if args.dataset else ' It needs the folder, with one sub-folder per class.'))


def _check_model(option: str, name: str) -> None:
    """Check that the name of an architecture occurs in the source of timm's models or of ours."""
    base = name.partition('.')[0].removeprefix(_SPIKING)
    sources = [*_sources('timm', 'models'), *_sources('timm_sscl', 'models')]
    word = re.compile(rf'\b{re.escape(base)}\b')
    if ':' in name or not sources or any(base in source and word.search(source) for source in sources):
        return
    known = [found for source in sources for found in re.findall(r'^@register_model\s+def (\w+)', source, re.MULTILINE)]
    raise not_registered(option, name, known, show=False, prefix=_SPIKING if name.startswith(_SPIKING) else '')


def _check_optimizer(name: str) -> None:
    """Check that the name of an optimizer, after a prefix such as lookahead_, occurs in timm's factory."""
    factory = ''.join(_sources('timm', 'optim', '_optim_factory.py'))
    plain = name.lower().rpartition('_')[2]
    if factory and f"'{plain}'" not in factory and f"'{name.lower()}'" not in factory:
        close = closest(plain, re.findall(r"name='(\w+)'", factory), n=3)
        raise OptionError(f'{option_text("opt", name)}: timm has no such optimizer.'
                          + (f' Did you mean {", ".join(close)}?' if close else ''))


def _sources(package: str, folder: str, pattern: str = '*.py') -> List[str]:
    """Return the source files in a folder of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return [file.read_text(encoding='utf-8') for root in folders or () for file in Path(root, folder).glob(pattern)]


def _check_files(args: argparse.Namespace) -> None:
    """Check that files and the folder of the images exist."""
    for option in _FILES:
        file = getattr(args, option)
        if file and not os.path.exists(file):
            raise OptionError(f'{option_text(option, file)}: the file does not exist.')
    if args.resume and args.resume != AUTO and not os.path.exists(args.resume):
        raise OptionError(f'{option_text("resume", args.resume)}: there is no checkpoint and no folder of this name.')
    if args.data_dir and not args.dataset and not os.path.exists(args.data_dir):
        raise OptionError(f'{option_text("data_dir", args.data_dir)}: the folder does not exist; it holds '
                          f'{args.train_split}/ and {args.val_split}/, with one sub-folder per class.')
