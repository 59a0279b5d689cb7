"""Mistakes in a user's file end the script with one line that says where and what."""
import sys

import pytest

from files import write_images
from runs import IMAGES, fails
from timm_sscl.data.samples import UnreadableSample, WrongLabel, WrongSample
from timm_sscl.distillation.loss_terms import WrongLoss
from timm_sscl.training.exits import report_resume_command

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
