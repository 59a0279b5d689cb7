"""--eval-only: measure accuracy, firing rates, entropy and energy of a checkpoint."""
import json
import logging
import os
import pickle
from argparse import Namespace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.models import clean_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.data.manifest import DATA_FILE, check_data, describe_data
from timm_sscl.models.finite import check_finite
from timm_sscl.report import FiringRates, estimate_energy

from ..saving.checkpoint import Position, lock_folder, position_of, why_damaged, write_text
from .deployed import check_deploy, evaluate_deployed, evaluate_timed
from ..datasets import create_datasets, guard_samples, resolve_input, resolve_num_classes
from ..errors import OptionError
from ..exits import one_line_errors
from ..loaders import create_loaders
from ..saving.resume import newest_file, runs_below
from .rows import append_row
from ..session import Session
from ..steps.stop import StopRequest
from ..student import create_student, without_initial_weights
from ..saving.state import prepare_input
from ..steps.validation import evaluate

__all__ = ['Evaluation', 'evaluate_only']

_logger = logging.getLogger('train')


class Evaluation(NamedTuple):
    """Result for one number of timesteps on the validation set."""
    weights: str  # 'model' or 'ema', with ', deployed' for the deployed model
    timesteps: Optional[int]
    top1: float
    top5: float
    loss: float
    firing_rate: Optional[float] = None  # spikes per neuron and timestep, mean over the layers
    entropy: Optional[float] = None  # of a spike, bits per neuron and timestep
    energy_uj: Optional[float] = None  # of the arithmetic for one image
    ann_energy_uj: Optional[float] = None
    weight_bits: Optional[int] = None  # of a deployed model
    images_per_second: Optional[float] = None  # with --deploy: of the model's calls in this process
    agreement: Optional[float] = None  # % of the images for which a deployed model predicts what the model predicts


class _Weights(NamedTuple):
    """What is evaluated, and where it comes from."""
    folder: Path  # for the results
    states: Dict[str, Optional[Dict[str, torch.Tensor]]]  # 'model' and 'ema'; None for the model as it is built
    file: str
    position: Optional[Position] = None  # of the training; None if the file does not say

    def facts(self) -> Dict[str, Any]:
        """Return the file, the epoch counted from 0 as in summary.csv, and the step if it lies within the epoch."""
        if self.position is None:
            return dict(checkpoint=self.file, epoch=None)
        epoch, step = self.position
        return dict(checkpoint=self.file, epoch=epoch, step=step) if step else dict(
            checkpoint=self.file, epoch=epoch - 1)

    def __str__(self) -> str:
        if self.position is None:
            return self.file
        epoch, step = self.position
        when = f'step {step} of epoch {epoch + 1}' if step else f'epoch {epoch}'
        return f'{self.file}, after {when} (the files count from 0: {self.facts()["epoch"]})'


def evaluate_only(args: Namespace, accelerator: Accelerator, stop: StopRequest) -> None:
    """--eval-only: report accuracy, firing rates, entropy and energy of a checkpoint, at its own T or at others."""
    with one_line_errors():
        datasets = create_datasets(args)
        described = describe_data(datasets[1])
        num_classes = resolve_num_classes(args, datasets[1])
        student = create_student(without_initial_weights(args) if args.resume else args, num_classes)
        data_config = resolve_input(args, student)
        datasets = guard_samples(args, datasets, data_config, num_classes)
        session = Session(args, accelerator, partial(create_loaders, args, datasets, data_config, num_classes), stop)
        weights = _weights_to_evaluate(args)
        if args.resume:
            check_data(weights.folder / DATA_FILE, validation=described)
        if args.eval_timesteps and not isinstance(student, SpikingModule):
            raise OptionError(f"--eval-timesteps: '{args.model}' does not spike and has no time steps.")
        if args.deploy:
            check_deploy(session, student)
        _logger.info(f'Evaluates {weights}.')
    student.to(accelerator.device)
    loader = accelerator.prepare(session.make_loaders().eval)
    results, rates = [], {}
    own = getattr(student, 'timesteps', None)
    for name, state in weights.states.items():
        if own is not None:
            student.set_timesteps(own)  # T with which the weights are loaded
        with one_line_errors():
            _load_student(student, state, weights.file)
        for timesteps in args.eval_timesteps or [own]:
            if timesteps is not None:
                student.set_timesteps(timesteps)
            result, rates[f'{name} T={timesteps}'] = _evaluate_one(session, student, loader, name, timesteps)
            results += [result] if not args.deploy else _with_deployed(session, student, loader, result)
    if accelerator.is_main_process:
        _report_evaluation(args, weights, results, rates)


def _with_deployed(session: Session, student: nn.Module, loader: Any, result: Evaluation) -> List[Evaluation]:
    """Return the student's result with its speed, and those of the model deployed with each number of bits."""
    own = evaluate_timed(session, student, loader)
    deployed = [Evaluation(f'{result.weights}, deployed', result.timesteps, weight_bits=bits, **evaluate_deployed(
        session, cast(SpikingModule, student), loader, own.predictions, bits)) for bits in session.args.weight_bits]
    return [result._replace(images_per_second=own.images_per_second), *deployed]


