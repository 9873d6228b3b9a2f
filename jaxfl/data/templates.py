"""Prompts: what a row of data is as text, and what the answers are.

A template is text with fields of the row in braces and one slot: `{answer}`
at the end for causal models, `{mask}` anywhere for masked ones. A field may
name how it is written: `{premise:open}` (see `WRITINGS`).

Protocol, slots and label words follow Malladi et al., "Fine-Tuning Language
Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333, appendix
(causal prompts; masked ones after Gao et al., "Making Pre-trained Language
Models Better Few-shot Learners", ACL 2021, arXiv:2012.15723). Whole sentences
are in our own words, so scores need not equal those papers' to the digit. TREC
and SST-5 for causal models, and CB, BoolQ and WiC for masked ones, are ours.
Slots and words agree with the authors' code, github.com/princeton-nlp/MeZO:
large_models/templates.py (causal), medium_models/run_fewshot.sh (masked).

The space before the answer belongs to the answer: prompt and answer are
encoded apart, and `'{text} It was {answer}'` is the prompt `'... It was'` with
the answers `' terrible'` and `' great'`. After a line end there is none.
"""

import functools
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxfl.data import rows as rows_lib

SLOTS = ('answer', 'mask')


def _lower(text: str) -> str:
  """The first letter small, if the first word is not the pronoun I."""
  alone = text.split(' ')[0].split("'")[0] == 'I'
  return text if alone else text[:1].lower() + text[1:]


def _ask(text: str) -> str:
  text = text.strip()
  return text[:1].upper() + text[1:] + ('' if text.endswith('?') else '?')


_LINKS = {'cause': 'because', 'effect': 'so'}

# how a field may be written
WRITINGS = {
  '': str.strip,
  'open': lambda text: text.strip().removesuffix('.'),  # to be gone on with
  'lower': lambda text: _lower(text.strip()),
  'ask': _ask,  # as a question
  'link': lambda text: _LINKS[text],  # COPA's conjunction
}


class Template(NamedTuple):
  """How rows of a dataset become text.

  Attributes:
    name: of the dataset.
    causal: ends in `{answer}`; '' if there is none.
    masked: has `{mask}`; '' if there is none.
    words: the label words, one per label; empty where `choices` are answers,
      or where a head alone can be used.
    labels: the names of the labels, in the order of `words`; empty if words
      are given by position.
    segments: the text, or the pair of texts, of a classification head.
    choices: templates of the answers where every row has its own; one whose
      field is None in a row is left out.
  """

  name: str
  causal: str
  masked: str
  words: tuple[str, ...]
  labels: tuple[str, ...]
  segments: tuple[str, ...]
  choices: tuple[str, ...] = ()


class Prompt(NamedTuple):
  """A row as text.

  Attributes:
    prefix: before the slot, without the space before it.
    suffix: after the slot; '' for causal models.
    candidates: the answers, each with the space before it.
  """

  prefix: str
  suffix: str
  candidates: tuple[str, ...]


_SENTIMENT = ('{text} It was {answer}', '{text} It was {mask}.')
_INFER = (
  'Take it that {premise} Does it follow that "{hypothesis}"? Yes, No or'
  ' Maybe?\n{answer}',
  '{premise:open}? {mask}, {hypothesis:lower}',
)
_PAIR = ('{premise}', '{hypothesis}')
_NLI = ('entailment', 'neutral', 'contradiction')

TEMPLATES = {
  t.name: t
  for t in (
    Template(
      'sst2',
      *_SENTIMENT,
      ('terrible', 'great'),
      ('negative', 'positive'),
      ('{text}',),
    ),
    Template(
      'sst5',
      *_SENTIMENT,
      ('terrible', 'bad', 'okay', 'good', 'great'),
      ('very negative', 'negative', 'neutral', 'positive', 'very positive'),
      ('{text}',),
    ),
    Template(
      'mr',
      *_SENTIMENT,
      ('terrible', 'great'),
      ('negative', 'positive'),
      ('{text}',),
    ),
    Template(
      'trec',
      'Question: {text}\nAnswer type: {answer}',
      '{mask}: {text}',
      ('Expression', 'Entity', 'Description', 'Human', 'Location', 'Number'),
      ('ABBR', 'ENTY', 'DESC', 'HUM', 'LOC', 'NUM'),
      ('{text}',),
    ),
    Template(
      'cb',
      *_INFER,
      ('Yes', 'No', 'Maybe'),
      ('entailment', 'contradiction', 'neutral'),
      _PAIR,
    ),
    Template(
      'rte',
      '{premise}\nIs it then true that "{hypothesis}"? Yes or No?\n{answer}',
      '{premise:open}? {mask}, {hypothesis:lower}',
      ('Yes', 'No'),
      ('entailment', 'not_entailment'),
      _PAIR,
    ),
    Template(
      'boolq',
      '{passage} {question:ask} {answer}',
      '{passage} {question:ask} {mask}.',
      ('No', 'Yes'),
      ('False', 'True'),
      ('{question:ask}', '{passage}'),
    ),
    Template(
      'wic',
      'Is the sense of "{word}" the same in both sentences? Yes or No?\n'
      '{sentence1}\n{sentence2}\n{answer}',
      '{sentence1} {sentence2} Same sense of "{word}"? {mask}.',
      ('No', 'Yes'),
      ('False', 'True'),
      ('{word}: {sentence1}', '{sentence2}'),
    ),
    Template(
      'copa',
      '{premise:open} {question:link} {answer}',
      '',
      (),
      ('choice1', 'choice2'),
      ('{premise:open} {question:link}', '{choice1} {choice2}'),
      choices=('{choice1:lower}', '{choice2:lower}'),
    ),
    Template('mnli', *_INFER, ('Yes', 'Maybe', 'No'), _NLI, _PAIR),
    Template('snli', *_INFER, ('Yes', 'Maybe', 'No'), _NLI, _PAIR),
  )
}

