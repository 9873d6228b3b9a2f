"""Leaf-level operations of shared randomness; installed as `jaxfl.kernels`.

In `jaxfl`, `perturb`, `blocks` and `lazy` are the only importers. The folder
lies at the top of the repository, but `kernels` is a name that another package
on PyPI owns, so this code answers to `jaxfl.kernels` alone. Under the other
name it is an empty module: libraries that only look whether there is a package
`kernels` (such as transformers, in a program that runs in the repository) go on
without it.

  * `xla`: plain XLA for every backend, and the definition that the others have
    to match bit for bit.
  * `tiles`: many directions on a tensor, or on rectangles of it, with `xla`.
  * `lowrank`: directions that are products of small sign matrices.
  * `walsh`: all directions of a Walsh pool at once.
  * `mosaic_tpu`, `mosaic_gpu`: many directions on a tensor, in Pallas. `signs`
    is what they share. `mosaic_gpu_walsh`: Walsh pools.
  * `api`: chooses one of them.
  * `arg_specs`: shapes of real tensors, for tests and measurements.

What is verified without a TPU or a GPU (`tests/test_kernels.py`,
`test_grid_kernels.py`): the code of the kernels runs in JAX's interpret modes
and has the bits of the NumPy reference; they lower for their platforms; and
`experiments.compile_kernels` compiles them ahead of time for TPU v5e and v6e
and for sm_90a. The layouts that `mosaic_gpu` gives to registers do not exist in
interpret mode: `tests/test_device.py` is for the device itself.

On a device (November 2026, JAX 0.11.2): `add` and `project` of `mosaic_gpu`
have the bits of the reference on an H100. Plans of rectangles, `add_units` and
`mosaic_gpu_walsh` are younger: an H200 ran a first form of them, which had
these bits as far as it came. `mosaic_tpu` has never run on a TPU.
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
