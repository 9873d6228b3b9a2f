"""Prompts: closed forms of every dataset, and what is refused."""

import pytest

from jaxfl.data import templates

ROWS = {
  'text': 'a fine film',
  'premise': 'It rained.',
  'hypothesis': 'The street was wet',
  'passage': 'Ice floats.',
  'question': 'does ice float',
  'sentence1': 'He sat on the bank.',
  'sentence2': 'The bank lent money.',
  'word': 'bank',
  'choice1': 'The street was wet.',
  'choice2': 'I went out.',
}


def _row(name):
  question = 'effect' if name == 'copa' else ROWS['question']
  return ROWS | {'question': question}


CAUSAL = {
  'sst2': ('a fine film It was', ' terrible', ' great'),
  'mr': ('a fine film It was', ' terrible', ' great'),
  'sst5': ('a fine film It was', ' terrible', ' great'),
  'trec': ('Question: a fine film\nAnswer type:', ' Expression', ' Number'),
  'cb': (
    'Take it that It rained. Does it follow that "The street was wet"?'
    ' Yes, No or Maybe?\n',
    'Yes',
    'Maybe',
  ),
  'mnli': (
    'Take it that It rained. Does it follow that "The street was wet"?'
    ' Yes, No or Maybe?\n',
    'Yes',
    'No',
  ),
  'rte': (
    'It rained.\nIs it then true that "The street was wet"? Yes or No?\n',
    'Yes',
    'No',
  ),
  'boolq': ('Ice floats. Does ice float?', ' No', ' Yes'),
  'wic': (
    'Is the sense of "bank" the same in both sentences? Yes or No?\n'
    'He sat on the bank.\nThe bank lent money.\n',
    'No',
    'Yes',
  ),
  'copa': ('It rained so', ' the street was wet.', ' I went out.'),
}
CAUSAL['snli'] = CAUSAL['mnli']

MASKED = {
  'sst2': ('a fine film It was', '.'),
  'trec': ('', ': a fine film'),
  'cb': ('It rained?', ', the street was wet'),
  'boolq': ('Ice floats. Does ice float?', '.'),
}


@pytest.mark.parametrize('name', templates.TEMPLATES)
def test_causal_prompts(name):
  prompt = templates.render(templates.named(name), _row(name), 'causal')
  text, first, last = CAUSAL[name]
  assert prompt.prefix == text
  assert prompt.suffix == ''
  assert (prompt.candidates[0], prompt.candidates[-1]) == (first, last)
  t = templates.named(name)
  assert len(prompt.candidates) == len(t.labels) == len(set(t.labels))


@pytest.mark.parametrize('name', MASKED)
def test_masked_prompts(name):
  t = templates.named(name)
  prompt = templates.render(t, _row(name), 'masked')
  assert (prompt.prefix, prompt.suffix) == MASKED[name]
  assert prompt.candidates == tuple(f' {word}' for word in t.words)


def test_copa_cause_and_what_is_neither():
  t = templates.named('copa')
  row = _row('copa') | {'question': 'cause'}
  assert templates.render(t, row, 'causal').prefix == 'It rained because'
  row['question'] = 'why'
  with pytest.raises(ValueError, match="'copa'.*'question'.*cause.*'why'"):
    templates.render(t, row, 'causal')
  with pytest.raises(ValueError, match="'copa'.*no template for masked"):
    templates.render(t, row, 'masked')


def test_text_of_a_row_is_not_a_template():
  row = {'text': 'a {answer} {{x}} {text}'}
  prompt = templates.render(templates.named('sst2'), row, 'causal')
  assert prompt.prefix == 'a {answer} {{x}} {text} It was'


def test_choices_that_a_row_lacks_are_left_out():
  t = templates.custom('{q} {answer}', choices=('{a}', '{b}', '{c}'))
  row = {'q': 'Which?', 'a': 'this', 'b': 'that', 'c': None}
  found = templates.render(t, row, 'causal').candidates
  assert found == (' this', ' that')


def test_labels_are_matched_by_name():
  t = templates.named('trec')
  names = ('num', 'HUM', 'abbr', 'loc', 'DESC', 'ENTY')
  words = templates.match_labels(t, names).words
  assert words == (
    'Number',
    'Human',
    'Expression',
    'Location',
    'Description',
    'Entity',
  )
  rte = templates.match_labels(
    templates.named('rte'), ['Not-Entailment', 'entailment']
  )
  assert rte.words == ('No', 'Yes')
  with pytest.raises(ValueError, match="'rte'.*not_entailment"):
    templates.match_labels(templates.named('rte'), ['yes', 'no'])


