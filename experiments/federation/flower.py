"""What Flower loads: a ServerApp and a ClientApp, see docs/flower.md."""

import os

import jax
from absl import logging
from flwr.app import Context  # pyright: ignore[reportMissingImports]
from flwr.serverapp import (  # pyright: ignore[reportMissingImports]
  Grid,
  ServerApp,
)

from experiments.federation import asked
from jaxfl.federation import flower
from jaxfl.federation.letters import Letter

logging.set_verbosity(logging.WARNING)


def answer(question: Letter, context: Context) -> Letter:
  """Answers a question, in a process of its own; programs are kept."""
  where = os.path.join(context.node_config.get('workdir', 'runs'), 'programs')
  jax.config.update('jax_compilation_cache_dir', os.path.abspath(where))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return asked.answer(question, context.node_config, context.run_config)


client_app = flower.client_app(answer)
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
  """Runs the server of a run to its end."""
  summary = asked.serve(flower.GridPost(grid), context.run_config)
  print('\n'.join(f'{name}: {value}' for name, value in summary.items()))
