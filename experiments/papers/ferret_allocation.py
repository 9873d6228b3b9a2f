"""How Ferret's coordinates are best spread over blocks.

Reconstructing a block of d entries from K coordinates has the squared error
(d - 2 + kappa) / K |delta|**2 (`jaxfl.allocation`). Compared are four rules, at
the same number of coordinates (bytes) and at the same sum of K_l d_l (the cost
to project and reconstruct):

    bytes    K_l ~ sqrt(d_l) |delta_l|
    compute  K_l ~ |delta_l|
    paper    K_l = max(floor(K |delta_l| / max |delta|), 2), the code's rule
    uniform  K_l = K

on blocks that are whole tensors, of a list like LLaMA's and of what clients of
FedAvg have to send; and on the same cut into blocks of at most 2**14 entries.
"""

import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from experiments.papers import common, deltas
from experiments.papers.ferret_cosine import project, reconstruct
from jaxfl import allocation, blocks, keys

COORDINATES = 4096

Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
# norms float32[L], sizes int64[L], amount -> counts int32[L]


def _of_library(name: str) -> Rule:
  def rule(norms, sizes, total):
    factors = allocation.factors(name, sizes.tolist(), 'rademacher')
    return np.asarray(allocation.counts(jnp.asarray(norms), factors, total))

  return rule


def _paper(norms, sizes, largest):
  del sizes  # Unused.
  return np.maximum((norms / norms.max() * largest).astype(np.int32), 2)


def _uniform(norms, sizes, total):
  del sizes  # Unused.
  edges = np.arange(len(norms) + 1) * total // len(norms)
  return np.diff(edges).astype(np.int32)


RULES: dict[str, Rule] = {
  'bytes': _of_library('bytes'),
  'compute': _of_library('compute'),
  'paper': _paper,
  'uniform': _uniform,
}


def spend(rule: Rule, norms, sizes, cost: np.ndarray, budget: float):
  """Counts of a rule that cost about as much as a budget, int32[L].

  Args:
    rule: to follow.
    norms: float32[L].
    sizes: int64[L].
    cost: of a coordinate of every block, float64[L].
    budget: of all of them, well above two coordinates for every block.
  """
  amount = int(budget / cost.mean())
  counts = rule(norms, sizes, amount)
  for _ in range(6):
    if (new := round(amount * budget / float(counts @ cost))) == amount:
      break
    amount = new
    counts = rule(norms, sizes, amount)
  return counts


def predicted(norms, sizes, counts) -> float:
  """Expected squared error as a share of |delta|**2, for signs."""
  squares = norms.astype(np.float64) ** 2
  errors = (sizes - 1) / np.maximum(counts, 1) * squares
  return float(np.sum(errors) / np.sum(squares))


def measured(case: deltas.Case, counts: np.ndarray, seed: int) -> float:
  """Squared error of one reconstruction as a share of |delta|**2.

  Blocks are taken one by one, each as a tensor of its own: blocks of one shape
  share their compiled programs.
  """
  num_slots = max(COORDINATES, 1 << int(counts.max()).bit_length())
  error = total = 0.0
  for i, (part, count) in enumerate(zip(case.parts, counts, strict=True)):
    tree = {'w': part}
    whole = blocks.partition(tree, max_size=deltas.WHOLE)
    k = jnp.full(1, count, jnp.int32)
    directions = keys.fold(keys.root(seed), i, np.arange(num_slots))
    gamma = project(tree, whole, k, directions) / np.float32(max(count, 1))
    rec = reconstruct(tree, whole, k[None], directions[None], gamma[None])
    error += float(jnp.sum(jnp.square(rec['w'] - part)))
    total += float(jnp.sum(jnp.square(part)))
  return error / total


