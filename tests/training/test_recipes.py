"""The recipes: one for every row of the paper's tables, what they resolve to, and one training step of each."""
import pickle
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.datasets.cifar as torchvision_cifar
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_sscl  # registers the models
import train
from timm_sscl.neurons import lif_backend
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.command_line.recipes import list_recipes, load_recipe
from timm_sscl.training.loaders import create_loaders

# Tables 1 and 2: data set, network, T
ROWS = [
    *(('cifar10', *row) for row in (('vgg16', 2), ('vgg16', 4), ('resnet19', 1), ('resnet19', 2), ('resnet20', 1),
                                    ('resnet20', 2), ('resnet20', 4))),
    *(('cifar100', *row) for row in (('vgg16', 5), ('resnet19', 1), ('resnet19', 2), ('resnet20', 1), ('resnet20', 2),
                                     ('resnet20', 4))),
    ('imagenet', 'resnet18', 4), ('imagenet', 'resnet34', 4), ('cifar10dvs', 'resnet19', 10),
    ('cifar10dvs', 'resnet20', 10)]
DATASETS = {'cifar10': 'torch/cifar10', 'cifar100': 'torch/cifar100', 'imagenet': '', 'cifar10dvs': 'events/cifar10dvs'}
CLASSES = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000, 'cifar10dvs': 10}


def _resolved(name):
    return parse_args(['--config', name, '--data-dir', 'somewhere'])[0]


@pytest.mark.parametrize('data, net, timesteps', ROWS)
def test_every_row_of_tables_1_and_2_has_its_recipe(data, net, timesteps):
    name = f'{data}_{net}_t{timesteps}'
    recipe = load_recipe(name)
    model = recipe['model'].removeprefix('spiking_')
    assert model == (net if data == 'imagenet' else f'{net}_cifar') and timm.is_model(recipe['model'])
    assert recipe['timesteps'] == timesteps and recipe.get('dataset', '') == DATASETS[data]
    assert recipe['num_classes'] == CLASSES[data] and 'model_kwargs' not in recipe
    assert recipe.get('distill', 'sscl') == 'sscl' and 'loss' not in recipe
    if data == 'imagenet':
        assert (recipe['sscl_temperature'], recipe['epochs'], recipe['stem_pool']) == (0.07, 320, 'avg')
    else:
        assert_small(name)


def assert_small(name):
    """A recipe's small form is narrower, shorter and without the slow augmentation, and nothing else."""
    recipe, small = load_recipe(name), load_recipe(f'{name}_small')
    assert small['model_kwargs'] == {'width': 16} and small['epochs'] < recipe['epochs']
    changed = {key for key in small if small[key] != recipe.get(key)}
    assert changed <= {'model_kwargs', 'epochs', 'aa', 'cutout', 'workers'}


@pytest.mark.parametrize('timesteps, mode', list(product([2, 4], ['none', 'kd', 'contrastive'])))
def test_the_other_modes_of_table_3_differ_in_the_mode_only(timesteps, mode):
    sscl, other = load_recipe(f'cifar100_resnet20_t{timesteps}'), load_recipe(f'cifar100_resnet20_t{timesteps}_{mode}')
    assert {key for key in other if other[key] != sscl.get(key)} == {'distill'} and other['distill'] == mode
    assert_small(f'cifar100_resnet20_t{timesteps}_{mode}')


def test_there_is_no_recipe_without_a_row():
    named = {f'{data}_{net}_t{t}' for data, net, t in ROWS} | {
        f'cifar100_resnet20_t{t}_{mode}' for t, mode in product([2, 4], ['none', 'kd', 'contrastive'])}
    assert {name.removesuffix('_small') for name in list_recipes()} == named | {'digits', 'events_digits'}


@pytest.mark.parametrize('name', list_recipes())
def test_every_recipe_says_where_its_numbers_come_from(name):
    text = (Path(timm_sscl.__file__).parent / 'configs' / f'{name}.yaml').read_text()
    assert text.startswith('# ')
    if name.endswith('_small'):
        assert '_small.yaml' in text
    elif name not in ('digits', 'events_digits'):
        assert 'The paper, Table' in text and ('public recipes' in text or 'where its numbers come from' in text)


