"""Rows of text as encoded examples: one function per form.

Prompt and answer are encoded apart, and the space between them belongs to the
answer, so that no token spans the border and the answers of an example share
their prompt. `examples` has the arrays of every form.

What is too long is cut: the longest text fields of the prompt, at their ends,
to one common length. Answers, the mask and the words of the template stay;
only the response of an instruction, which has no bound, is cut as well where
it leaves the prompt less than half of the tokens.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from jaxfl.data import examples as examples_lib
from jaxfl.data import templates
from jaxfl.data import tokenizer as tokenizer_lib

Row = Mapping[str, Any]
FORMS = ('head', 'words', 'candidates', 'lm', 'prompt')


def encode(
  rows: Sequence[Row],
  template: templates.Template | None,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  form: str,
  max_length: int,
  kind: str = 'causal',
  positions: int | None = None,
  label_names: Sequence[str] | None = None,
  name: str | None = None,
) -> examples_lib.Examples:
  """Encodes a dataset.

  Args:
    rows: fields as the template names them, and `label`; or `instruction`,
      `input`, `response` and `references` for the forms lm and prompt.
    template: of the dataset; None for lm and prompt, which have their own.
    tokenizer: of the model.
    form: `head`, text for a classification head; `words`, label words scored
      at one position; `candidates`, answers scored by their likelihood; `lm`,
      instruction and response; `prompt`, the instruction alone.
    max_length: tokens of an example, at most, special tokens included.
    kind: `'causal'` or `'masked'`, the model; it matters for `words`.
    positions: how many positions the model has, if that is bounded.
    label_names: of the dataset, by index: words are then matched by name, see
      `templates.match_labels`, and not by position.
    name: what to call the dataset in messages, where rows count from 1; the
      template's name if None.

  Returns:
    As many examples as rows, in their order.

  Raises:
    ValueError: naming dataset, row and field, or the word that is not one
      token, or the length that cannot be had.
  """
  if form not in FORMS:
    raise ValueError(f'form must be one of {FORMS}, got {form!r}')
  if not rows:
    raise ValueError('there are no rows to encode')
  examples_lib.check_length(max_length, positions)
  if form not in ('lm', 'prompt') and template is None:
    raise ValueError(f'form {form!r} needs a template')
  if form in ('candidates', 'lm', 'prompt') and kind != 'causal':
    raise ValueError(
      f'form {form!r} needs a causal model, and this one is {kind}; use'
      ' form=words or form=head'
    )
  if label_names and template:
    template = templates.match_labels(template, label_names)
  if template and name:
    template = template._replace(name=name)
  name = template.name if template else name or 'instructions'
  match form:
    case 'head':
      out = _head(rows, template, tokenizer, max_length)
    case 'words':
      out = _words(rows, template, tokenizer, max_length, kind)
    case 'candidates':
      out = _candidates(rows, template, tokenizer, max_length)
    case _:
      out = _instructions(rows, tokenizer, max_length, form, name)
  if out.truncated:
    logging.info(
      '%d of %d examples of %s were cut to %d tokens',
      out.truncated,
      len(out),
      name,
      max_length,
    )
  return out


def _where(name: str, index: int) -> str:
  return f'dataset {name!r}, row {index + 1}'


def _num_labels(template) -> int:
  return len(template.words or template.choices or template.labels)


def _labels(rows, template) -> np.ndarray:
  """int32[N]."""
  count = _num_labels(template)
  labels = []
  for i, row in enumerate(rows):
    try:
      label = operator.index(row.get('label'))
    except TypeError:
      label = -1
    if not 0 <= label < count:
      raise ValueError(
        f"{_where(template.name, i)}: field 'label' is {row.get('label')!r};"
        f' expected a whole number in [0, {count}), for'
        f' {template.labels or template.words or template.choices}'
      )
    labels.append(label)
  return np.array(labels, np.int32)


def _head(rows, template, tokenizer, max_length):
  """Text, or a pair of texts, as the model's encoder expects it."""
  segments = template.segments
  joined = len(segments) == 2 and tokenizer.cls_id is None
  if joined:
    segments = (' '.join(segments),)

  def render(i, row):
    where = _where(template.name, i)
    return tuple(templates.fill(text, row, where) for text in segments)

  around = len(tokenizer.wrap([], [] if len(segments) == 2 else None))
  pieces, cut = _fit(
    rows,
    render,
    lambda i: templates.fields(*segments),
    [tokenizer.encode] * len(segments),
    [max_length - around] * len(rows),
    tokenizer,
    lambda i: _where(template.name, i),
  )
  sequences = [tokenizer.wrap(*ids) for ids in zip(*pieces, strict=True)]
  for i, ids in enumerate(sequences):
    if not ids:
      raise ValueError(f'{_where(template.name, i)}: the text is empty')
  before = len(tokenizer.prefix) + len(tokenizer.middle)
  seconds = [
    before + len(ids[0]) if len(ids) == 2 else len(whole)
    for ids, whole in zip(zip(*pieces, strict=True), sequences, strict=True)
  ]
  return examples_lib.from_lists(
    'head',
    sequences,
    tokenizer.pad_id,
    max_length,
    seconds=np.array(seconds, np.int32) if tokenizer.segments else None,
    scalars={'label': _labels(rows, template)},
    num_labels=_num_labels(template),
    truncated=int(cut.sum()),
  )


