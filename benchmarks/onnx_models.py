#!/usr/bin/env python3
"""Write spiking models of timm to ONNX, run the files in onnxruntime, and print the table of the manual.

    python benchmarks/onnx_models.py
    python benchmarks/onnx_models.py resnet18 levit_128s

Every model is calibrated on noise, written from 2 images and run on 8. A difference is the largest one between two
outputs, relative to the largest output. Float32 rounding flips spikes at the threshold, in onnxruntime as in PyTorch,
so the file is compared with the model, and the model with itself in float64.
"""
import argparse
import copy
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List

import onnxruntime
import torch

from coverage import SHRUNK, Subject, T
from timm_sscl.export import to_onnx

IMAGES = 8
ROUNDING = 1e-3  # a difference below flips no spike
# name -> arguments that shrink it
MODELS: Dict[str, Dict[str, Any]] = {
    'resnet18': {}, 'vgg11': dict(mlp_ratio=1 / 64), 'regnetx_002': {}, 'mobilenetv3_small_050': {},
    'convnext_atto': {}, 'vit_tiny_patch16_224': dict(img_size=64), 'mixer_s32_224': {}, 'levit_128s': {},
}


@torch.no_grad()
def check(name: str) -> Dict[str, Any]:
    """Write a model to a file and run it.

    Returns:
        The name, the input's size, the two differences, how far images differ, the share of images with the same class,
        and the seconds that the export took; the reason instead where `to_onnx` refuses the model.
    """
    subject = Subject(name)
    subject.kwargs = MODELS.get(name, SHRUNK.get(name, {}))
    model = subject.spiking.eval()
    images = subject.batch(IMAGES)
    row: Dict[str, Any] = dict(model=name, size=images.shape[-1])
    began = time.time()
    with TemporaryDirectory() as folder:
        file = Path(folder, 'model.onnx')
        try:
            to_onnx(model, file, images[:2])
        except ValueError as error:
            return {**row, 'refused': str(error)}
        row['seconds'] = time.time() - began
        got = torch.from_numpy(onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider']).run(
            None, {'images': images.numpy()})[0])
    expected, exact = model(images), copy.deepcopy(model).double()(images.double())
    scale = exact.abs().max()
    return {**row, 'file': ((got - expected).abs().max() / scale).item(),
            'float32': ((expected - exact).abs().max() / scale).item(),
            'spread': ((exact - exact.mean(0)).abs().max() / scale).item(),
            'same': (got.argmax(1) == expected.argmax(1)).float().mean().item()}


def is_equal(row: Dict[str, Any]) -> bool:
    """Return whether a file computes what its model does, up to rounding.

    Where no spike flips, the difference is rounding itself. Where float32 flips spikes of the model (against float64),
    onnxruntime may flip as many others.
    """
    return 'refused' not in row and row['file'] <= max(ROUNDING, 3 * row['float32'])


def table_lines(rows: List[Dict[str, Any]]) -> List[str]:
    """Return the results as a Markdown table."""
    lines = ['| model | input | onnxruntime and PyTorch | PyTorch, float32 and float64 | same class |',
             '|---|---|---|---|---|']
    for row in rows:
        cells = [f'`{row["model"]}`', f'{row["size"]} px']
        if 'refused' in row:
            cells += [f'refused: {row["refused"]}', '', '']
        else:
            cells += [f'{row["file"]:.1e}', f'{row["float32"]:.1e}', f'{row["same"]:.0%}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=list(MODELS), metavar='MODEL',
                        help='timm names (default: %(default)s)')
    args = parser.parse_args()
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    rows = []
    for name in args.models:
        rows.append(check(name))
        print(rows[-1], flush=True)
    versions = f'torch {torch.__version__}, onnxruntime {onnxruntime.__version__}'
    print('\n'.join(['', f'T = {T}, {IMAGES} images, {versions}:', '', *table_lines(rows)]))
    wrong = [row['model'] for row in rows if not is_equal(row)]
    if wrong:
        raise SystemExit(f'not equal up to rounding, or refused: {", ".join(wrong)}')


if __name__ == '__main__':
    main()
