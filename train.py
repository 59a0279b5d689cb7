#!/usr/bin/env python3
"""Train a spiking timm model with its real-valued twin as the teacher (SSCL).

    accelerate launch train.py                                    # bundled digits, no download
    accelerate launch train.py --data-dir DIR --model spiking_resnet34 --teacher resnet34

The script reads from top to bottom: options, data, student and teacher, the loop and its step, the summary. Its shape
and options are those of timm's train.py. Accelerate handles devices and processes. Parts are in timm_sscl.training.
"""
import importlib.util
import json
import logging
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import List, Optional, Sequence

if __name__ == '__main__':  # a wrong option ends the script here, before torch is imported
    try:
        spec = importlib.util.find_spec('timm_sscl')
        sys.modules['timm_sscl'] = package = importlib.util.module_from_spec(spec)  # its parts can be imported alone
        importlib.import_module('timm_sscl.training.command_line.first_look').end_if_wrong()
        spec.loader.exec_module(package)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; run pip install -e '{Path(__file__).resolve().parent}'")

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils import random_seed

from timm_sscl import SSCLTask
from timm_sscl.conversion import SpikingReport
from timm_sscl.data.events import is_event_dataset
from timm_sscl.data.manifest import DATA_FILE, check_data, describe_data
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.training.saving.checkpoint import lock_folder, write_text
from timm_sscl.training.datasets import (
    EVENT_SETTINGS, create_datasets, guard_samples, resolve_input, resolve_num_classes)
from timm_sscl.training.errors import blame_options
from timm_sscl.training.runs.evaluation import evaluate_only
from timm_sscl.training.exits import one_line_errors, report_resume_command
from timm_sscl.training.steps.guard import guard_step
from timm_sscl.training.steps.learning_rate import resolve_lr
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.steps.loop import (
    batches_left, begin_epoch, clip_gradients, count_update, end_of_batches, end_step, epochs_left, finish_epoch,
    share_of_update, spike_packing, task_inputs, watch_layers)
from timm_sscl.training.steps.meters import layer_stats, scalar_terms
from timm_sscl.training.neuron_init import prepare_neurons
from timm_sscl.training.optimizer import create_optimizer_and_schedule
from timm_sscl.training.command_line.option_ranges import check_values
from timm_sscl.training.command_line.options import ARGS_FILE, parse_args
from timm_sscl.training.processes import (
    create_accelerator, finish_trackers, set_threads, setup_logging, start_trackers, warn_slow_precision)
from timm_sscl.training.saving.resume import find_run, options_as_yaml, restore
from timm_sscl.training.runs.run_report import try_to_report
from timm_sscl.training.runs.run_summary import log_options, run_command
from timm_sscl.training.runs.seeds import SeedGroup
from timm_sscl.training.session import Session
from timm_sscl.training.saving.state import FitResult, Training, restore_random_state, start_training
from timm_sscl.training.steps.stop import StopRequest
from timm_sscl.training.student import create_student
from timm_sscl.training.runs.summary import summarize
from timm_sscl.training.task import LOSS_OPTIONS, create_task, needs_teacher
from timm_sscl.training.teachers.teacher import Teacher, create_teacher
from timm_sscl.training.teachers.teacher_cache import TeacherCache
from timm_sscl.training.teachers.teacher_folder import read_teacher_record
from timm_sscl.training.teachers.teacher_key import settings_digest
from timm_sscl.training.teachers.teacher_record import TeacherRecord
from timm_sscl.training.teachers.teacher_weights import check_teacher, obtain_teacher, warn_warmup
from timm_sscl.training.steps.validation import validate, validate_when_due

_logger = logging.getLogger('train')


def main(argv: Optional[List[str]] = None) -> None:
    """Parse the options, build the run or one run per seed, and train or evaluate it."""
    command = run_command(__file__, argv)
    with ExitStack() as resources:
        with one_line_errors():
            args, recipe = parse_args(argv)
            check_values(args)
            accelerator = create_accelerator(args)
            setup_logging(accelerator)
            set_threads(args, accelerator)
            warn_slow_precision(args, accelerator)
            log_options(vars(args), recipe)
            stop = resources.enter_context(StopRequest())
            group = SeedGroup(args, accelerator, resources) if args.seeds else None
        if args.eval_only:
            with report_resume_command(__file__):
                evaluate_only(args, accelerator, stop)
        elif group is None:
            run(args, accelerator, stop, command, None)
        else:
            for one in group.runs_left():
                run(one, create_accelerator(one), stop, command, group.folder)
            group.summarize()
    accelerator.end_training()


def run(args: Namespace, accelerator: Accelerator, stop: StopRequest, command: str, group: Optional[Path]) -> None:
    """Build a run and train it. `command` started it; `group` is the folder of the runs of --seeds."""
    started = time.time()
    with ExitStack() as resources:
        with one_line_errors():
            job = prepare(args, accelerator, stop, resources)
        with report_resume_command(__file__, job.folder, group):
            train(job, started, command)
    finish_trackers(accelerator)


@dataclass
class Job:
    """A run that is built and checked, ready to train."""
    session: Session
    task: SSCLTask
    student: nn.Module
    teacher: Optional[Teacher]
    folder: Path
    resume: str
    teacher_record: Optional[TeacherRecord]  # record of the teacher in the checkpoint
    report: Optional[SpikingReport] = None


