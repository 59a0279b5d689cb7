"""train.py itself, tiny: through accelerate launch as a user starts it, and most of it in this process."""
import json
import logging
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from files import write_images
from runs import TINY, fails, launch, rows_of, run_here, run_of
import timm_sscl  # registers the spiking_ names
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training import processes
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.teachers.teacher import create_teacher


@pytest.fixture(scope='module')
def main_run(tmp_path_factory):
    """One tiny run of the main job with a neuron that is not the default; several tests look at it."""
    cwd = tmp_path_factory.mktemp('main')
    code, log = launch([*TINY, '--tau', '0.5', '--v-threshold', '0.75', '--output', 'out', '--experiment', 'run'], cwd)
    assert code == 0, log
    return cwd, log


@pytest.mark.slow
def test_main_job_tells_what_it_does_and_leaves_its_files(main_run):
    cwd, log = main_run
    assert 'bundled handwritten digits' in log and 'epochs=' not in log.split('recipe digits:')[1].split('\n')[0]
    assert 'Teacher test_resnet: no weights for it, so it is trained first, for 2 epochs' in log
    assert 'CPU threads per process' in log and 'ETA' in log and 'img/s' in log
    run = cwd / 'out' / 'run'
    for name in ('last.pth.tar', 'model_best.pth.tar', 'summary.csv', 'args.yaml', 'summary.json'):
        assert (run / name).is_file(), name
    facts = json.loads((run / 'summary.json').read_text())
    assert f"{facts['student']['top1']:.2f} top-1 after the last epoch" in log
    assert f"{facts['teacher']['top1']:.2f} top-1" in log
    assert facts['firing_rates'] and all(0 <= rate <= 1 for rate in facts['firing_rates'].values())
    assert yaml.safe_load((run / 'args.yaml').read_text())['tau'] == 0.5


@pytest.mark.slow
def test_closing_summary_is_short_and_names_the_extreme_layers(main_run):
    cwd, log = main_run
    closing = log[log.rindex('Teacher   '):].splitlines()
    closing = closing[:next(i for i, line in enumerate(closing) if line.startswith('Time')) + 1]
    assert len(closing) <= 15
    facts = json.loads((cwd / 'out' / 'run' / 'summary.json').read_text())
    rates, text = facts['firing_rates'], '\n'.join(closing)
    for title, layer in (('least', min(rates, key=rates.get)), ('most', max(rates, key=rates.get))):
        assert re.search(rf'{title} +{re.escape(layer)} {rates[layer]:.3f}', text)
    assert f'{list(rates)[-1]} {rates[list(rates)[-1]]:.3f}' in text.split('deepest')[1]
    model = timm.create_model('spiking_test_resnet', num_classes=10)
    assert facts['parameters'] == sum(p.numel() for p in model.parameters())
    assert facts['energy']['spiking_uj'] == pytest.approx(
        4.6e-6 * facts['energy']['macs'] + .9e-6 * facts['energy']['additions'], rel=1e-12)
    assert facts['images_per_second'] > 0 and facts['versions']['timm'] == timm.__version__
    assert facts['command'].startswith('accelerate launch ') and '--tau 0.5 --v-threshold 0.75' in facts['command']
    assert facts['arguments'] == yaml.safe_load((cwd / 'out' / 'run' / 'args.yaml').read_text())


@pytest.mark.slow
def test_summary_has_a_row_per_epoch_with_columns_per_layer(main_run):
    rows = rows_of(main_run[0] / 'out' / 'run')
    assert [row['epoch'] for row in rows] == ['0', '1']
    for layer in ('layer1', 'layer4', 'pooled'):
        for key in ('cka', 'nce', 'weight'):
            assert np.isfinite(float(rows[-1][f'train_{key}_{layer}']))
    assert {'eval_top1', 'eval_loss', 'lr', 'train_task_loss', 'train_sscl_loss'} <= set(rows[0])


@pytest.mark.slow
def test_neurons_are_calibrated_and_the_report_is_printed_and_written(main_run):
    cwd, log = main_run
    assert '12 neuron layers calibrated' in log and 'MACs per image' in log and '% binary' in log
    conversion = json.loads((cwd / 'out' / 'run' / 'summary.json').read_text())['conversion']
    assert len(conversion['activations']) == 12 and conversion['macs']['binary'] > conversion['macs']['analog'] > 0
    assert all(record['now'] == 'LIF' for record in conversion['activations'])


