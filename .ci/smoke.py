"""What a user of the built package does first: import it, train with the loss, run train.py and the console scripts.

    python smoke.py SDIST     in a folder outside of the repository, with the package installed
"""
import importlib.metadata
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import timm_sscl
from timm_sscl.training.command_line.recipes import load_recipe

here, scripts = Path.cwd().resolve(), Path(sys.executable).parent
assert here not in Path(timm_sscl.__file__).resolve().parents, timm_sscl.__file__
assert importlib.metadata.version('timm_sscl') == timm_sscl.__version__
assert load_recipe('cifar100_resnet20_t2') and (Path(timm_sscl.__file__).parent / 'py.typed').is_file()

with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(here / 'sdist')
source, = (here / 'sdist').iterdir()
assert source.name == f'timm_sscl-{timm_sscl.__version__}', source

for code in re.findall(r'^```python\n(.*?)^```', (source / 'README.md').read_text(), re.S | re.M):
    exec(compile(code, 'README.md', 'exec'), {'__name__': 'readme'})


def run(*command):
    print('+', *command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


# the script of the source distribution, beside no package, takes the installed one
(here / 'train.py').write_text((source / 'train.py').read_text())
run(sys.executable, 'train.py', '--model', 'spiking_test_resnet', '--timesteps', 2, '--epochs', 1, '--batch-size', 16,
    '--teacher-epochs', 1, '--warmup-epochs', 0, '--train-num-samples', 64, '--val-num-samples', 40, '--workers', 0,
    '--output', 'out', '--experiment', 'run')
run(scripts / 'timm-sscl-hub', 'out/run', 'hub')
assert timm_sscl.load('hub').timesteps == timm_sscl.load('out/run/last.pth.tar').timesteps == 2
run(scripts / 'timm-sscl-report', '--help')
print('smoke test passed:', timm_sscl.__file__)
