#!/usr/bin/env python3
"""Write the table of what the audit says of timm's classes, for the version of timm that is installed.

    python benchmarks/audit_table.py             # all architectures that have a class which those before lack
    python benchmarks/audit_table.py --skip-all  # one model of every family and the hard cases only

Models are built and run on the meta device, without arithmetic, where they do not look at values. The table is
written only if nothing is unknown. Models
with classes that it lacks are audited when they are converted.
"""
import argparse
import json
import multiprocessing
import time
from typing import Any, Dict, Optional, Set

import timm
import torch
from coverage import HARD_CASES, REPRESENTATIVES, Subject

from timm_sscl.conversion.audit.run import run
from timm_sscl.conversion.audit.table import TABLES
from timm_sscl.conversion.audit.verdicts import class_name, findings
from timm_sscl.conversion.policy import Policy
from timm_sscl.probing import ProbeError, probe
from timm_sscl.models.spiking import PREFIX

WRAPPERS = 'FeatureListNet', 'FeatureDictNet', 'FeatureHookNet', 'FeatureGetterNet'  # they call the model's own modules
FAMILIES = tuple(dict.fromkeys([*REPRESENTATIVES.values(), *HARD_CASES]))

_seen: Set[str] = set()  # classes that this process has audited


def audit_model(name: str) -> Optional[Dict[str, Any]]:
    """Classes of one architecture, and what the audit finds in each; None where all classes were seen before."""
    torch.set_num_threads(1)
    with torch.device('meta'):
        classes = {class_name(module) for module in timm.create_model(name).modules()}
        if classes <= _seen:
            return None
        model = timm.create_model(PREFIX + name, timesteps=2, allow_analog=True)
    try:
        seen = probe(model, lambda example: run(model, example), batch=2)
    except ProbeError:  # it looks at values
        model = Subject(name).create(PREFIX, timesteps=2, allow_analog=True)
        seen = probe(model, lambda example: run(model, example), batch=2)
    modules, ops = dict(model.named_modules()), {}
    found = findings(model, seen, model._report, Policy(model, None, None))
    for finding in found:
        path = finding.name.removesuffix(finding.op).removesuffix('.')
        ops.setdefault(class_name(modules[path]), {})[finding.op] = finding.reason
    _seen.update(classes)
    return dict(model=name, classes=classes, ops=ops, unknown=[f'{name}: {f.reason}' for f in found if f.unknown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--skip-all', action='store_true', help='only the models of the coverage benchmark')
    parser.add_argument('--jobs', type=int, default=2, help='processes, one thread each (default: 2)')
    args = parser.parse_args()
    names = list(FAMILIES)
    if not args.skip_all:
        names += [name for name in timm.list_models() if not name.startswith(PREFIX) and name not in FAMILIES]
    table: Dict[str, Dict[str, Dict[str, str]]] = {}
    wrappers = {f'timm.models._features.{wrapper}' for wrapper in WRAPPERS}
    unknown, began = [], time.time()
    with multiprocessing.get_context('fork').Pool(args.jobs) as pool:
        for n, row in enumerate(pool.imap_unordered(audit_model, names), 1):
            if row is None:
                continue
            print(f'{n:>5}/{len(names)}  {time.time() - began:5.0f} s  {row["model"]}', flush=True)
            unknown += row['unknown']
            for name in row['classes'] | wrappers:
                module, _, cls = name.rpartition('.')
                table.setdefault(module, {}).setdefault(cls, {}).update(row['ops'].get(name, {}))
    if unknown:
        raise SystemExit('not written:\n' + '\n'.join(unknown))
    file = TABLES / f'timm_{timm.__version__}.json'
    file.write_text(json.dumps({m: dict(sorted(c.items())) for m, c in sorted(table.items())}, indent=1) + '\n')
    print(f'{file}: {sum(map(len, table.values()))} classes')


if __name__ == '__main__':
    main()
