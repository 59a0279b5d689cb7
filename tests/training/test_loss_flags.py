"""Options of losses on the command line: --loss-kwargs, the flags that stand for some, and files of options."""
import pytest
import yaml

from timm_sscl.losses import loss_spec
from timm_sscl.training.command_line.loss_flags import LOSS_FLAGS
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.saving.resume import options_as_yaml

DATA = ['--data-dir', 'images']
PLUGIN = '''
import torch.nn as nn
from timm_sscl import register_loss


@register_loss('test_user_loss')
class UserLoss(nn.Module):
    def __init__(self, scale: float = 1., steps: int = 2):
        super().__init__()
        self.scale, self.steps = scale, steps

    def forward(self, step):
        return self.scale * step.logits.square().mean()
'''
# a value of every flag that is not its default, as words, and as the loss takes it
VALUES = {
    'sscl_temperature': ('0.07', 0.07), 'sscl_dim': ('64', 64), 'sscl_critic': ('literal', 'literal'),
    'sscl_weighting': ('uniform', 'uniform'), 'sscl_projection': ('flattened', 'flattened'), 'sscl_queue': ('16', 16),
    'sscl_cka_floor': ('0.2', 0.2), 'sscl_cka_momentum': ('1', 1.), 'sscl_cka_scope': ('global', 'global'),
    'kd_temperature': ('2', 2.), 'kd_step_temperature': ('2', 2.), 'tet_lambda': ('0', 0.),
    'firing_rate_target': ('0.1 0.2', (0.1, 0.2)),
}


def _options(*argv):
    return parse_args([*DATA, *argv])[0]


def _resume(tmp_path, args, *argv):
    (tmp_path / 'args.yaml').write_text(args if isinstance(args, str) else options_as_yaml(args))
    return parse_args(['--resume', str(tmp_path), *argv])[0]


def test_options_by_name():
    args = _options('--loss', 'sscl=1,tet=1', '--loss-kwargs', 'tet.mse_share=0.1', 'sscl.critic=normalized',
                    'sscl.dim=32', '--loss-kwargs', 'sscl.queue_size=8')
    assert args.loss_options['tet'] == dict(mse_share=0.1, smoothing=0.1)
    sscl = args.loss_options['sscl']
    assert (sscl['critic'], sscl['dim'], sscl['queue_size'], sscl['temperature']) == ('normalized', 32, 8, 0.2)
    assert type(sscl['dim']) is int


def test_every_flag_has_a_value_here():
    assert set(VALUES) == set(LOSS_FLAGS)


@pytest.mark.parametrize('name', LOSS_FLAGS)
def test_flag_and_name_are_one_option(name):
    flag, (text, value) = LOSS_FLAGS[name], VALUES[name]
    losses = ['--loss', ','.join(flag.losses)]
    by_flag = _options(*losses, f'--{name.replace("_", "-")}', *text.split())
    pairs = [f'{loss}.{flag.option}={text.replace(" ", ",")}' for loss in flag.losses]
    by_name = _options(*losses, '--loss-kwargs', *pairs)
    for loss in flag.losses:
        given, default = by_flag.loss_options[loss][flag.option], loss_spec(loss).options[flag.option].default
        assert by_name.loss_options[loss][flag.option] == value != default
        assert (tuple(given) if isinstance(given, list) else given) == value
    both = _options(*losses, f'--{name.replace("_", "-")}', *text.split(), '--loss-kwargs', *pairs)
    assert both.loss_options == by_flag.loss_options and both.loss_kwargs == {}


@pytest.mark.parametrize('argv, words', [
    (['--sscl-temperature', '0.1', '--loss-kwargs', 'sscl.temperature=0.2'],
     '--sscl-temperature 0.1 and --loss-kwargs sscl.temperature=0.2 say different things'),
    (['--loss', 'sscl,contrastive', '--sscl-dim', '8', '--loss-kwargs', 'contrastive.dim=9'],
     '--sscl-dim 8 and --loss-kwargs contrastive.dim=9'),
    (['--loss-kwargs', 'scsl.temperature=1'], "scsl.temperature=1: unknown loss 'scsl'.*Did you mean 'sscl'"),
    (['--loss-kwargs', 'sscl.temprature=1'], "loss 'sscl' has no option 'temprature'.*Did you mean 'temperature'"),
    (['--loss-kwargs', 'contrastive.weighting=cka'], "loss 'contrastive' has no option 'weighting'"),
    (['--loss-kwargs', 'sscl.temperature=warm'], 'sscl.temperature=warm: must be a number'),
    (['--loss-kwargs', 'sscl.critic=nce'], 'sscl.critic=nce: must be one of infonce, normalized, literal'),
    (['--loss-kwargs', 'sscl.dim=1.5'], 'must be a whole number'),
    (['--loss-kwargs', 'sscl.dim=0'], "loss 'sscl': dim=0"),
    (['--loss-kwargs', 'temperature=1'], 'takes NAME.OPTION=VALUE'),
    (['--loss-kwargs', 'sscl.temperature'], 'takes NAME.OPTION=VALUE'),
    (['--loss-kwargs', 'sscl.dim=1', 'sscl.dim=2'], "'sscl.dim' stands there twice, with 1 and 2"),
    (['--loss-kwargs', 'sscl.dim=1', '--loss-kwargs', 'sscl.dim=2'], "'sscl.dim' stands there twice"),
    (['--batch-size', '2', '--loss-kwargs', 'sscl.weighting=cka_mean1'], 'too small for CKA weights'),
])
def test_errors(argv, words):
    with pytest.raises(OptionError, match=words):
        _options(*argv)