# generation rows, with and without input
INSTRUCTION = (
  Template(
    'instruction with input',
    'Instruction: {instruction}\n\nInput: {input}\n\nResponse: {answer}',
    '',
    (),
    (),
    (),
    choices=('{response}',),
  ),
  Template(
    'instruction',
    'Instruction: {instruction}\n\nResponse: {answer}',
    '',
    (),
    (),
    (),
    choices=('{response}',),
  ),
)


@functools.lru_cache(256)
def parts(text: str) -> tuple[tuple[str, str | None, str], ...]:
  """A template as (literal before, field or None, writing).

  Raises:
    ValueError: if braces do not match, or a field or a writing is no name.
  """
  try:
    parsed = list(string.Formatter().parse(text))
  except ValueError as error:
    raise ValueError(f'template {text!r}: {error}') from error
  for _, field, writing, conversion in parsed:
    if field is None:
      continue
    if not field.isidentifier() or conversion:
      raise ValueError(
        f'template {text!r}: {field!r} is not the name of a field; write'
        " '{{' for a brace"
      )
    if writing not in WRITINGS:
      raise ValueError(
        f'template {text!r}: {field!r} has the writing {writing!r}; there are'
        f' {sorted(WRITINGS)}'
      )
  return tuple(
    (literal, field, writing or '') for literal, field, writing, _ in parsed
  )


def fields(*texts: str) -> tuple[str, ...]:
  """The fields of templates that are free text, in order, each once."""
  found = (part for text in texts for part in parts(text))
  return tuple(
    dict.fromkeys(
      field
      for _, field, writing in found
      if field is not None and field not in SLOTS and writing != 'link'
    )
  )


def custom(
  template: str,
  words: str | Sequence[str] = (),
  *,
  choices: Sequence[str] = (),
  labels: Sequence[str] = (),
  name: str = 'custom',
) -> Template:
  """A template for data of your own.

  Args:
    template: as `'{text} It was {answer}'`. Models that are masked need the
      slot `{mask}`, or `{answer}`, anywhere; causal ones need it at the end.
    words: label words, one per label; a string is cut at its commas.
    choices: as `Template.choices`, instead of words.
    labels: names of the labels, for `match_labels`; if none are given, words
      are in the order of the labels.
    name: for messages.

  Raises:
    ValueError: if the template has no slot or two, a field that is no name, or
      if there are fewer than two answers, or the same twice.
  """
  if isinstance(words, str):
    words = [word.strip() for word in words.split(',')] if words else []
  slots = [field for _, field, _ in parts(template) if field in SLOTS]
  if len(slots) != 1:
    raise ValueError(
      f'template {template!r} of {name!r} has {len(slots)} slots; it needs one'
      ' {answer} or {mask}'
    )
  if bool(words) == bool(choices):
    raise ValueError(
      f'template of {name!r}: give words or choices, and not both;'
      f' {words=}, {choices=}'
    )
  answers = tuple(words or choices)
  _check_answers(name, answers)
  if labels and len(labels) != len(answers):
    raise ValueError(
      f'template of {name!r} has {len(answers)} answers for {len(labels)}'
      f' labels {tuple(labels)}'
    )
  slot = '{' + slots[0] + '}'
  names = ['{' + field + '}' for field in fields(template, *choices)]
  return Template(
    name=name,
    causal=template.replace(slot, '{answer}')
    if template.endswith(slot)
    else '',
    masked='' if choices else template.replace(slot, '{mask}'),
    words=() if choices else answers,
    labels=tuple(labels),
    segments=(names[0], ' '.join(names[1:])) if names[1:] else tuple(names),
    choices=tuple(choices),
  )


def _check_answers(name: str, answers: tuple[str, ...]) -> None:
  if len(answers) < 2 or len(set(answers)) < len(answers) or '' in answers:
    raise ValueError(
      f'template of {name!r} needs two or more different answers, found'
      f' {answers}'
    )


