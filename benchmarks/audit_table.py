#!/usr/bin/env python3
"""Write the table of the audit's results for timm's classes, for the installed version of timm.

    python benchmarks/audit_table.py             # one small model of every family, and the hard cases
    python benchmarks/audit_table.py --all       # also every architecture with a class that is not in the table yet
    python benchmarks/audit_table.py --continue  # keep the existing table and add what it lacks

Models run on the CPU with two images of the smallest size that they accept. The table is written after every model. A
model with an unexplained operation is reported, and its findings are left out. Models with classes that are not in
the table are audited at conversion.
"""
import argparse
import json
import time
from pathlib import Path
from typing import Dict, List, Set

import timm
import torch
import torch.nn as nn
from coverage import HARD_CASES, REPRESENTATIVES, Subject

from timm_sscl.conversion.audit import Finding, audit
from timm_sscl.conversion.audit.table import TABLES
from timm_sscl.conversion.audit.verdicts import class_name
from timm_sscl.conversion.finding.policy import Policy
from timm_sscl.models.spiking import PREFIX

WRAPPERS = 'FeatureListNet', 'FeatureDictNet', 'FeatureHookNet', 'FeatureGetterNet'  # they call the model's own modules
MAX_PARAMETERS = 300e6  # larger architectures are skipped, since smaller ones of their family have the same classes

Table = Dict[str, Dict[str, Dict[str, str]]]  # module -> class -> operation that stays analog -> reason


class Unexplained(ValueError):
    """The audit does not fully explain an architecture."""


def classes_of(name: str) -> Set[str]:
    """Return the names of the classes in an architecture before its conversion."""
    with torch.device('meta'):
        model = Subject(name).create()
    if sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS:
        raise Unexplained(f'more than {MAX_PARAMETERS / 1e6:.0f} million parameters')
    return {class_name(module) for module in model.modules()}


def findings_of(model: nn.Module) -> List[Finding]:
    """Return the findings of an audit of a spiking model.

    Raises:
        Unexplained: The audit finds an unknown operation or cannot run.
    """
    # the conversion has already audited a model with classes that the installed table lacks
    seen = model._audit or audit(model, model._report, Policy(model, None, None))
    if seen.unknown or seen.status.startswith('pending') or 'training mode was not seen' in seen.status:
        raise Unexplained('; '.join([*(finding.reason for finding in seen.unknown), seen.status]))
    return seen.findings


def audit_model(name: str) -> Dict[str, Dict[str, str]]:
    """Return class -> operation -> reason for all classes of one architecture."""
    model = Subject(name).create(PREFIX, timesteps=2, allow_analog=True)
    modules = dict(model.named_modules())
    found: Dict[str, Dict[str, str]] = {cls: {} for cls in classes_of(name)}
    for finding in findings_of(model):
        path = finding.name.removesuffix(finding.op).removesuffix('.')
        found.setdefault(class_name(modules[path]), {})[finding.op] = finding.reason
    return found


def add(table: Table, found: Dict[str, Dict[str, str]]) -> None:
    """Add the findings of an audit to the table."""
    for name, ops in found.items():
        module, _, cls = name.rpartition('.')
        table.setdefault(module, {}).setdefault(cls, {}).update(ops)


def write(file: Path, table: Table) -> None:
    """Write the table atomically."""
    part = file.with_suffix('.part')
    ordered = {m: {c: dict(sorted(ops.items())) for c, ops in sorted(t.items())} for m, t in sorted(table.items())}
    part.write_text(json.dumps(ordered, indent=1) + '\n')
    part.replace(file)


def run(names: List[str], table: Table, file: Path, again: bool) -> Dict[str, str]:
    """Audit architectures and add them to the table. Return those that the audit does not explain, with the reason.

    Args:
        names: Architectures.
        table: The table, changed in place.
        file: File of the table, written after every model.
        again: Whether to audit models whose classes are all in the table, too.
    """
    failed, began = {}, time.time()
    for n, name in enumerate(names, 1):
        try:
            classes = classes_of(name)
            if not again and all(c.rpartition('.')[2] in table.get(c.rpartition('.')[0], ()) for c in classes):
                continue
            add(table, audit_model(name))
        except Exception as error:  # one failing architecture does not stop the others
            failed[name] = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
        write(file, table)
        print(f'{n:>5}/{len(names)}  {time.time() - began:5.0f} s  {name}  {failed.get(name, "")}', flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--all', action='store_true', help='all architectures, after one of every family')
    parser.add_argument('--continue', dest='go_on', action='store_true', help='keep the table there is and add to it')
    parser.add_argument('--output', type=Path, default=TABLES, help='folder (default: where the library reads it)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.output / f'timm_{timm.__version__}.json'
    table: Table = json.loads(file.read_text()) if args.go_on and file.is_file() else {}
    add(table, {f'timm.models._features.{wrapper}': {} for wrapper in WRAPPERS})
    failed = run(list(REPRESENTATIVES.values()), table, file, again=not args.go_on)
    others = list(HARD_CASES)
    if args.all:
        others += [name for name in timm.list_models() if not name.startswith(PREFIX)]
    failed.update(run(others, table, file, again=False))
    print(f'{file}: {sum(map(len, table.values()))} classes')
    for name, reason in failed.items():
        print(f'left out: {name}: {reason}')
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
