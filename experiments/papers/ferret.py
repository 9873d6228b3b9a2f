"""Ferret (Shu et al., ICML 2025, https://arxiv.org/abs/2409.06277)."""

import functools

from experiments.papers import (
  common,
  ferret_allocation,
  ferret_cosine,
  ferret_sine,
  reference,
  study_entry,
)


def _sine(panel: str, varied: str) -> common.Entry:
  return common.Entry(
    f'fig. {panel}: convergence on sum sin(w)^2; {varied}',
    functools.partial(ferret_sine.run, panel=panel),
    ferret_sine.draw,
  )


_READ = 'Published numbers as quoted in summaries of the paper.'

ENTRIES = {
  '7': common.Entry(
    'fig. 7: cosine of a reconstruction against K, 100,000 entries',
    ferret_cosine.run,
    ferret_cosine.draw,
  ),
  '8a': _sine('8a', 'methods'),
  '8b': _sine('8b', 'K'),
  '8c': _sine('8c', 'local steps'),
  'allocation': common.Entry(
    'allocations of coordinates to blocks at equal bytes and equal compute',
    ferret_allocation.run,
    ferret_allocation.draw,
  ),
  'K': study_entry.entry(
    'coordinates of a message, on a real task',
    'ferret_coordinates',
    notes=[
      'The paper varies K in its fig. 3, on Natural Instructions with 1.3 B'
      ' parameters; its values could not be read.'
    ],
  ),
  'table2': reference.entry(
    'table 2: Rouge-L of LLaMA',
    (
      'Natural Instructions, 1.3 B',
      'Natural Instructions, 3 B',
      'Dolly, 1.3 B',
      'Dolly, 3 B',
    ),
    {
      'FedIT': ('22.30', '28.13', '30.80', '33.23'),
      'FedZO': ('21.74', '29.46', '26.99', '31.67'),
      'FedKSeed': ('22.33', '29.77', '30.91', '34.56'),
      'FedAvg': ('23.95', '32.11', '29.67', '30.98'),
      'Ferret': ('24.99', '30.03', '30.63', '34.57'),
    },
    [_READ],
  ),
  'table3': reference.entry(
    'table 3: scores of LLaMA on CodeAlpaca and GSM8K',
    ('CodeAlpaca, 7 B', 'CodeAlpaca, 13 B', 'GSM8K, 7 B', 'GSM8K, 13 B'),
    {
      'FedKSeed': ('8.33', '10.70', '28.26', '33.67'),
      'FedAvg': ('15.41', '14.68', '38.30', '39.82'),
      'Ferret': ('12.10', '11.84', '36.10', '34.50'),
    },
    [_READ],
  ),
}
