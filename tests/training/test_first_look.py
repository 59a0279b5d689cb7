"""train.py says what is wrong with its command line before it imports torch."""
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.optim import list_optimizers

import timm_sscl
from timm_sscl import LIF
from timm_sscl.conversion import list_threshold_rules, list_variants
from timm_sscl.data import list_datasets
from timm_sscl.data.events import FrameSettings
from timm_sscl.dataset_names import TIMM_NAMES
from timm_sscl.losses import list_losses, loss_spec
from timm_sscl.losses.options import REQUIRED
from timm_sscl.neurons import list_neurons, list_surrogates
from timm_sscl.training.errors import OptionError
from timm_sscl.training.command_line import declared
from timm_sscl.training.command_line.first_look import check_at_sight
from timm_sscl.training.command_line.option_sources import read_command_line
from timm_sscl.training.command_line.loss_flags import LOSS_FLAGS

TRAIN = Path(timm_sscl.__file__).parent.parent / 'train.py'


# ---- what is read from the source is what the modules declare

@pytest.mark.parametrize('module, name, cls', [
    ('neurons.lif', 'LIF.Settings', LIF.Settings), ('data.events.frames', 'FrameSettings', FrameSettings)])
def test_settings_in_the_source_are_those_of_the_class(module, name, cls):
    fields = {field.name: (field.default, field.metadata.get('help', '')) for field in dataclasses.fields(cls)}
    read = declared.settings(module, name)
    assert read and all(fields[name] == (option.default, option.help) for name, option in read.items())


@pytest.mark.parametrize('loss', sorted({flag.losses[0] for flag in LOSS_FLAGS.values()}))
def test_arguments_of_losses_in_the_source_are_their_options(loss):
    read = declared.loss_arguments(loss)
    for name, option in loss_spec(loss).options.items():
        default = declared.REQUIRED if option.default is REQUIRED else option.default
        assert (read[name].default, read[name].choices) == (default, option.choices), name


@pytest.mark.parametrize('folder, call, names', [
    ('neurons', ['register_neuron'], list_neurons), ('neurons', ['register_surrogate'], list_surrogates),
    ('losses', ['register_loss'], list_losses),
    ('conversion', ['register_threshold_rule'], list_threshold_rules),
    ('data', ['register_dataset'], lambda: sorted({*list_datasets()} - {*TIMM_NAMES})),
    ('conversion', ['register_variant', 'norm'], lambda: list_variants('norm')),
    ('conversion', ['register_variant', 'residual'], lambda: list_variants('residual'))])
def test_names_in_the_source_are_those_registered(folder, call, names, pytestconfig):
    read = declared.registered(folder, *call)
    assert set(read) <= set(names())
    if not pytestconfig.getoption('--plugin'):  # which may register more
        assert read == names()


@pytest.mark.parametrize('loss', list_losses())
def test_every_option_of_a_loss_passes(loss):
    for option in loss_spec(loss).options:
        check_at_sight(['--loss-kwargs', f'{loss}.{option}=1'])


def test_what_the_source_does_not_declare_is_an_error():
    for read in (lambda: declared.constant('conversion.from_ann.qcfs', 'NO'),
                 lambda: declared.settings('neurons.lif', 'NO'), lambda: declared.loss_arguments('no')):
        with pytest.raises(LookupError):
            read()


# ---- right command lines pass

def test_every_name_of_timm_occurs_in_its_source():
    """The first look refuses a model or an optimizer whose name is no word in the source."""
    folders = Path(timm.__file__).parent, Path(timm_sscl.__file__).parent
    words = {word for root in folders for file in (root / 'models').glob('*.py')
             for word in re.findall(r'\w+', file.read_text())}
    bases = {name.removeprefix('spiking_') for name in timm.list_models()}  # other tests may have registered some
    models = {name for name in bases if timm.models.is_model(name)
              and timm.models.model_entrypoint(name).__module__.startswith(('timm.', 'timm_sscl.'))}
    assert len(models) > 1000 and models <= words
    factory = (folders[0] / 'optim' / '_optim_factory.py').read_text()
    assert all(f"'{name}'" in factory for name in list_optimizers())


@pytest.mark.parametrize('argv', [
    [], ['--model', 'spiking_vit_tiny_patch16_224.augreg_in21k', '--teacher', 'tf_efficientnet_b0_ap'],
    ['--model', 'resnet20_cifar', '--opt', 'Lookahead_AdamW'], ['--opt', 'bnbadamw8bit'],
    ['--teacher', 'hf-hub:someone/something'],
    ['--neuron', 'plif', '--surrogate', 'atan', '--norm', 'tebn', '--residual', 'ms', '--loss', 'kd=1,contrastive'],
    ['--neuron', 'of_a_plugin', '--loss', 'mine=1', '--model', 'mine', '--plugin', 'a_module'],
    ['--dataset', 'torch/cifar100', '--data-dir', 'nowhere', '--dataset-download'], ['--dataset', 'TORCH/cifar10'],
    ['--threshold-rule', 'spike_norm'], ['--config', 'digits'], ['--dataset', 'tonic/NMNIST', '--data-dir', 'x']])
def test_what_may_be_right_passes(argv):
    check_at_sight(argv)


# ---- wrong ones do not