def test_weightings():
    args = _options('--loss-kwargs', 'sscl.weighting=fixed', 'sscl.layer_weights=1,2,3,2,1')
    assert args.loss_options['sscl']['layer_weights'] == (1., 2., 3., 2., 1.)
    assert _options('--sscl-weighting', 'shuffled').loss_options['sscl']['weighting'] == 'shuffled'
    with pytest.raises(OptionError, match="layer_weights=None: go with weighting='fixed'"):
        _options('--sscl-weighting', 'fixed')


def test_option_of_a_loss_that_does_not_run_is_said(caplog):
    args = _options('--loss-kwargs', 'kd.temperature=2', 'sscl.temperature=0.1')
    assert '--loss-kwargs kd.temperature: no loss of this run reads it' in caplog.text
    assert list(args.loss_options) == ['sscl']


def test_file_of_options(tmp_path):
    (tmp_path / 'c.yaml').write_text('loss: sscl=1,kd=1\nsscl_dim: 16\nloss_kwargs:\n  sscl.temperature: 0.07\n'
                                     '  kd.temperature: 1e1\n')
    args = _options('--config', str(tmp_path / 'c.yaml'))
    assert (args.loss_options['sscl']['dim'], args.loss_options['sscl']['temperature']) == (16, 0.07)
    assert args.loss_options['kd'] == dict(temperature=10.)
    # the command line wins, by either name, option by option
    args = _options('--config', str(tmp_path / 'c.yaml'), '--sscl-temperature', '0.5', '--loss-kwargs', 'sscl.dim=8')
    assert (args.loss_options['sscl']['dim'], args.loss_options['sscl']['temperature']) == (8, 0.5)
    assert args.loss_options['kd'] == dict(temperature=10.)
    (tmp_path / 'c.yaml').write_text('sscl_dim: 16\nloss_kwargs:\n  sscl.dim: 8\n')
    with pytest.raises(OptionError, match=r'--config .*c.yaml: --sscl-dim 16 and --loss-kwargs sscl.dim=8'):
        _options('--config', str(tmp_path / 'c.yaml'))
    (tmp_path / 'c.yaml').write_text('loss_kwargs: sscl.dim=8\n')
    with pytest.raises(OptionError, match='c.yaml: .*loss_kwargs'):
        _options('--config', str(tmp_path / 'c.yaml'))


def test_run_goes_on_with_its_options(tmp_path):
    args = _options('--loss', 'sscl=1,contrastive=1,firing_rate=1', '--sscl-temperature', '0.3', '--loss-kwargs',
                    'sscl.dim=8', 'firing_rate.target=0.1,0.2')
    again = _resume(tmp_path, args)
    assert again.loss_options == args.loss_options and again.losses == args.losses
    # overruled in part: the flag stood for two losses
    changed = _resume(tmp_path, args, '--loss-kwargs', 'sscl.temperature=0.4')
    assert changed.loss_options['sscl']['temperature'] == 0.4 and changed.sscl_temperature is None
    assert changed.loss_options['contrastive']['temperature'] == 0.3
    assert changed.loss_options['sscl']['dim'] == 8
    (tmp_path / 'second').mkdir()
    assert _resume(tmp_path / 'second', changed).loss_options == changed.loss_options


def test_run_of_0_1_0_goes_on_with_its_options(tmp_path):
    """Version 0.1.0 wrote every flag, given or not."""
    written = dict(
        dataset='digits', loss='sscl=0.1,kd=1', sscl_temperature=0.07, sscl_dim=128, sscl_critic='literal',
        sscl_weighting='cka', sscl_projection='pooled', sscl_queue=0, sscl_cka_floor=0.1, sscl_cka_momentum=0.1,
        sscl_cka_scope='process', kd_temperature=2., kd_step_temperature=3., tet_lambda=0.05,
        firing_rate_target=[0.05, 0.25])
    args = _resume(tmp_path, yaml.safe_dump(written))
    assert (args.loss_options['sscl']['temperature'], args.loss_options['sscl']['critic']) == (0.07, 'literal')
    assert args.loss_options['kd'] == dict(temperature=2.)
    args = _resume(tmp_path, yaml.safe_dump(written), '--loss-kwargs', 'kd.temperature=5')
    assert args.loss_options['kd'] == dict(temperature=5.)


def test_plugins_loss_has_options(tmp_path):
    (tmp_path / 'user_loss.py').write_text(PLUGIN)
    plugin = ['--plugin', str(tmp_path / 'user_loss.py'), '--loss', 'test_user_loss=1']
    args = _options(*plugin, '--loss-kwargs', 'test_user_loss.scale=3')
    assert args.loss_options == {'test_user_loss': dict(scale=3., steps=2)}


def test_help_lists_losses_and_options(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--help'])
    text = capsys.readouterr().out
    assert 'tet.mse_share=0.05' in text and 'sscl.temperature=0.2' in text and 'same as --loss-kwargs tet.mse' in text
    lines = text.splitlines()
    line = lines.index('    kd.temperature=4.0')
    assert lines[line + 1].strip() == loss_spec('kd').options['temperature'].help
