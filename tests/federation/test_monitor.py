"""The page that shows a run: on this machine, read-only, nothing unescaped."""

import asyncio
import json

import pytest

from experiments.config import UsageError
from experiments.federation import monitor
from jaxfl.federation.coordinator import Status
from jaxfl.federation.server import _free_port

STATUS = Status(
  round=4,
  num_rounds=10,
  members=(0, 2),
  bytes_up=1500,
  bytes_down=90,
  refused={1: {'late': 2, '<b>': 1}},
  losses={2: 3.5, 4: 3.25},
  attested={2: 'ab' * 8, 4: None},
)


async def get(port, line):
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  writer.write(line + b'\r\n\r\n')
  answer = await reader.read()
  writer.close()
  head, _, body = answer.partition(b'\r\n\r\n')
  return head.split(b'\r\n')[0], body.decode()


def test_the_page():
  port = _free_port()

  async def main():
    async with monitor.serve(port, 'run') as update:
      update(STATUS)
      found = [
        await get(port, line)
        for line in (
          b'GET / HTTP/1.1', b'GET /status.json HTTP/1.1',
          b'GET /other HTTP/1.1', b'POST / HTTP/1.1', b'\xff\xfe',
        )
      ]  # fmt: skip
      with pytest.raises(UsageError, match=f'--monitor_port {port}'):
        async with monitor.serve(port, 'run'):
          pass
    return found

  page, status, other, post, junk = asyncio.run(main())
  assert page[0] == b'HTTP/1.1 200 OK'
  for text in (
    '4 of 10', '0, 2', '1.5 kB', '2 late, 1 &lt;b&gt;', 'replicas differ',
    '3.5 at the top',
  ):  # fmt: skip
    assert text in page[1]
  assert json.loads(status[1])['losses'] == {'2': 3.5, '4': 3.25}
  assert other[0].startswith(b'HTTP/1.1 404')
  assert post[0].startswith(b'HTTP/1.1 405')
  assert junk[0].startswith(b'HTTP/1.1 405')


def test_no_port_no_page():
  async def main():
    async with monitor.serve(None, 'run') as update:
      update(STATUS)

  asyncio.run(main())


def test_a_run_without_losses_has_no_curve():
  assert '<svg' not in monitor.page(Status(), 'a<b')
  assert 'a&lt;b' in monitor.page(Status(), 'a<b')
  assert '<polyline points="0.0,0.0 640.0,240.0"' in monitor.page(STATUS, 'run')
