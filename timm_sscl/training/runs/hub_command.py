"""timm-sscl-hub: save what a run trained in a folder as the Hugging Face hub takes it."""
import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

from timm.utils import setup_default_logging
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_sscl.conversion.model import SpikingModule
from timm_sscl.data.manifest import DATA_FILE
from timm_sscl.export import save_for_hub
from timm_sscl.export.hub import LICENCE
from timm_sscl.models import load
from timm_sscl.models.loading import BEST_FILE
from timm_sscl.report.energy import RULE

from ..errors import OptionError
from ..exits import one_line_errors
from ..command_line.option_types import HelpFormatter, OptionParser, home_path
from ..command_line.options import parse_args
from ..saving.checkpoint import Position, position_of
from .run_files import RunFiles, columns_with, read_run
from .run_summary import NOT_AVERAGED, differing_options

__all__ = ['create_hub_parser', 'main', 'save_run_for_hub']

# options that name files and folders of the machine that trained, or that do not change the training
_NOT_SHOWN = {
    'data_dir', 'experiment', 'output', 'resume', 'workers', 'log_interval', 'model', 'timesteps', 'teacher_checkpoint',
    'initial_checkpoint', 'pretrained_path', 'plugin', 'loss_file', 'class_map', 'report', 'report_to', 'config',
    'checkpoint_hist', 'recovery_interval', 'threads', 'seeds', 'device'}


def save_run_for_hub(
        run: Union[str, Path],
        folder: Union[str, Path],
        checkpoint: str = BEST_FILE,
        licence: str = LICENCE,
) -> Path:
    """Save the student of a run with `timm_sscl.export.save_for_hub`. The model card says what the run's files say.

    Averaged weights (--model-ema) are taken where the run has them.

    Args:
        run: Folder of a run of train.py.
        folder: Folder to write, new or empty.
        checkpoint: Name of a checkpoint in the run's folder.
        licence: Licence of the weights, by its name on the hub.

    Returns:
        The folder.

    Raises:
        OptionError: The run has no such checkpoint, or its student does not spike.
        FileExistsError: The folder holds something.
    """
    files = read_run(Path(run))
    file = files.folder / checkpoint
    if not file.is_file():
        found = ', '.join(sorted(path.name for path in files.folder.glob('*.pth.tar')))
        raise OptionError(f"'{files.folder}' holds no checkpoint '{checkpoint}'; it has {found}.")
    args, _ = parse_args(['--resume', str(files.folder), '--eval-only'])  # imports the plug-ins of the run
    student = load(file)
    if not isinstance(student, SpikingModule):
        raise OptionError(f"'{files.folder}' trained {args.model}, which does not spike.")
    names = _class_names(files.folder / DATA_FILE)
    config: Dict[str, Any] = {'label_names': names} if names and len(names) == student.num_classes else {}
    return save_for_hub(student, folder, _details(files, file), licence=licence, **config)


def _class_names(file: Path) -> Optional[List[str]]:
    """Return the names of the classes by label, or None if the run's description of its data does not say them."""
    classes = json.loads(file.read_text()).get('validation', {}).get('classes') if file.is_file() else None
    return sorted(classes, key=classes.__getitem__) if classes else None