def _prompts(rows, template, tokenizer, kind, rooms, around):
  """Prefix and suffix ids of every row, cut to the room, and what was cut."""
  text = template.causal if kind == 'causal' else template.masked

  def render(i, row):
    prompt = templates.render(template, row, kind, _where(template.name, i))
    return prompt.prefix, prompt.suffix

  pieces, cut = _fit(
    rows,
    render,
    lambda i: templates.fields(text),
    [tokenizer.encode, tokenizer.encode_next],
    [room - around for room in rooms],
    tokenizer,
    lambda i: _where(template.name, i),
  )
  for i, ids in enumerate(pieces[0]):
    if kind == 'causal' and not ids and not tokenizer.prefix:
      raise ValueError(f'{_where(template.name, i)}: the prompt is empty')
  return pieces, cut


def label_ids(
  template: templates.Template, tokenizer: tokenizer_lib.Tokenizer, kind: str
) -> np.ndarray:
  """int32[C], the token of every label word after the prompt.

  Raises:
    ValueError: naming a word that is not one token, or two that are the same.
  """
  if not template.words:
    raise ValueError(
      f'dataset {template.name!r} has no label words; use form='
      + ('candidates' if template.choices else 'head, or give some')
    )
  text = template.causal.removesuffix('{answer}')
  space = ' ' if kind == 'masked' or text.endswith(' ') else ''
  ids = tokenizer.encode_next([space + word for word in template.words])
  for word, tokens in zip(template.words, ids, strict=True):
    if len(tokens) != 1:
      raise ValueError(
        f'dataset {template.name!r}: the label word {space + word!r} is'
        f' {len(tokens)} tokens, form=words needs one; use form=candidates or'
        ' another word'
      )
  flat = [tokens[0] for tokens in ids]
  if len(set(flat)) < len(flat):
    raise ValueError(
      f'dataset {template.name!r}: label words {template.words} are not'
      f' different tokens: {flat}'
    )
  return np.array(flat, np.int32)


