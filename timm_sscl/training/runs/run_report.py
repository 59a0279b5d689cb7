"""Write the report of a run: report.html and its pictures."""
import logging
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
import yaml

from timm_sscl.random_state import get_random_state, set_random_state
from timm_sscl.report import plot_cka_map, plot_energy, plot_firing_rates
from timm_sscl.report.energy import RULE
from timm_sscl.report.extra import can_report
from timm_sscl.report.figures import (
    draw_confusion, draw_curves, draw_layers, draw_pictures, draw_rasters, draw_terms, draw_timesteps, new_figure)
from timm_sscl.report.page import Section, Table, render_page

from ..saving.checkpoint import replacing, write_text
from .rebuild import Rebuilt, rebuild
from .run_files import RunFiles, columns_with, curve, read_run
from .run_measure import Measured, measure_run
from .run_summary import NOT_AVERAGED, differing_options, library_versions

__all__ = ['REPORT_FILE', 'PICTURES', 'IMAGES', 'write_run_report', 'write_page', 'try_to_report']

_logger = logging.getLogger('train')

REPORT_FILE = 'report.html'  # file name in a run's folder
PICTURES = 'report'  # folder of its pictures, in a run's folder
IMAGES = 1000  # number of validation images that a report measures at most


def write_run_report(folder: Path, images: int = IMAGES, device: Optional[torch.device] = None) -> Path:
    """Write the report of a run: report.html, which needs no other file, and its pictures in the folder report.

    The run is rebuilt from its files. Nothing in the process or the folder changes besides.

    Args:
        folder: Folder of a run of train.py.
        images: At most so many images, evenly spaced over the validation set, are measured.
        device: Device to measure on; by default a GPU where there is one.

    Returns:
        The report.

    Raises:
        OptionError: The folder holds no run, or its options do not apply any more.
        ImportError: matplotlib or jinja2 is not installed.
    """
    run = read_run(folder)
    random_state = get_random_state()
    try:
        rebuilt = rebuild(run, images, device or torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
        measured = measure_run(rebuilt)
    finally:
        set_random_state(random_state)
    return write_page(folder, f'{run.options["model"]}: {folder.name}', run.status, _sections(run, rebuilt, measured))


def write_page(folder: Path, title: str, status: str, sections: List[Section], name: str = REPORT_FILE) -> Path:
    """Write a page into a folder, and its pictures into the folder `report` there."""
    page, pictures = render_page(title, status, sections)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for picture, content in pictures.items():
        with replacing(folder / PICTURES / picture) as aside:
            aside.write_bytes(content)
    write_text(folder / name, page)
    return folder / name


def try_to_report(wanted: Optional[bool], folder: Path, write: Callable[[Path], Path] = write_run_report) -> None:
    """--report: write a report at the end of a run. An error is logged, since the run itself is complete.

    Args:
        wanted: Value of --report; None writes a report if the extra is installed.
        folder: Folder of the run.
        write: Function that writes the report into the folder.
    """
    if wanted is False or not can_report():
        return
    _logger.info('Writes the report, for which the trained model is measured again (--no-report leaves it out).')
    try:
        _logger.info(f'Report    {write(folder)}')
    except Exception as error:  # whatever a user's model, data or a full disk raises
        _logger.warning(f'The report could not be written ({type(error).__name__}: {" ".join(str(error).split())[:300]}'
                        f'); timm-sscl-report {folder} tries again. The run itself is complete.')


def _sections(run: RunFiles, rebuilt: Rebuilt, measured: Measured) -> List[Section]:
    return [_overview(run, measured), _curves(run), _terms(run), _layers(run), *_spiking(rebuilt, measured),
            _similarity(measured), _errors(rebuilt, measured), _conversion(rebuilt), _settings(run)]


def _overview(run: RunFiles, measured: Measured) -> Section:
    summary = run.summary or {}
    part = f'on {measured.images} validation images' + (NOT_AVERAGED if run.options.get('model_ema') else '')
    rows = [('Student', f'{measured.top1:.2f} top-1, {part}')]
    if summary.get('teacher'):
        rows.append(('Teacher', f'{summary["teacher"]["name"]}: {summary["teacher"]["top1"]:.2f} top-1 '
                                f'({summary["teacher"]["source"]})'))
    elif run.teacher is not None:
        rows.append(('Teacher', str(run.teacher)))
    else:
        rows.append(('Teacher', 'none'))
    if measured.rates:
        mean = sum(sum(r) / len(r) for r in measured.rates.values()) / len(measured.rates)
        rows.append(('Firing rate', f'{mean:.3f} spikes per neuron and timestep, mean of {len(measured.rates)} layers, '
                                    f'{part}'))
    if measured.energy is not None:
        rows.append(('Energy', f'{measured.energy.spiking:.3g} microjoules per image, {measured.energy.ratio:.2f} of '
                               f'the real-valued network with one timestep, {part}'))
    if 'seconds' in summary:
        rows.append(('Time', f'{summary["seconds"]:.0f} s'))
    return Section('Overview', tables=[Table(('', ''), rows)])


def _curves(run: RunFiles) -> Section:
    panels: Dict[str, List[Any]] = {}
    for quantity, columns in (('top-1 in percent', ('eval_top1',)), ('loss', ('eval_loss', 'train_task_loss'))):
        for column in columns:
            for label, rows in (('student', run.rows), ('teacher', run.teacher_rows)):
                source = 'train_loss' if label == 'teacher' and column == 'train_task_loss' else column
                found = curve(rows, source, f'{label}, {"training" if column.startswith("train") else "validation"}')
                if found.values:
                    panels.setdefault(quantity, []).append(found)
    text = [] if run.teacher_rows or run.teacher is None else ['The teacher was not trained by this script.']
    return Section('Accuracy and loss', text, {'curves.png': draw_curves(panels)} if panels else {})


def _terms(run: RunFiles) -> Section:
    names = ['loss', *(name for name in columns_with(run.rows, 'train_') if name.endswith('_loss'))]
    curves = [curve(run.rows, f'train_{name}', name) for name in names]
    curves = [found for found in curves if found.values]
    return Section('Terms of the loss', ['Means over the training batches of an epoch, before the terms are weighted.'],
                   {'terms.png': draw_terms(curves)} if curves else {})


def _layers(run: RunFiles) -> Section:
    panels: Dict[str, List[Any]] = {}
    for key, title in (('cka', 'CKA'), ('weight', 'weight in the sum'), ('mi_bound', 'bound on MI in nats')):
        layers = columns_with(run.rows, f'train_{key}_')
        for layer, column in layers.items():
            if not layer.startswith('running_'):
                panels.setdefault(title, []).append(curve(run.rows, column, layer))
    if not panels:
        return Section('Layers over the epochs', ['No loss of the run compares layers.'])
    return Section('Layers over the epochs', ['Student against teacher, means over the training batches.'],
                   {'layers.png': draw_layers(panels)})


def _spiking(rebuilt: Rebuilt, measured: Measured) -> List[Section]:
    """Return the sections on spikes and energy."""
    if 'spikes' in measured.missing:
        return [Section('Spikes', [measured.missing['spikes']])]
    figure = new_figure(5.5, 1.2 + .22 * len(measured.rates))
    plot_firing_rates(measured.rates, figure.subplots())
    rates = Section('Firing rates', ['Spikes per neuron at every timestep, on the validation images.'],
                    {'rates.png': figure})
    raster = Section('Spikes of one image per class', [
        'Rows are neurons, at most 24 evenly spaced ones of every layer; columns are timesteps.'])
    if measured.spikes is None:
        raster.text = [measured.missing['raster']]
    else:
        raster.figures['raster.png'] = draw_rasters(measured.spikes, measured.examples)
    assert measured.energy is not None
    figure = new_figure(8, 1.4 + .3 * len(measured.energy.layers))
    plot_energy(measured.energy, figure.subplots())
    total = (f'In all {measured.energy.spiking:.4g} microjoules per image, {measured.energy.ann:.4g} real-valued, at '
             f'the firing rates of the {measured.images} validation images.')
    energy = Section('Energy by layer', [RULE, total], {'energy.png': figure})
    return [rates, raster, _sweep(rebuilt, measured), energy]


def _sweep(rebuilt: Rebuilt, measured: Measured) -> Section:
    text = ['The weights are those of the training; only the number of timesteps changes.']
    if 'sweep' in measured.missing:
        text = [f'Other numbers of timesteps were not measured: {measured.missing["sweep"]}']
    points, figures = measured.sweep, {}
    if len(points) > 1:
        figures['timesteps.png'] = draw_timesteps([p.timesteps for p in points], {
            'top-1 in percent': [p.top1 for p in points], 'spikes per neuron and timestep': [p.rate for p in points],
            'microjoules per image': [p.energy for p in points]}, int(rebuilt.student.timesteps))
    rows = [(p.timesteps, f'{p.top1:.2f}', f'{p.rate:.3f}', f'{p.energy:.4g}', f'{p.ann:.4g}') for p in points]
    return Section('Against the number of timesteps', text, figures, [Table(
        ('T', 'top-1', 'firing rate', 'energy in microjoules', 'real-valued, one timestep'), rows)])


def _similarity(measured: Measured) -> Section:
    title = 'Similarity of all layers to the teacher\'s'
    if measured.similarity is None:
        return Section(title, [measured.missing['similarity']])
    found = measured.similarity
    size = 2.5 + .17 * max(len(found.student), len(found.teacher))
    figure = new_figure(min(size, 13.) + 1, min(size, 12.))
    plot_cka_map(found, figure.subplots())
    text = [f'CKA across {found.batches} mini-batches of validation images.']
    text += [f'Left out: {name} ({why}).' for name, why in found.left_out.items()]
    return Section(title, text, {'cka.png': figure})


def _errors(rebuilt: Rebuilt, measured: Measured) -> Section:
    wrong = measured.images - int(measured.confusion.diagonal().sum())
    figures = {'confusion.png': draw_confusion(measured.confusion, rebuilt.classes)}
    text = [f'{wrong} of {measured.images} validation images '
            f'({_which_images(rebuilt)}) are classified wrongly.']
    if measured.worst:
        figures['worst.png'] = draw_pictures(measured.worst)
        text.append('The pictures are the wrong answers with the largest cross-entropy.')
    return Section('Errors', text, figures)


def _which_images(rebuilt: Rebuilt) -> str:
    """Say in words which images of the validation set were measured."""
    wanted = rebuilt.args.val_num_samples
    used = f'those of --val-num-samples {wanted}' if wanted else 'the whole set'
    return used if rebuilt.whole else f'evenly spaced over {used}'


def _conversion(rebuilt: Rebuilt) -> Section:
    if not hasattr(rebuilt.student, 'spiking_report'):
        return Section('Conversion', ['The model does not spike.'])
    report = rebuilt.student.spiking_report()
    rows = [(record.name, record.was, record.now, record.reason) for record in report]
    return Section('Conversion', [
        f'{len(report.neurons)} activations are neurons, {len(report.analog)} stay analog.'],
        tables=[Table(('module', 'was', 'is', 'why'), rows)], details={'Report': str(report)}, open=bool(report.analog))


def _settings(run: RunFiles) -> Section:
    summary, differ = run.summary or {}, list(differing_options(run.options).items())
    versions = summary.get('versions') or {}
    rows = [(name, versions.get(name, 'not recorded'), value) for name, value in library_versions().items()]
    command = summary.get('command') or f'train.py --config {run.folder}/args.yaml'
    return Section('Settings', [f'Command: {command}'], tables=[
        Table(('option that differs from its default', 'value'), differ),
        Table(('version', 'of the run', 'of this report'), rows)],
        details={'All options (args.yaml)': yaml.safe_dump(run.options, default_flow_style=False)})