@pytest.mark.slow
def test_checkpoint_gives_the_same_logits_through_create_model(main_run):
    file = main_run[0] / 'out' / 'run' / 'last.pth.tar'
    model = timm.create_model('spiking_test_resnet', num_classes=10, checkpoint_path=file).eval()
    assert (model.timesteps, model.settings.tau, model.settings.v_threshold) == (2, 0.5, 0.75)
    # independent of the checkpoint's settings: an ANN converted by hand, with the weights alone
    weights = torch.load(file, weights_only=False)['state_dict']
    ann_weights = {k: v for k, v in weights.items() if 'spiking_' not in k}
    by_hand = timm.create_model('test_resnet', num_classes=10)
    by_hand.load_state_dict(ann_weights)
    timm_sscl.convert_to_spiking(by_hand.eval(), timesteps=2, tau=0.5, v_threshold=0.75)
    for name, lif in by_hand.neurons().items():
        lif.set_gain(weights[f'{name}.spiking_gain'])
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), by_hand(x))


@pytest.mark.slow
def test_memory_options_change_no_accuracy(main_run, monkeypatch, caplog):
    """The same run with spikes kept as bits, the stem run once and gradient checkpointing: the same training loss."""
    cwd, _ = main_run
    with caplog.at_level(logging.INFO):
        run_here([*TINY, '--tau', '0.5', '--v-threshold', '0.75', '--output', 'out', '--epochs', '1',
                  '--teacher-epochs', '2', '--experiment', 'saving', '--share-stem', '--pack-spikes',
                  '--grad-checkpointing'], cwd, monkeypatch)
    assert 'what comes before conv1.2 runs once per image' in caplog.text
    plain, saving = (float(rows_of(cwd / 'out' / name)[0]['train_task_loss']) for name in ('run', 'saving'))
    # float32 in another order flips a few spikes in four steps; a wrong gradient would show in the first digit
    assert saving == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow
def test_second_run_finds_the_teacher_and_resume_goes_on(main_run, monkeypatch, capsys, caplog):
    cwd, _ = main_run
    teachers = sorted((cwd / 'out' / 'teachers').iterdir())
    second = [*TINY, '--output', 'out', '--experiment', 'second']
    with caplog.at_level(logging.INFO):
        run_here([*second, '--teacher-epochs', '2', '--distill', 'kd'], cwd, monkeypatch)
    assert 'trained on the same data with the same settings' in caplog.text and 'teacher epoch' not in caplog.text
    assert sorted((cwd / 'out' / 'teachers').iterdir()) == teachers
    run = cwd / 'out' / 'second'
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_here(['--resume', run, '--epochs', '3', '--teacher-epochs', '2'], cwd, monkeypatch)
    assert [row['epoch'] for row in rows_of(run)] == ['0', '1', '2']
    assert 'student epoch 3/3' in caplog.text and 'student epoch 1/' not in caplog.text
    # the folder of a run is left alone without --resume
    code, line = fails([*second, '--distill', 'none'], cwd, monkeypatch, capsys)
    assert code == 2 and 'holds a run already' in line and len(rows_of(run)) == 3


@pytest.mark.slow
def test_two_processes_train_on_an_image_folder(server, tmp_path):
    data = write_images(tmp_path / 'images', per_class=7)
    args = ['--data-dir', str(data), '--model', 'spiking_test_resnet', '--timesteps', '2', '--epochs', '1',
            '--img-size', '32', '--batch-size', '4', '--workers', '0', '--warmup-epochs', '0', '--output', 'out',
            '--lr', '0.01', '--threads', '1']
    code, log = server.run(args, tmp_path, processes=2)
    assert code == 0, log
    run = run_of(tmp_path / 'out')
    facts = json.loads((run / 'summary.json').read_text())
    # top-1 is a share of exactly the 21 validation images
    assert facts['student']['top1'] * 21 / 100 == pytest.approx(round(facts['student']['top1'] * 21 / 100), abs=1e-6)
    assert log.count('Student   ') == 1  # one process writes
    assert timm.create_model('spiking_test_resnet', num_classes=3, checkpoint_path=run / 'last.pth.tar').timesteps == 2


def test_two_copies_that_do_not_know_of_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(processes, 'Accelerator', lambda **kwargs: SimpleNamespace(num_processes=1))
    with pytest.raises(
            ValueError, match='2 processes were launched, but Accelerate runs 1.*torchrun --nproc_per_node 2'):
        create_accelerator(parse_args([])[0])


