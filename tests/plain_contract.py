"""The seed contract in plain Python: integers, and floats that `struct` rounds.

Written from docs/seed_contract.md alone, without NumPy and JAX, so that two
implementations have to agree. Slow, and for small tensors.
"""

import functools
import hashlib
import itertools
import math
import struct
import zlib

MASK = 0xFFFFFFFF


# keys


def rotate(x, n):
  return (x << n | x >> (32 - n)) & MASK


@functools.cache
def threefry(key, x0, x1):
  k = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
  x, y = (x0 + k[0]) & MASK, (x1 + k[1]) & MASK
  for i in range(20):
    x = (x + y) & MASK
    y = rotate(y, (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]) ^ x
    if i % 4 == 3:
      j = i // 4 + 1
      x = (x + k[j % 3]) & MASK
      y = (y + k[(j + 1) % 3] + j) & MASK
  return x, y


def root(seed):
  return seed >> 32, seed & MASK


def fold(key, *data):
  for d in data:
    key = threefry(tuple(key), 0, d & MASK)
  return key


def tensor_id(path):
  return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], 'big')


def leaf_key(direction, path):
  return fold(direction, tensor_id(path))


def stream(key, name):
  return fold(key, tensor_id(name) | 1 << 31)


def uniform(key):
  """An integer, in units of 2**-24."""
  return fold(key, 0)[0] >> 8


def seeds_of_steps(seed, party, round, count, num_seeds):
  key = stream(fold(root(seed), party, round), 'seeds')
  at = [f32(uniform(fold(key, i)) * 2.0**-24 * num_seeds) for i in range(count)]
  return [min(math.floor(x), num_seeds - 1) for x in at]


# fields: integers at row r and column c of the view


def view(shape):
  return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def sign_bit(key, r, c, group=0):
  a, b = threefry(key, group | r >> 6, c)
  return (b if r & 32 else a) >> (r & 31) & 1


def rademacher(key, r, c):
  return 1 - 2 * sign_bit(key, r, c)


def popcount16(key, r, c):
  a, b = threefry(key, r >> 2, c)
  half = (a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16)[r & 3]
  return half.bit_count() - 8


def gaussian(key, r, c):
  a, b = threefry(key, r >> 1, c)
  radius = math.sqrt(-2 * math.log((a + 0.5) * 2.0**-32))
  angle = 2 * math.pi * b * 2.0**-32
  return radius * (math.sin(angle) if r & 1 else math.cos(angle))