def test_the_cifar_recipe_resolves_to_the_lines_settings():
    args = _resolved('cifar100_resnet20_t2')
    assert args.losses == {'sscl': 0.1}  # this project's default weight
    assert (args.batch_size, args.lr, args.weight_decay, args.epochs, args.crop_padding, args.aa, args.cutout) == (
        128, 0.1, 1e-4, 400, 4, 'cifar10', 16)
    model = timm.create_model('spiking_resnet20_cifar', width=8)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    assert type(optimizer) is torch.optim.SGD
    names = {p: n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert (group['momentum'], group['nesterov'], group['lr']) == (0.9, False, 0.1)
        # weights of convolutions and of the classifier only
        assert {names[p].endswith('weight') and p.ndim > 1 for p in group['params']} == {group['weight_decay'] == 1e-4}
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0., 1e-4}
    data_config = dict(input_size=(3, 32, 32), mean=args.mean, std=args.std, interpolation='bicubic', crop_pct=1.)
    args.workers = 0
    images = [(Image.new('RGB', (32, 32)), 0)] * 4
    datasets = [type('Images', (list,), dict(transform=None))(images) for _ in range(2)]
    args.batch_size = 4
    create_loaders(args, datasets, data_config, 100)
    assert [type(t).__name__ for t in datasets[0].transform.transforms] == [
        'Resize', 'RandomCrop', 'RandomHorizontalFlip', 'AutoAugment', 'MaybeToTensor', 'Cutout', 'Normalize']
    assert not [t for t in datasets[1].transform.transforms if 'Random' in type(t).__name__]


def test_schedule_is_a_cosine_to_zero():
    args = _resolved('cifar10_resnet19_t2')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    assert epochs == 400
    for epoch in (0, 100, 200, 399):
        scheduler.step(epoch)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(.05 * (1 + np.cos(np.pi * epoch / 400)))


# ---- bases

def test_a_base_gives_way_to_later_ones_and_to_the_recipe(tmp_path):
    (tmp_path / 'a.yaml').write_text('epochs: 1\nlr: 0.1\nmomentum: 0.5\n')
    (tmp_path / 'b.yaml').write_text('lr: 0.2\nmomentum: 0.6\n')
    (tmp_path / 'c.yaml').write_text(f'base: [{tmp_path}/a.yaml, {tmp_path}/b.yaml]\nmomentum: 0.7\n')
    assert load_recipe(str(tmp_path / 'c.yaml')) == dict(epochs=1, lr=0.2, momentum=0.7)
    (tmp_path / 'mine.yaml').write_text('base: cifar100_resnet20_t2\nbatch-size: 64\n')
    args = parse_args(['--config', str(tmp_path / 'mine.yaml')])[0]
    assert (args.batch_size, args.timesteps, args.dataset) == (64, 2, 'torch/cifar100')


@pytest.mark.parametrize('text, words', [
    ('base: no_such_recipe\n', "unknown recipe 'no_such_recipe'"), ('base: {file}\n', 'itself as a base'),
    ('base: ../configs/digits\n', 'unknown recipe')])
def test_wrong_bases(text, words, tmp_path):
    file = tmp_path / 'x.yaml'
    file.write_text(text.format(file=file))
    with pytest.raises(OptionError, match=words):
        parse_args(['--config', str(file)])


def test_a_data_folder_of_the_command_line_wins_over_the_recipes():
    assert parse_args(['--config', 'cifar10_vgg16_t2'])[0].data_dir == 'data'
    for argv in (['--data-dir', 'mine'], ['mine']):
        args = parse_args(['--config', 'cifar10_vgg16_t2', '--dataset', '', *argv])[0]
        assert (args.data_dir, args.dataset) == ('mine', '')


# ---- a step of each

def _write_cifar(folder, rng):
    """Both data sets as torchvision unpacks them, with four training and four validation images each."""
    def images(n):
        return rng.integers(0, 256, (n, 3072), dtype=np.uint8)

    def write(name, **content):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(content))

    for i in range(1, 6):
        write(f'cifar-10-batches-py/data_batch_{i}', data=images(1), labels=[i])
    write('cifar-10-batches-py/test_batch', data=images(4), labels=[1, 2, 3, 5])
    write('cifar-10-batches-py/batches.meta', label_names=[f'class{i}' for i in range(10)])
    write('cifar-100-python/train', data=images(4), fine_labels=[0, 1, 50, 99])
    write('cifar-100-python/test', data=images(4), fine_labels=[0, 1, 50, 99])
    write('cifar-100-python/meta', fine_label_names=[f'class{i}' for i in range(100)])