def _details(files: RunFiles, checkpoint: Path) -> Dict[str, Any]:
    """Return the facts of the model card on the training and the measurements."""
    options, summary = files.options, files.summary or {}
    content = load_checkpoint_metadata(str(checkpoint))
    epoch, step = position_of(content) or Position(0, 0)
    # within an epoch, no row was measured with these weights
    row = next((row for row in files.rows if not step and int(row['epoch']) == epoch - 1), {})
    inside = f', after its step {step}' if step else ''
    averaged = content.get('state_dict_ema') is not None
    of = NOT_AVERAGED if averaged else ''
    late = '' if files.rows and row is files.rows[-1] else ', after the last epoch'
    shown = {name: value for name, value in differing_options(options).items() if name not in _NOT_SHOWN}
    data = options.get('dataset') or os.path.basename(os.path.normpath(options.get('data_dir') or ''))
    plugins = ', '.join(map(os.path.basename, options.get('plugin') or []))
    facts = {
        'Data': data, 'Accuracy': _accuracy(row, averaged, of), 'Teacher': _teacher(files, summary),
        'Losses': _losses(summary),
        'Firing rate': _firing_rate(row, of),
        'Energy': _energy(summary.get('energy'), of + late),
        'Training': f'epoch {epoch + bool(step)} of {options.get("epochs")}{inside}, seed {options.get("seed")}'
                    + (', averaged weights (EMA)' if averaged else ''),
        'Options': ', '.join(f'{name}={value}' for name, value in shown.items()),
        'Plug-ins': f'{plugins}; import before loading' if plugins else '',
        'Versions': ', '.join(f'{name} {value}' for name, value in (summary.get('versions') or {}).items())}
    return {title: fact for title, fact in facts.items() if fact}


def _accuracy(row: Mapping[str, str], averaged: bool, of: str) -> str:
    ending = '_ema' if averaged and row.get('eval_top1_ema') else ''
    columns = {f'eval_top1{ending}': 'top-1', f'eval_top5{ending}': 'top-5'}
    values = [f'{float(row[column]):.2f} {text}' for column, text in columns.items() if row.get(column)]
    of = '' if ending else of
    return f'{", ".join(values)} on the validation split{of}' if values else ''


def _losses(summary: Mapping[str, Any]) -> str:
    weights = summary.get('losses')  # an interrupted run has no summary
    return '' if weights is None else ' + '.join(['cross-entropy', *(f'{w:g} {name}' for name, w in weights.items())])


def _teacher(files: RunFiles, summary: Mapping[str, Any]) -> str:
    teacher = summary.get('teacher')
    if teacher:
        return f'{teacher["name"]}, {teacher["top1"]:.2f} top-1 on the validation split'
    return files.teacher.name if files.teacher else 'none'


def _firing_rate(row: Mapping[str, str], of: str) -> str:
    """Return the mean over the layers of the epoch's firing rates, measured on the validation split."""
    layers = {name: column for name, column in columns_with([dict(row)], 'firing_rate_').items()
              if not name.removeprefix('step').isdigit()}
    rates = [float(row[column]) for column in layers.values() if row[column]]
    mean = sum(rates) / max(len(rates), 1)
    return f'{mean:.3f} spikes per neuron and timestep, mean of {len(rates)} layers{of}' if rates else ''


def _energy(energy: Optional[Mapping[str, float]], of: str) -> str:
    if not energy:
        return ''
    return (f'{energy["spiking_uj"]:.3g} microjoules per image, {energy["spiking_uj"] / energy["ann_uj"]:.2f} of the '
            f'real-valued network{of}. {RULE}')


def create_hub_parser() -> argparse.ArgumentParser:
    """Create the parser of timm-sscl-hub."""
    parser = OptionParser(
        prog='timm-sscl-hub', allow_abbrev=False, formatter_class=HelpFormatter,
        description='Save the student of a run in a folder with config.json, model.safetensors and a model card, which '
                    "timm.create_model('local-dir:FOLDER', pretrained=True) loads, and the Hugging Face hub takes "
                    '(hf upload USER/NAME FOLDER).')
    parser.add_argument('run', type=home_path, metavar='RUN', help='folder of a run of train.py')
    parser.add_argument('folder', type=home_path, metavar='FOLDER', help='folder to write, new or empty')
    parser.add_argument('--checkpoint', default=BEST_FILE, metavar='NAME', help='checkpoint in the folder of the run')
    parser.add_argument('--license', default=LICENCE, metavar='NAME', help='licence of the weights, for the model card')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Parse the command line and save the student of the run."""
    with one_line_errors():
        args = create_hub_parser().parse_args(argv)
        setup_default_logging(logging.WARNING)
        print(save_run_for_hub(args.run, args.folder, args.checkpoint, args.license))


if __name__ == '__main__':
    main()
