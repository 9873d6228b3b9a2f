"""Tokenizers of pretrained models, read from their own files.

`load` takes the directory of a checkpoint as it was published:
`tokenizer.json`; or `vocab.json` with `merges.txt` (byte-level BPE of GPT-2,
OPT and RoBERTa); or `vocab.txt` (WordPiece of BERT). `'bytes'` needs no file:
a token is a byte.

Text never becomes a special token: `[MASK]` or `</s>` inside a row of data is
encoded as the characters it is made of.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Ids = list[int]

_FILES = ('tokenizer.json', 'vocab.json with merges.txt', 'vocab.txt')
_ROLES = ('bos', 'eos', 'pad', 'mask', 'cls', 'sep')
# names of special tokens where no file says which one it is
_USUAL = {
  'bos': ('<|begin_of_text|>', '<bos>', '<s>', '<|endoftext|>'),
  'eos': ('<|end_of_text|>', '<eos>', '</s>', '<|endoftext|>'),
  'pad': ('[PAD]', '<pad>', '<|padding|>'),
  'mask': ('[MASK]', '<mask>'),
  'cls': ('[CLS]',),
  'sep': ('[SEP]',),
}


class Tokenizer(NamedTuple):
  """Text to ids and back.

  Attributes:
    encode: texts -> ids of each, without special tokens.
    encode_next: the same for texts that go on from earlier text, so that a
      tokenizer that puts a space before every text puts none here.
    cut: texts, sizes -> the longest beginning of each that is made of its
      first `size` tokens.
    decode: ids -> text, special tokens left out.
    vocab_size: largest id + 1.
    bos_id, eos_id, mask_id, cls_id, sep_id: None where the model has none.
    pad_id: what padding is filled with: the model's own, or the end token, or
      0; it is always masked.
    prefix, middle, suffix: what the model has before, between and after texts.
    segments: whether the second text of a pair has segment id 1 (BERT).
  """

  encode: Callable[[Sequence[str]], list[Ids]]
  encode_next: Callable[[Sequence[str]], list[Ids]]
  cut: Callable[[Sequence[str], Sequence[int]], list[str]]
  decode: Callable[[Sequence[int]], str]
  vocab_size: int
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int = 0
  mask_id: int | None = None
  cls_id: int | None = None
  sep_id: int | None = None
  prefix: tuple[int, ...] = ()
  middle: tuple[int, ...] = ()
  suffix: tuple[int, ...] = ()
  segments: bool = False

  def wrap(self, ids: Ids, pair: Ids | None = None) -> Ids:
    """One text, or a pair, with the special tokens of the model around."""
    second = [] if pair is None else [*self.middle, *pair]
    return [*self.prefix, *ids, *second, *self.suffix]


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.

  Padding and truncation that are baked into a `tokenizer.json` are off. The
  ids of special tokens are those named in `special_tokens_map.json`,
  `tokenizer_config.json` or `config.json`, in this order, or else the usual
  names. What stands around a text is what the tokenizer's own post-processor
  puts there, and the begin token where `add_bos_token` is true or the model is
  OPT.

  Args:
    path: a directory, a `tokenizer.json`, or `'bytes'`.

  Raises:
    FileNotFoundError: naming the directory and the files looked for.
    ValueError: naming a file that cannot be read as what it should be.
  """
  if path == 'bytes':
    return _bytes()
  where = pathlib.Path(path)
  if not where.exists():
    raise FileNotFoundError(
      f'no tokenizer at {os.fspath(path)!r}: expected a directory, a'
      " tokenizer.json, or 'bytes'"
    )
  folder = where if where.is_dir() else where.parent
  config = _read_json(folder / 'config.json')
  told = {
    **_read_json(folder / 'tokenizer_config.json'),
    **_read_json(folder / 'special_tokens_map.json'),
  }
  model = _read_model(where, told, config)
  model.no_padding()
  model.no_truncation()
  model.encode_special_tokens = True
  return _describe(model, told, config)