# ---- in this process

@pytest.mark.slow
def test_weight_zero_is_exactly_mode_none(tmp_path, monkeypatch):
    common = [*TINY, '--epochs', '1', '--drop', '0.2', '--output', 'out']
    run_here([*common, '--distill', 'none', '--experiment', 'none'], tmp_path, monkeypatch)
    run_here([*common, '--loss', 'sscl=0,kd=0', '--experiment', 'zero'], tmp_path, monkeypatch)
    run_here([*common, '--loss', 'kd=1', '--experiment', 'kd'], tmp_path, monkeypatch)
    none, zero, kd = (torch.load(tmp_path / 'out' / name / 'last.pth.tar')['state_dict']
                      for name in ('none', 'zero', 'kd'))
    assert none.keys() == zero.keys() and all(torch.equal(none[k], zero[k]) for k in none)
    assert not all(torch.equal(none[k], kd[k]) for k in none)  # the comparison can fail


@pytest.mark.slow
def test_options_of_a_training_step_work_together(tmp_path, monkeypatch):
    run_here([*TINY, '--epochs', '1', '--output', 'out', '--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', '2',
              '--clip-grad', '1', '--model-ema', '--model-ema-decay', '0.5', '--mixup', '0.2', '--cutmix', '0.5',
              '--channels-last', '--grad-checkpointing', '--opt', 'adamw', '--sched-on-updates', '--reprob', '0.2',
              '--loss', 'sscl=0.1,kd=0.5', '--sscl-critic', 'infonce', '--sscl-taps', 'layer2,layer4,pooled'],
             tmp_path, monkeypatch)
    run = run_of(tmp_path / 'out')
    checkpoint = torch.load(run / 'last.pth.tar')
    assert 'state_dict_ema' in checkpoint and any('g_student' in k for k in checkpoint['task_state']['losses'])
    row = rows_of(run)[0]
    assert np.isfinite(float(row['train_kd_loss'])) and 'eval_top1_ema' in row
    assert 'train_nce_layer2' in row and 'train_nce_layer3' not in row


def test_own_loss_is_one_file_and_one_decorator(tmp_path, monkeypatch):
    (tmp_path / 'mine.py').write_text(
        'from timm_sscl import register_loss\n\n\n@register_loss("logit_norm")\ndef logit_norm(step):\n'
        '    return step.logits.square().mean()\n')
    run_here([*TINY, '--epochs', '1', '--output', 'out', '--loss-file', 'mine.py', '--loss', 'logit_norm=0.5'],
             tmp_path, monkeypatch)
    row = rows_of(run_of(tmp_path / 'out'))[0]
    task, mine, total = (float(row[f'train_{k}']) for k in ('task_loss', 'logit_norm_loss', 'loss'))
    assert mine > 0 and total == pytest.approx(task + 0.5 * mine, rel=1e-5)  # float32 sums


def test_teacher_from_a_file_is_used_as_it_is(tmp_path, monkeypatch):
    teacher = timm.create_model('test_vit', num_classes=10, img_size=32)
    save_file(teacher.state_dict(), tmp_path / 'teacher.safetensors')
    run_here([*TINY, '--epochs', '1', '--output', 'out', '--teacher', 'test_vit',
              '--teacher-checkpoint', 'teacher.safetensors', '--teacher-epochs', '0',
              '--teacher-kwargs', 'img_size=32'], tmp_path, monkeypatch)
    facts = json.loads((run_of(tmp_path / 'out') / 'summary.json').read_text())
    assert facts['teacher']['source'] == 'teacher.safetensors' and not (tmp_path / 'out' / 'teachers').exists()


@pytest.mark.slow
def test_thresholds_from_an_ann(main_run, tmp_path, monkeypatch, caplog):
    teacher = min((main_run[0] / 'out' / 'teachers').glob('test_resnet-*'))
    run_here([*TINY, '--epochs', '1', '--output', 'out', '--distill', 'none',
              '--initial-checkpoint', teacher / 'last.pth.tar',
              '--neuron-init', 'ann', '--ann-percentile', '99'], tmp_path, monkeypatch)
    model = timm.create_model('spiking_test_resnet', num_classes=10,
                              checkpoint_path=run_of(tmp_path / 'out') / 'last.pth.tar')
    assert (model.settings.tau, model.settings.v_reset, model.settings.v_init) == (1., None, .5)
    assert model.timesteps == 2 and all(lif.scale is not None for lif in model.neurons().values())