def _write_image_folder(folder, rng):
    """Four of ImageNet's thousand classes: the recipe names their number."""
    for split, i in product(('train', 'validation'), range(4)):
        (folder / split / f'class{i}').mkdir(parents=True)
        image = Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8))
        image.save(folder / split / f'class{i}' / 'image.jpeg')


def _write_recordings(folder, rng):
    """CIFAR10-DVS's layout: AEDAT 2.0, two recordings of 60 events for each of ten classes."""
    for c, i in product(range(10), range(2)):
        addresses, times = rng.integers(0, 2 ** 15, 60), np.arange(60)
        (folder / f'class{c}').mkdir(parents=True, exist_ok=True)
        (folder / f'class{c}' / f'cifar10_class{c}_{i}.aedat').write_bytes(
            b'#!AER-DAT2.0\r\n' + np.stack([addresses, times], 1).astype('>u4').tobytes())


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with tiny data sets, in which runs share their teachers."""
    folder, rng = tmp_path_factory.mktemp('recipes'), np.random.default_rng(0)
    _write_cifar(folder / 'data', rng)
    _write_image_folder(folder / 'imagenet', rng)
    _write_recordings(folder / 'recordings', rng)
    yield folder
    shutil.rmtree(folder)


def _run(name, place):
    """train.py by this recipe, one batch of four images; what a CPU or a short test cannot do is taken out."""
    overlay = dict(base=name, epochs=1, batch_size=4, workers=0, threads=1, output='out', experiment=name,
                   model_kwargs=_model(name)[1])
    if name.startswith('imagenet'):
        # no synchronised batch norm and no float16 on a CPU; 224 pixels take ten times as long
        overlay.update(sync_bn=False, amp=False, data_dir='imagenet', input_size=[3, 64, 64])
    if name.startswith('cifar10dvs'):
        overlay.update(data_dir='recordings', event_split='last1', train_num_samples=4, val_num_samples=4)
    if name in ('digits', 'events_digits'):
        overlay.update(train_num_samples=4, val_num_samples=4)
    (place / f'{name}.yaml').write_text(yaml.safe_dump(overlay))
    try:
        with lif_backend('eager'):  # the compiler would take longer than the step
            train.main(['--config', f'{name}.yaml'])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate's settings are the process's


# the other small ones differ from a recipe that is here in the settings of _small.yaml only, as tested above; that
# all parse is tested with the options
STEPS = [name for name in list_recipes() if not name.endswith('_small') or name in (
    'cifar10_vgg16_t2_small', 'cifar100_resnet20_t2_small', 'cifar10dvs_resnet20_t10_small')]


@pytest.mark.slow
@pytest.mark.parametrize('name', STEPS)
def test_recipe_takes_a_step(name, place, monkeypatch):
    monkeypatch.chdir(place)
    # the files' checksums are the real data's
    monkeypatch.setattr(torchvision_cifar, 'check_integrity', lambda path, md5=None: Path(path).is_file())
    before = torch.get_num_threads()
    try:
        _run(name, place)
    finally:
        torch.set_num_threads(before)
    run = place / 'out' / name
    recipe, (model_name, model_kwargs) = load_recipe(name), _model(name)
    model = timm.create_model(
        model_name, num_classes=recipe['num_classes'], checkpoint_path=str(run / 'last.pth.tar'), **model_kwargs,
        in_chans=2 if recipe.get('dataset', '').startswith('events/') else 3)
    assert model.timesteps == recipe.get('timesteps', 4) and model.settings.stem_pool == recipe.get('stem_pool')
    row, = (run / 'summary.csv').read_text().splitlines()[1:]
    assert np.isfinite([float(value) for value in row.split(',') if value]).all()
    shutil.rmtree(run)  # 100 MB and more


def _model(name):
    """The recipe's model, narrower: the widths of the paper's networks are tested with the networks."""
    recipe = load_recipe(name)
    narrow = dict(channels=[16, 24, 32, 40]) if name.startswith('imagenet') else dict(width=8)
    return recipe['model'], recipe.get('model_kwargs', narrow)