def walsh(pool, seed, path, shape):
  """The field as a function of r and c."""
  rows, cols = view(shape)
  if rows < 32 or cols < 128:
    key = leaf_key(fold(pool, seed), path)
    return functools.partial(rademacher, key)
  key, shifts = (
    leaf_key(fold(stream(pool, name), seed // 4096), path)
    for name in ('walsh', 'walsh shifts')
  )

  def at(r, c):
    t, s = threefry(shifts, r >> 5, c >> 7)
    g = 128 * ((r + t) & 31) + ((c + s) & 127)
    return rademacher(key, r, c) * (-1) ** (g & seed % 4096).bit_count()

  return at


def low_rank(key, shape, rank):
  """The field as a function of r and c of the view."""
  rows = (1, 1, *shape)[-2]

  def at(r, c):
    total = 0
    for j in range(rank):
      u = sign_bit(key, r, j)
      v = sign_bit(key, r // rows * rank + j, c, group=1 << 31)
      total += (-1) ** (u ^ v)
    return total

  return at


FIELD_UNIT = {
  'rademacher': 1.0, 'popcount16': 0.5, 'walsh': 1.0,
  'rank1': 1.0, 'rank4': 0.5, 'rank16': 0.25,
}  # fmt: skip


def field(direction, path, shape, distribution):
  """The integers Z (of 'gaussian': z) in row-major order.

  A 'walsh' direction is (first word, second word, seed) of its pool.
  """
  if distribution == 'walsh':
    at = walsh(direction[:2], direction[2], path, shape)
  else:
    key = leaf_key(direction, path)
    if distribution.startswith('rank'):
      at = low_rank(key, shape, int(distribution[4:]))
    else:
      of = {'rademacher': rademacher, 'popcount16': popcount16}
      at = functools.partial(of.get(distribution, gaussian), key)
  rows, cols = view(shape)
  return [at(r, c) for r in range(rows) for c in range(cols)]


# floats


def f32(x):
  """The nearest float32, ties to even."""
  return struct.unpack('<f', struct.pack('<f', x))[0]


def round_significant(x, bits=12):
  mantissa, exponent = math.frexp(x)
  return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def fractions(weights):
  """weights / sum, 24 significant bits, rounded down."""
  total = sum(weights)
  found = []
  for w in weights:
    shift = 0
    while w > 0 and (w << shift) // total < 2**23 and w != total:
      shift += 1
    found.append(math.ldexp((w << shift) // total, -shift) if total else 0.0)
  return found


# grid


def exponent(largest):
  return 24 - max(math.frexp(largest)[1] + 2, 0)


def snap(x, e):
  return round(math.ldexp(f32(x), e))


def to_units(coefficient, e, direction, path):
  x = math.ldexp(coefficient, e)
  x = max(-2147483520.0, min(2147483520.0, x))
  key = leaf_key(stream(direction, 'rounding'), path)
  u = uniform(key) * 2.0**-24
  return math.floor(x) + (u < f32(x - math.floor(x)))


def decay(w, e, rate, key, path):
  """Weights in grid steps, after `w - rate w`."""
  offset = uniform(leaf_key(key, path)) >> 16
  factor = f32(math.ldexp(rate, e + 8))
  x = [round(f32(math.ldexp(w, -e) * factor)) for w in w]
  return [w - ((step + offset) >> 8) for w, step in zip(w, x, strict=True)]


def pool_units(coordinate, e, largest_e, distribution):
  finer = round(-math.log2(FIELD_UNIT[distribution]))
  shift = min(largest_e + 6 - e + finer, 31)
  return (coordinate + (1 << (shift - 1))) >> shift


# codecs


def log8_levels():
  exact = [0.0] + [2.0 ** ((m - 64) / 5) for m in range(1, 128)]
  return [f32(round_significant(x)) if x else 0.0 for x in exact]


def linear8_levels(scale):
  step = round_significant(scale / 127)
  return [f32(q * step) for q in range(128)]


def level(x, levels, u=None):
  """The level of x >= 0: the nearest, or one of two by u in [0, 1)."""
  if u is None:
    return sum(x >= (a + b) / 2 for a, b in itertools.pairwise(levels))
  below = max(i for i in range(128) if levels[i] <= x)
  gap = f32(levels[below + 1] - levels[below]) if below < 127 else 0.0
  up = f32(u * gap) < f32(x - levels[below])
  return min(below + up, 127)


def encode(name, scale, values, key):
  """The bytes of a code."""
  finite = [math.isfinite(x) for x in values]
  if name == 'sign1':
    valid = all(finite)
    bits = [valid, *(x < 0 and valid for x in values)]
    word = sum(bit << i for i, bit in enumerate(bits))
    return word.to_bytes((len(values) + 8) // 8, 'little')
  if name == 'float32':
    values = [
      x if ok else math.nan for x, ok in zip(values, finite, strict=True)
    ]
    return struct.pack(f'<{len(values)}f', *values)
  if name == 'bfloat16':
    return b''.join(map(bfloat16, values))
  if name == 'linear16':
    inverse = f32(1 / round_significant(scale / 32767, 8))
    return b''.join(
      (
        max(-32767, min(32767, round(f32(x * inverse)))) if ok else -32768
      ).to_bytes(2, 'little', signed=True)
      for x, ok in zip(values, finite, strict=True)
    )
  levels = log8_levels() if 'log8' in name else linear8_levels(scale)
  code = []
  for i, x in enumerate(values):
    u = None
    if name.endswith('stochastic'):
      u = uniform(fold(key, i)) * 2.0**-24
    if not math.isfinite(x):
      code.append(128)
      continue
    n = level(abs(x), levels, u)
    if x < 0 and n:
      n = n + 128 if 'log8' in name else 256 - n
    code.append(n)
  return bytes(code)


def bfloat16(x):
  if not math.isfinite(x):
    return b'\xc0\x7f'
  bits = int.from_bytes(struct.pack('<f', x), 'little')
  bits += 0x7FFF + (bits >> 16 & 1)
  return (bits >> 16).to_bytes(2, 'little')


def decode(name, scale, code, count):
  """Floats; None for what is not finite."""
  if name == 'sign1':
    word = int.from_bytes(code, 'little')
    magnitude = f32(round_significant(scale))
    if not word & 1:
      return [None] * count
    return [
      -magnitude if word >> (i + 1) & 1 else magnitude for i in range(count)
    ]
  if name == 'float32':
    values = struct.unpack(f'<{count}f', code)
  elif name == 'bfloat16':
    pad = b''.join(b'\0\0' + code[2 * i : 2 * i + 2] for i in range(count))
    values = struct.unpack(f'<{count}f', pad)
  elif name == 'linear16':
    step = round_significant(scale / 32767, 8)
    q = struct.unpack(f'<{count}h', code)
    values = [math.nan if n == -32768 else f32(n * step) for n in q]
  else:
    log = 'log8' in name
    levels = log8_levels() if log else linear8_levels(scale)
    values = [
      math.nan if n == 128
      else levels[n] if n < 128
      else -levels[n - 128 if log else 256 - n]
      for n in code
    ]  # fmt: skip
  return [x if math.isfinite(x) else None for x in values]


# frames and digests

DTYPES = (
  'bool', 'uint8', 'uint16', 'uint32', 'uint64', 'int8', 'int16', 'int32',
  'int64', 'float16', 'bfloat16', 'float32', 'float64',
)  # fmt: skip


def varint(n):
  out = []
  while n > 0x7F:
    out.append(n & 0x7F | 0x80)
    n >>= 7
  return bytes([*out, n])


def frame(leaves):
  """Of (path, dtype, shape, bytes of the elements) of every leaf."""
  leaves = sorted(leaves)
  body = varint(len(leaves))
  for path, dtype, shape, _ in leaves:
    text = path.encode()
    body += varint(len(text)) + text + bytes([DTYPES.index(dtype) + 1])
    body += varint(len(shape)) + b''.join(map(varint, shape))
  body += b''.join(data for *_, data in leaves)
  magic = b'\xf1\x4a\x01'
  return magic + zlib.crc32(magic + body).to_bytes(4, 'little') + body


def digest(leaves):
  """Of leaves as above."""
  h = hashlib.sha256()
  for path, dtype, shape, data in sorted(leaves):
    h.update(f'{path}\n{dtype}\n{tuple(shape)}\n'.encode() + data)
  return h.hexdigest()


# a round of SPSA


def spsa_round(case):
  """Weights in grid steps by path, from a case of the vectors."""
  count, scale = case['num_perturbations'], case['codec_scale']
  messages = [
    decode(case['codec'], scale, bytes.fromhex(m), count)
    for m in case['messages']
  ]
  weights = [
    w if x is not None else 0
    for w, m in zip(case['weights'], messages, strict=True)
    for x in m
  ]
  part = iter(fractions(weights))
  rate = f32(round_significant(case['learning_rate']))
  steps = []  # direction, coefficient
  for party, message in zip(case['ids'], messages, strict=True):
    base = fold(root(case['seed']), party, case['round'])
    for sample, x in enumerate(message):
      g = f32(rate * (x or 0.0))
      steps.append((fold(base, sample), f32(-g * next(part))))
  found = {}
  unit = FIELD_UNIT[case['distribution']]
  for path, tensor in case['params'].items():
    values, shape = tensor['values'], tensor['shape']
    e = exponent(max(map(abs, values)))
    total = [snap(x, e) for x in values]
    for direction, coefficient in steps:
      n = to_units(coefficient * unit, e, direction, path)
      z = field(direction, path, shape, case['distribution'])
      total = [t + n * x for t, x in zip(total, z, strict=True)]
    found[path] = (total, e, shape)
  return found


def fedkseed_round(case):
  """Coordinates that are not 0, by seed, and weights as of `spsa_round`."""
  base, steps = root(case['seed']), case['local_steps']
  params = {
    path: [(i % 97 - 48) / 64 for i in range(math.prod(shape))]
    for path, shape in case['shapes'].items()
  }
  exponents = {p: exponent(max(map(abs, x))) for p, x in params.items()}
  finest = max(exponents.values())
  messages = [
    decode(case['codec'], case['codec_scale'], bytes.fromhex(m), steps)
    for m in case['messages']
  ]
  share = fractions(
    [
      w if any(x is not None for x in m) else 0
      for w, m in zip(case['weights'], messages, strict=True)
    ]
  )
  rate = f32(round_significant(case['learning_rate']))
  coordinates = {}
  for party, part, message in zip(case['ids'], share, messages, strict=True):
    seeds = seeds_of_steps(
      case['seed'], party, case['round'], steps, case['num_seeds']
    )
    stem = fold(stream(base, 'coordinates'), party, case['round'])
    for i, (k, x) in enumerate(zip(seeds, message, strict=True)):
      move = f32(-f32(rate * (x or 0.0)) * part)
      amount = to_units(move, finest + 6, fold(stem, i), '')
      coordinates[k] = coordinates.get(k, 0) + amount
  found = {}
  for path, values in params.items():
    e, shape = exponents[path], case['shapes'][path]
    total = [snap(x, e) for x in values]
    for k, x in coordinates.items():
      n = pool_units(x, e, finest, case['distribution'])
      z = field((*base, k), path, shape, case['distribution'])
      total = [t + n * x for t, x in zip(total, z, strict=True)]
    found[path] = (total, e, shape)
  return {k: x for k, x in coordinates.items() if x}, found


def digest_of_weights(found):
  leaves = []
  for path, (total, e, shape) in found.items():
    data = struct.pack(f'<{len(total)}f', *(math.ldexp(x, -e) for x in total))
    leaves.append((path, 'float32', shape, data))
  return digest(leaves)
