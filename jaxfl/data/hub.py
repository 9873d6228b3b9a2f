"""Data sets of the Hugging Face hub as rows; no foreign code is run."""

import contextlib
import logging as std_logging
import pathlib
import tempfile
from collections.abc import Iterator

from absl import logging

from jaxfl.data import sources

# readers that we let run: none of them executes or unpickles what it reads
FORMATS = ('csv', 'json', 'parquet', 'text', 'arrow', 'cache')


def read(
  name: str, train: str = 'train', test: str | None = None
) -> sources.Splits:
  """Rows of a data set on the Hugging Face hub, or of its cached copy.

  Args:
    name: owner/name, or owner/name:config.
    train: name of the split to train on; 'train[:10%]' takes a part of it.
    test: name of the split to hold out; the first that is there of
      `sources.TEST_SPLITS` if None.

  Raises:
    FileNotFoundError: if the hub or the data set cannot be reached.
    ValueError: if it has no such config or split, or needs code to be read.
  """
  import datasets

  repo, _, config = name.partition(':')
  logging.info('looking for data set %r on the hub', name)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_quiet())
    cache = _hub_cache(stack)
    try:
      builder = datasets.load_dataset_builder(
        repo, config or None, cache_dir=cache
      )
      if builder.name not in FORMATS:
        raise ValueError(
          f'its files are read by {builder.name!r}, we read {FORMATS}'
        )
      builder.download_and_prepare()
      splits = list(builder.info.splits or ())
      held_out = test or next(
        (s for s in sources.TEST_SPLITS if s in splits), None
      )
      parts = [
        builder.as_dataset(split=part) if part else None
        for part in (train, held_out)
      ]
    except OSError as error:
      raise FileNotFoundError(
        f'data set {name!r} cannot be had from the hub: {error}'
      ) from error
    except (ValueError, RuntimeError, KeyError) as error:
      raise ValueError(
        f'data set {name!r} from the hub cannot be read: {error}'
      ) from error
    where = f'data set {name!r}'
    rows, names = sources.to_rows(parts[0], f'{where}, split {train!r}')
    if held_out is None:
      return sources.Splits(rows, None, names)
    return sources.Splits(
      rows, sources.to_rows(parts[1], f'{where}, split {held_out!r}')[0], names
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """No lines about every retry: what we raise says what is wrong."""
  logger = std_logging.getLogger('huggingface_hub')
  level = logger.level
  logger.setLevel(std_logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


def _hub_cache(stack: contextlib.ExitStack) -> str | None:
  """None (the usual cache) if that can be written, else a temporary folder."""
  from datasets import config

  folder = pathlib.Path(config.HF_DATASETS_CACHE)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      return None
  except OSError:
    logging.warning(
      'cannot write to %s: what is downloaded now is not kept; set HF_HOME to '
      'a folder that can be written',
      folder,
    )
    return stack.enter_context(
      tempfile.TemporaryDirectory(prefix='jaxfl-data-')
    )
