#!/usr/bin/env python3
"""Measure the accuracy of a trained ReLU network converted to integrate-and-fire neurons, over T and kinds of
thresholds.

    accelerate launch train.py --model resnet20_cifar --distill none ... --experiment ann
    python benchmarks/pretrained.py output/train/ann

Thresholds come from training images. Accuracies of the spiking network and the ANN are on validation images. The
training neuron (tau 0.25, hard reset) with calibrated gains and the same weights is measured, too; it is an
initialisation, not a conversion.
"""
import argparse
import csv
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from timm.data import create_loader, resolve_data_config
from timm.models import load_checkpoint
from torch.utils.data import Subset

from timm_sscl import calibrate, convert_ann, convert_to_qcfs, convert_to_spiking
from timm_sscl.data import create_dataset

VARIANTS = {
    'per channel, maximum': dict(per_channel=True, percentile=100.),
    'per channel, 99.9 %': dict(per_channel=True, percentile=99.9),
    'per layer, maximum': dict(per_channel=False, percentile=100.),
    'per layer, 99.9 %': dict(per_channel=False, percentile=99.9),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of a train.py run of the ANN')
    parser.add_argument('--timesteps', type=int, nargs='+', default=[1, 2, 4, 8, 16, 32])
    parser.add_argument('--images', type=int, default=1024, help='training images that the thresholds are taken from')
    parser.add_argument('--every', type=int, default=1, help='use every n-th validation image')
    parser.add_argument('--batch-size', type=int, default=100)
    parser.add_argument('--output', type=Path, default=Path('pretrained'), help='writes OUTPUT.csv and OUTPUT.json')
    return parser.parse_args()


def create_ann(run: Path) -> Tuple[nn.Module, Dict[str, Any]]:
    """Return the run's network with its last weights, and its options."""
    options = yaml.safe_load((run / 'args.yaml').read_text())
    facts = json.loads((run / 'summary.json').read_text())
    if facts['timesteps']:
        raise SystemExit(f'{run} trained {facts["model"]}, which spikes; this starts from an ANN.')
    classes = options['num_classes'] or len(create_set(options, 'val_split', False).reader.class_to_idx)
    model = timm.create_model(options['model'], num_classes=classes, **(options['model_kwargs'] or {}))
    if options.get('qcfs'):
        convert_to_qcfs(model, options['qcfs'])
    load_checkpoint(model, str(run / 'last.pth.tar'))
    return model.eval(), options


def create_set(options: Dict[str, Any], split: str, training: bool) -> Any:
    return create_dataset(options['dataset'], root=options['data_dir'], split=options[split], is_training=training)


def loader(options: Dict[str, Any], model: nn.Module, dataset: Any, batch_size: int) -> Any:
    config = resolve_data_config(options, model=model)
    dataset_with_transform = dataset.dataset if isinstance(dataset, Subset) else dataset
    made = create_loader(dataset_with_transform, batch_size=batch_size, use_prefetcher=False, num_workers=0,
                         persistent_workers=False, **{k: config[k] for k in (
                             'input_size', 'mean', 'std', 'interpolation', 'crop_pct')})
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size) if dataset is not made.dataset else made


@torch.no_grad()
def top1(model: nn.Module, batches: List[Tuple[torch.Tensor, torch.Tensor]]) -> float:
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def rows(args: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    ann, options = create_ann(args.run)
    validation = create_set(options, 'val_split', False)
    validation = Subset(validation, range(0, len(validation), args.every)) if args.every > 1 else validation
    batches = list(loader(options, ann, validation, args.batch_size))
    train = create_set(options, 'train_split', False)
    spread = Subset(train, torch.linspace(0, len(train) - 1, min(args.images, len(train))).long().tolist())
    images = torch.cat([x for x, _ in loader(options, ann, spread, args.batch_size)])
    yield dict(neuron='ANN', timesteps='', top1=top1(ann, batches), images=sum(len(y) for _, y in batches))
    began, done, total = time.time(), 0, sum(args.timesteps) * (len(VARIANTS) + 1)

    def fresh() -> nn.Module:
        return create_ann(args.run)[0]

    models = {name: convert_ann(fresh(), images, **variant) for name, variant in VARIANTS.items()}
    models['training neuron, calibrated'] = convert_to_spiking(fresh())
    calibrate(models['training neuron, calibrated'], images[:256])
    for name, model in models.items():
        for timesteps in args.timesteps:
            model.set_timesteps(timesteps)
            yield dict(neuron=name, timesteps=timesteps, top1=top1(model, batches))
            done += timesteps
            eta = (time.time() - began) / done * (total - done)
            print(f'{name}, T={timesteps}: ETA {timedelta(seconds=round(eta))}', flush=True)


def main() -> None:
    args = parse_args()
    results = list(rows(args))
    with args.output.with_suffix('.csv').open('w', newline='') as stream:
        writer = csv.DictWriter(stream, ['neuron', 'timesteps', 'top1', 'images'])
        writer.writeheader()
        writer.writerows(results)
    args.output.with_suffix('.json').write_text(json.dumps(results, indent=2) + '\n')
    ann = results[0]
    print(f'\nANN {ann["top1"]:.2f} top-1 on {ann["images"]} validation images')
    print(f'{"thresholds":<28}' + ''.join(f'{f"T={t}":>8}' for t in args.timesteps))
    for name in dict.fromkeys(row['neuron'] for row in results[1:]):
        print(f'{name:<28}' + ''.join(f'{row["top1"]:>8.2f}' for row in results if row['neuron'] == name))
    print(f'files: {args.output}.csv, {args.output}.json')


if __name__ == '__main__':
    main()
