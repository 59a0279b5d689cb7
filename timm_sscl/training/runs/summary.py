"""Summarise a finished run."""
import json
import logging
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch.nn as nn
import yaml

from timm_sscl.conversion import SpikingReport
from timm_sscl.report import Energy, estimate_energy

from ..saving.checkpoint import write_text
from ..command_line.options import ARGS_FILE
from ..saving.resume import SUMMARY_FILE, options_as_yaml
from .run_summary import (
    NOT_AVERAGED, best_epoch_facts, best_epoch_text, firing_lines, last_epoch_text, library_versions)
from ..session import Session
from ..saving.state import FitResult, prepare_input
from ..teachers.teacher_weights import TeacherResult

__all__ = ['summarize']

_logger = logging.getLogger('train')


@dataclass
class _Ended:
    """A run that ended."""
    session: Session
    folder: Path
    student: nn.Module
    teacher: Optional[TeacherResult]
    result: FitResult
    report: Optional[SpikingReport]
    seconds: float
    command: str

    @property
    def timesteps(self) -> Optional[int]:
        return getattr(self.student, 'timesteps', None)

    @property
    def best(self) -> Dict[str, Any]:
        result = self.result
        return best_epoch_facts(self.session.args.eval_metric, result.last, result.best, result.best_epoch)


def summarize(
        session: Session,
        folder: Path,
        student: nn.Module,
        teacher: Optional[TeacherResult],
        result: FitResult,
        report: Optional[SpikingReport],
        seconds: float,
        command: str,
) -> None:
    """Print the closing summary and write summary.json.

    Args:
        session: Objects of the run.
        folder: Folder of the run.
        student: The trained student.
        teacher: Result of the teacher, or None.
        result: Result of the student.
        report: What the conversion did, or None for an ANN.
        seconds: Time of the whole run.
        command: Command that started it.
    """
    run = _Ended(session, folder, student, teacher, result, report, seconds, command)
    loader = session.make_loaders().eval
    energy = _energy(run, loader)
    _logger.info('\n'.join(_lines(run, energy)))
    write_text(folder / SUMMARY_FILE, json.dumps(_facts(run, energy, len(loader.dataset)), indent=2) + '\n')


def _energy(run: _Ended, loader: Any) -> Optional[Energy]:
    """Return the energy of a spiking student, by the firing rates of the whole validation set."""
    if run.timesteps is None:
        return None
    images = next(iter(loader))[0]
    device = next(run.student.parameters()).device
    return estimate_energy(run.student, prepare_input(run.session.args, images.to(device)), run.result.firing)


def _lines(run: _Ended, energy: Optional[Energy]) -> List[str]:
    """Return the closing table, at most 15 lines."""
    args, teacher, result = run.session.args, run.teacher, run.result
    losses = ' + '.join(f'{w:g} {name}' for name, w in args.losses.items()) or 'none'
    of = NOT_AVERAGED if 'top1_ema' in result.last else ''
    lines = ['', f'Teacher   {f"{teacher.name}: {teacher.top1:.2f} top-1 ({teacher.source})" if teacher else "none"}',
             f'Student   {args.model}{f", T={run.timesteps}" if run.timesteps else ""}: {last_epoch_text(result.last)}'
             f'{best_epoch_text(run.best, args.eval_metric)}; cross-entropy + {losses}',
             *firing_lines(result.firing_rates, result.step_rates, of)]
    if energy is not None:
        lines.append(f'Energy    {energy.spiking:.3g} microjoules per image, {energy.ratio:.2f} of the real-valued '
                     f'network (one timestep){of}')
    speed = f', {result.images_per_second:.0f} images per second in training' if result.images_per_second else ''
    return [*lines,
            f'Files     {run.folder}: last.pth.tar, model_best.pth.tar, summary.csv, {ARGS_FILE}, {SUMMARY_FILE}',
            f'Time      {timedelta(seconds=round(run.seconds))} from the start until here{speed}']


def _facts(run: _Ended, energy: Optional[Energy], images: int) -> Dict[str, Any]:
    """Return what summary.json holds. `images` is the size of the validation set."""
    args, teacher, result = run.session.args, run.teacher, run.result
    return dict(
        model=args.model, timesteps=run.timesteps, losses=args.losses, seed=args.seed, student=result.last,
        best=run.best,
        teacher=dict(name=teacher.name, top1=teacher.top1, source=teacher.source, file=teacher.record.file,
                     digest=teacher.record.digest) if teacher else None,
        firing_rates=result.firing_rates, firing_rates_per_step=result.step_rates,
        energy=dict(spiking_uj=energy.spiking, ann_uj=energy.ann, macs=energy.macs, additions=energy.additions,
                    ann_macs=energy.ann_macs, images=images) if energy is not None else None,
        parameters=sum(p.numel() for p in run.student.parameters()),
        conversion=run.report.as_dict() if run.report is not None else None,
        images_per_second=result.images_per_second, seconds=round(run.seconds, 1),
        command=run.command, arguments=yaml.safe_load(options_as_yaml(args)), versions=library_versions())
