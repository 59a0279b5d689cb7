"""One version, stated in one place; requirements with bounds; what the source distribution needs is there."""
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import yaml

import timm_sscl

ROOT = Path(__file__).resolve().parent.parent


def config():
    found = configparser.ConfigParser()
    found.read(ROOT / 'setup.cfg')
    return found


def test_versions_agree():
    """timm_sscl.__version__ is the one that is written by hand; setuptools reads it without importing the package."""
    assert config()['metadata']['version'] == 'attr: timm_sscl.__version__'
    values = {node.targets[0].id: node.value for node in ast.parse((ROOT / 'timm_sscl/__init__.py').read_text()).body
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    version = ast.literal_eval(values['__version__'])
    assert version == timm_sscl.__version__ and re.fullmatch(r'\d+\.\d+\.\d+', version)
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == version
    assert re.search(r'^## (\d\S*) - ', (ROOT / 'CHANGELOG.md').read_text(), re.M).group(1) == version
    texts = [ROOT / 'README.md', *(ROOT / 'docs' / 'pages').glob('*.md')]
    named = {name for file in texts for name in re.findall(r'timm_sscl-(\d[\d.]*\d)', file.read_text())}
    assert named == {version}


def test_the_python_version_is_that_of_the_pages():
    lowest = re.fullmatch(r'>=(\d+\.\d+)', config()['options']['python_requires']).group(1)
    for name in ('README.md', 'docs/pages/getting-started.md'):
        assert f'Python {lowest} or newer' in (ROOT / name).read_text(), name


def test_every_requirement_has_bounds():
    options = config()
    extras = dict(options['options.extras_require'], install=options['options']['install_requires'])
    for extra, text in extras.items():
        for line in text.split('\n'):
            assert not line or re.fullmatch(
                r'[\w.-]+(\[\w+\])?>=[\w.]+,<\d[\w.]*(; python_version >= "3\.\d+")?', line), f'{extra}: {line}'
    pins = subprocess.run(
        [sys.executable, str(ROOT / '.ci/lower_bounds.py')], capture_output=True, text=True, check=True)
    needed = {line.partition('>=')[0] for extra in ('install', 'test') for line in extras[extra].split('\n') if line}
    assert {line.partition('==')[0] for line in pins.stdout.split()} == needed


def test_files_of_the_distributions_exist():
    options = config()
    for pattern in re.split(r',\s*', options['options.package_data']['timm_sscl']):
        assert list((ROOT / 'timm_sscl').glob(pattern)), pattern
    manifest = (ROOT / 'MANIFEST.in').read_text().split()
    assert 'train.py' in manifest
    for name in manifest:
        assert name in ('include', 'recursive-include', '*.py') or (ROOT / name).exists(), name
    for line in options['options.entry_points']['console_scripts'].split('\n'):
        module, _, function = line.partition(' = ')[2].partition(':')
        assert not line or f'def {function}(' in (ROOT / f'{module.replace(".", "/")}.py').read_text(), line


def test_bibtex_of_the_manual_says_what_the_citation_file_says():
    facts = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    software, paper = facts, facts['references'][0]
    page = (ROOT / 'docs/pages/paper-to-code.md').read_text()
    authors = ' and '.join(f'{author["family-names"]}, {author["given-names"]}' for author in paper['authors'])
    for name, value in (
            ('title', software['title']), ('version', software['version']), ('license', software['license']),
            ('author', f'{{{software["authors"][0]["name"]}}}'), ('title', paper['title']), ('author', authors),
            ('booktitle', paper['collection-title']), ('publisher', paper['publisher']['name']),
            ('year', paper['year'])):
        assert f'  {name} = {{{value}}},\n' in page