def prepare(args: Namespace, accelerator: Accelerator, stop: StopRequest, resources: ExitStack) -> Job:
    """Build data, student, teacher and task, and check them together. `resources` holds the lock on the run's folder.
    """
    random_seed(args.seed, 0)  # every process gets the same initial weights
    datasets = create_datasets(args)
    num_classes = resolve_num_classes(args, datasets[0])
    student = create_student(args, num_classes)
    data_config = args.data_config = resolve_input(args, student)
    if is_event_dataset(args.dataset):  # a trained teacher depends on these settings, too
        data_config['events'] = {name: getattr(args, name) for name in EVENT_SETTINGS}
    described = {split: describe_data(dataset) for split, dataset in zip(('training', 'validation'), datasets)}
    args.training_data = settings_digest(described['training'])  # part of the key of a trained teacher
    datasets = guard_samples(args, datasets, data_config, num_classes)
    session = Session(
        args, accelerator, partial(create_loaders, args, datasets, data_config, num_classes), stop)
    root, teacher, network, teacher_input = Path(args.output or './output/train'), None, None, TeacherInput()
    if needs_teacher(args):
        network, teacher_input = create_teacher(args, num_classes, data_config)
        teacher = Teacher(args, network, teacher_input, num_classes, root, session.launch)
    loaders = session.make_loaders()
    with blame_options({name: getattr(args, name) for name in LOSS_OPTIONS}, passing=(ValueError,)):
        task = create_task(
            args, student, network, teacher_input, data_config, accelerator.device, loaders.mixup is not None,
            loaders.train.dataset)
    # one process decides, since the answer may change when it begins to write
    found = [find_run(args, root, data_config) if accelerator.is_main_process else None]
    folder, resume = broadcast_object_list(found)[0]
    record = None
    if teacher is not None:
        record = read_teacher_record(resume, teacher) if resume else None
        check_teacher(teacher, record)
    if resume:
        _logger.info(f'Goes on from {resume}.')
        check_data(Path(resume).parent / DATA_FILE, **described)
        restore(task, resume)
    if accelerator.is_main_process:
        warn_warmup(args, 'student', args.epochs)
    lr = resolve_lr(args, accelerator.num_processes)
    create_optimizer_and_schedule(Namespace(**{**vars(args), 'lr': lr}), task.get_trainable_module())
    resources.enter_context(lock_folder(folder, accelerator.is_main_process))
    job = Job(session, task, student, teacher, folder, resume, record)
    job.report = prepare_neurons(args, accelerator, student, loaders.train, bool(resume))
    if accelerator.is_main_process:
        write_text(folder / ARGS_FILE, options_as_yaml(args))
        write_text(folder / DATA_FILE, json.dumps(described, indent=2) + '\n')
    start_trackers(args, accelerator, folder)
    return job


def train(job: Job, started: float, command: str) -> None:
    """Train the teacher if it has no weights yet, then the student. `command` is stored in the summary."""
    args, accelerator = job.session.args, job.session.accelerator
    teacher_result = None
    if job.teacher is not None:
        teacher_result = obtain_teacher(job.session, job.teacher, fit, job.teacher_record)
    cache = None
    if args.teacher_cache:
        samples = len(job.session.make_loaders().train.dataset)
        cache = TeacherCache(job.folder, samples, create=accelerator.is_local_main_process)
    training = start_training(
        job.session, args, job.task, job.folder, 'student', resume=job.resume, ema=args.model_ema,
        compile_task=bool(args.torchcompile), teacher_cache=cache,
        teacher_record=teacher_result.record if teacher_result else None)
    result = fit(training)
    if accelerator.is_main_process:
        summarize(
            job.session, job.folder, job.student, teacher_result, result, job.report, time.time() - started, command)
        try_to_report(args.report, job.folder)


def fit(training: Training) -> FitResult:
    """Train from the current position to the last epoch."""
    restore_random_state(training)
    metrics, rates = {}, {}
    for epoch in epochs_left(training):
        with watch_layers(training) as layers:
            progress = begin_epoch(training, epoch, layers)
            for step, batch in batches_left(training):
                stop = train_step(training, step, batch)
                end_step(training, progress, step, batch[0], stop)
        train_metrics = end_of_batches(training)
        metrics, rates = validate_when_due(training, epoch)
        finish_epoch(training, epoch, train_metrics, metrics, rates)
    if not metrics:
        metrics, rates = validate(training, training.epochs - 1)
    training.accelerator.wait_for_everyone()
    return training.result(metrics, rates)


def train_step(training: Training, step: int, batch: Sequence[torch.Tensor]) -> bool:
    """Run forward, backward and update on one batch. Return whether a signal asked any process to stop.

    A loss or gradients that are not finite end the run at the next step, and do not reach the weights.
    """
    args, accelerator, task = training.args, training.accelerator, training.task
    input, target, *index = batch
    with accelerator.accumulate(training.module):
        if training.mixup is not None:
            input, target = training.mixup(input, target)
        with accelerator.autocast(), spike_packing(args):
            input = training.prepare_input(input)
            result = task(input, target, **task_inputs(training, input, index))
        accelerator.backward(result['loss'] * share_of_update(training, step))
        stop = guard_step(training, step, result)
        clip_gradients(training)
        training.optimizer.step()
        training.optimizer.zero_grad()
    if accelerator.sync_gradients:
        count_update(training)
    if args.synchronize_step and accelerator.device.type == 'cuda':
        torch.cuda.synchronize()
    training.meters.update(scalar_terms(result), len(input))
    training.meters.update_stats(layer_stats(task), len(input))
    return stop


if __name__ == '__main__':
    main()