def test_teacher_of_another_family_size_and_normalisation(tmp_path, monkeypatch):
    teacher = timm.create_model('test_vit', num_classes=10, img_size=48)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    run_here([*TINY, '--epochs', '1', '--output', 'out', '--teacher', 'test_vit', '--teacher-checkpoint', 'teacher.pth',
              '--teacher-size', '48', '48', '--teacher-mean', '0.4', '--teacher-std', '0.3', '0.3', '0.3',
              '--neuron-init', 'none', '--neuron-exclude', 'layer1', 'act1'], tmp_path, monkeypatch)
    run = run_of(tmp_path / 'out')
    model = timm.create_model('spiking_test_resnet', num_classes=10, checkpoint_path=run / 'last.pth.tar')
    assert model.settings.exclude == ('layer1', 'act1') and type(model.act1).__name__ == 'ReLU'
    assert all(lif.gain is None for lif in model.neurons().values())
    assert np.isfinite(float(rows_of(run)[0]['train_nce_layer4']))


def test_teacher_that_cannot_be_built_for_the_images_sees_them_resized(tmp_path, monkeypatch):
    args = parse_args([*TINY, '--teacher', 'test_nfnet'])[0]
    made = []

    def create(**given):
        made.append(given['pretrained_cfg']['architecture'])
        if len(made) == 1:
            raise AssertionError('not for this size')
        return timm.models.create_model(given.pop('model_name'), **given)

    monkeypatch.setattr(timm, 'create_model', create)
    config = dict(input_size=(3, 32, 32), mean=(.5,) * 3, std=(.5,) * 3)
    teacher, teacher_input = create_teacher(args, 10, config)
    assert teacher_input.size == timm.get_pretrained_cfg('test_nfnet').input_size[1:]
    assert teacher_input(torch.zeros(2, 3, 32, 32)).shape[-2:] == teacher_input.size


class _Attack:
    def __reduce__(self):
        return Path.touch, (Path('unpickled'),)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with files that are no weights, or another model's; what is refused writes nothing there."""
    tmp_path = tmp_path_factory.mktemp('files')
    other = timm.create_model('test_vit', num_classes=10)
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), tmp_path / 'seven.pth')
    with open(tmp_path / 'attack.pth', 'wb') as f:
        pickle.dump(_Attack(), f)
    torch.save({'state_dict': {}, 'x': _Attack()}, tmp_path / 'attack_zip.pth')
    (tmp_path / 'text.pth').write_text('these are no weights')
    (tmp_path / 'text.safetensors').write_text('these are no weights')
    (tmp_path / 'wrong.yaml').write_text('epochz: 3\n')
    (tmp_path / 'empty').mkdir()
    return tmp_path


