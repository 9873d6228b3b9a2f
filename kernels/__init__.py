"""Leaf-level operations of shared randomness; installed as `jaxfl.kernels`.

`jaxfl.perturb` is the only importer. The folder lies at the top of the
repository, but `kernels` is a name that another package on PyPI owns, so this
code answers to `jaxfl.kernels` alone.

  * `xla`: plain XLA for every backend, and the definition that the others have
    to match bit for bit.
"""

if __name__ != 'jaxfl.kernels':
  raise ImportError(
    f'this package was imported as {__name__!r}; it is part of jaxfl: install '
    'the repository (`pip install -e .`) and import `jaxfl.kernels`'
  )
