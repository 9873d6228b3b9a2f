"""Version, licence and tools are said in several files, and alike."""

import configparser
import pathlib

import yaml

ROOT = pathlib.Path(__file__).parents[1]


def test_files_agree():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  metadata = setup['metadata']
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == metadata['version']
  assert citation['license'] == metadata['license'] == 'Apache-2.0'
  assert 'Apache License' in (ROOT / metadata['license_files']).read_text()
  readme = (ROOT / 'README.md').read_text()
  assert 'SPDX-License-Identifier: Apache-2.0' in readme
  assert metadata['version'] in (ROOT / 'CHANGELOG.md').read_text()


def test_tools_are_those_of_ci():
  script = (ROOT / '.ci/run').read_text()
  workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
  assert workflow['jobs']['run']['steps'][-1] == {'run': '.ci/run'}
  hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
  for hook in hooks['repos'][0]['hooks']:
    assert hook['entry'].replace(' --force-exclude', '') in script
