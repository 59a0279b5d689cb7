"""Timm's options of a run: logs, validation, checkpoints, where it goes on, its folder and its seed."""
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from contextlib import ExitStack

import torch
from accelerate.state import AcceleratorState

from timm_options import observes
from tiny_training import Posing, Tiny, parse, rows
import train
from timm_sscl.training.steps import validation
from timm_sscl.training.datasets import create_datasets
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.saving.resume import find_run
from timm_sscl.training.saving.state import restore_run_state, start_training
from timm_sscl.training.teachers.teacher_weights import teacher_options


# ---- the run

@observes('--log-interval', '--save-images')
def test_logging(fit, caplog):
    caplog.set_level(logging.INFO, 'train')
    datasets = create_datasets(parse(['--train-num-samples', 20]))
    for interval, logged in ((1, 5), (2, 3), (50, 1)):  # the last step always
        caplog.clear()
        run = fit(['--epochs', 1, '--log-interval', interval, '--save-images'], datasets=datasets)
        train.fit(run)
        assert sum('img/s' in message for message in caplog.messages) == logged
        assert len(list(run.folder.glob('train-batch-*.jpg'))) == logged
    run = fit(['--epochs', 1])
    train.fit(run)
    assert not list(run.folder.glob('*.jpg'))


@observes('--val-interval')
def test_validation_interval(fit, monkeypatch):
    for interval, validated in ((1, [1, 1, 1, 1, 1]), (2, [0, 1, 0, 1, 1]), (3, [0, 0, 1, 0, 1])):  # the last always
        calls = []
        monkeypatch.setattr(validation, 'evaluate', lambda *args: calls.append(1) or dict(loss=1., top1=50., top5=60.))
        run = fit(['--epochs', 5, '--val-interval', interval])
        train.fit(run)
        assert [bool(row['eval_top1']) for row in rows(run)] == validated and len(calls) == sum(validated)


@observes('--checkpoint-hist', '--eval-metric')
def test_the_best_checkpoints_are_kept(fit, monkeypatch):
    def best(*argv):
        metrics = iter(zip([1., 9., 5., 7.], [4., 3., 1., 2.]))  # top-1 and loss per epoch

        def evaluate(*args):
            top1, loss = next(metrics)
            return dict(loss=loss, top1=top1, top5=-top1)
        monkeypatch.setattr(validation, 'evaluate', evaluate)
        run = fit(['--epochs', 4, *argv])
        result = train.fit(run)
        kept = sorted(int(re.search(r'checkpoint-(\d)', f.name)[1]) for f in run.folder.glob('checkpoint-*'))
        file = torch.load(run.folder / 'model_best.pth.tar')
        assert file['epoch'] == result.best_epoch
        return result.best_epoch, kept
    assert best() == (1, [0, 1, 2, 3])
    assert best('--checkpoint-hist', 2) == (1, [1, 3])
    assert best('--checkpoint-hist', 2, '--eval-metric', 'loss') == (2, [2, 3])
    assert best('--checkpoint-hist', 1, '--eval-metric', 'top5') == (0, [0])


def test_the_averages_metric_ranks_where_there_is_one(fit, monkeypatch):
    values = iter([1., 8., 2., 3.])  # model and average, two epochs
    monkeypatch.setattr(validation, 'evaluate', lambda *args: dict(loss=1., top1=next(values), top5=1.))
    result = train.fit(fit(['--model-ema']))
    assert (result.best, result.best_epoch) == (8., 0)


@observes('--recovery-interval')
def test_recovery_interval(fit):
    datasets = create_datasets(parse(['--train-num-samples', 20]))
    for interval, steps in ((0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4])):
        run, saved = fit(['--epochs', 1, '--recovery-interval', interval], datasets=datasets), []
        run.saver.save_recovery = lambda position, state: saved.append(position.step)
        train.fit(run)
        assert saved[:-1] == steps  # and one more before the validation


@observes('--start-epoch', '--resume', '--no-resume-opt')
def test_where_a_run_goes_on(fit):
    first = fit(['--epochs', 2, '--lr', .1])
    train.fit(first)
    file = first.folder / 'last.pth.tar'
    config = dict(input_size=(3, 8, 8))
    assert find_run(parse(['--resume', file]), first.folder.parent, config)[1] == str(file)
    assert find_run(parse([]), first.folder.parent, config)[1] == ''
    for argv, epoch, momentum in (([], 2, True), (['--no-resume-opt'], 2, False), (['--start-epoch', 1], 1, True)):
        run = fit(['--epochs', 4, '--lr', .1, *argv], Tiny(5), resume=file)
        assert run.position == (epoch, 0)
        assert torch.equal(run.task.student.fc.weight, first.task.student.fc.weight)
        assert bool(run.optimizer.optimizer.state) is momentum
        train.fit(run)
        assert [int(row['epoch']) for row in rows(run)] == list(range(epoch, 4))
        loaded = []
        run.session.accelerator = Posing(run.accelerator, scaler=SimpleNamespace(load_state_dict=loaded.append))
        restore_run_state(run, dict(scaler=dict(scale=2.)))
        assert bool(loaded) is momentum
    run = fit(['--epochs', 4, '--start-epoch', 3])
    train.fit(run)
    assert [int(row['epoch']) for row in rows(run)] == [3]
    assert fit(['--epochs', 4, '--start-epoch', 3], options=teacher_options).position == (0, 0)  # a run of its own


@observes('--output', '--experiment')
def test_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dict(input_size=(3, 8, 8))
    folder, resume = find_run(parse(['--experiment', 'mine']), Path('out'), config)
    assert folder == Path('out/mine') and resume == ''
    assert re.fullmatch(r'out/\d{8}-\d{6}-test_resnet-8', str(find_run(parse([]), Path('out'), config)[0]))
    seen = []
    monkeypatch.setattr(train, 'find_run', lambda args, root, config: seen.append(root) or (root / 'run', ''))
    prepared(['--output', 'there'])
    prepared([])
    assert seen == [Path('there'), Path('output/train')] and (tmp_path / 'there/run/args.yaml').is_file()


def prepared(argv):
    AcceleratorState._reset_state(reset_partial_state=True)
    args = parse(argv)
    with ExitStack() as held:
        return train.prepare(args, create_accelerator(args), SimpleNamespace(signal_number=None), held)


@observes('--seed')
def test_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def drawn(seed, n):
        job = prepared(['--seed', seed, '--experiment', f'run{n}'])
        training = start_training(job.session, job.session.args, job.task, job.folder, 'student')
        order = torch.cat([y for _, y in training.train_loader])
        return job.student.conv1[0].weight.detach(), order, torch.rand(1)
    first, again, other = drawn(1, 0), drawn(1, 1), drawn(2, 2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