def with_words(template: Template, words: Sequence[str]) -> Template:
  """The template with other label words, in the order of its labels.

  Raises:
    ValueError: if its answers are no words, or words are not as many as they
      were, or not all different.
  """
  words = tuple(words)
  if len(words) != len(template.words):
    raise ValueError(
      f'template of {template.name!r} takes {len(template.words)} words'
      + (': every row has answers of its own' if template.choices else '')
      + f'; found {words}'
    )
  _check_answers(template.name, words)
  return template._replace(words=words)


def bare(
  name: str, row: Mapping[str, Any], label_names: Sequence[str]
) -> Template:
  """The text fields of a row and nothing else, for a classification head.

  Args:
    name: of the dataset.
    row: one that has the fields of all.
    label_names: of the dataset, by index.

  Raises:
    ValueError: if no field is text.
  """
  names = [k for k, v in row.items() if isinstance(v, str) and k != 'label']
  known = [k for k in rows_lib.TEXT_FIELDS if k in names]
  names = ['{' + k + '}' for k in known or names]
  if not names:
    raise ValueError(f'dataset {name!r}: no field is text in {sorted(row)}')
  segments = (names[0], ' '.join(names[1:])) if names[1:] else tuple(names)
  return Template(name, '', '', (), tuple(label_names), segments)


def named(name: str) -> Template:
  """The template of a dataset.

  Raises:
    ValueError: if there is none, with those there are.
  """
  if name not in TEMPLATES:
    raise ValueError(
      f'no template for the dataset {name!r}; there are {sorted(TEMPLATES)};'
      ' give a template and words of your own'
    )
  return TEMPLATES[name]


def match_labels(template: Template, label_names: Sequence[str]) -> Template:
  """The template with its words in the order of a dataset's labels.

  Args:
    template: whose `labels` say what its words mean.
    label_names: of the dataset, by index. Case, and whether words are joined
      by space, hyphen or underscore, make no difference.

  Raises:
    ValueError: if the names are not those of the template, or more or fewer.
  """
  answers = template.words or template.choices
  if not template.words or not template.labels:
    if len(label_names) != len(answers):
      raise ValueError(
        f'the template of {template.name!r} has the {len(answers)} answers'
        f' {answers}, for the {len(label_names)} labels {list(label_names)}'
      )
    return template
  plain = lambda x: str(x).lower().replace('_', ' ').replace('-', ' ').strip()
  order = {plain(label): i for i, label in enumerate(template.labels)}
  wanted = [plain(name) for name in label_names]
  if sorted(order) != sorted(wanted):
    raise ValueError(
      f'labels {list(label_names)} of {template.name!r} are not those of its'
      f' template, {list(template.labels)}; give words of your own'
    )
  places = [order[name] for name in wanted]
  return template._replace(
    words=tuple(template.words[i] for i in places),
    labels=tuple(template.labels[i] for i in places),
  )


def fill(text: str, row: Mapping[str, Any], where: str) -> str:
  """A template with the fields of a row, and no slot.

  Args:
    text: the template.
    row: fields that are strings.
    where: dataset and row, for messages.

  Raises:
    ValueError: naming dataset, row and field if a field is not there, is not a
      string, or cannot be written as the template wants it.
  """
  out = []
  for literal, field, writing in parts(text):
    out.append(literal)
    if field is None:
      continue
    value = row.get(field)
    if not isinstance(value, str):
      raise ValueError(
        f'{where}: the template needs a text in {field!r}, found {value!r};'
        f' the row has {sorted(row)}'
      )
    try:
      out.append(WRITINGS[writing](value))
    except KeyError as error:
      raise ValueError(
        f'{where}: {field!r} must be one of {sorted(_LINKS)}, found {value!r}'
      ) from error
  return ''.join(out)


def render(
  template: Template, row: Mapping[str, Any], kind: str, where: str = ''
) -> Prompt:
  """A row as the text before the slot, the text after it, and the answers.

  Args:
    template: of the dataset.
    row: a row of it.
    kind: `'causal'` or `'masked'`. Words of masked models always have a space
      before them, as in the text these models know (Gao et al.).
    where: dataset and row, for messages.

  Raises:
    ValueError: if the dataset has no template of this kind, or as `fill`.
  """
  if kind not in ('causal', 'masked'):
    raise ValueError(f"kind must be 'causal' or 'masked', got {kind!r}")
  where = where or f'dataset {template.name!r}'
  text = template.causal if kind == 'causal' else template.masked
  slot = '{answer}' if kind == 'causal' else '{mask}'
  before, found, after = text.partition(slot)
  if not found or (kind == 'causal' and after):
    raise ValueError(
      f'{where}: no template for {kind} models, which needs {slot}'
      + (' at its end' if kind == 'causal' else '')
    )
  space = ' ' if kind == 'masked' or before.endswith(' ') else ''
  if template.choices:
    given = [
      choice
      for choice in template.choices
      if all(row.get(name) is not None for name in fields(choice))
    ]
    answers = [fill(choice, row, where) for choice in given]
  else:
    answers = template.words
  return Prompt(
    prefix=fill(before.removesuffix(' '), row, where),
    suffix=fill(after, row, where),
    candidates=tuple(space + answer for answer in answers),
  )
