"""The CPU's side of `experiments.digests`: bits that must never change."""

import pytest

from experiments import digests


@pytest.mark.parametrize('name', digests.CASES)
def test_weights_after_1000_updates(name):
  assert digests.run(name) == digests.expected()[name]