@pytest.mark.parametrize('args, words', [
    (['--model', 'spiking_resnet81'], ["unknown model 'spiking_resnet81'", 'Did you mean']),
    (['--teacher', 'resnet81'], ["--teacher: unknown model 'resnet81'"]),
    (['--timesteps', '0'], ['--timesteps 0', '1 or more']),
    (['--tau', '2'], ['tau=2', '[0, 1]']),
    (['--batch-size', '3'], ['--batch-size 3', 'at least 4', 'contrastive']),
    (['--teacher-checkpoint', 'seven.pth'], ['--teacher-checkpoint', 'another model', '10 classes', 'fc.weight']),
    (['--teacher-checkpoint', 'other.pth'], ['--teacher-checkpoint', 'another model']),
    (['--initial-checkpoint', 'other.pth'], ['--initial-checkpoint', 'another model']),
    (['--resume', 'other.pth'], ['--resume', 'no checkpoint of this model']),
    (['--resume', 'nowhere'], ['--resume', 'nowhere']),
    (['--sscl-taps', 'layer2,layer9'], ["tap 'layer9'", 'layer4']),
    (['--data-dir', 'nowhere'], ["'nowhere' does not exist", '--data-dir']),
    (['--data-dir', 'empty'], ["'empty' is empty"]),
    (['--teacher-checkpoint', 'attack.pth'], ['no weights file']),
    (['--teacher-checkpoint', 'attack_zip.pth'], ['no weights file']),
    (['--teacher-checkpoint', 'text.pth'], ['no weights file']),
    (['--initial-checkpoint', 'text.safetensors'], ['no weights file']),
    (['--teacher-checkpoint', 'gone.pth'], ['does not exist']),
    (['--config', 'no_such_recipe'], ["unknown recipe 'no_such_recipe'", 'digits']),
    (['--config', 'wrong.yaml'], ["unknown option 'epochz'", "'epochs'"]),
    (['--teacher-epochs', '0'], ['--teacher-epochs 0', 'untrained']),
    (['--num-classes', '4'], ['--num-classes 4', '10 classes']),
    (['--loss', 'ssl=1'], ["unknown loss 'ssl'", "'sscl'"]),
    (['--loss', 'kd=-1'], ["'kd'", '-1']),
    (['--distill', 'magic'], ['--distill', 'magic']),
    (['--no-such-option'], ['--no-such-option']),
    (['--share-stem', '--model', 'spiking_test_convnext'],
     ['--share-stem', 'stages.0.blocks.0.mlp.act', 'once per image']),
    (['--torchscript'], ['--torchscript is not supported', '--torchcompile']),
    (['--amp'], ['bfloat16']),
    (['--sync-bn'], ['--sync-bn', 'CPU']),
    (['--batch-size', '2000'], ['--batch-size 2000', 'larger than the training set']),
    (['--neuron-init', 'ann'], ['--neuron-init ann', '--pretrained-path']),
    (['--neuron-init', 'ann', '--initial-checkpoint', 'other.pth', '--model', 'spiking_test_vit',
      '--input-size', '3', '160', '160'], ['GELU', 'initialisation']),
    (['--neuron-exclude', 'layer9'], ["'layer9' matches no activation", 'act1']),
    (['--teacher-mean', '0.1', '0.2'], ['--teacher-mean', '2 values for 3 channels']),
    (['--teacher-size', '0', '32'], ['--teacher-size', '0']),
    (['--model', 'test_resnet', '--tau', '0.5'], ['does not spike', 'spiking_test_resnet']),
])
def test_bad_input_is_one_line_that_says_what_to_do(args, words, files, monkeypatch, capsys):
    given = [*TINY, '--device', 'cpu', *args]
    with pytest.raises(SystemExit) as exit_:
        run_here(given, files, monkeypatch)
    assert exit_.value.code == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    for word in words:
        assert word in line, line
    assert not (files / 'unpickled').exists()
    assert not list(files.rglob('*.pth.tar'))  # nothing was trained


def test_help_names_the_options_in_timms_groups(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        run_here(['--help'], tmp_path, monkeypatch)
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ('Dataset parameters', 'Optimizer parameters', '--teacher', '--sscl-temperature', '--v-threshold'):
        assert word in text


@pytest.mark.slow
def test_teacher_from_a_folder(tmp_path, monkeypatch, capsys):
    teacher = timm.create_model('test_resnet', num_classes=10)
    folder = tmp_path / 'hub'
    folder.mkdir()
    args = [*TINY, '--epochs', '1', '--output', 'out', '--teacher-checkpoint', 'hub', '--teacher-epochs', '0']
    with pytest.raises(SystemExit):
        run_here(args, tmp_path, monkeypatch)
    assert "folder 'hub' holds none of model.safetensors" in capsys.readouterr().err
    save_file(teacher.state_dict(), folder / 'model.safetensors')
    run_here(args, tmp_path, monkeypatch)
    facts = json.loads((run_of(tmp_path / 'out') / 'summary.json').read_text())
    # as timm saves for the hub, with its config: timm's own local-dir: names
    config = dict(architecture='test_resnet', num_classes=10, pretrained_cfg=dict(
        num_classes=10, input_size=[3, 160, 160], mean=[.4] * 3, std=[.3] * 3, first_conv='conv1.0', classifier='fc'))
    (folder / 'config.json').write_text(json.dumps(config))
    run_here([*TINY, '--epochs', '1', '--output', 'out2', '--teacher', 'local-dir:hub', '--teacher-pretrained',
              '--teacher-mean', '0.5', '--teacher-std', '0.5'], tmp_path, monkeypatch)
    same = json.loads((run_of(tmp_path / 'out2') / 'summary.json').read_text())
    assert same['teacher']['top1'] == facts['teacher']['top1'] and not (tmp_path / 'out2' / 'teachers').exists()
