"""Wrong values of timm's options end in one line that names the option, its value and what would be right."""
import pickle

import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from runs import TINY, run_here, run_of
from timm_sscl.data.posterize import allow_posterize_to_black
from timm_sscl.data.samples import FailedTransform, Samples
from timm_sscl.training.errors import OptionError, blame_options
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.student import create_student


def error_line(args, cwd, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_here([*TINY, '--device', 'cpu', '--output', 'out', *args], cwd, monkeypatch)
    assert exit_.value.code == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert not list(cwd.rglob('*.pth.tar'))  # nothing was trained
    return line


@pytest.mark.parametrize('args, words', [
    (['--opt', 'adamww'], ['--opt adamww', 'Did you mean adamw']),
    (['--opt', 'adamw', '--opt-kwargs', 'nosuch=1'], ['--opt adamw', '--opt-kwargs nosuch=1']),
    (['--opt', 'adamw', '--opt-betas', '0.9'], ['--opt-betas 0.9']),
    (['--sched', 'plateau', '--sched-on-updates'], ['--sched plateau', '--sched-on-updates', 'per epoch']),
    (['--sched', 'wsd'], ['--sched wsd', '--decay-epochs 90']),
    (['--dataset', 'hfds/foo'], ['--dataset hfds/foo', 'datasets']),
    (['--dataset', 'tfds/foo'], ['--dataset tfds/foo', 'tensorflow']),
    (['--aa', 'foo'], ['--aa foo', 'Unknown AA policy']),
    (['--gp', 'foo'], ['Invalid pool type: foo']),
    (['--teacher-kwargs', 'foo=1'], ['--teacher-kwargs foo=1']),
    (['--device-modules', 'no_such_module'], ['--device-modules no_such_module']),
    (['--torchcompile', 'indctor'], ['--torchcompile indctor', "Did you mean 'inductor'"]),
    (['--torchcompile', '--torchcompile-mode', 'fast'], ['--torchcompile-mode fast', 'reduce-overhead']),
])
def test_what_another_library_refuses_names_the_option(args, words, tmp_path, monkeypatch, capsys):
    if 'foo' in args[-1] and args[0] == '--dataset':  # whether or not the package is installed here
        monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
        monkeypatch.setitem(__import__('sys').modules, 'tensorflow', None)
    line = error_line(args, tmp_path, monkeypatch, capsys)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize('args, words', [
    (['--sched', 'cosin'], ['--sched cosin', "Did you mean 'cosine'"]),
    (['--remode', 'foo'], ['--remode foo', 'const, rand, pixel']),
    (['--train-crop-mode', 'foo'], ['rrc, rkrc, rkrr']),
    (['--train-interpolation', 'cubic'], ["'bicubic'"]),
    (['--mixup-mode', 'half'], ['batch, pair, elem']),
    (['--scale', '0.5'], ['--scale 0.5', 'two numbers']),
    (['--ratio', '2', '1'], ['--ratio 2.0 1.0', 'the lower one first']),
    (['--smoothing', '2'], ['--smoothing 2', 'between 0 and 1']),
    (['--lr', 'nan'], ['--lr nan', '0 or more']),
    (['--seed', '-1'], ['--seed -1']),
    (['--layer-decay', '7'], ['--layer-decay 7', 'between 0 and 1']),
    (['--layer-decay-no-opt-scale', '2'], ['--layer-decay-no-opt-scale 2', 'between 0 and 1']),
    (['--lr', 'inf'], ['--lr inf', '0 or more']), (['--decay-rate', '-1'], ['--decay-rate -1', '0 or more']),
    (['--mean', 'nan'], ['--mean nan', 'a finite number']), (['--std', 'inf'], ['--std inf', 'more than 0']),
    (['--lr-k-decay', '0'], ['--lr-k-decay 0', 'more than 0']), (['--cutout', '-8'], ['--cutout -8', '0 or more']),
    (['--std', '0'], ['--std 0', 'more than 0']),
    (['--decay-epochs', '0'], ['--decay-epochs 0', 'more than 0']),
    (['--train-num-samples', '0'], ['--train-num-samples 0', '1 or more']),
    (['--model-kwargs', 'width'], ['--model-kwargs width', 'KEY=VALUE']),
])
def test_numbers_and_names_are_checked_before_anything_is_built(args, words, tmp_path, monkeypatch, capsys):
    line = error_line(args, tmp_path, monkeypatch, capsys)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize('text, words', [
    ('scale: 0.5\n', '--scale 0.5: takes two numbers'), ('hflip: [0.5]\n', '--hflip 0.5: must be a number')])
def test_numbers_of_a_config_are_checked_too(text, words, tmp_path, monkeypatch, capsys):
    (tmp_path / 'c.yaml').write_text(text)
    assert words in error_line(['--config', 'c.yaml'], tmp_path, monkeypatch, capsys)


def test_options_behind_an_error_are_named_and_those_not_given_are_not():
    with pytest.raises(OptionError, match=r"^--lr-noise 0.4 0.9, --sched x: KeyError: 'x'$"):
        with blame_options(dict(lr_noise=[.4, .9], sched='x', opt_kwargs={}, aa=None)):
            {}['x']
    with pytest.raises(OptionError, match='^mine$'):
        with blame_options(dict(sched='x')):
            raise OptionError('mine')


@pytest.mark.parametrize('variable, name', [('FSDP', 'FSDP'), ('DEEPSPEED', 'DeepSpeed')])
def test_sharding_is_refused(variable, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(f'ACCELERATE_USE_{variable}', 'true')
    line = error_line([], tmp_path, monkeypatch, capsys)
    assert f'launched with {name}' in line and 'shards the model' in line


@pytest.mark.parametrize('option', ['--pretrained-path', '--initial-checkpoint', '--teacher-checkpoint'])
@pytest.mark.parametrize('kind, words', [
    ('pickled', ['no weights file', 'state_dict']), ('text', ['no weights file']), ('cut', ["'weights.pth'"]),
    ('folder', ["'weights.pth'", 'folder']), ('gone', ['does not exist']), ('other', ['another model']),
    ('pickle', ['no weights file']), ('tuple', ['holds no weights by name', 'model.state_dict()']),
])
def test_file_without_weights_is_named(option, kind, words, tmp_path, monkeypatch, capsys):
    file, model = tmp_path / 'weights.pth', timm.create_model('test_resnet', num_classes=10)
    if kind == 'pickled':
        torch.save(model, file)
    elif kind == 'text':
        file.write_text('no weights')
    elif kind == 'folder':
        file.mkdir()
    elif kind == 'pickle':
        file.write_bytes(pickle.dumps({'a': 1}))
    elif kind == 'tuple':
        torch.save((torch.ones(2), torch.ones(3)), file)
    elif kind != 'gone':
        torch.save((timm.create_model('test_vit') if kind == 'other' else model).state_dict(), file)
    if kind == 'cut':
        file.write_bytes(file.read_bytes()[:5000])
    line = error_line([option, 'weights.pth'], tmp_path, monkeypatch, capsys)
    for word in [option, *words]:
        assert word in line, line


def test_weights_that_fit_in_part_are_counted(tmp_path, monkeypatch, caplog):
    weights = timm.create_model('test_resnet', num_classes=10).state_dict()
    torch.save({k: v for k, v in weights.items() if not k.startswith('layer1')}, tmp_path / 'weights.pth')
    args = [*TINY, '--num-classes', '10', '--pretrained-path', str(tmp_path / 'weights.pth')]
    create_student(parse_args(args)[0], 10)
    # two convolutions, and the head, which timm makes anew
    assert '4 of ' in caplog.text and 'layer1.0.conv1.weight, layer1.0.conv2.weight, fc.weight, fc.bias' in caplog.text
    caplog.clear()
    torch.save(weights, tmp_path / 'weights.pth')
    create_student(parse_args(args)[0], 10)
    assert '2 of ' in caplog.text and 'such as fc.weight, fc.bias;' in caplog.text


# ---- posterize and other transforms

def test_posterize_takes_every_strength():
    transform = create_transform(32, is_training=True, auto_augment='rand-m9-mstd0.5-inc1')
    allow_posterize_to_black(transform)
    image = Image.new('RGB', (32, 32), (255, 130, 3))
    random_augment = next(t for t in transform.transforms if type(t).__name__ == 'RandAugment')
    op, = [op for op in random_augment.ops if op.name == 'PosterizeIncreasing']
    for bits in range(1, 9):
        assert list(op.aug_fn(image, bits).tobytes()) == list(ImageOps.posterize(image, bits).tobytes())
    assert set(op.aug_fn(image, 0).tobytes()) == {0}  # value & ~255, by Pillow's own definition


@pytest.mark.parametrize('policy', ['v0', 'original', 'rand-m10-inc1', 'augmix-m10', '3a'])
def test_every_policy_of_timm_runs_at_its_strongest(policy):
    transform = create_transform(32, is_training=True, auto_augment=policy)
    allow_posterize_to_black(transform)
    image = Image.effect_noise((40, 40), 50).convert('RGB')
    policies = [t for t in transform.transforms if hasattr(t, 'policy') or hasattr(t, 'ops')]
    for augment in policies:
        for op in getattr(augment, 'ops', None) or sum(augment.policy, []):
            op.prob = 1.
            op(image)
    assert policies or policy == '3a'


class _OneImage(torch.utils.data.Dataset):
    samples = [('image.png', 0)]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Image.new('RGB', (4, 4)), 0


def test_transform_that_fails_names_the_sample_and_the_options():
    samples = Samples(_OneImage(), 1, training=True)
    samples.transform = lambda image: 1 / 0
    with pytest.raises(FailedTransform, match="'image.png' was read, but its transform failed .*--aa"):
        samples[0]


def test_posterizing_policy_trains(tmp_path, monkeypatch):
    run_here([*TINY, '--epochs', '1', '--distill', 'none', '--output', 'out', '--aa', 'rand-m10-n8-inc1'], tmp_path,
             monkeypatch)
    assert (run_of(tmp_path / 'out') / 'last.pth.tar').is_file()
