"""The few types that the whole library shares."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray | np.generic
Params = Any  # a pytree of floating-point arrays
Batch = Any  # a pytree of arrays; the leading axis counts examples
Message = Any  # a pytree of fixed-width arrays: all that leaves a client
Metrics = Mapping[str, jax.Array]
LossFn = Callable[[Params, Batch], jax.Array]  # -> float[]
Schedule = Callable[[int], float]  # round -> value
