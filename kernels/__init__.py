"""Leaf-level operations of shared randomness; installed as `jaxfl.kernels`.

In `jaxfl`, `perturb` and `blocks` are the only importers. The folder lies at
the top of the repository, but `kernels` is a name that another package on PyPI
owns, so this code answers to `jaxfl.kernels` alone. Under the other name it is
an empty module: libraries that only look whether there is a package `kernels`
(such as transformers, in a program that runs in the repository) go on without
it.

  * `xla`: plain XLA for every backend, and the definition that the others have
    to match bit for bit.
  * `tiles`: many directions on a tensor, or on rectangles of it, with `xla`.
  * `lowrank`: directions that are products of small sign matrices.
  * `walsh`: all directions of a Walsh pool at once.
  * `mosaic_tpu`, `mosaic_gpu`: many directions on a tensor, in Pallas. `signs`
    is what they share.
  * `api`: chooses one of them for a whole tensor.
  * `arg_specs`: shapes of real tensors, for tests and measurements.

What is verified, and how, without a TPU or a GPU (`tests/test_kernels.py`): the
code of both kernels runs in JAX's interpret modes and has the bits of the NumPy
reference; both lower for their platforms; and `experiments.compile_kernels`
compiles them ahead of time for TPU v5e and v6e and for sm_90a. The layouts that
`mosaic_gpu` gives to registers do not exist in interpret mode. Neither kernel
has run on a device yet, or been timed.
"""

if __name__ != 'jaxfl.kernels':
  __path__ = []  # no submodules

  def __getattr__(name: str):
    if name.startswith('__'):
      raise AttributeError(name)
    raise ImportError(
      f'this package was imported as {__name__!r}; it is part of jaxfl: install'
      ' the repository (`pip install -e .`) and import `jaxfl.kernels`'
    )
