"""Text, the default task or a directory of it: any stretch is an example."""

from experiments import checks, models, parts
from experiments.config import Config
from jaxfl import objectives
from jaxfl.data import python_text


def build(config: Config) -> parts.Problem:
  """The problem of a resolved config; ValueError or OSError if it has none."""
  options = {
    'length': config.sequence_length,
    'eval_batch_size': config.eval_batch_size,
    'eval_examples': config.eval_examples or 10**9,
  }
  model = models.load_model(config, 'lm')
  if models.load_tokenizer(model).vocab_size != 256:
    raise ValueError(
      'text is read as bytes, which this model is not made for; use'
      ' --model=embedded, or a --dataset of rows'
    )
  checks.length(config, model.shape)
  if config.dataset == 'python_text':
    task = python_text.load(config.num_clients, **options)
  else:
    task = python_text.from_files(config.dataset, config.num_clients, **options)
  measure = objectives.evaluate_lm(model.shape)

  def evaluate(params):
    values = measure(params, task.eval_batches)
    return {
      'bits_per_byte': values['bits_per_token'],
      'accuracy': values['accuracy'],
    }

  loss_fn = objectives.lm_loss(model.shape)
  return parts.assemble(config, model, task, loss_fn, evaluate)
