"""Mistakes in a user's file end the script with one line that says where and what."""
import sys

import pytest

from files import write_images
from runs import IMAGES, fails
from timm_sscl.data.samples import UnreadableSample, WrongLabel, WrongSample
from timm_sscl.distillation.loss_terms import WrongLoss
from timm_sscl.training.exits import report_resume_command
from timm_sscl.training.command_line.options import parse_args

LOSS = '''
from timm_sscl import register_loss

@register_loss('own_vector')
def own_vector(step):
    return step.logits.square().mean(1)
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text) is the options that import a file with this text."""
    monkeypatch.setattr(sys, 'path', list(sys.path))

    def make(text, name='own_mistakes'):
        (tmp_path / f'{name}.py').write_text(text)
        return ['--plugin', str(tmp_path / f'{name}.py')]

    yield make
    for name in [name for name in sys.modules if name.startswith('own_mistakes')]:
        del sys.modules[name]


EVERYTHING = '''
from dataclasses import dataclass
from timm_sscl import (
    SpikingNeuron, Variant, register_dataset, register_loss, register_neuron, register_surrogate, register_variant)
from timm_sscl.conversion import VariantSettings
from timm_sscl.knobs import knob
from timm_sscl.neurons import NeuronSettings

@register_loss('own_loss')
def own_loss(step, power: float = 2.5):
    """Powers.

    Args:
        power: Exponent of it.
    """

@register_neuron('own_neuron')
class OwnNeuron(SpikingNeuron):
    @dataclass(frozen=True)
    class Settings(NeuronSettings):
        leak: float = knob(0.25, 'what leaks')

@register_surrogate('own_surrogate')
def own_surrogate(u, v_threshold, width=0.75, progress=None):
    return u

@register_variant('norm', 'own_norm')
class OwnNorm(Variant):
    @dataclass(frozen=True)
    class Settings(VariantSettings):
        start: float = knob(0.5, 'where it starts')

    def apply(self, model, settings):
        pass

    def remove(self, model):
        pass

@register_dataset('own/set')
def own_set(split, num_samples=None, fill=200):
    return []
'''


@pytest.mark.parametrize('first', [True, False])
def test_help_lists_what_a_plug_in_registers(write, first, capsys):
    plugin = write(EVERYTHING)
    with pytest.raises(SystemExit) as exit_:
        parse_args([*plugin, '--help'] if first else ['-h', *plugin])
    lines = capsys.readouterr().out.splitlines()
    assert exit_.value.code == 0
    for entry in (['  own_loss', '    own_loss.power=2.5', '        Exponent of it.'],
                  ['  own_neuron', '    leak=0.25', '        what leaks'], ['  own_surrogate', '    width=0.75'],
                  ['  own_norm', '    start=0.5', '        where it starts'], ['  own/set', '    fill=200']):
        at = lines.index(entry[0])
        assert lines[at:at + len(entry)] == entry
        assert not lines[at + len(entry):][:1] or not lines[at + len(entry)].startswith('    ')
    assert any(line.startswith('norms (--norm NAME)') for line in lines)


@pytest.mark.parametrize('text, words', [
    ('x = 1\n\ndef f(:\n', "own_mistakes.py, line 3: SyntaxError: "),
    ('x = 1\nif x:\npass\n', "own_mistakes.py, line 3: IndentationError: "),
    ('\nundefined + 1\n', "own_mistakes.py, line 2: NameError: name 'undefined' is not defined"),
    ('import own_that_is_missing\n', 'own_mistakes.py, line 1: ModuleNotFoundError: '),
    ("from timm_sscl import register_loss\n\nregister_loss('a=b')(lambda step: 0)\n",
     "own_mistakes.py, line 3: 'a=b' as the name"),
    ("from timm_sscl import register_loss\n\nregister_loss('a')(max)\n", 'own_mistakes.py, line 3: no signature'),
    ('import own_mistakes_beside\n', 'own_mistakes.py: {folder}/own_mistakes_beside.py, line 1: SyntaxError: '),
])
@pytest.mark.parametrize('help', [[], ['--help']])
def test_mistakes_in_the_file_are_said_in_one_line(write, text, words, help, tmp_path, monkeypatch, capsys):
    write('1 +\n', 'own_mistakes_beside')
    code, line = fails([*write(text), *help], tmp_path, monkeypatch, capsys)
    assert code == 2 and line.startswith(f'error: --plugin {tmp_path}/') and words.format(folder=tmp_path) in line


def test_a_loss_of_the_wrong_shape_ends_a_run_with_a_line(write, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / 'images', classes=2)
    argv = [a for a in IMAGES if a not in ('--distill', 'none')]
    code, line = fails([*argv, *write(LOSS), '--loss', 'own_vector=1', '--neuron-init', 'none'], tmp_path, monkeypatch,
                       capsys)
    assert code == 1 and "loss 'own_vector' returns a tensor of torch.float32 and shape (8,)" in line


@pytest.mark.parametrize('error, resumes', [
    (WrongLabel('has the label 9'), False), (WrongSample('is no pair'), False), (WrongLoss('returns None'), False),
    (UnreadableSample('cannot be read'), True)])
def test_the_command_to_go_on_stands_only_where_it_helps(error, resumes, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        with report_resume_command(__file__, tmp_path):
            raise error
    text = capsys.readouterr().err
    assert exit_.value.code == 1 and text.endswith(f'error: {error}\n') and 'Newest whole checkpoint: none yet' in text
    assert ('--resume' in text) == resumes and ('would fail in the same way' in text) != resumes
