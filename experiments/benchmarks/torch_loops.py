"""The peers' loops in PyTorch, typed from what their papers describe.

They are what such code does: for every tensor a seeded generator draws a whole
direction, which is then scaled and added, or multiplied with a difference.

  * MeZO (https://arxiv.org/abs/2305.17333, algorithm 1): perturb in place by
    +mu, -2 mu, +mu with normals that the seed gives again, then step.
  * FedKSeed (https://arxiv.org/abs/2312.06353, eq. 7): `w -= c_k z_k` for every
    seed of the pool.
  * Ferret (https://arxiv.org/abs/2409.06277, eq. 4-6): directions of normals
    truncated to +-1 / sqrt(d), d entries; inner products, or a scaled sum.

float32, on one thread, or on the GPU if JAX runs on one and torch sees it.
Without torch, `device` is None and there is nothing to compare with.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

from experiments.benchmarks import machine

SEEDS = 8  # over which loops are timed; each costs the same as the others
_SCALE = 1e-9


def device() -> str | None:
  """Where the loops run, or None if they can't."""
  if not importlib.util.find_spec('torch'):
    return None
  import torch  # pyright: ignore[reportMissingImports]

  if machine.on_cpu():
    torch.set_num_threads(1)
    return 'cpu'
  return 'cuda' if torch.cuda.is_available() else None


def wait() -> None:
  """Until the GPU is done."""
  import torch  # pyright: ignore[reportMissingImports]

  if not machine.on_cpu():
    torch.cuda.synchronize()


def zeros(shapes: dict[str, tuple[int, ...]]) -> list[Any]:
  """A list of tensors."""
  import torch  # pyright: ignore[reportMissingImports]

  return [torch.zeros(shape, device=device()) for shape in shapes.values()]


def _generators(count):
  import torch  # pyright: ignore[reportMissingImports]

  for seed in range(count):
    yield torch.Generator(device()).manual_seed(seed)


def _truncated(w, generator):
  import torch  # pyright: ignore[reportMissingImports]

  end = 1 / math.sqrt(w.numel())
  z = torch.empty_like(w)
  return torch.nn.init.trunc_normal_(z, a=-end, b=end, generator=generator)


def mezo_pass(weights: list[Any], scale: float = _SCALE) -> None:
  """Seed, then draw, scale and add for every tensor: one of MeZO's passes."""
  import torch  # pyright: ignore[reportMissingImports]

  torch.manual_seed(0)
  for w in weights:
    z = torch.normal(
      mean=0.0, std=1.0, size=w.size(), device=w.device, dtype=w.dtype
    )
    w.add_(z * scale)


def mezo_step(weights: list[Any], loss: Callable[[], Any]) -> float:
  """Two losses, three passes around them, and the step."""
  mu = 1e-3
  mezo_pass(weights, mu)
  plus = loss()
  mezo_pass(weights, -2 * mu)
  minus = loss()
  mezo_pass(weights, mu)
  projected_grad = float(plus - minus) / (2 * mu)
  mezo_pass(weights, -1e-6 * projected_grad)
  return projected_grad


def fedkseed_rebuild(weights: list[Any]) -> None:
  """`w -= c_k z_k` for every seed."""
  import torch  # pyright: ignore[reportMissingImports]

  for k, generator in enumerate(_generators(SEEDS)):
    for w in weights:
      z = torch.empty_like(w).normal_(generator=generator)
      w.sub_(_SCALE * (k + 1) * z)


def ferret_project(weights: list[Any]) -> list[Any]:
  """`<v_k, delta>` for every seed, over all tensors."""
  products = []
  for generator in _generators(SEEDS):
    terms = [w.view(-1).dot(_truncated(w, generator).view(-1)) for w in weights]
    products.append(sum(terms))
  return products


def ferret_rebuild(weights: list[Any]) -> None:
  """`w -= gamma_k v_k` for every seed."""
  for k, generator in enumerate(_generators(SEEDS)):
    for w in weights:
      w.sub_(_SCALE * (k + 1) * _truncated(w, generator))


def ferret_both(weights: list[Any]) -> None:
  """What a client and the server do: project, and reconstruct."""
  ferret_project(weights)
  ferret_rebuild(weights)


# name -> the loop, and over how many directions it goes
LOOPS: dict[str, tuple[Callable[[list[Any]], Any], int]] = {
  'MeZO pass, torch': (mezo_pass, 1),
  'FedKSeed rebuild, torch': (fedkseed_rebuild, SEEDS),
  'Ferret project, torch': (ferret_project, SEEDS),
  'Ferret project + reconstruct, torch': (ferret_both, SEEDS),
}
