"""The endpoint against servers that do not end, and errors that tell."""

import time
import types

import pytest

from idesign import judges
from idesign.judges import endpoint as endpoint_lib
from tests.judges.server import DRIPS, serve, verdict

ASK = ([{'role': 'user', 'content': 'hello'}], {'type': 'object'})


def make(url, **options):
  options = {'api_key': 'none', 'backoff': 0.0, 'timeout': 20.0} | options
  return judges.ChatEndpoint('tiny', base_url=url, **options)


@pytest.mark.parametrize('drip', DRIPS)
def test_no_server_holds_it_longer_than_it_waits(drip):
  with serve(drip) as server:
    ask = make(server.url, timeout=1.5, tries=1)
    started = time.monotonic()
    with pytest.raises(judges.EndpointError):
      ask(*ASK)
    assert time.monotonic() - started < 9


@pytest.mark.parametrize(
  'act,said', [('one line', 'more than 70656 bytes'), ('compressed', 'is comp')]
)
def test_bytes_are_bounded_before_they_are_a_reply(act, said):
  with serve(act) as server:
    ask = make(server.url, max_characters=10, tries=1)
    started = time.monotonic()
    with pytest.raises(judges.EndpointError, match=said):
      ask(*ASK)
    assert time.monotonic() - started < 9


def test_a_reply_as_long_as_it_may_be_fits():
  with serve('x' * 3000) as server:
    ask = make(server.url, max_characters=3000, tries=1)
    assert ask(*ASK).text == 'x' * 3000
  with serve('x' * 3001) as server:
    ask = make(server.url, max_characters=3000, tries=1)
    with pytest.raises(judges.EndpointError, match='3000 characters'):
      ask(*ASK)


@pytest.mark.parametrize('name', ['backoff', 'timeout', 'tries'])
@pytest.mark.parametrize('value', [-1, float('nan'), float('inf')])
def test_numbers_that_cannot_be_waited_are_refused(name, value):
  with pytest.raises(ValueError, match=f'{name}={value}'):
    make('http://localhost:1/v1', **{name: value})


def test_it_waits_longer_each_time(monkeypatch):
  waits = []
  clock = types.SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
  monkeypatch.setattr(endpoint_lib, 'time', clock)
  with serve(500) as server:
    with pytest.raises(judges.EndpointError, match='4 of 4 tries'):
      make(server.url, backoff=3.0)(*ASK)
  assert len(waits) == 3
  for n, wait in enumerate(waits):
    assert 3 * 2**n <= wait <= 3 * 2**n * 1.25


@pytest.mark.parametrize('status', [408, 409])
def test_timeouts_and_conflicts_are_tried_again(status):
  with serve(status, verdict()) as server:
    assert make(server.url)(*ASK).text == verdict()
    assert len(server.requests) == 2


@pytest.mark.parametrize('status', [400, 422])
def test_a_prompt_that_is_refused_does_not_change_the_next(status):
  with serve(status, status, status, verdict()) as server:
    ask = make(server.url)
    with pytest.raises(judges.EndpointError, match=f'HTTP {status}'):
      ask(*ASK)
    assert len(server.requests) == 3
    ask(*ASK)
  kinds = [r.get('response_format', {}).get('type') for r in server.requests]
  assert kinds == ['json_schema', 'json_object', None, 'json_schema']


@pytest.mark.parametrize('model', [float('nan'), 7, None, 'x' * 999])
def test_the_name_of_the_model_is_a_text(model):
  with serve(verdict()) as server:
    server.model = model
    name = make(server.url)(*ASK).model
  assert isinstance(name, str) and 0 < len(name) <= 200


KEY = 'sk-0123456789abcdef'


def test_errors_hold_no_credentials():
  with serve(401) as server:
    url = server.url.replace('//', '//admin:hun%24ter2@')
    server.message = f'{url} is not for hun$ter2 or hun%24ter2 with {KEY}'
    with pytest.raises(judges.EndpointError) as caught:
      make(url, api_key=KEY, tries=1)(*ASK)
  assert server.url in str(caught.value)  # It still says where.
  for secret in ('ter2', 'admin', KEY):
    assert secret not in str(caught.value)
  with pytest.raises(judges.EndpointError) as caught:
    make(url, tries=1)(*ASK)  # Nobody listens any more.
  assert 'ter2' not in str(caught.value)
  with pytest.raises(ValueError, match='base_url is no URL') as caught:
    make('http://admin:hun:ter2@local:port/v1')
  assert 'ter2' not in str(caught.value)
