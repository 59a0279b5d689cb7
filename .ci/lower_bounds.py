"""Print the lower bounds of setup.cfg's requirements, and of its extra `test`, as pins for pip."""
import configparser
import re
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parent.parent / 'setup.cfg')
lines = config['options']['install_requires'] + config['options.extras_require']['test']
print('\n'.join(sorted({f'{name}=={low}' for name, low in re.findall(r'^([\w-]+)>=([\w.]+),', lines, re.M)})))
