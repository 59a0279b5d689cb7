"""Values of options: one rule for neurons, surrogates, variants, losses and data sets, in Python and in the script."""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Literal, Optional, Sequence, Tuple, Union

import pytest
import torch

from timm_sscl import (
    SpikingNeuron, Variant, create_loss, register_dataset, register_loss, register_neuron, register_surrogate,
    register_variant)
from timm_sscl.conversion import VariantSettings
from timm_sscl.conversion.settings import SpikingSettings
from timm_sscl.data import create_dataset
from timm_sscl.knobs import build, knob
from timm_sscl.neurons import NeuronSettings, create_neuron

WRONG = [
    ('leak', 'abc', 'a number'), ('leak', math.nan, 'a finite number'), ('leak', 'inf', 'a finite number'),
    ('leak', True, 'a number'), ('leak', None, 'a number'), ('count', 2.5, 'a whole number'),
    ('on', 'maybe', 'true or false'), ('on', 2, 'true or false'), ('mode', 'max', 'one of mean, sum'),
    ('cap', 'x', 'a number or none'), ('sizes', '1,x', 'a whole number, or several with commas'),
    ('pair', (1, 2, 3), '2 values'), ('word', [1], 'a word')]
RIGHT = [
    ('leak', '0.6', .6), ('leak', 1, 1.), ('count', '1e3', 1000), ('count', 2 ** 60 + 1, 2 ** 60 + 1),
    ('on', 'no', False), ('on', 'true', True), ('mode', 'sum', 'sum'), ('cap', 'none', None), ('cap', None, None),
    ('cap', '2', 2.), ('sizes', '1,2', (1, 2)), ('sizes', [3], (3,)), ('pair', '1,x', (1., 'x')), ('word', 12, '12')]


@dataclass(frozen=True)
class Every(NeuronSettings):
    leak: float = knob(.5, 'a float')
    count: int = knob(3, 'an int')
    on: bool = knob(False, 'a bool')
    mode: Literal['mean', 'sum'] = knob('mean', 'a choice')
    cap: Optional[float] = knob(None, 'a float or None')
    sizes: Tuple[int, ...] = knob((1,), 'numbers')
    pair: Tuple[float, str] = knob((1., 'a'), 'a number and a word')
    word: str = knob('a', 'a text')


@dataclass(frozen=True)
class EveryOfVariant(VariantSettings):
    leak: float = knob(.5, 'a float')
    count: int = knob(3, 'an int')
    on: bool = knob(False, 'a bool')
    mode: Literal['mean', 'sum'] = knob('mean', 'a choice')
    cap: Optional[float] = knob(None, 'a float or None')
    sizes: Tuple[int, ...] = knob((1,), 'numbers')
    pair: Tuple[float, str] = knob((1., 'a'), 'a number and a word')
    word: str = knob('a', 'a text')


class Keep(Variant):
    Settings = EveryOfVariant

    def apply(self, model, settings):
        pass

    def remove(self, model):
        pass


class Fire(SpikingNeuron):
    Settings = Every

    @staticmethod
    def step(x, state, constants, t, settings):
        return settings.spike(x, settings.leak), state


def _every(first, leak: float = .5, count: int = 3, on: bool = False, mode: Literal['mean', 'sum'] = 'mean',
           cap: Optional[float] = None, sizes: Sequence[int] = (1,), pair: Tuple[float, str] = (1., 'a'),
           word: str = 'a'):
    return dict(leak=leak, count=count, on=on, mode=mode, cap=cap, sizes=sizes, pair=pair, word=word)


def _neuron(name, value):
    register_neuron('every')(Fire)
    return getattr(create_neuron('every', 2, **{name: value}).settings, name)


def _in_a_model(name, value):
    register_neuron('every')(Fire)
    return dict(SpikingSettings(neuron='every', neuron_kwargs=((name, value),)).neuron_kwargs)[name]


def _variant(name, value):
    register_variant('norm', 'every')(Keep)
    return dict(SpikingSettings(norm='every', norm_kwargs=((name, value),)).norm_kwargs)[name]