def run(
  request: common.Request,
  coordinates: int = COORDINATES,
  with_model: bool = True,
) -> common.Result:
  """All rules on all differences."""
  seeds = request.seed_list
  clients = deltas.Clients() if with_model else None
  found: dict[tuple[str, str, str], list[dict]] = {}
  blocks_of: dict[str, int] = {}
  for (seed,) in common.track((seed,) for seed in seeds):
    for case in deltas.cases(seed, clients):
      norms, sizes = case.norms(), case.sizes
      blocks_of[case.name] = len(sizes)
      reference = RULES['compute'](norms, sizes, coordinates)
      budgets = {
        'bytes': (np.ones(len(sizes)), float(coordinates)),
        'compute': (sizes.astype(float), float(reference @ sizes)),
      }
      for equal, (cost, budget) in budgets.items():
        for name, rule in RULES.items():
          counts = spend(rule, norms, sizes, cost, budget)
          start = time.process_time()
          error = measured(case, counts, seed)
          found.setdefault((case.name, equal, name), []).append(
            {
              'error': error,
              'predicted': predicted(norms, sizes, counts),
              'coordinates': int(counts.sum()),
              'work': float(counts @ sizes),
              'seconds': time.process_time() - start,
            }
          )
  rows = []
  for (case, equal, name), runs in found.items():
    mean = lambda key, runs=runs: float(np.mean([r[key] for r in runs]))
    best = found[case, equal, equal]
    ratios = [
      r['predicted'] / b['predicted'] for r, b in zip(runs, best, strict=True)
    ]
    rows.append(
      common.row(
        f'{case}, equal {equal}: {name}',
        [r['error'] for r in runs],
        published='not found' if name == 'paper' else '-',
        seconds=mean('seconds'),
        more={
          'coordinates': round(mean('coordinates')),
          'predicted': mean('predicted'),
          'above best': f'{round(np.mean(ratios) - 1, 3) + 0.0:+.1%}',
          'work': f'{mean("work"):.2e}',
        },
      )
    )
  return common.result(
    f'Ferret: allocations of about {coordinates:,} coordinates to blocks',
    'squared error of a reconstruction as a share of |difference|^2',
    rows,
    style='.2f',
    settings={
      'LLaMA-like': '4 layers of 64, feed-forward 172, 1,000 words, entries'
      ' N(0, 1)',
      'FedAvg client': f'embedded model, {deltas.LOCAL_STEPS} SGD steps of'
      f' {deltas.CLIENT_LR}, a client of the default task for every seed',
      'blocks': ', '.join(f'{k}: {v}' for k, v in blocks_of.items()),
      'directions': 'signs',
    },
    notes=[
      'predicted: sum_l (d_l - 1) / K_l |delta_l|^2. above best: predicted,'
      ' beside the rule that is optimal there.'
      ' work: sum_l K_l d_l. seconds: of CPU, with compilation.',
      'paper is the rule of the reference code, at the K for which its total is'
      ' the same; equal compute is that of the rule compute at'
      f' {coordinates:,} coordinates.',
    ],
    seeds=seeds,
    groups=[list(key) for key in found],
  )


def draw(found: common.Result):
  """Measured errors as bars, predictions as lines on them."""
  cases = list(dict.fromkeys(case for case, _, _ in found['groups']))
  by_key = {
    tuple(key): line
    for key, line in zip(found['groups'], found['rows'], strict=True)
  }
  figure, axes = common.subplots(2, found['title'], sharey=True)
  names = list(RULES)
  for axis, equal in zip(axes, ('bytes', 'compute'), strict=True):
    for i, name in enumerate(names):
      lines = [by_key[case, equal, name] for case in cases]
      x = np.arange(len(cases)) + (i - 1.5) * 0.2
      axis.bar(
        x,
        [line['ours'] for line in lines],
        0.18,
        yerr=[line['spread'] or 0 for line in lines],
        color=f'C{i}',
        label=name,
      )
      axis.hlines(
        [line['more']['predicted'] for line in lines],
        x - 0.09,
        x + 0.09,
        color='k',
        lw=1.5,
        label='predicted' if i == 3 else None,
      )
    axis.set_xticks(
      np.arange(len(cases)),
      [case.replace(', ', '\n') for case in cases],
      fontsize=8,
    )
    axis.set_title(f'at equal {equal}', fontsize=9)
    axis.set_xlabel('difference and its blocks')
  axes[0].set_ylabel('squared error / |difference|^2')
  axes[0].legend(frameon=False, fontsize=8)
  return figure
