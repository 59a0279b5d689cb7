"""Read train.py's command line over a configuration file over a recipe. This does not import torch."""
import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from .declared import constant, settings
from ..errors import OptionError, option_text
from .option_groups import create_parser
from .option_ranges import check_counts
from .option_types import home_path, suggest_option
from .recipes import DIGITS_RECIPE, load_recipe
from .refused_options import EVENTS_ONLY, IMAGE_ONLY, UNSUPPORTED

__all__ = ['ARGS_FILE', 'AUTO', 'CommandLine', 'has_event_frames', 'parse_losses', 'read_command_line']

ARGS_FILE = 'args.yaml'  # file name in a run's folder
AUTO = 'auto'  # value of --resume


@dataclass
class CommandLine:
    """Options as the command line, a file and the digits recipe give them.

    Attributes:
        args: The options.
        given: Names of the options on the command line.
        typed: Their values.
        file_options: Options of --config or of the resumed run.
        source: Where those come from: '--config FILE'.
        recipe: Options that the digits recipe set; empty if data or a data set is given.
    """
    args: argparse.Namespace
    given: set
    typed: Dict[str, Any]
    file_options: Dict[str, Any]
    source: str
    recipe: Dict[str, Any]


def read_command_line(argv: Optional[Sequence[str]] = None, registered: str = '') -> CommandLine:
    """Parse the command line. It overrides the configuration file, and that the digits recipe, which applies without
    data.

    Args:
        argv: Arguments; None takes sys.argv's.
        registered: Text on what is registered, for the end of --help.

    Raises:
        OptionError: An option is unknown, refused or wrong.
    """
    parser = create_parser(registered)
    given = _given(parser, argv)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    given |= {'data_dir'} if args.data else set()
    typed = {name: getattr(args, name) for name in given}
    stored = load_recipe(args.config) if args.config else _resumed_options(args.resume)
    source = f'--config {args.config}' if args.config else f'--resume {args.resume}'
    _apply(parser, args, stored, given, source)
    recipe: Dict[str, Any] = {}
    if not args.data_dir and not args.dataset:
        options = load_recipe(DIGITS_RECIPE)
        recipe = {k: v for k, v in options.items() if k not in given and k not in stored}
        if 'model' not in recipe:
            recipe.pop('model_kwargs', None)
        _apply(parser, args, recipe, given, DIGITS_RECIPE)
    del args.data
    usual = [name for name, value in stored.items() if value == parser.get_default(name)]
    args.fit_workers = 'workers' not in {*given, *recipe, *stored} - set(usual)
    _check(args, given | {name for name, value in stored.items() if value is not None})
    _check_seeds(args, given)
    _check_loss_weights(args, given)
    frames = constant('distillation.frames_ann', 'FRAMES')
    if has_event_frames(args.dataset):
        _check_events(parser, args)
    else:
        _check_images(args, given, args.teacher_frames != frames[0])
    return CommandLine(args, given, typed, stored, source, recipe)


def has_event_frames(dataset: str) -> bool:
    """Return whether a data set of this name has event frames."""
    return dataset.startswith(constant('data.registry', 'EVENT_PREFIXES'))


def _resumed_options(resume: str) -> Dict[str, Any]:
    """Return the options of the run that is resumed by its folder or a file in it, so that they need not be given
    again.
    """
    folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    if not resume or resume == AUTO or not (folder / ARGS_FILE).is_file():
        return {}
    try:
        options = load_recipe(str(folder / ARGS_FILE))
    except OptionError as error:
        raise OptionError(str(error).replace('--config', '--resume', 1)) from error
    return {name: value for name, value in options.items() if name not in (
        'resume', 'eval_only', 'eval_timesteps', 'deploy', 'weight_bits')}


def _given(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]]) -> set:
    """Return the names of the options on the command line."""
    missing = object()
    probe = argparse.Namespace(**{action.dest: missing for action in parser._actions if action.dest != 'help'})
    parser.parse_args(argv, namespace=probe)
    return {name for name, value in vars(probe).items() if value is not missing}


