"""Parse train.py's options and check them against what is registered."""
import argparse
import os
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from timm_sscl.distillation.presets import PRESETS, resolve_losses
from timm_sscl.report.extra import MISSING, can_report

from .option_sources import ARGS_FILE, AUTO, parse_losses, read_command_line
from ..errors import OptionError
from .loss_options import resolve_loss_options
from .neuron_options import check_threshold_options
from .option_types import OptionParser, home_path
from .plugins import describe_failure, import_plugin, plugin_digests
from .registered_help import describe_registered
from .unused_options import check_loss_options

__all__ = ['ARGS_FILE', 'AUTO', 'parse_args']


def parse_args(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """Parse the command line; see `read_command_line`. Plug-ins are imported.

    Args:
        argv: Arguments; None takes sys.argv's.

    Returns:
        The options, and those that the digits recipe set (empty if data or a data set is given).

    Raises:
        OptionError: An option is unknown, refused or wrong.
    """
    line = read_command_line(argv, describe_registered() if _import_for_help(argv) else '')
    args = line.args
    if args.report and not can_report():
        raise OptionError(f'--report: matplotlib and jinja2 are not both installed; {MISSING}.')
    args.losses = _losses(args)
    check_threshold_options(args)
    args.loss_options = resolve_loss_options(
        args, [('', line.recipe), (f'{line.source}: ', line.file_options), ('', line.typed)], list(args.losses))
    _check_batch_size(args)
    check_loss_options(args, line.given, args.losses)
    return args, line.recipe


def _import_for_help(argv: Optional[Sequence[str]]) -> bool:
    """Return whether the command line asks for help, which lists what is registered; then import its plug-ins."""
    probe = OptionParser(add_help=False, allow_abbrev=False)
    probe.add_argument('--help', '-h', action='store_true')
    probe.add_argument('--plugin', type=home_path, nargs='+')
    probe.add_argument('--loss-file', type=home_path)
    args, _ = probe.parse_known_args(argv)
    if args.help:
        _import_plugins(args)
    return args.help


def _losses(args: argparse.Namespace) -> Dict[str, float]:
    """Return the weights of the losses that --distill or --loss select."""
    _import_plugins(args)
    preset = args.distill or ('kd' if args.kd_model_name else 'sscl')
    args.distill = None if args.loss else preset
    weights = parse_losses(args.loss) if args.loss else dict(PRESETS[preset])
    if not args.loss:
        kd_weight = args.kd_weight
        if kd_weight is None and args.task_loss_weight is not None:
            kd_weight = 1. - args.task_loss_weight  # timm's complementary weights
        for name, weight in (('sscl', args.sscl_weight), ('contrastive', args.sscl_weight), ('kd', kd_weight)):
            if name in weights and weight is not None:
                weights[name] = weight
    try:
        return resolve_losses(weights)
    except ValueError as error:
        raise OptionError(f'--{"loss" if args.loss else "distill"}: {error}') from error


def _check_batch_size(args: argparse.Namespace) -> None:
    """Check that the batch is large enough for CKA, which needs four samples."""
    options: Mapping[str, Any] = args.loss_options.get('sscl', {})
    processes = int(os.environ.get('WORLD_SIZE', 1)) if options.get('cka_scope') == 'global' else 1
    if options and args.batch_size * processes < 4 and options['weighting'] != 'uniform':
        raise OptionError(f'--batch-size {args.batch_size} is too small for CKA weights, which need at least 4 '
                          f'samples; use a larger batch or --distill contrastive.')


def _import_plugins(args: argparse.Namespace) -> None:
    """Import the user's files, and store their full paths, so that a run can be resumed in another folder."""
    if args.plugin is not None:
        args.plugin = list(dict.fromkeys(os.path.abspath(p) if os.path.isfile(p) else p for p in args.plugin))
    for option, sources in (('plugin', args.plugin or []), ('loss-file', [args.loss_file] if args.loss_file else [])):
        for source in sources:
            try:
                import_plugin(source)
            except FileNotFoundError as error:
                raise OptionError(f'--{option}: {error}') from error
            except Exception as error:  # a user's file may raise anything
                raise OptionError(f'--{option} {describe_failure(source, error)}') from error
    args.plugin_digests = plugin_digests([*(args.plugin or []), *([args.loss_file] if args.loss_file else [])])