def _words(rows, template, tokenizer, max_length, kind):
  """The prompt, and where the label word is predicted."""
  where = _where(template.name, 0)
  templates.render(template, rows[0], kind, where)  # has it such a template?
  words = label_ids(template, tokenizer, kind)
  slot = []
  if kind == 'masked':
    if tokenizer.mask_id is None:
      raise ValueError(
        'the tokenizer has no mask token, which masked models need; use'
        ' kind=causal'
      )
    slot = [tokenizer.mask_id]
  wrap = lambda ids: tokenizer.wrap(ids) if slot else [*tokenizer.prefix, *ids]
  around = len(wrap(slot))
  rooms = [max_length] * len(rows)
  pieces, cut = _prompts(rows, template, tokenizer, kind, rooms, around)
  sequences = [
    wrap([*before, *slot, *after])
    for before, after in zip(*pieces, strict=True)
  ]
  ends = np.array([len(before) for before in pieces[0]], np.int32)
  lengths = np.array([len(ids) for ids in sequences], np.int32)
  return examples_lib.from_lists(
    'words',
    sequences,
    tokenizer.pad_id,
    max_length,
    seconds=lengths if tokenizer.segments else None,
    scalars={
      'label': _labels(rows, template),
      # of the mask, or of the last token of the prompt
      'position': ends + len(tokenizer.prefix) - (0 if slot else 1),
    },
    num_labels=len(words),
    label_ids=words,
    truncated=int(cut.sum()),
  )


def _candidates(rows, template, tokenizer, max_length):
  """The prompt with every answer behind it."""
  answers = []
  for i, row in enumerate(rows):
    where = _where(template.name, i)
    found = templates.render(template, row, 'causal', where).candidates
    answers.append(found)
  flat = tokenizer.encode_next([text for found in answers for text in found])
  labels = _labels(rows, template)
  ids, at = [], 0
  for i, found in enumerate(answers):
    ids.append(flat[at : at + len(found)])
    at += len(found)
    if not all(ids[-1]) or labels[i] >= len(found):
      raise ValueError(
        f'{_where(template.name, i)}: the answers are {found}, the label is'
        f' {labels[i]}; no answer may be empty, and the right one must be there'
      )
  rooms = [max_length - max(map(len, one)) for one in ids]
  around = len(tokenizer.prefix)
  pieces, cut = _prompts(rows, template, tokenizer, 'causal', rooms, around)
  width = max(map(len, ids))
  sequences, starts = [], []
  for prompt, one in zip(pieces[0], ids, strict=True):
    before = [*tokenizer.prefix, *prompt]
    sequences += [before + answer for answer in one]
    sequences += [[]] * (width - len(one))
    starts += [len(before)] * width
  return examples_lib.from_lists(
    'candidates',
    sequences,
    tokenizer.pad_id,
    max_length,
    num_candidates=width,
    starts=np.array(starts, np.int32),
    scalars={'label': labels},
    num_labels=width,
    truncated=int(cut.sum()),
  )


def _instructions(rows, tokenizer, max_length, form, name):
  """Instruction and response, or the instruction alone."""
  where = lambda i: _where(name, i)
  formats = [templates.INSTRUCTION[not row.get('input')] for row in rows]
  answers = [[] for _ in rows]
  if form == 'lm':
    answers = _responses(rows, formats, tokenizer, where)
  around = len(tokenizer.prefix)
  # a prompt that would have less room than half is given half
  least = max_length if form == 'prompt' else max_length // 2
  pieces, cut = _fit(
    rows,
    lambda i, row: (
      templates.render(formats[i], row, 'causal', where(i)).prefix,
    ),
    lambda i: templates.fields(formats[i].causal),
    [tokenizer.encode],
    [max(max_length - len(ids), least) - around for ids in answers],
    tokenizer,
    where,
  )
  sequences, starts = [], []
  for i, (prompt, answer) in enumerate(zip(pieces[0], answers, strict=True)):
    before = [*tokenizer.prefix, *prompt]
    starts.append(len(before))
    sequences.append((before + answer)[:max_length])
    cut[i] |= len(before) + len(answer) > max_length
  return examples_lib.from_lists(
    form,
    sequences,
    tokenizer.pad_id,
    max_length,
    starts=np.array(starts, np.int32) if form == 'lm' else None,
    truncated=int(cut.sum()),
    references=_references(rows, where) if form == 'prompt' else None,
  )


def _responses(rows, formats, tokenizer, where) -> list[list[int]]:
  """Ids of the responses, with the end token."""
  texts = []
  for i, row in enumerate(rows):
    found = templates.render(formats[i], row, 'causal', where(i)).candidates
    if not found:
      raise ValueError(
        f"{where(i)}: no text in 'response'; the row has {sorted(row)}"
      )
    texts.append(found[0])
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  return [ids + end for ids in tokenizer.encode_next(texts)]