def _apply(parser: argparse.ArgumentParser, args: argparse.Namespace, options: Dict[str, Any], given: set, source: str):
    """Set the options of a recipe or file in args, except those given on the command line."""
    known = {action.dest: action for action in parser._actions}
    if options.get('input_size') and 'input_size' not in given and {'img_size', 'in_chans'} & given:
        channels, size, _ = options['input_size']  # else input_size would override the given options
        options = {'in_chans': channels, 'img_size': size, **{k: v for k, v in options.items() if k != 'input_size'}}
    if 'model' in given:  # the architecture's own arguments belong to the other model
        options = {name: value for name, value in options.items() if name not in ('model_kwargs', 'teacher_kwargs')}
    for name, value in options.items():
        if name not in known or name in ('help', 'config', 'data'):
            close = suggest_option(name, known)
            raise OptionError(f"{source}: unknown option '{name}'." + (f" Did you mean '{close}'?" if close else ''))
        if name in given:
            continue
        kind, choices = known[name].type, list(known[name].choices or ())
        if kind is home_path:
            value = [home_path(v) for v in value] if isinstance(value, list) else value and home_path(value)
        if kind in (int, float) and value is not None and not isinstance(value, (list, dict, bool)):
            try:
                value = kind(value)
            except ValueError as error:
                raise OptionError(f"{source}: option '{name}' is {value!r}, expected a number.") from error
        if choices and value is not None and value not in choices:
            raise OptionError(f"{source}: option '{name}' is {value!r}, expected one of "
                              f"{', '.join(map(str, choices))}.")
        setattr(args, name, value)


def _check(args: argparse.Namespace, given: set) -> None:
    """Check options and combinations of options."""
    for name, reason in UNSUPPORTED.items():
        if getattr(args, name) not in (None, False):  # an older run's options may hold False
            raise OptionError(f"--{name.replace('_', '-')} is not supported: {reason}.")
        delattr(args, name)
    check_counts(args)
    if args.eval_only and args.resume == AUTO:
        raise OptionError('--eval-only: --resume auto starts or continues a training; name a folder or a file.')
    if args.eval_timesteps and (not args.eval_only or min(args.eval_timesteps) < 1):
        raise OptionError(f'--eval-timesteps {" ".join(map(str, args.eval_timesteps))}: goes with --eval-only, and '
                          f'takes numbers of 1 or more.')
    if args.deploy and not args.eval_only:
        raise OptionError('--deploy: goes with --eval-only; a training needs the model as it is.')
    if 'weight_bits' in given and not args.deploy:
        raise OptionError(f'--weight-bits {" ".join(map(str, args.weight_bits))}: goes with --deploy.')
    for name in ('eval_timesteps', 'weight_bits'):
        numbers = getattr(args, name) or []
        if len({*numbers}) < len(numbers):
            raise OptionError(f'{option_text(name, numbers)}: a number stands there twice; the rows would be equal.')
    if args.teacher_size and min(args.teacher_size) < 1:
        raise OptionError(f'--teacher-size {args.teacher_size[0]} {args.teacher_size[1]}: must be 1 pixel or more.')
    if not 0 < args.ann_percentile <= 100:
        raise OptionError(f'--ann-percentile {args.ann_percentile}: must be above 0 and at most 100.')
    if args.teacher_cache:
        random = [f'--{name.replace("_", "-")}' for name in ('mixup', 'cutmix', 'cutmix_minmax') if getattr(args, name)]
        if random or not args.no_aug:
            raise OptionError(f'--teacher-cache: images must be the same in every epoch; '
                              f'{"leave out " + ", ".join(random) if random else "give --no-aug"}.')
    if args.eval_only and not (args.resume or args.initial_checkpoint or args.pretrained or args.pretrained_path):
        raise OptionError('--eval-only: no weights; give --resume FOLDER|FILE, --initial-checkpoint or --pretrained.')
    if 'loss' in given and 'distill' in given:
        raise OptionError('--distill and --loss both say what is added to cross-entropy; use one.')
    if args.kd_model_name and args.teacher and args.kd_model_name != args.teacher:
        raise OptionError('--teacher and --kd-model-name both name the teacher; use one.')
    args.teacher = args.teacher or args.kd_model_name
    if args.teacher_checkpoint and args.teacher_pretrained:
        raise OptionError('--teacher-checkpoint and --teacher-pretrained both name the teacher\'s weights; use one.')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise OptionError(f'--amp and --model-dtype {args.model_dtype} both set the precision; --amp is for '
                          f'float32 models.')
    if not args.val_split:
        raise OptionError("--val-split '': every run is validated here; name the split.")
    if args.drop_path is None and args.drop_connect is not None:
        args.drop_path = args.drop_connect


