"""Describe a run on the terminal and in summary.json: best epoch, firing rates, command, versions."""
import logging
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Dict, List, Mapping, Optional, Sequence

from timm_sscl.report import mean_per_step

from ..errors import is_given, option_text
from ..exits import launcher
from ..command_line.option_groups import create_parser
from ..teachers.teacher_key import plain

__all__ = ['NOT_AVERAGED', 'best_epoch_facts', 'best_epoch_text', 'last_epoch_text', 'differing_options',
           'firing_lines', 'library_versions', 'log_options', 'options_line', 'run_command']

_logger = logging.getLogger('train')

NOT_AVERAGED = ' (of the weights that are not averaged)'
_SHOWN = 3  # number of layers that a line of the closing table names


def best_epoch_facts(
        metric: str,
        last: Dict[str, float],
        best: Optional[float],
        epoch: Optional[int],
) -> Dict[str, Any]:
    """Return the entries of summary.json on the best epoch.

    Args:
        metric: Name of the metric that ranks the epochs.
        last: Metrics of the last epoch, with `<metric>_ema` if the averaged model's metric ranks them.
        best: Value of the best epoch; None if there is none.
        epoch: Number of the best epoch, counted from 0 as in summary.csv and the checkpoints' names.
    """
    facts: Dict[str, Any] = {metric: best, 'epoch': epoch, 'epochs_count_from': 0}
    if epoch is not None:
        facts.update(weights='ema' if f'{metric}_ema' in last else 'model', checkpoint=f'checkpoint-{epoch}.pth.tar')
    return facts


def best_epoch_text(facts: Dict[str, Any], metric: str) -> str:
    """Return the text on the best epoch for the terminal, where epochs count from 1."""
    if facts['epoch'] is None:
        return ''
    model = " of the averaged model (--model-ema)" if facts['weights'] == 'ema' else ''
    return (f', best {metric}{model} {facts[metric]:.2f} (epoch {facts["epoch"] + 1}; the files count from 0: '
            f'{facts["checkpoint"]})')


def last_epoch_text(last: Dict[str, float]) -> str:
    """Return the text on the top-1 after the last epoch, of the model and of the averaged model if there is one."""
    average = f' ({last["top1_ema"]:.2f} of the averaged model)' if 'top1_ema' in last else ''
    return f'{last["top1"]:.2f} top-1 after the last epoch{average}'


def firing_lines(rates: Dict[str, float], step_rates: Dict[str, List[float]], of: str = '') -> List[str]:
    """Return lines on the firing rates: their mean, the most silent, the busiest and the deepest layers.

    Args:
        rates: Layer -> firing rate, in the order of the calls.
        step_rates: Layer -> firing rate at every timestep.
        of: Which weights were measured, in words, if that is not clear.
    """
    if not rates:
        return []
    ranked = sorted(rates, key=lambda name: rates[name])
    mean, steps = sum(rates.values()) / len(rates), ' '.join(f'{rate:.3f}' for rate in mean_per_step(step_rates))
    lines = [f'Firing    {mean:.3f} spikes per neuron and timestep, the mean of {len(rates)} layers{of}; at '
             f'every timestep: {steps}']
    for title, names in (('least', ranked[:_SHOWN]), ('most', ranked[::-1][:_SHOWN]), ('deepest', [*rates][-_SHOWN:])):
        lines.append(f'          {title:<8}' + ', '.join(f'{name} {rates[name]:.3f}' for name in names))
    return lines


def differing_options(options: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the options that are set and differ from the parser's defaults, by name."""
    parser = create_parser()
    known = {action.dest for action in parser._actions}
    return {name: value for name, value in sorted(options.items()) if name in known
            and is_given(value) and plain(value) != plain(parser.get_default(name))}


def options_line(options: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return the line that opens a run: its options that differ from the defaults and are not the recipe's."""
    differ = {name: value for name, value in differing_options(options).items()
              if name not in recipe or value != recipe[name]}
    text = ' '.join(option_text(name, value) for name, value in differ.items())
    return f'Options   {text or "all at their defaults"}'


def log_options(options: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Log the options that differ from their defaults: those of the digits recipe where it applies, then the others."""
    if recipe:
        _logger.info('No data named: using the bundled handwritten digits and the recipe digits: '
                     + ', '.join(f'{name}={value}' for name, value in recipe.items()))
    _logger.info(options_line(options, recipe))


def library_versions() -> Dict[str, str]:
    """Return the versions of Python and of the libraries that a run's numbers depend on."""
    versions = dict(python=platform.python_version())
    for name in ('timm_sscl', 'torch', 'torchvision', 'timm', 'accelerate', 'numpy'):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from its source folder
            versions[name] = getattr(sys.modules.get(name), '__version__', 'not installed')
    return versions


def run_command(script: str, argv: Optional[Sequence[str]]) -> str:
    """Return the command that started this run.

    Args:
        script: File of the running script.
        argv: Its arguments; None takes sys.argv's.
    """
    return shlex.join([*launcher(), os.path.relpath(script), *map(str, sys.argv[1:] if argv is None else argv)])
