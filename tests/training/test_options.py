import argparse
import re

import pytest
import yaml

from timm_sscl import LIF
from timm_sscl.conversion.settings import SpikingSettings
from timm_sscl.losses import loss_spec
from timm_sscl.training.datasets import create_datasets
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.command_line.loss_flags import LOSS_FLAGS
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.command_line.option_groups import create_parser
from timm_sscl.training.command_line.recipes import list_recipes, load_recipe
from timm_sscl.training.runs.run_summary import options_line

# names and defaults read off timm's own parser (2026-08), where this script keeps them
TIMM_DEFAULTS = dict(
    train_split='train', val_split='validation', class_map='', pretrained=False, initial_checkpoint='', resume='',
    no_resume_opt=False, gp=None, img_size=None, in_chans=None, input_size=None, crop_pct=None, mean=None, std=None,
    interpolation='', batch_size=128, validation_batch_size=None, channels_last=False, grad_accum_steps=1,
    grad_checkpointing=False, fast_norm=False, model_kwargs={}, head_init_scale=None, head_init_bias=None,
    torchcompile=None, torchcompile_mode=None, amp=False, amp_dtype='float16', model_dtype=None, no_ddp_bb=False,
    synchronize_step=False, opt='sgd', opt_eps=None, opt_betas=None, momentum=0.9, weight_decay=2e-5, clip_grad=None,
    clip_mode='norm', layer_decay=None, layer_decay_min_scale=0, layer_decay_no_opt_scale=None, opt_kwargs={},
    sched='cosine', sched_on_updates=False, lr=None, lr_base=0.1, lr_base_size=256, lr_base_scale='', lr_noise=None,
    lr_noise_pct=0.67, lr_noise_std=1.0, lr_cycle_mul=1.0, lr_cycle_decay=0.5, lr_cycle_limit=1, lr_k_decay=1.0,
    warmup_lr=1e-5, min_lr=0, epochs=300, epoch_repeats=0., start_epoch=None, decay_milestones=[90, 180, 270],
    decay_epochs=90, warmup_epochs=5, warmup_prefix=False, cooldown_epochs=0, patience_epochs=10, decay_rate=0.1,
    no_aug=False, train_crop_mode=None, scale=[0.08, 1.0], ratio=[0.75, 4 / 3], hflip=0.5, vflip=0.0, color_jitter=0.4,
    color_jitter_prob=None, grayscale_prob=None, gaussian_blur_prob=None, aa=None, bce_loss=False, bce_sum=False,
    bce_target_thresh=None, bce_pos_weight=None, reprob=0.0, remode='pixel', recount=1, mixup=0.0,
    cutmix=0.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode='batch', mixup_off_epoch=0,
    smoothing=0.1, train_interpolation='random', drop=0.0, drop_path=None, drop_block=None, bn_momentum=None,
    bn_eps=None,
    sync_bn=False, dist_bn='reduce', model_ema=False, model_ema_force_cpu=False, model_ema_decay=0.9998,
    model_ema_warmup=False, seed=42, worker_seeding='all', log_interval=50, val_interval=1, recovery_interval=0,
    checkpoint_hist=10, workers=4, save_images=False, pin_mem=False, output='', experiment='', eval_metric='top1',
)
DATA = ['--data-dir', 'somewhere']


def test_defaults_are_timms_where_data_is_named():
    args, recipe = parse_args(DATA)
    assert recipe == {} and args.model == 'spiking_resnet18'
    assert {name: getattr(args, name) for name in TIMM_DEFAULTS} == TIMM_DEFAULTS


def test_without_data_the_digits_recipe_fills_in_what_was_not_given(tmp_path):
    args, recipe = parse_args(['--epochs', '3'])
    assert args.dataset == 'digits' and args.epochs == 3 and 'epochs' not in recipe
    assert args.batch_size == recipe['batch_size'] == load_recipe('digits')['batch_size'] != 128
    (tmp_path / 'mine.yaml').write_text('batch-size: 32\n')
    args, recipe = parse_args(['--config', str(tmp_path / 'mine.yaml')])
    assert args.batch_size == 32 and 'batch_size' not in recipe and args.epochs == recipe['epochs']
    args, recipe = parse_args(['--epochs', '300'])  # a default that is given is given
    assert args.epochs == 300


