"""What a registered loss declares: its needs, and its options with types, defaults and help texts."""
import logging
from functools import partial
from typing import List, Literal, Optional, Sequence, Union

import pytest
import torch
import torch.nn as nn

from timm_sscl import create_loss, register_loss
from timm_sscl.losses import TrainStep, list_losses, loss_spec


def _step(logits):
    return TrainStep(torch.zeros(logits.shape[1], 3, 8, 8), torch.zeros(logits.shape[1], dtype=torch.long), logits,
                     nn.Linear(2, 2))


class Demo(nn.Module):
    """A loss with an option of every kind.

    Args:
        rate: Rate
            of it.
        count: Number.
        on: Whether.
        mode: Which of three.
        band: A rate, or two.
        cap: Upper end.
        word: A name: of something.

    Raises:
        ValueError: Never.
    """

    def __init__(
            self,
            rate: float = 0.5,
            count: int = 3,
            on: bool = False,
            mode: Literal['a', 'b', 2] = 'a',
            band: Union[float, Sequence[float]] = (0.1, 0.2),
            cap: Optional[float] = None,
            word: str = 'x',
            powers: List[int] = (1, 2),
            plain=4.,
    ):
        super().__init__()
        self.values = dict(rate=rate, count=count, on=on, mode=mode, band=band, cap=cap, word=word, powers=powers)

    def forward(self, step):
        return step.logits.mean()


def _demo():
    register_loss('test_demo')(Demo)
    return loss_spec('test_demo').options


def test_options_are_read_from_signature_and_docstring():
    options = _demo()
    assert list(options) == ['rate', 'count', 'on', 'mode', 'band', 'cap', 'word', 'powers', 'plain']
    assert {name: option.default for name, option in options.items()} == dict(
        rate=0.5, count=3, on=False, mode='a', band=(0.1, 0.2), cap=None, word='x', powers=(1, 2), plain=4.)
    assert options['rate'].help == 'Rate of it.' and options['word'].help == 'A name: of something.'
    assert options['powers'].help == '' and options['plain'].type is float
    assert options['mode'].choices == ('a', 'b', 2)


@pytest.mark.parametrize('name, text, value', [
    ('rate', '1e-3', 1e-3), ('rate', '2', 2.), ('count', '7', 7), ('count', '1e3', 1000), ('on', 'true', True),
    ('on', '0', False), ('on', 'No', False), ('mode', 'b', 'b'), ('mode', '2', 2), ('band', '0.3', 0.3),
    ('band', '0.1,0.4', (0.1, 0.4)), ('band', '(0.1, 0.4)', (0.1, 0.4)), ('cap', 'none', None), ('cap', '4', 4.),
    ('word', '12', '12'), ('word', 'true', 'true'), ('powers', '3', (3,)), ('powers', '1, 2,3', (1, 2, 3)),
    # as YAML reads them
    ('rate', 1, 1.), ('band', [0.1, 0.4], (0.1, 0.4)), ('on', True, True), ('cap', None, None), ('count', 5., 5)])
def test_texts_are_read_by_the_type(name, text, value):
    parsed = _demo()[name].parse(text, 'demo')
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize('name, text, words', [
    ('rate', 'much', 'demo.rate=much: must be a number'), ('count', '1.5', 'demo.count=1.5: must be a whole number'),
    ('count', 'nan', 'a whole number'), ('count', 'inf', 'a whole number'), ('rate', True, 'a number'),
    ('on', 'maybe', 'demo.on=maybe: must be true or false'), ('mode', 'c', 'must be one of a, b, 2'),
    ('band', '0.1,x', 'a number or a number, or several with commas'), ('cap', 'x', 'a number or none'),
    ('powers', '1,2.5', 'a whole number, or several with commas')])
def test_other_texts_raise(name, text, words):
    with pytest.raises(ValueError, match=words):
        _demo()[name].parse(text, 'demo')


def test_unknown_option_is_an_error_with_a_hint():
    _demo()
    with pytest.raises(ValueError, match="loss 'test_demo' has no option 'rat'; it has rate, .*Did you mean 'rate'"):
        create_loss('test_demo', rat=1.)
    assert create_loss('test_demo', rate=1.).values['rate'] == 1.


