"""Print the lowest versions that setup.cfg allows, of what the package and its extra `test` need, as pins for pip."""
import configparser
import re
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parent.parent / 'setup.cfg')
lines = config['options']['install_requires'] + config['options.extras_require']['test']
pins = {f'{name}=={low}' for name, low in re.findall(r'^([\w.-]+)(?:\[\w+\])?>=([\w.]+),', lines, re.M)}
print('\n'.join(sorted(pins)))