@pytest.mark.parametrize('argv, meant', [
    (['--sscl-temprature=0.2'], r'unrecognized arguments: --sscl-temprature=0.2. Did you mean --sscl-temperature\?$'),
    (['--learning-rate', '0.1'], r'Did you mean --lr\?$'), (['--num_workers', '2'], r'Did you mean --workers\?$'),
    (['--epohcs=3', '--batchsize=4'], r'Did you mean --epochs for epohcs\? Did you mean --batch-size for batchsize\?$'),
    (['--qqqqqq'], 'unrecognized arguments: --qqqqqq$')])
def test_a_misspelt_option_is_answered_with_the_closest(argv, meant):
    with pytest.raises(OptionError, match=meant):
        parse_args([*DATA, *argv])


def test_a_misspelt_option_of_a_file_is_answered_too(tmp_path):
    (tmp_path / 'c.yaml').write_text('learning_rate: 1\n')
    with pytest.raises(OptionError, match="unknown option 'learning_rate'. Did you mean 'lr'"):
        parse_args([*DATA, '--config', str(tmp_path / 'c.yaml')])


@pytest.mark.parametrize('argv, workers', [
    ([], 3), (['--workers', '4'], 4), (['--workers', '8'], 8), (['--workers', '1'], 1), (['--config', 'old.yaml'], 3),
    (['--config', 'many.yaml'], 16)])
def test_workers_that_are_not_given_fit_the_cores(argv, workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'old.yaml').write_text('workers: 4\n')  # a run's file holds the defaults, too
    (tmp_path / 'many.yaml').write_text('workers: 16\n')
    monkeypatch.setattr('timm_sscl.training.loaders.count_cores', lambda: (6, 3))
    args, _ = parse_args(['--dataset', 'digits', '--model', 'spiking_test_resnet', '--train-num-samples', '256', *argv])
    config = dict(input_size=(3, 32, 32), mean=(.5,) * 3, std=(.5,) * 3, interpolation='bicubic', crop_pct=1.)
    loaders = create_loaders(args, create_datasets(args), config, 10)
    assert loaders.train.num_workers == loaders.eval.num_workers == workers


def test_a_run_opens_with_the_options_that_differ():
    args, recipe = parse_args(['--epochs', '3', '--tau', '0.5', '--no-aug'])
    assert options_line(vars(args), recipe) == 'Options   --distill sscl --epochs 3 --no-aug --tau 0.5'
    args, _ = parse_args([*DATA, '--model-kwargs', 'width=8'])
    assert options_line(vars(args), {}) == 'Options   --data-dir somewhere --distill sscl --model-kwargs width=8'
    args, _ = parse_args([*DATA, '--smoothing', '0', '--workers', '0', '--color-jitter', '0'])
    assert options_line(vars(args), {}) == ('Options   --color-jitter 0.0 --data-dir somewhere --distill sscl '
                                            '--smoothing 0.0 --workers 0')


def test_command_line_wins_over_the_config(tmp_path):
    (tmp_path / 'c.yaml').write_text('epochs: 7\nlr: 1e-3\ntau: 0.5\n')  # YAML reads 1e-3 as a string
    args, _ = parse_args([*DATA, '--config', str(tmp_path / 'c.yaml'), '--epochs', '9'])
    assert (args.epochs, args.lr, args.tau) == (9, 1e-3, 0.5)


@pytest.mark.parametrize('argv, losses', [
    ([], {'sscl': 0.1}),
    (['--sscl-weight', '1'], {'sscl': 1.}),
    (['--distill', 'contrastive', '--sscl-weight', '0.3'], {'contrastive': 0.3}),
    (['--distill', 'kd'], {'kd': 1.}),
    (['--kd-model-name', 'resnet34'], {'kd': 1.}),
    (['--kd-model-name', 'resnet34', '--distill-loss-weight', '2'], {'kd': 2.}),
    (['--kd-model-name', 'resnet34', '--distill', 'sscl'], {'sscl': 0.1}),
    (['--distill', 'none'], {}),
    (['--loss', 'sscl=0.5,kd=2'], {'sscl': 0.5, 'kd': 2.}),
    (['--loss', 'sscl=0,kd'], {'kd': 1.}),
])
def test_losses(argv, losses):
    args, _ = parse_args([*DATA, *argv])
    assert args.losses == losses
    if '--kd-model-name' in argv:
        assert args.teacher == 'resnet34'