def _references(rows, where) -> tuple[tuple[str, ...], ...]:
  out = []
  for i, row in enumerate(rows):
    texts = row.get('references')
    if (
      not isinstance(texts, Sequence)
      or isinstance(texts, str)
      or not texts
      or not all(isinstance(text, str) for text in texts)
    ):
      raise ValueError(
        f"{where(i)}: 'references' must be a list of texts, found {texts!r}"
      )
    out.append(tuple(texts))
  return tuple(out)


def _fit(
  rows: Sequence[Row],
  render: Callable[[int, Row], tuple[str, ...]],
  fields: Callable[[int], tuple[str, ...]],
  encoders: Sequence[Callable[[Sequence[str]], list[list[int]]]],
  rooms: Sequence[int],
  tokenizer: tokenizer_lib.Tokenizer,
  where: Callable[[int], str],
) -> tuple[list[list[list[int]]], np.ndarray]:
  """Encodes rows, and cuts text fields until every row has room.

  Args:
    rows: to encode.
    render: index, row -> its pieces of text, as many as `encoders`.
    fields: index -> the fields that may be cut.
    encoders: of the pieces.
    rooms: tokens that a row's pieces may have in all.
    tokenizer: to cut with.
    where: index -> what to call the row.

  Returns:
    Ids by piece and row, and bool[N], which rows were cut.
  """
  rows = list(rows)
  pieces = [[[]] * len(rows) for _ in encoders]
  cut = np.zeros(len(rows), bool)
  pending = list(range(len(rows)))
  while pending:
    texts = [render(i, rows[i]) for i in pending]
    for piece, encoder, column in zip(
      pieces, encoders, zip(*texts, strict=True), strict=True
    ):
      for i, ids in zip(pending, encoder(column), strict=True):
        piece[i] = ids
    used = {i: sum(len(piece[i]) for piece in pieces) for i in pending}
    pending = [i for i in pending if used[i] > rooms[i]]
    cut[pending] = True
    excess = [used[i] - rooms[i] for i in pending]
    for i, row in zip(
      pending,
      _shorter(rows, pending, fields, excess, tokenizer, where),
      strict=True,
    ):
      rows[i] = row
  return pieces, cut


def _shorter(rows, pending, fields, excess, tokenizer, where) -> list[Row]:
  """Rows whose longest fields are cut to have `excess` tokens less."""
  texts = [(i, field) for i in pending for field in fields(i)]
  words = [rows[i][field] for i, field in texts]
  lengths = dict(zip(texts, map(len, tokenizer.encode(words)), strict=True))
  sizes = []
  for i, more in zip(pending, excess, strict=True):
    own = [lengths[i, field] for field in fields(i)]
    if not any(own):
      raise ValueError(
        f'{where(i)}: max_length (--sequence_length) is too small: {more} more'
        ' tokens are needed for the template and the answer alone'
      )
    sizes += _budgets(own, more)
  out = {i: dict(rows[i]) for i in pending}
  parts = tokenizer.cut(words, sizes)
  for (i, field), word, part, size in zip(
    texts, words, parts, sizes, strict=True
  ):
    # a text always gets shorter, so that this comes to an end
    same = part == word and size < lengths[i, field]
    out[i][field] = word[:-1] if same else part
  return list(out.values())


def _budgets(lengths: Sequence[int], excess: int) -> list[int]:
  """Lengths with `excess` less in all: the longest are cut to one level.

  Where it does not come out even, the last of them keep one more.
  """
  left = max(sum(lengths) - excess, 0)
  for count, size in zip(
    range(len(lengths), 0, -1), sorted(lengths), strict=True
  ):
    if size * count > left:  # `count` fields share what is left
      level, more = divmod(left, count)
      cut = [i for i, length in enumerate(lengths) if length > level]
      keep = set(cut[count - more :])
      return [min(x, level) + (i in keep) for i, x in enumerate(lengths)]
    left -= size
  return list(lengths)
