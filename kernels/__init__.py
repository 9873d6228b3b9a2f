"""Leaf-level operations of shared randomness; installed as `jaxfl.kernels`.

`jaxfl.perturb` and `jaxfl.blocks` are the only importers. The folder lies at
the top of the repository, but `kernels` is a name that another package on PyPI
owns, so this code answers to `jaxfl.kernels` alone. Under the other name it is
an empty module: libraries that only look whether there is a package `kernels`
(such as transformers, in a program that runs in the repository) go on without
it.

  * `xla`: plain XLA for every backend, and the definition that the others have
    to match bit for bit.
  * `tiles`: many directions on a tensor, or on rectangles of it, with `xla`.
  * `lowrank`: directions that are products of small sign matrices.
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