def test_options_reach_their_loss():
    args, _ = parse_args([
        *DATA, '--loss', 'sscl=1,kd=1', '--sscl-temperature', '0.07', '--sscl-dim', '64', '--sscl-critic',
        'literal', '--kd-temperature', '2', '--sscl-cka-floor', '0.2', '--sscl-cka-momentum', '1'])
    assert args.loss_options == {
        'sscl': dict(dim=64, temperature=0.07, critic='literal', cka_floor=0.2, cka_momentum=1., projection='pooled',
                     weighting='cka', cka_scope='process', queue_size=0),
        'kd': dict(temperature=2.)}


@pytest.mark.parametrize('argv, words', [
    (['--distill', 'kd', '--loss', 'sscl=1'], 'use one'),
    (['--teacher', 'a', '--kd-model-name', 'b'], 'use one'),
    (['--teacher-checkpoint', 'a', '--teacher-pretrained'], 'use one'),
    (['--loss', 'sscl=much'], 'no number'),
    (['--loss', 'sscl=1,kd=1,sscl=2'], "'sscl' stands there twice, with 1 and 2"),
    (['--loss', 'sscl', '--sscl-weight', '0.5'], '--sscl-weight 0.5: .* write --loss sscl=0.5'),
    (['--loss', 'kd=1', '--distill-loss-weight', '3'], '--kd-weight 3.0: .* write --loss kd=3'),
    (['--naflex-loader'], 'NaFlex'),
    (['--kd-distill-type', 'feature'], 'feature'),
    (['--batch-size', 'many'], 'many'),
    (['--threads', '0'], '--threads 0'),
])
def test_errors(argv, words):
    with pytest.raises(OptionError, match=words):
        parse_args([*DATA, *argv])


@pytest.mark.parametrize('argv, unread', [
    (['--distill', 'none', '--sscl-temperature', '0.07', '--teacher', 'resnet34'], ['--sscl-temperature', '--teacher']),
    (['--distill', 'contrastive', '--sscl-weighting', 'cka_mean1'], ['--sscl-weighting']),
    (['--loss', 'sscl=1', '--kd-temperature', '2', '--tet-lambda', '0'], ['--kd-temperature', '--tet-lambda']),
    (['--distill', 'kd', '--sscl-taps', '2', '--kd-temperature', '2'], ['--sscl-taps']),
    (['--loss', 'sscl=1,kd=1', '--kd-temperature', '2', '--sscl-weighting', 'uniform', '--teacher', 'resnet34'], []),
    (['--config', 'digits', '--distill', 'none'], []),
])
def test_options_that_no_loss_reads_are_said(argv, unread, caplog):
    parse_args([*DATA, *argv])
    assert [word.strip(':,') for word in caplog.text.split() if word.startswith('--')] == unread


@pytest.mark.parametrize('name', list_recipes())
def test_every_recipe_parses(name):
    args, _ = parse_args(['--config', name, '--data-dir', 'somewhere'])
    assert all(getattr(args, k) == v or isinstance(v, str) for k, v in load_recipe(name).items())


def test_help_gives_the_neurons_defaults():
    text = ' '.join(create_parser().format_help().split())
    for option, default in (('--tau TAU', LIF.Settings.tau), ('--v-threshold V_THRESHOLD', LIF.Settings.v_threshold),
                            ('--v-reset V_RESET', LIF.Settings.v_reset)):
        assert re.search(rf'{option} [^()]*\(default: {default}\)', text), option
    assert '--detach-reset ' in text and '(False)' not in text and '(None)' not in text and 'None)' not in text