def _bytes() -> Tokenizer:
  """A token is a byte: 256 ids, newline (10) is the end, 0 is padding."""

  def encode(texts):
    return [list(text.encode()) for text in texts]

  def cut(texts, sizes):
    pairs = zip(texts, sizes, strict=True)
    return [text.encode()[:n].decode(errors='ignore') for text, n in pairs]

  return Tokenizer(
    encode=encode,
    encode_next=encode,
    cut=cut,
    decode=lambda ids: bytes(ids).decode(errors='replace'),
    vocab_size=256,
    eos_id=0x0A,
    pad_id=0,
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: expected an object, found {type(value)}')
  return value


def _read_model(where: pathlib.Path, told, config):
  """The `tokenizers.Tokenizer` of a directory or file."""
  import tokenizers

  file = where / 'tokenizer.json' if where.is_dir() else where
  vocab, merges = where / 'vocab.json', where / 'merges.txt'
  if file.exists():
    try:
      return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
      raise ValueError(f'{file}: not a tokenizer.json: {error}') from error
  if vocab.exists() and merges.exists():
    return _byte_level(vocab, merges, told, config)
  if (where / 'vocab.txt').exists():
    return _word_piece(where / 'vocab.txt', told)
  raise FileNotFoundError(
    f'no tokenizer in {os.fspath(where)!r}: looked for {", ".join(_FILES)};'
    f' found {sorted(p.name for p in where.iterdir()) or "nothing"}'
  )


def _word_piece(vocab: pathlib.Path, told):
  """BERT's tokenizer from its old file."""
  import tokenizers
  from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
  )

  model = models.WordPiece.from_file(
    str(vocab), unk_token=_content(told.get('unk_token')) or '[UNK]'
  )
  model = tokenizers.Tokenizer(model)
  model.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=told.get('tokenize_chinese_chars', True),
    strip_accents=told.get('strip_accents'),
    lowercase=told.get('do_lower_case', True),
  )
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  model.decoder = decoders.WordPiece()
  sep, cls = (
    _with_id(model, _content(told.get(key)) or usual, vocab)
    for key, usual in (('sep_token', '[SEP]'), ('cls_token', '[CLS]'))
  )
  model.post_processor = processors.BertProcessing(sep, cls)
  return model