def _weights_to_evaluate(args: Namespace) -> _Weights:
    """Return a checkpoint's model and EMA, or the model as it is built."""
    if not args.resume:
        source = args.initial_checkpoint or args.pretrained_path or f'the pretrained weights of {args.model}'
        return _Weights(Path(args.output or './output/eval'), {'model': None}, source)
    file = args.resume if os.path.isfile(args.resume) else newest_file(Path(args.resume))
    if not file:
        raise FileNotFoundError(
            f"--resume: '{args.resume}' is neither a checkpoint nor a folder with an undamaged one"
            f'{runs_below(Path(args.resume))}.')
    if why_damaged(Path(file)):
        raise ValueError(f"--resume: '{file}' is damaged or no checkpoint ({why_damaged(Path(file))}).")
    try:
        checkpoint = load_checkpoint_metadata(file)
        states = {'model': checkpoint['state_dict'], 'ema': checkpoint.get('state_dict_ema')}
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: '{file}' is no checkpoint of a run: {error}") from error
    states = {name: state for name, state in states.items() if state}
    for state in states.values():
        check_finite(state, f"--resume: '{file}'")
    return _Weights(Path(file).parent, states, str(file), position_of(checkpoint))


def _load_student(student: nn.Module, state: Optional[Dict[str, torch.Tensor]], source: str) -> None:
    """Load a state dict into the student; None leaves it as built."""
    if state is None:
        return
    try:
        student.load_state_dict(clean_state_dict(state))
    except RuntimeError as error:
        raise ValueError(f"--resume: '{source}' holds the weights of another model: "
                         f'{" ".join(str(error).split())[:300]}') from error


def _evaluate_one(
        session: Session,
        student: nn.Module,
        loader: Any,
        weights: str,
        timesteps: Optional[int],
) -> Tuple[Evaluation, Dict[str, Dict[str, Any]]]:
    """Return the Evaluation for the student's current T, and the values of every layer."""
    cast = partial(prepare_input, session.args)
    metrics: Any
    if timesteps is None:
        metrics = evaluate(session, student, loader, cast)
        return Evaluation(weights, None, **metrics), {}
    with FiringRates(student, per_neuron=True, inputs=True) as firing:
        metrics = evaluate(session, student, loader, cast)
    firing.sum_over_processes()
    rates, entropy = firing.per_layer(), firing.entropy()
    images = broadcast(cast(next(iter(loader))[0]))
    energy = estimate_energy(student, images, firing)
    per_step = firing.per_step()
    layers = {name: dict(firing_rate=rates[name], firing_rate_per_step=per_step[name], entropy=entropy.get(name))
              for name in rates}
    mean = [sum(values.values()) / len(values) if values else None for values in (rates, entropy)]
    return Evaluation(weights, timesteps, **metrics, firing_rate=mean[0], entropy=mean[1], energy_uj=energy.spiking,
                      ann_energy_uj=energy.ann), layers


def _report_evaluation(args: Namespace, weights: _Weights, results: List[Evaluation], rates: Dict[str, Any]) -> None:
    """Print the results as a table, append them to evaluation.csv, and write them with all layers to a new JSON file.
    """
    columns = [name for name in Evaluation._fields if any(getattr(r, name) is not None for r in results)]
    rows = [['-' if v is None else f'{v:.4g}' if isinstance(v, float) else str(v)
             for v in (getattr(r, c) for c in columns)] for r in results]
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = ['', *('  '.join(f'{cell:>{w}}' for cell, w in zip(row, widths)) for row in (columns, *rows))]
    if len(rates) == 1:  # with several results, only the JSON file has the layers
        lines += [f'  {name:<30} {v["firing_rate"]:.3f} spikes '
                  f'({" ".join(f"{r:.3f}" for r in v["firing_rate_per_step"])} step by step)'
                  + ('' if v["entropy"] is None else f', {v["entropy"]:.3f} bits per neuron and step')
                  for layers in rates.values() for name, v in layers.items()]
    if any(r.energy_uj is not None for r in results):
        lines.append(f'Energy: microjoules of one image\'s arithmetic at 45 nm (4.6 pJ a MAC, 0.9 pJ an addition), '
                     f'with the firing rates of all validation images; layers without binary or whole input are MACs; '
                     f'the stem counts {"once" if args.share_stem else "at every step"}.')
    now, folder, facts = datetime.now(), weights.folder, weights.facts()
    file = folder / f'evaluation-{now.strftime("%Y%m%d-%H%M%S-%f")}.json'
    _logger.info('\n'.join([*lines, f'Files: {file}, {folder / "evaluation.csv"}']))
    with lock_folder(folder / 'evaluation'):  # the run itself may be writing
        write_text(file, json.dumps(dict(model=args.model, weights=args.resume or args.initial_checkpoint, **facts,
                                         results=[r._asdict() for r in results], layers=rates), indent=2) + '\n')
        for result in results:
            append_row(folder / 'evaluation.csv', {'time': now.isoformat(timespec='seconds'), 'model': args.model,
                                                   **facts, **result._asdict()})
