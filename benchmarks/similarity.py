#!/usr/bin/env python3
"""Measure the similarity of students to their teacher per layer: NCE, MI bound and CKA on validation images.

    python benchmarks/similarity.py RUN [RUN ...]

Students, data and teacher are those of the runs. A run without a teacher (mode `none`) is compared with that of the
others.
A student's own projections favour the mode that trained them, and mode `none` has none. Therefore one evaluator, a pair
of projections per layer, is trained on the frozen features of the teacher and of ALL students together (training
images, the same number for every student). It is then frozen and applied to each student's validation features. The
critic is that of the training. Its value depends on the batch size, which is equal for all.
"""
import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from timm.data import create_loader

from timm_sscl.data import create_dataset
from timm_sscl.losses import SSCLCriterion
from timm_sscl.losses.cka import gram_matrix, hsic_terms
from timm_sscl.features.reader import FeatureReader
from timm_sscl.training.errors import OptionError
from timm_sscl.training.runs.rebuild import rebuild
from timm_sscl.training.runs.run_files import read_run

Features = List[List[torch.Tensor]]  # per batch, per layer (B, C)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folders of train.py runs')
    parser.add_argument('--critic', default='normalized')
    parser.add_argument('--temperature', type=float, default=0.1)
    parser.add_argument('--batch-size', type=int, default=250)
    parser.add_argument('--fit-epochs', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', default='similarity', help='writes OUTPUT.csv and OUTPUT.json')
    return parser.parse_args()


def rebuild_models(folders: List[Path]) -> Tuple[Dict[str, torch.nn.Module], argparse.Namespace]:
    """Return the teacher and the students by the names of their runs, and the options of the first run."""
    runs = {folder.resolve().name: read_run(folder) for folder in folders}
    rebuilt = {name: rebuild(run, 1, torch.device('cpu')) for name, run in runs.items()}
    taught = {name: built for name, built in rebuilt.items() if built.teacher is not None}
    if not taught:
        why = '; '.join(f'{name}: {built.no_teacher}' for name, built in rebuilt.items())
        raise OptionError(f'no run has a teacher to compare with ({why})')
    digests = {name: runs[name].teacher.digest for name in taught}
    if len(set(digests.values())) > 1:
        raise OptionError(f'the runs have different teachers: {", ".join(f"{n} {d}" for n, d in digests.items())}')
    first = next(iter(taught.values()))
    data = {name: (built.args.data_dir, built.args.dataset) for name, built in rebuilt.items()}
    if len(set(data.values())) > 1:
        raise OptionError(f'the runs read different data: {data}')
    return {'teacher': first.teacher, **{name: built.student for name, built in rebuilt.items()}}, first.args


def make_loader(batch_size: int, split: str, options: argparse.Namespace):
    config = options.data_config
    return create_loader(
        create_dataset(options.dataset, root=options.data_dir, split=split, **options.dataset_kwargs),
        input_size=config['input_size'], batch_size=batch_size, mean=config['mean'], std=config['std'],
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], use_prefetcher=False, num_workers=0,
        persistent_workers=False)


@torch.no_grad()
def collect(models: Dict[str, torch.nn.Module], readers: Dict[str, FeatureReader], loader, with_cka: bool):
    """Return pooled features per model, and per student the HSIC terms with the teacher, averaged over batches."""
    pooled: Dict[str, Features] = {name: [] for name in models}
    terms: Dict[str, List[torch.Tensor]] = {name: [] for name in models}
    for i, (x, _) in enumerate(loader):
        features = {name: readers[name](model, x)[1] for name, model in models.items()}
        for name, layers in features.items():
            pooled[name].append([f.flatten(3).mean((0, 3)) if f.ndim > 3 else f.mean(0) for f in layers])
            if with_cka and name != 'teacher' and x.shape[0] >= 4:
                terms[name].append(torch.stack([hsic_terms(gram_matrix(s), gram_matrix(a))
                                                for s, a in zip(layers, features['teacher'])]))
        print(f'\r{i + 1}/{len(loader)} batches', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return pooled, {name: torch.stack(t).mean(0) for name, t in terms.items() if t}


def fit_evaluator(args: argparse.Namespace, reader: FeatureReader, teacher: FeatureReader, pooled: Dict[str, Features],
                  students: List[str]) -> SSCLCriterion:
    """Train one pair of projections per layer on the frozen features of all students."""
    torch.manual_seed(args.seed)
    evaluator = SSCLCriterion(reader.names, reader.channels, teacher.channels, temperature=args.temperature,
                              critic=args.critic, weighting='uniform')
    steps = args.fit_epochs * len(pooled['teacher']) * len(students)
    optimizer = torch.optim.AdamW(evaluator.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = {name: [torch.cat(layer) for layer in zip(*batches)] for name, batches in pooled.items()}
    n = len(rows['teacher'][0])
    for _ in range(args.fit_epochs):
        order = torch.randperm(n)
        for batch in order.split(args.batch_size):
            if len(batch) < 4:
                continue
            for name in students:
                loss = evaluator([f[batch].unsqueeze(0) for f in rows[name]],
                                 [f[batch].unsqueeze(0) for f in rows['teacher']])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return evaluator.eval().requires_grad_(False)


def measure(evaluator: SSCLCriterion, student: Features, teacher: Features) -> Dict[str, Tuple[float, float]]:
    """Return NCE and MI bound per layer, averaged over the full batches."""
    size = len(teacher[0][0])
    sums = {name: [0., 0.] for name in evaluator.names}
    batches = [(s, a) for s, a in zip(student, teacher) if len(a[0]) == size]
    for s, a in batches:
        evaluator([f.unsqueeze(0) for f in s], [f.unsqueeze(0) for f in a])
        for name, stats in evaluator.stats.items():
            sums[name][0] += stats['nce'] / len(batches)
            sums[name][1] += stats['mi_bound'] / len(batches)
    return {name: tuple(values) for name, values in sums.items()}


def main() -> None:
    args = parse_args()
    models, options = rebuild_models(args.runs)
    students = [name for name in models if name != 'teacher']
    size = options.data_config['input_size']
    readers = {name: FeatureReader(model.eval(), 4, size) for name, model in models.items()}
    train, val = (make_loader(args.batch_size, split, options) for split in (options.train_split, options.val_split))
    pooled, _ = collect(models, readers, train, with_cka=False)
    evaluator = fit_evaluator(args, readers[students[0]], readers['teacher'], pooled, students)
    pooled, terms = collect(models, readers, val, with_cka=True)

    rows = []
    for name in students:
        values = measure(evaluator, pooled[name], pooled['teacher'])
        for (layer, (nce, bound)), (xy, xx, yy) in zip(values.items(), terms[name].tolist()):
            rows.append(dict(run=name, layer=layer, nce=nce, mi_bound=bound, cka=xy / (xx * yy) ** 0.5))
    print(f'{"run":<14}{"layer":<10}{"NCE":>8}{"MI bound":>10}{"CKA":>8}   (batch {args.batch_size}, nats)')
    for row in rows:
        print(f'{row["run"]:<14}{row["layer"]:<10}{row["nce"]:>8.3f}{row["mi_bound"]:>10.3f}{row["cka"]:>8.3f}')
    with open(f'{args.output}.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    text = json.dumps(dict(options=vars(args), rows=rows), indent=2, default=str)
    Path(f'{args.output}.json').write_text(text + '\n')


if __name__ == '__main__':
    try:
        main()
    except OptionError as error:
        sys.exit(f'error: {error}.')