def _byte_level(vocab: pathlib.Path, merges: pathlib.Path, told, config):
  """GPT-2's, OPT's or RoBERTa's tokenizer from its two old files."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors

  space = bool(told.get('add_prefix_space', False))
  try:
    model = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
  except Exception as error:
    raise ValueError(f'{vocab}, {merges}: {error}') from error
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  model.decoder = decoders.ByteLevel()
  family = f'{told.get("tokenizer_class", "")} {config.get("model_type", "")}'
  if 'roberta' in family.lower():
    sep, cls = (
      _with_id(model, _content(told.get(key)) or usual, vocab)
      for key, usual in (('sep_token', '</s>'), ('cls_token', '<s>'))
    )
    model.post_processor = processors.RobertaProcessing(sep, cls, True, space)
  return model


def _with_id(model, token: str, vocab: pathlib.Path) -> tuple[str, int]:
  index = model.token_to_id(token)
  if index is None:
    raise ValueError(f'{vocab}: no special token {token!r}')
  return token, index


def _content(token) -> str | None:
  """A token in a config is a string, or a dict with `content`, or null."""
  return token.get('content') if isinstance(token, dict) else token


def _special_id(role: str, model, told, config) -> int | None:
  """The id of a special token; None where the model has none."""
  if f'{role}_token' in told:
    token = _content(told[f'{role}_token'])
    return None if token is None else model.token_to_id(token)
  if f'{role}_token_id' in config:
    value = config[f'{role}_token_id']
    return value[0] if isinstance(value, list) else value
  found = (model.token_to_id(token) for token in _USUAL[role])
  return next((i for i in found if i is not None), None)


class _Around(NamedTuple):
  prefix: tuple[int, ...]
  middle: tuple[int, ...]
  suffix: tuple[int, ...]
  segments: bool


def _around(model) -> _Around:
  """What the post-processor puts around texts, seen on a text of one word."""
  texts = itertools.chain('a0', (model.decode([i]) for i in range(1000)))
  plain = lambda text: model.encode(text, add_special_tokens=False).ids
  word = next((x for x in texts if x and plain(x)), None)
  if word is None:
    raise ValueError(
      f'the tokenizer encodes no text: it has {model.get_vocab_size()} words'
    )
  single, pair = model.encode(word), model.encode(word, word)
  first = [i for i, s in enumerate(pair.sequence_ids) if s == 0]
  second = [i for i, s in enumerate(pair.sequence_ids) if s == 1]
  own = [i for i, s in enumerate(single.sequence_ids) if s == 0]
  return _Around(
    prefix=tuple(single.ids[: own[0]]),
    middle=tuple(pair.ids[first[-1] + 1 : second[0]]),
    suffix=tuple(single.ids[own[-1] + 1 :]),
    segments=pair.type_ids[second[0]] == 1,
  )


def _describe(model, told, config) -> Tokenizer:
  """A `Tokenizer` of the library's tokenizer and the files beside it."""
  ids = {role: _special_id(role, model, told, config) for role in _ROLES}
  # known as special, so that `decode` leaves them out
  names = [model.id_to_token(i) for i in ids.values() if i is not None]
  model.add_special_tokens([name for name in names if name is not None])
  around = _around(model)
  prefix = around.prefix
  adds_bos = told.get('add_bos_token', config.get('model_type') == 'opt')
  if adds_bos and ids['bos'] is not None and ids['bos'] not in prefix:
    prefix = (ids['bos'], *prefix)
  if ids['mask'] is not None and prefix and around.suffix:
    # RoBERTa has no names of its own for these two in some releases
    ids['cls'] = prefix[0] if ids['cls'] is None else ids['cls']
    ids['sep'] = around.suffix[-1] if ids['sep'] is None else ids['sep']
  encoder = ids['cls'] is not None and ids['sep'] is not None
  encode, encode_next = _encoders(model)

  def cut(texts, sizes):
    encodings = model.encode_batch(list(texts), add_special_tokens=False)
    return [
      _cut(text, encoding.offsets, size)
      for text, encoding, size in zip(texts, encodings, sizes, strict=True)
    ]

  return Tokenizer(
    encode=encode,
    encode_next=encode_next,
    cut=cut,
    decode=lambda x: model.decode(list(map(int, x)), skip_special_tokens=True),
    vocab_size=max(model.get_vocab(with_added_tokens=True).values()) + 1,
    bos_id=ids['bos'],
    eos_id=ids['eos'],
    pad_id=next(i for i in (ids['pad'], ids['eos'], 0) if i is not None),
    mask_id=ids['mask'],
    cls_id=ids['cls'],
    sep_id=ids['sep'],
    prefix=prefix,
    middle=around.middle if encoder else (),
    suffix=around.suffix,
    segments=encoder and around.segments,
  )


def _encoders(model):
  """`encode` and `encode_next` of `Tokenizer`."""

  def encode(texts):
    batch = model.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in batch]

  # a tokenizer that begins every text with a space of its own (Llama 2) is
  # asked for the text after a line end, whose tokens are then dropped
  lead = encode(['\n'])[0]
  token = model.encode('a', add_special_tokens=False).tokens[:1]
  if not lead or not token or token[0][0] not in '\u2581\u0120':
    return encode, encode

  def encode_next(texts):
    after = encode(['\n' + text for text in texts])
    plain = encode(texts)
    return [
      ids[len(lead) :] if ids[: len(lead)] == lead else alone
      for ids, alone in zip(after, plain, strict=True)
    ]

  return encode, encode_next


def _cut(text: str, offsets: Sequence[tuple[int, int]], size: int) -> str:
  """The beginning of a text that its first `size` tokens cover."""
  if size >= len(offsets):
    return text
  if size <= 0:
    return ''
  # the next token may be another byte of the same character
  return text[: min(offsets[size - 1][1], offsets[size][0])]
