"""Summarise a finished run."""
import json
import logging
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch.nn as nn

from timm_sscl.conversion import SpikingReport
from timm_sscl.report import mean_per_step

from .checkpoint import write_text
from .options import ARGS_FILE
from .resume import SUMMARY_FILE
from .run_summary import best_epoch_facts, best_epoch_text, last_epoch_text
from .state import FitResult
from .teacher_weights import TeacherResult

__all__ = ['summarize']

_logger = logging.getLogger('train')


def summarize(
        args: Namespace,
        folder: Path,
        student: nn.Module,
        teacher: Optional[TeacherResult],
        result: FitResult,
        report: Optional[SpikingReport],
        seconds: float,
) -> None:
    """Print the closing summary and write summary.json."""
    timesteps = getattr(student, 'timesteps', None)
    losses = ' + '.join(f'{w:g} {name}' for name, w in args.losses.items()) or 'none'
    best = best_epoch_facts(args.eval_metric, result.last, result.best, result.best_epoch)
    lines = ['', f'Teacher   {f"{teacher.name}: {teacher.top1:.2f} top-1 ({teacher.source})" if teacher else "none"}',
             f'Student   {args.model}{f", T={timesteps}" if timesteps else ""}: {last_epoch_text(result.last)}'
             f'{best_epoch_text(best, args.eval_metric)}; cross-entropy + {losses}']
    if result.firing_rates:
        rates = result.firing_rates
        lines.append(f'Firing    {sum(rates.values()) / len(rates):.3f} spikes per neuron and step, '
                     f'the mean of {len(rates)} layers:')
        width = max(map(len, rates))
        lines += [f'          {name:<{width}}  {rate:.3f}' for name, rate in rates.items()]
        lines.append(f'          at every time step: {" ".join(f"{r:.3f}" for r in mean_per_step(result.step_rates))}')
    lines += [f'Files     {folder}: last.pth.tar, model_best.pth.tar, summary.csv, {ARGS_FILE}, {SUMMARY_FILE}',
              f'Time      {timedelta(seconds=round(seconds))}']
    _logger.info('\n'.join(lines))
    facts = dict(
        model=args.model, timesteps=timesteps, losses=args.losses, seed=args.seed, student=result.last,
        best=best,
        teacher=dict(name=teacher.name, top1=teacher.top1, source=teacher.source, file=teacher.record.file,
                     digest=teacher.record.digest) if teacher else None,
        firing_rates=result.firing_rates, firing_rates_per_step=result.step_rates,
        conversion=report.as_dict() if report is not None else None,
        seconds=round(seconds, 1))
    write_text(folder / SUMMARY_FILE, json.dumps(facts, indent=2) + '\n')