def _surrogate(name, value):
    def every(u, v_threshold, leak: float = .5, count: int = 3, on: bool = False,
              mode: Literal['mean', 'sum'] = 'mean', cap: Optional[float] = None, sizes: Sequence[int] = (1,),
              pair: Tuple[float, str] = (1., 'a'), word: str = 'a'):
        return torch.ones_like(u)

    register_surrogate('every')(every)
    return dict(SpikingSettings(surrogate='every', surrogate_kwargs=((name, value),)).surrogate_kwargs)[name]


def _loss(name, value):
    register_loss('every')(_every)
    return create_loss('every', **{name: value})(None)[name]


def _dataset(name, value):
    seen = []

    @register_dataset('every')
    def every(split, leak: float = .5, count: int = 3, on: bool = False, mode: Literal['mean', 'sum'] = 'mean',
              cap: Optional[float] = None, sizes: Sequence[int] = (1,), pair: Tuple[float, str] = (1., 'a'),
              word: str = 'a'):
        seen.append(dict(leak=leak, count=count, on=on, mode=mode, cap=cap, sizes=sizes, pair=pair, word=word))
        return [(0, 0)]

    create_dataset('every', split='train', **{name: value})
    return seen[0][name]


KINDS = [_neuron, _in_a_model, _variant, _surrogate, _loss, _dataset]


@pytest.mark.parametrize('read', KINDS)
def test_values_are_read_by_the_type_that_is_declared(read):
    for name, given, expected in RIGHT:
        value = read(name, given)
        assert value == expected and type(value) is type(expected), name


@pytest.mark.parametrize('read', KINDS)
def test_other_values_are_refused_by_owner_option_and_value(read):
    for name, given, words in WRONG:
        with pytest.raises(ValueError) as error:
            read(name, given)
        text = ','.join(map(str, given)) if isinstance(given, tuple) else str(given)
        assert f'{name}={text.strip("[]") if name == "word" else text}: must be {words}' in str(error.value)
        assert any(owner in str(error.value) for owner in ('every', 'Fire', 'Keep'))


def test_a_plain_default_is_the_type_where_no_annotation_is():
    @register_surrogate('bare')
    def bare(u, v_threshold, width=1, on=False, of=None):
        return torch.ones_like(u)

    def options(**given):
        return dict(SpikingSettings(surrogate='bare', surrogate_kwargs=tuple(given.items())).surrogate_kwargs)

    assert options(width=.5, on='yes', of='2') == dict(width=.5, on=True, of='2')
    with pytest.raises(ValueError, match=r"width=abc: must be a number \(an option of surrogate 'bare'\)"):
        options(width='abc')


def test_objects_and_defaults_are_left_as_they_are():
    @dataclass
    class Options:
        of: Union[str, torch.nn.Module] = knob('a', 'a module or its name')
        to: float = knob(math.inf, 'a bound')
        file: Path = knob(Path('a'), 'a file')
        items: List[Any] = knob((), 'anything')

    module, items = torch.nn.Identity(), (object(),)
    built = build(Options, dict(of=module, to=math.inf, file='b', items=items), 'it')
    assert built.of is module and built.to == math.inf and built.file == Path('b') and built.items == items
    with pytest.raises(ValueError, match=r'to=nan: must be a finite number \(an option of it\)'):
        build(Options, dict(to=math.nan), 'it')


def test_an_option_of_the_script_that_stands_twice(capsys):
    from timm_sscl.training.command_line.options import OptionError, parse_args
    for flag in ('neuron', 'surrogate', 'norm', 'residual', 'dataset', 'model', 'teacher', 'opt'):
        flag = f'--{flag}-kwargs'
        for given in ([flag, 'leak=0.6', 'leak=0.7'], [flag, 'leak=0.6', flag, 'leak=0.7']):
            with pytest.raises(OptionError, match=f"{flag}: 'leak' stands there twice, with 0.6 and 0.7"):
                parse_args(given)
    args, _ = parse_args(['--neuron-kwargs', 'leak=0.6', '--neuron-kwargs', 'top=3', 'leak=0.6'])
    assert args.neuron_kwargs == dict(leak=.6, top=3)
    assert parse_args([])[0].neuron_kwargs == {}