def _check_seeds(args: argparse.Namespace, given: set) -> None:
    """Check --seeds. `given` are the options on the command line."""
    if not args.seeds:
        return
    text = f'--seeds {" ".join(map(str, args.seeds))}'
    for seed in args.seeds:
        if not 0 <= seed < 2 ** 32:
            raise OptionError(f'{text}: a seed must be a whole number from 0 to {2 ** 32 - 1}.')
        if args.seeds.count(seed) > 1:
            raise OptionError(f'{text}: {seed} stands there twice; a run with the same seed is the same run.')
    if 'seed' in given:
        raise OptionError(f'--seed {args.seed} and {text} both set the seed; use one.')
    if args.eval_only:
        raise OptionError(f'{text}: --eval-only trains nothing; name one run with --resume.')
    if os.path.isfile(args.resume):
        raise OptionError(f'{text}: --resume {args.resume} is a checkpoint of one run; with --seeds it takes the '
                          f'folder above the runs of all seeds.')


def _check_loss_weights(args: argparse.Namespace, given: set) -> None:
    """Refuse weights of --distill on the command line beside --loss."""
    for option, name in (('sscl_weight', 'sscl'), ('kd_weight', 'kd')):
        if args.loss and option in given:
            value = getattr(args, option)
            raise OptionError(f'{option_text(option, value)}: is of --distill, and --loss has the weights itself; '
                              f'write --loss {name}={value:g}.')


def _check_events(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the options for event data."""
    given = [name for name in IMAGE_ONLY if getattr(args, name) != parser.get_default(name)]
    # values that train.py sets itself may come from a run's stored options
    given += [name for name, own in (('in_chans', 2), ('mean', [0., 0.]), ('std', [1., 1.]))
              if getattr(args, name) not in (None, own)]
    given += ['input_size'] if args.input_size and args.input_size[0] != 2 else []
    given += ['mixup_mode'] if args.mixup > 0 and args.mixup_mode != 'batch' else []
    if given:
        names = ', '.join('--' + name.replace('_', '-') for name in given)
        raise OptionError(f'{names}: not for event data, whose samples are frames (T, 2, H, W); see the event data '
                          f'parameters in --help.')
    if args.neuron_init == 'ann':
        raise OptionError('--neuron-init ann: measures an ANN on images; with event data use calibrated.')
    for name, least in (('event_size', 1), ('event_roll', 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise OptionError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be {least} or more.')
    if args.timesteps is None:
        args.timesteps = settings('data.events.frames', 'FrameSettings')['timesteps'].default


def _check_images(args: argparse.Namespace, given: set, by_frames: bool) -> None:
    """Refuse options of event data, of those on the command line, and a teacher's treatment of frames."""
    names = [name for name in EVENTS_ONLY if name in given] + ['teacher_frames'] * by_frames
    if names:
        texts = ', '.join(option_text(name, getattr(args, name)) for name in names)
        raise OptionError(f'{texts}: goes with event data (--dataset events/... or tonic/...).')


def parse_losses(text: str) -> Dict[str, float]:
    """Return the weights that --loss NAME=WEIGHT,... names.

    Raises:
        OptionError: A weight is no number, or a name stands there twice.
    """
    weights: Dict[str, float] = {}
    for part in text.split(','):
        name, _, weight = part.strip().partition('=')
        try:
            number = float(weight) if weight else 1.
        except ValueError as error:
            raise OptionError(f"--loss: the weight in '{part}' is no number; write NAME=WEIGHT,...") from error
        if name in weights:
            raise OptionError(f"--loss {text}: '{name}' stands there twice, with {weights[name]:g} and {number:g}.")
        weights[name] = number
    return weights
