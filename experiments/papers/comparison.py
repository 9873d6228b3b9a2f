"""All methods on one task, at equal bytes and at equal forward passes."""

from experiments.papers import study_entry

_NOTES = [
  'Nothing was published for this task and model; for tables of large models'
  ' see --paper=ferret --figure=table2 and table3.'
]

ENTRIES = {
  'sst2': study_entry.entry(
    'SPSA, FedKSeed, -Pro, DeComFL, Ferret, FedAvg on SST-2 features',
    'methods_sst2',
    missing='not published',
    notes=_NOTES,
  ),
  'text': study_entry.entry(
    'the same methods on a language model and text',
    'methods_text',
    missing='not published',
    notes=_NOTES,
  ),
}
