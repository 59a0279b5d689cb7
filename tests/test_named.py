"""Names that register_* refuses, since the command line or SSCLTask could not use them."""
import pytest
import torch.nn as nn

import timm_sscl
from timm_sscl import (
    SSCLTask, SpikingNeuron, Variant, register_dataset, register_loss, register_neuron, register_surrogate,
    register_variant, unregister_loss)
from timm_sscl.losses import loss_spec
from timm_sscl.neurons import create_neuron
from timm_sscl.training.student import check_model_name


class _Neuron(SpikingNeuron):
    pass


class _Variant(Variant):
    pass


REGISTER = {
    'loss': lambda name: register_loss(name)(lambda step: step.logits.mean()),
    'neuron': lambda name: register_neuron(name)(_Neuron),
    'surrogate': lambda name: register_surrogate(name)(lambda u, v_threshold: u),
    'norm': lambda name: register_variant('norm', name)(_Variant),
    'residual': lambda name: register_variant('residual', name)(_Variant),
    'data set': lambda name: register_dataset(name)(lambda split: [0]),
}


def _registered():
    kinds = 'losses', 'neurons', 'surrogates', 'variants', 'datasets'
    return [getattr(timm_sscl, f'list_{kind}')() for kind in kinds]


@pytest.mark.parametrize('kind', REGISTER)
@pytest.mark.parametrize('name, words', [
    ('a=b', "contains '='"), ('a,b', "contains ','"), ('a=b,c', "contains '=' and ','"), ('-a', "begins with '-'"),
    ('', 'must be a text'), (' a', 'without spaces at its ends'), ('a\n', 'without spaces'), (3, 'must be a text')])
def test_names_that_the_command_line_cannot_express(kind, name, words):
    before = _registered()
    with pytest.raises(ValueError, match=words) as error:
        REGISTER[kind](name)
    assert kind in str(error.value) and repr(name) in str(error.value) and _registered() == before


@pytest.mark.parametrize('name', ['a.b', 'output', 'task', 'keys', 'training'])
def test_names_that_the_task_cannot_take(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        REGISTER['loss'](name)
    assert name not in timm_sscl.list_losses()


@pytest.mark.parametrize('name', ['a_b', 'a-b', 'a/b', 'Größe', '2', 'loss'])
def test_other_names_work(name):
    REGISTER['loss'](name)
    try:
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        assert list(SSCLTask(net, None, {name: 1.}, verbose=False).weights) == [name]
    finally:
        unregister_loss(name)


def test_an_option_of_a_function_has_a_default():
    with pytest.raises(ValueError, match=r"register_loss\('test_p'\): the option p has no default"):
        register_loss('test_p')(lambda step, p, q=1.: step.logits.mean())
    with pytest.raises(ValueError, match='the option names has no default'):  # only a class is given the taps
        register_loss('test_p', needs_features=True)(lambda step, names: step.logits.mean())
    assert 'test_p' not in timm_sscl.list_losses()
    register_loss('test_p')(lambda step, *, p=1., **more: step.logits.mean())
    assert list(loss_spec('test_p').options) == ['p']
    unregister_loss('test_p')


@pytest.mark.parametrize('name, meant', [
    ('lfi', 'lif'), ('mfl', 'mlf'), ('kilf', 'klif'), ('LIF', 'lif'), ('PsN', 'psn')])
def test_neighbours_that_changed_places_are_one_edit(name, meant):
    """Of the names that share as many letters with it, an error names the closest, whatever its capitals."""
    with pytest.raises(ValueError, match=rf"unknown neuron '{name}'.*Did you mean '{meant}'\?"):
        create_neuron(name, 2)


def test_a_common_prefix_makes_no_names_similar():
    with pytest.raises(ValueError, match="unknown model 'spiking_nope'.$"):
        check_model_name('spiking_nope', '--model')
    with pytest.raises(ValueError, match="unknown model 'spiking_resnte18'. Did you mean spiking_resnet18,"):
        check_model_name('spiking_resnte18', '--model')
    with pytest.raises(ValueError, match="unknown model 'resnte18'. Did you mean resnet18,"):
        check_model_name('resnte18', '--model')
