"""Describe what is registered by name, and its options, for the end of `train.py --help`."""
import dataclasses
import inspect
import textwrap
from typing import Any, Iterator, List, Tuple

from timm_sscl.conversion import list_threshold_rules, list_variants
from timm_sscl.conversion.scales.gains import RMS
from timm_sscl.conversion.variants.registry import create_variant
from timm_sscl.data.registry import ARGUMENTS, TIMM_ARGUMENTS, dataset_entry, list_datasets
from timm_sscl.neurons import list_neurons, list_surrogates
from timm_sscl.neurons.registry import neuron_class
from timm_sscl.neurons.surrogate import resolve_surrogate

from .loss_options import describe_losses

__all__ = ['describe_registered']

_Option = Tuple[str, Any, str]  # name, default, help
_WITH_FLAGS = 'surrogate', 'surrogate_kwargs'  # options of neurons that are options of the script themselves
_SET_BY_TRAINING = 'progress',


def describe_registered() -> str:
    """Return a text with all that is registered (losses, neurons, surrogates, norms, residuals, threshold rules, data
    sets) and its options.
    """
    sections = [
        describe_losses(),
        _section('neurons', 'neuron', [(name, list(_knobs(neuron_class(name).Settings))) for name in list_neurons()]),
        _section('surrogates', 'surrogate', [(name, list(_parameters(resolve_surrogate(name), 2)))
                                             for name in list_surrogates()])]
    for kind in ('norm', 'residual'):
        settings = [(name, type(create_variant(kind, name)).Settings) for name in list_variants(kind)]
        sections.append(_section(f'{kind}s', kind, [(name, list(_knobs(cls))) for name, cls in settings]))
    rules = ', '.join([RMS, *list_threshold_rules()])
    sections.append(f'threshold rules (--threshold-rule NAME):\n  {rules}')
    sections.append(_section('data sets', 'dataset', [(name, list(_parameters(dataset_entry(name), 0)))
                                                      for name in list_datasets()]))
    return '\n\n'.join(sections)


def _section(title: str, option: str, entries: List[Tuple[str, List[_Option]]]) -> str:
    lines = [f'{title} (--{option} NAME) and their options (--{option}-kwargs OPTION=VALUE ...):']
    for name, options in entries:
        lines.append(f'  {name}')
        for key, default, text in options:
            lines.append(f'    {key}={"" if default is inspect.Parameter.empty else default}')
            lines += textwrap.wrap(text, 96, initial_indent=' ' * 8, subsequent_indent=' ' * 8)
    return '\n'.join(lines)


def _knobs(settings: type) -> Iterator[_Option]:
    for field in dataclasses.fields(settings):
        if field.name not in _WITH_FLAGS:
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            yield field.name, default, field.metadata.get('help', '')


def _parameters(function: Any, skipped: int) -> Iterator[_Option]:
    """Yield the parameters of a function or a constructor after the first ones, except those that the script sets."""
    for parameter in list(inspect.signature(function).parameters.values())[skipped:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.name not in (*ARGUMENTS, *TIMM_ARGUMENTS, *_SET_BY_TRAINING):
            yield parameter.name, parameter.default, ''
