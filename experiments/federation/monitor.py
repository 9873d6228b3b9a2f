"""A small page that shows a run, on this machine only, read-only."""

import asyncio
import contextlib
import dataclasses
import html
import json
from collections.abc import AsyncIterator, Callable

from experiments import report
from experiments.config import UsageError
from jaxfl import probe
from jaxfl.federation.coordinator import Status

_REQUEST_S = 5.0
_PAGE = """<!doctype html><meta charset="utf-8">
<meta http-equiv="refresh" content="5"><title>{run}</title>
<style>body{{font:16px sans-serif;margin:2em}}td,th{{padding:.2em 1em;
text-align:right;border-bottom:1px solid #ccc}}th{{text-align:left}}</style>
<h1>{run}</h1><table>{rows}</table>{curve}
<p><a href="/status.json">status.json</a></p>
"""


@contextlib.asynccontextmanager
async def serve(
  port: int | None, run: str
) -> AsyncIterator[Callable[[Status], None]]:
  """Shows a run on http://127.0.0.1:PORT while it is open.

  Args:
    port: None for no page.
    run: its name.

  Yields:
    A function that takes the newest status.

  Raises:
    UsageError: if the port can't be had.
  """
  latest = Status()

  def update(status):
    nonlocal latest
    latest = dataclasses.replace(status)

  if port is None:
    yield update
    return

  async def answer(reader, writer):
    with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError):
      request = await asyncio.wait_for(reader.readline(), _REQUEST_S)
      writer.write(_response(request, latest, run))
      await writer.drain()
    writer.close()

  try:
    server = await asyncio.start_server(answer, '127.0.0.1', port)
  except OSError as error:
    raise UsageError(f'--monitor_port {port}: {error.strerror}') from error
  async with server:
    yield update


def _response(request: bytes, status: Status, run: str) -> bytes:
  method, _, rest = request.decode('latin-1').partition(' ')
  path, _, _ = rest.partition(' ')
  if method != 'GET':
    return _http('405 Method Not Allowed', 'text/plain', 'read-only\n')
  if path == '/status.json':
    text = json.dumps(dataclasses.asdict(status), indent=1, sort_keys=True)
    return _http('200 OK', 'application/json', text)
  if path != '/':
    return _http(
      '404 Not Found', 'text/plain', 'there are / and /status.json\n'
    )
  return _http('200 OK', 'text/html; charset=utf-8', page(status, run))


def _http(status, kind, text):
  body = text.encode()
  head = (
    f'HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}'
    '\r\nConnection: close\r\nCache-Control: no-store\r\n\r\n'
  )
  return head.encode() + body


def page(status: Status, run: str) -> str:
  """The page, HTML."""
  refused = {
    f'refused of client {client}': ', '.join(
      f'{n} {reason}' for reason, n in counts.items()
    )
    for client, counts in sorted(status.refused.items())
  }
  rows = {
    'round': f'{status.round} of {status.num_rounds}',
    'members': ', '.join(map(str, status.members)) or 'none',
    'bytes up, all clients': report.amount(status.bytes_up),
    'bytes down, each replica': report.amount(status.bytes_down),
    **refused,
  }
  if status.levels:
    levels = (f'{i}: {level}' for i, level in enumerate(status.levels))
    rows[f'trust of clients, 0 to {probe.LEVELS}'] = ', '.join(levels)
  if status.attested:
    last = max(status.attested)
    digest = status.attested[last] or 'replicas differ'
    rows[f'digest after round {last}'] = digest
  text = ''.join(
    f'<tr><th>{html.escape(k)}<td>{html.escape(v)}' for k, v in rows.items()
  )
  return _PAGE.format(
    run=html.escape(run), rows=text, curve=_curve(status.losses)
  )


def _curve(losses: dict[int, float]) -> str:
  """The mean training loss of the clients against rounds, as SVG."""
  if len(losses) < 2:
    return ''
  width, height = 640, 240
  rounds, values = list(losses), list(losses.values())
  low, high = min(values), max(values)
  across = lambda r: width * (r - rounds[0]) / (rounds[-1] - rounds[0])
  down = lambda v: height * (high - v) / ((high - low) or 1.0)
  points = ' '.join(f'{across(r):.1f},{down(v):.1f}' for r, v in losses.items())
  label = lambda y, text: f'<text x="4" y="{y}" font-size="13">{text}</text>'
  return (
    f'<svg viewBox="0 -20 {width} {height + 50}" width="{width}">'
    f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>'
    f'{label(-6, f"mean training loss of the clients, {high:.4g} at the top")}'
    f'{label(height + 20, f"{low:.4g}; rounds {rounds[0]} to {rounds[-1]}")}'
    '</svg>'
  )