def test_help_says_what_every_option_is_and_one_default():
    parser = create_parser()
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != 'help']
    formatter = parser._get_formatter()
    for action in shown:
        text = formatter._expand_help(action)
        assert len(text.partition(' (default')[0]) > 5 and text.count('(default: ') == 1, f'{action.dest}: {text}'
        said = text.rpartition('(default: ')[2].removesuffix(')')
        if action.default not in (None, {}, ''):
            assert said == str(action.default), action.dest
    # what a description says of an option without a default of its own is what the models and losses then take
    args, _ = parse_args(DATA)
    effective = dict(timesteps=SpikingSettings().timesteps, neuron=SpikingSettings().neuron, distill=args.distill,
                     surrogate=f"the neuron's own; {LIF.Settings.surrogate} for the LIF")
    for name, value in effective.items():
        action, = [action for action in shown if action.dest == name]
        assert re.search(rf'\(default: {re.escape(str(value))}[;)]', formatter._expand_help(action)), name
    for name, flag in LOSS_FLAGS.items():
        action, = [action for action in shown if action.dest == name]
        default = loss_spec(flag.losses[0]).options[flag.option].default
        default = ','.join(map(str, default)) if isinstance(default, tuple) else default
        assert formatter._expand_help(action).endswith(f'(default: {default})')


def test_help_ends_in_three_commands_that_are_right():
    epilog = create_parser().format_help().partition('three commands:')[2]
    commands = re.findall(r'^  accelerate launch train.py ?(.*)$', epilog, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        args, _ = parse_args(command.split())
        assert args.model.startswith('spiking_')


def test_a_runs_arguments_are_read_back_on_resume(tmp_path):
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(dataset='digits', epochs=5, batch_size=16, tau=0.5)))
    args, recipe = parse_args(['--resume', str(tmp_path), '--epochs', '6'])
    assert (args.epochs, args.batch_size, args.tau, args.resume) == (6, 16, 0.5, str(tmp_path)) and recipe == {}


# ---- paths

def _takes_a_path(action):
    if action.type in (int, float):
        return False
    words = str(action.metavar).replace('|', ' ').split()
    return bool({'DIR', 'FILE', 'PATH'} & set(words)) or action.dest.endswith(('_path', '_file', '_checkpoint', '_dir'))


def test_home_is_expanded_in_every_option_that_takes_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'losses.py').write_text('')
    (tmp_path / 'mine.yaml').write_text('epochs: 7\n')
    (tmp_path / 'c.yaml').write_text('base: ~/mine.yaml\nclass_map: ~/m.txt\n')
    given = {
        '--loss-file': 'losses.py', '--plugin': 'losses.py', '--config': 'c.yaml', 'data': 'images', '--resume': 'run'}
    paths = [a for a in create_parser()._actions if _takes_a_path(a)]
    assert {a.dest for a in paths} >= {
        'config', 'data', 'data_dir', 'class_map', 'output', 'resume', 'initial_checkpoint', 'pretrained_path',
        'teacher_checkpoint', 'loss_file'}
    for action in paths:
        option = max(action.option_strings, key=len, default='data')
        name = given.get(option, 'somewhere')
        argv = [*([] if option == 'data' else [option]), f'~/{name}']
        args, _ = parse_args([*argv, *([] if 'data' in action.dest else DATA)])
        dest = 'data_dir' if action.dest == 'data' else action.dest
        value = getattr(args, dest)
        assert (value[0] if isinstance(value, list) else value) == str(tmp_path / name), option
    assert parse_args([*DATA, '--output', '$HOME/~'])[0].output == '$HOME/~'
    args, _ = parse_args(['--config', '~/c.yaml', *DATA])
    assert args.class_map == str(tmp_path / 'm.txt') and args.epochs == 7  # those in a file too


def test_home_is_expanded_in_lists_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'mine.py').write_text('')
    (tmp_path / 'c.yaml').write_text("plugin: ['~/mine.py']\noutput: null\n")
    args = parse_args([*DATA, '--config', '~/c.yaml'])[0]
    assert args.plugin == [str(tmp_path / 'mine.py')] and args.output is None


def test_home_is_expanded_in_folders_that_are_models(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for option in ('--model', '--teacher', '--kd-model-name'):
        args, _ = parse_args([*DATA, option, 'local-dir:~/m'])
        assert (args.model if option == '--model' else args.teacher) == f'local-dir:{tmp_path}/m'
