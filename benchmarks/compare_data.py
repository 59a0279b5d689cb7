"""Runs of a comparison: from runs.jsonl to a CSV file and a file of bits per image, and back."""
import csv
import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

import numpy as np

from trials import decode_correct, encode_correct

Row = Dict[str, Any]

MAX_BITS = 200_000  # bytes of a file of bits that is kept in the repository
# columns that hold text; others hold JSON
TEXT = ('name', 'plan', 'phase', 'arm', 'split', 'arch', 'teacher', 'status', 'error', 'precision', 'device', 'cpu',
        'torch', 'timm', 'revision', 'finished')


def csv_file(folder: Path, plan: str) -> Path:
    return folder / f'compare_{plan}.csv'


def costs_file(folder: Path, plan: str) -> Path:
    return folder / f'compare_{plan}_costs.csv'


def bits_file(folder: Path, plan: str) -> Path:
    return folder / f'compare_{plan}_bits.npz'


def check_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for a primary or confirming run that saw the images on which settings are chosen, that is there
    twice, or that ran on another kind of device or in another precision than those it is paired with.
    """
    seen: Dict[Any, str] = {}
    places: Dict[Any, Tuple[Any, str]] = {}
    for row in rows:
        if row['phase'] not in ('primary', 'confirm'):
            continue
        if row['split'] != 'validation':
            raise ValueError(f"{row['name']}: a run of phase '{row['phase']}' on the split '{row['split']}'. Only the "
                             f'validation images count.')
        if row['status'] != 'ok':
            continue
        key = row['phase'], setting(row), row['arm'], row['seed']
        if key in seen:
            raise ValueError(f"{row['name']} and {seen[key]}: two runs of one arm and seed in phase '{row['phase']}'.")
        seen[key] = row['name']
        where = ', '.join(str(row[name]) for name in ('device', 'precision') if row.get(name))
        first, other = places.setdefault((row['phase'], setting(row)), (where, row['name']))
        if where != first:
            raise ValueError(f"{row['name']}: a run on {where}, but {other} on {first}. Pairs are of one device and "
                             'precision.')


def setting(row: Mapping[str, Any]) -> Tuple[str, int, str]:
    """Return what compared runs have in common: name of the scale, T and network."""
    return row['scale']['name'], row['timesteps'], row['arch']


def write_rows(folder: Path, plan: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write every run of a plan to CSV, failed ones too, and the bits of those of the comparison if they are small.

    The file of bits holds the arrays `names` (R,) of the runs, `sizes` (R,) in bytes, and `bits`, the bytes of all runs
    one after the other. `numpy.unpackbits` of a run's bytes says of each image, in the order of the data, whether it is
    classified correctly; the first `num_images` bits count, a column of the CSV file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row if key != 'correct'))
    with open(csv_file(folder, plan), 'w', newline='') as out:
        writer = csv.DictWriter(out, columns, lineterminator='\n')
        writer.writeheader()
        for row in rows:
            writer.writerow({key: row[key] if key in TEXT else _json(row[key])
                             for key in columns if row.get(key) is not None})
    compared = [row for row in rows if row.get('correct') and row['phase'] in ('primary', 'confirm')]
    file = bits_file(folder, plan)
    file.unlink(missing_ok=True)
    if compared:
        bits = [np.packbits(decode_correct(row)) for row in compared]
        np.savez_compressed(file, names=[row['name'] for row in compared], sizes=[len(b) for b in bits],
                            bits=np.concatenate(bits))
        size = file.stat().st_size
        if size > MAX_BITS:
            print(f'{file}: {size} bytes of results per image, more than {MAX_BITS}; not kept.')
            file.unlink()


def _json(value: Any) -> str:
    return json.dumps(_shortened(value), separators=(',', ':'))


def _shortened(value: Any) -> Any:
    """Return a value with its numbers in six significant digits."""
    if isinstance(value, float):
        return float(f'{value:.6g}')
    if isinstance(value, Mapping):
        return {key: _shortened(v) for key, v in value.items()}
    return [_shortened(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_rows(folder: Path, plan: str) -> List[Row]:
    """Return the runs of a plan as `write_rows` left them; none if there is no file."""
    file, bits = csv_file(folder, plan), bits_file(folder, plan)
    if not file.is_file():
        return []
    with open(file, newline='') as lines:
        rows = [{key: text if key in TEXT else json.loads(text) for key, text in line.items() if text != ''}
                for line in csv.DictReader(lines)]
    if bits.is_file():
        with np.load(bits) as kept:
            packed = dict(zip(kept['names'].tolist(), np.split(kept['bits'], np.cumsum(kept['sizes'])[:-1])))
        for row in rows:
            if row['name'] in packed:
                row['correct'] = encode_correct(np.unpackbits(packed[row['name']])[:row['num_images']])
    return rows