def test_bare_fields():
  row = {'label': 0, 'note': 'x', 'sentence2': 'b', 'sentence1': 'a', 'n': 3}
  t = templates.bare('own', row, ('x', 'y', 'z'))
  assert t.segments == ('{sentence1}', '{sentence2}')
  assert t.labels == ('x', 'y', 'z')
  assert templates.bare('own', {'q': 'x'}, ('a', 'b')).segments == ('{q}',)
  assert (t.words, t.choices, t.causal, t.masked) == ((), (), '', '')
  with pytest.raises(ValueError, match="'own': no field is text"):
    templates.bare('own', {'n': 3, 'label': 'a'}, ('x', 'y'))


class TestCustom:
  def test_by_position(self):
    t = templates.custom('{text} It was {answer}', 'bad, good')
    assert t.words == ('bad', 'good')
    row = {'text': 'x'}
    assert templates.render(t, row, 'causal').prefix == 'x It was'
    assert templates.render(t, row, 'masked').prefix == 'x It was'
    assert templates.match_labels(t, ['0', '1']) == t
    with pytest.raises(ValueError, match='2 answers.*3 labels'):
      templates.match_labels(t, ['0', '1', '2'])
    assert t.segments == ('{text}',)

  def test_slot_inside_is_for_masked_models_alone(self):
    t = templates.custom('{a}? {answer}, {b} {c}', ['Yes', 'No'], name='own')
    prompt = templates.render(t, {'a': '1', 'b': '2', 'c': '3'}, 'masked')
    assert (prompt.prefix, prompt.suffix) == ('1?', ', 2 3')
    assert t.segments == ('{a}', '{b} {c}')
    with pytest.raises(ValueError, match="'own'.*causal.*at its end"):
      templates.render(t, {'a': '1', 'b': '2', 'c': '3'}, 'causal')

  @pytest.mark.parametrize(
    ('template', 'words', 'message'),
    [
      ('{text} It was', 'a,b', '0 slots'),
      ('{answer} {text} {mask}', 'a,b', '2 slots'),
      ('{text} {answer}', 'a', 'two or more different answers'),
      ('{text} {answer}', 'a,a', 'two or more different answers'),
      ('{text} {answer}', 'a,', 'two or more different answers'),
      ('{text} {answer}', '', 'words or choices'),
      ('{text.__class__} {answer}', 'a,b', 'not the name of a field'),
      ('{text!r} {answer}', 'a,b', 'not the name of a field'),
      ('{} {answer}', 'a,b', 'not the name of a field'),
      ('{text {answer}', 'a,b', 'template'),
      ('{text:big} {answer}', 'a,b', "writing 'big'"),
    ],
  )
  def test_refused(self, template, words, message):
    with pytest.raises(ValueError, match=message):
      templates.custom(template, words)

  def test_labels_and_words_differ_in_number(self):
    with pytest.raises(ValueError, match='2 answers for 3 labels'):
      templates.custom('{text} {answer}', 'a,b', labels=('x', 'y', 'z'))


def test_other_words():
  t = templates.with_words(templates.named('sst2'), ['bad', 'good'])
  assert t.words == ('bad', 'good')
  assert t.labels == ('negative', 'positive')
  with pytest.raises(ValueError, match="'sst2' needs two or more different"):
    templates.with_words(t, ['bad', 'bad'])
  with pytest.raises(ValueError, match="'sst2' takes 2 words; found"):
    templates.with_words(t, ['a', 'b', 'c'])
  with pytest.raises(ValueError, match="'copa' takes 0 words: every row"):
    templates.with_words(templates.named('copa'), ['a', 'b'])


class TestErrors:
  def test_field_that_is_missing_or_no_text(self):
    t = templates.named('cb')
    with pytest.raises(ValueError, match="'cb'.*'hypothesis'.*None.*premise"):
      templates.render(t, {'premise': 'x'}, 'causal')
    row = {'premise': 'x', 'hypothesis': 3}
    with pytest.raises(ValueError, match="row 7.*'hypothesis'.*3"):
      templates.render(t, row, 'causal', "dataset 'cb', row 7")

  def test_unknown_dataset_and_kind(self):
    with pytest.raises(ValueError, match="'imdb'.*sst2"):
      templates.named('imdb')
    with pytest.raises(ValueError, match='kind'):
      templates.render(templates.named('mr'), {'text': ''}, 'decoder')