def test_function_with_options():
    @register_loss('test_power')
    def power(step, exponent: float = 2., scale=1):
        """Powers of the logits.

        Args:
            step: The step.
            exponent: Power.
        """
        return scale * step.logits.abs().pow(exponent).mean()

    logits = torch.tensor([[[1., -2.]]])
    options = loss_spec('test_power').options
    assert list(options) == ['exponent', 'scale'] and options['exponent'].help == 'Power.'
    assert create_loss('test_power')(_step(logits)).item() == 2.5
    assert create_loss('test_power', exponent=3., scale=2)(_step(logits)).item() == 9.
    with pytest.raises(ValueError, match="no option 'exponnent'"):
        create_loss('test_power', exponnent=3.)


def test_what_a_partial_binds_is_no_option():
    register_loss('test_demo_b')(partial(Demo, mode='b', count=1))
    options = loss_spec('test_demo_b').options
    assert 'mode' not in options and 'count' not in options and 'rate' in options
    assert create_loss('test_demo_b', rate=2.).values['mode'] == 'b'
    with pytest.raises(ValueError, match='no option'):
        create_loss('test_demo_b', mode='a')
    assert 'weighting' in loss_spec('sscl').options and 'weighting' not in loss_spec('contrastive').options


def test_options_of_the_base_class():
    class More(Demo):
        """More.

        Args:
            extra: Another.
        """

        def __init__(self, extra: float = 1., **options):
            super().__init__(**options)
            self.extra = extra

    class Anything(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

    register_loss('test_more')(More)
    options = loss_spec('test_more').options
    assert list(options)[:2] == ['extra', 'rate'] and options['rate'].help == 'Rate of it.'
    assert create_loss('test_more', extra=2., rate=3.).values['rate'] == 3.
    with pytest.raises(ValueError, match="no option 'nothing'"):
        create_loss('test_more', nothing=1)
    register_loss('test_anything')(Anything)
    assert create_loss('test_anything', whatever=3).options == dict(whatever=3)
    assert loss_spec('test_anything').option('whatever', 'it').parse('3', 'it') == 3


def test_option_without_a_default():
    @register_loss('test_required')
    class Required(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.width = width

    assert list(loss_spec('test_required').options) == ['width']
    assert create_loss('test_required', width=3).width == 3
    with pytest.raises(ValueError, match="loss 'test_required'.*width"):
        create_loss('test_required')


def test_what_is_registered_stays_as_it_is():
    before = set(vars(Demo))

    def plain(step):
        return step.logits.mean()

    register_loss('test_one', needs_teacher=True)(plain)
    register_loss('test_two', needs_features=True, needs_shapes=True, global_batch=True)(plain)
    register_loss('test_cls', needs_firing_rates=True)(Demo)
    assert not vars(plain) and set(vars(Demo)) == before
    one, two = loss_spec('test_one'), loss_spec('test_two')
    assert (one.needs_teacher, one.needs_features, one.compares_classes, one.global_batch) == (True, False, True, False)
    assert (two.needs_teacher, two.needs_features, two.needs_shapes, two.compares_classes) == (True, True, True, False)
    assert loss_spec('test_cls').needs_firing_rates and not loss_spec('test_cls').needs_teacher
    with pytest.raises(AttributeError):
        one.needs_teacher = False
    with pytest.raises(TypeError):
        loss_spec('kd').options['more'] = 1


def test_loss_defined_again_replaces_the_first(caplog):
    def define(factor, **needs):
        @register_loss('test_again', **needs)
        def again(step, scale: float = factor):
            return scale * step.logits.mean()

    define(1.)
    with caplog.at_level(logging.WARNING):
        define(3., needs_teacher=True)
    assert 'test_again' in caplog.text and 'replaces' in caplog.text
    assert create_loss('test_again')(_step(torch.ones(1, 2, 3))).item() == 3.
    assert loss_spec('test_again').needs_teacher and loss_spec('test_again').options['scale'].default == 3.


@pytest.mark.parametrize('name', list_losses())
def test_every_option_of_a_built_in_loss_has_a_help_text_and_a_type(name):
    for option in loss_spec(name).options.values():
        assert option.help and option.help[0].isupper(), option
        if option.default is not None:
            given = ','.join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)
            assert option.parse(given, name) == option.default