@pytest.mark.parametrize('argv, words', [
    (['--sscl-temprature', '0.2'], 'Did you mean --sscl-temperature?'),
    (['--config', 'cifar10_resnet19_t3'], "Did you mean 'cifar10_resnet19_t2'?"),
    (['--epochs', 'x'], "invalid int value: 'x'"), (['--lr', '-1'], '--lr -1.0: must be 0 or more'),
    (['--sched', 'cosin'], "Did you mean 'cosine'"), (['--sscl-critic', 'nce'], 'invalid choice'),
    (['--opt', 'adamww'], 'Did you mean adamw'), (['--model', 'spiking_resnt18'], "Did you mean 'spiking_resnet18'?"),
    (['--teacher', 'resnet1'], '--teacher resnet1'), (['--neuron', 'liff'], "Did you mean 'lif'?"),
    (['--neuron', 'lfi'], "Did you mean 'lif'?"),
    (['--surrogate', 'atann'], "Did you mean 'atan'?"), (['--norm', 'tdbnn'], 'bntt, mpbn, tab, tdbn, tebn'),
    (['--residual', 'sow'], 'ds, ms, sew'), (['--threshold-rule', 'rmss'], "Did you mean 'rms'?"),
    (['--loss-kwargs', 'sscl.temprature=1'], "loss 'sscl' has no option 'temprature'. Did you mean 'temperature'?"),
    (['--loss-kwargs', 'scsl.dim=8'], '--loss-kwargs scsl: is not registered'),
    (['--loss-kwargs', 'scsl.dim=8'], "Did you mean 'sscl'?"),
    (['--loss', 'sscl=1,kdd=2'], '--loss kdd'), (['--loss', 'kd=x'], "the weight in 'kd=x' is no number"),
    (['--dataset', 'digts'], "did you mean 'digits'?"),
    (['--dataset', 'cifar10'], "did you mean 'torch/cifar10'?"), (['--data-dir', 'nowhere'], '--data-dir nowhere'),
    (['--teacher-checkpoint', 'no.pth'], '--teacher-checkpoint no.pth'), (['--resume', 'no'], '--resume no'),
    (['--eval-only'], '--eval-only: no weights'),
    (['--train-split', 'trian'], "--train-split trian: 'digits' has no split 'trian'. Did you mean 'train'?"),
    (['--dataset', 'torch/cifar10', '--val-split', 'vaildation'], "Did you mean 'validation'?"),
    (['--event-frames', 'time', '--event-size', '8'], '--event-frames time, --event-size 8: goes with event data'),
    (['--loss', 'sscl=0.1', '--sscl-weight', '0.2'], 'write --loss sscl=0.2'),
    (['--eval-only', '--pretrained', '--deploy', '--weight-bits', '8', '8'], '--weight-bits 8 8: a number stands'),
    (['--eval-only', '--pretrained', '--eval-timesteps', '2', '4', '2'], '--eval-timesteps 2 4 2: a number stands'),
    (['--v-reset', 'sotf'], "'sotf' is neither a number nor 'soft'"),
    (['--seeds', '1', '1'], '1 stands there twice'), (['--torchscript'], 'not supported')])
def test_what_is_wrong_is_refused(argv, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        check_at_sight(argv)


def test_splits_of_a_folder(tmp_path):
    for name in ('training', 'eval', 'parts/a'):
        (tmp_path / name).mkdir(parents=True)
    right = ['--data-dir', str(tmp_path)]
    check_at_sight(right)  # timm takes training/ for train, eval/ for validation
    check_at_sight([*right, '--train-split', 'parts/a'])
    with pytest.raises(OptionError, match="trainnig: .* has no split 'trainnig'. Did you mean 'training'?"):
        check_at_sight([*right, '--train-split', 'trainnig'])
    (tmp_path / 'eval').rmdir()
    with pytest.raises(OptionError, match="--val-split validation: .* has no split 'validation'.* one sub-folder per"):
        check_at_sight(right)


def test_no_name_is_suggested_for_the_sake_of_its_prefix():
    with pytest.raises(OptionError) as error:
        check_at_sight(['--model', 'spiking_nope'])
    assert '--model spiking_nope: is not registered' in str(error.value) and 'Did you mean' not in str(error.value)


def test_the_recipe_that_was_meant_stands_before_the_list():
    with pytest.raises(OptionError, match="unknown recipe 'digts'. Did you mean 'digits'. Give a YAML file or one of"):
        check_at_sight(['--config', 'digts'])


@pytest.mark.parametrize('word', ['soft', 'none', 'None'])
def test_words_for_the_soft_reset(word):
    assert read_command_line(['--v-reset', word]).args.v_reset == 'soft'
    assert read_command_line(['--v-reset', '0.1']).args.v_reset == .1


def test_an_error_comes_before_torch_is_imported():
    command = [sys.executable, '-X', 'importtime', str(TRAIN), '--epohcs', '3']
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = re.findall(r'^import time:.*\| +(\S+)$', result.stderr, re.MULTILINE)
    error, = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert result.returncode == 2 and error.endswith('Did you mean --epochs?')
    assert 'timm_sscl.training.command_line.option_sources' in imported
    assert not {'torch', 'timm', 'accelerate', 'numpy', 'timm_sscl.losses'} & set(imported)
