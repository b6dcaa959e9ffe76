"""An OpenAI-compatible chat endpoint, for one JSON object at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import math
import random
import re
import sys
import threading
import time
from typing import Any, NamedTuple
import urllib.parse

Message = dict[str, str]

# A token of a few characters comes in an event of its own, in some hundred
# bytes of JSON: a reply as long as it may be needs no more than this.
_BYTES_PER_CHARACTER, _MORE_BYTES = 512, 65_536


class EndpointError(RuntimeError):
  """The endpoint gave no answer; says what happened and how often."""


class Completion(NamedTuple):
  """A reply.

  Attributes:
    text: what the model wrote.
    model: its name as the server reports it.
  """

  text: str
  model: str


# (messages, JSON schema of the reply) -> reply; raises EndpointError.
Complete = Callable[[Sequence[Message], dict[str, Any]], Completion]


_STYLES = ('json_schema', 'json_object', 'prompt')


class ChatEndpoint:
  """Calls `POST {base_url}/chat/completions` through the `openai` client.

  Asks for the schema first (`json_schema`); a server that refuses that is
  asked for any JSON object, then in the prompt alone, and what it answered is
  remembered. What comes back is *not* validated here.

  Whatever the server sends, a try ends after `timeout` seconds, and reads no
  more bytes than a reply of `max_characters` needs. Each try has a connection
  of its own, so that one which hangs is closed without harm to another.
  408, 409, 429, 5xx, broken connections and streams, and timeouts are tried
  again after `backoff * 2^n` seconds and up to a quarter more; anything else (a
  wrong key, an unknown model) fails at once.
  """

  def __init__(
    self,
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    tries: int = 4,
    backoff: float = 1.0,
    max_characters: int = 20_000,
    seed: int = 0,
  ):
    """Makes a client; nothing is sent yet.

    Args:
      model: the name the server knows.
      base_url: of the server; OPENAI_BASE_URL or OpenAI's own if None. A user
        and password in it, or a query, are kept out of all errors.
      api_key: OPENAI_API_KEY if None; local servers take anything.
      timeout: seconds for a whole reply, from connecting to its end.
      tries: how often a failing call is made in all.
      backoff: seconds before the first repetition.
      max_characters: a longer reply is an error.
      seed: sent along, with temperature 0.

    Raises:
      ImportError: without the `llm` extra.
      ValueError: for a number that is not positive and finite (`backoff` may
        be 0), or a `base_url` that is none.
    """
    try:
      import openai
    except ImportError as error:
      raise ImportError(
        "a language-model judge needs the openai client: pip install 'idesign"
        "[llm]'."
      ) from error
    for name, value in (
      ('timeout', timeout),
      ('tries', tries),
      ('max_characters', max_characters),
    ):
      if not 0 < value < math.inf:
        raise ValueError(f'{name}={value} must be positive and finite.')
    if not 0 <= backoff < math.inf:
      raise ValueError(f'backoff={backoff} must be finite and not negative.')
    self._openai = openai
    try:
      self._client = openai.OpenAI(
        base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0
      )
      self._url = urllib.parse.urlsplit(str(self._client.base_url))
      self._shown = self._url._replace(
        netloc=self._url.netloc.rpartition('@')[2], query='', fragment=''
      ).geturl()
    except openai.OpenAIError:  # No key; says so.
      raise
    except Exception as error:  # Its text may hold the password.
      raise ValueError(
        f'base_url is no URL ({type(error).__name__}); it should look like '
        'http://localhost:8000/v1.'
      ) from None
    self.model, self.seed = model, seed
    self._timeout, self._tries, self._backoff = timeout, tries, backoff
    self._max_characters = max_characters
    self._style = 0  # Into _STYLES: the first that the server answered.

  def __call__(
    self, messages: Sequence[Message], schema: dict[str, Any]
  ) -> Completion:
    """One reply.

    Raises:
      EndpointError: after the last try, or at once where repeating is no use.
    """
    failures: list[str] = []
    style = self._style
    while len(failures) < self._tries:
      if failures:
        wait = self._backoff * 2 ** (len(failures) - 1)
        time.sleep(wait * (1 + random.random() / 4))
      try:
        reply = self._bounded(messages, schema, _STYLES[style])
      except self._openai.APIStatusError as error:
        status = error.status_code
        if status in (400, 422) and style + 1 < len(_STYLES):
          style += 1  # Not a failure: ask in simpler words.
          continue
        failures.append(f'HTTP {status}: {self._redacted(error)}')
        if status not in (408, 409, 429) and status < 500:
          break
      # What the client lets through of a broken stream is of many kinds.
      except Exception as error:
        failures.append(f'{type(error).__name__}: {self._redacted(error)}')
      else:
        # Only now is it known that the format was refused, not the prompt.
        self._style = style
        return reply
    raise EndpointError(
      f'{self._shown} gave no answer in {len(failures)} of '
      f'{self._tries} tries: {" | ".join(failures)}'
    )

  def _redacted(self, error: Exception) -> str:
    """What an error says, shortened, without what the URL holds of secrets."""
    text = re.sub(r'//[^/\s@]*@', '//***@', str(error))
    key = self._client.api_key
    # A short user or key, such as `none`, is a placeholder and no secret.
    long = [x for x in (self._url.username, key) if x and len(x) > 7]
    for secret in (self._url.password, self._url.query, *long):
      for form in (secret, urllib.parse.unquote(secret)) if secret else ():
        text = text.replace(form, '***')
    return text[:200]

  def _bounded(self, messages, schema, style) -> Completion:
    """One try, ended after `timeout` seconds whatever the server does.

    Nothing else bounds it: the client's own timeout starts anew with every
    byte, in headers too, and looking up a host's address has none.
    """
    http = self._openai.DefaultHttpxClient()
    client = self._client.with_options(http_client=http)
    limit = _Limit(
      self._timeout, _MORE_BYTES + _BYTES_PER_CHARACTER * self._max_characters
    )
    http.event_hooks = {'response': [limit.watch]}
    outcome: list[Completion | Exception] = []

    def work():
      try:
        outcome.append(self._stream(client, messages, schema, style))
      except Exception as error:
        outcome.append(error)

    thread = threading.Thread(target=work, name='judge', daemon=True)
    try:
      thread.start()
      thread.join(self._timeout)
      result = outcome[0] if outcome else limit.late()
    finally:
      # The thread, if it still waits, fails at the next byte.
      with contextlib.suppress(Exception):
        http.close()
    try:
      if isinstance(result, Exception):
        # The client hides what its hooks raise.
        raise limit.broken or result
      return result
    finally:
      # An error that refers to itself keeps all its callers alive. The thread
      # may still have something to put into `outcome`: it stays.
      outcome.clear()
      del result, limit

  def _stream(self, client, messages, schema, style) -> Completion:
    options: dict[str, Any] = {}
    if style == 'json_schema':
      options['response_format'] = {
        'type': 'json_schema',
        'json_schema': {'name': 'reply', 'strict': True, 'schema': schema},
      }
    elif style == 'json_object':
      options['response_format'] = {'type': 'json_object'}
    if style != 'json_schema':
      ask = (
        'Reply with one JSON object and nothing else. Its schema: '
        + json.dumps(schema)
      )
      messages = [*messages, {'role': 'system', 'content': ask}]
    parts, characters, model, ended = [], 0, self.model, False
    with client.chat.completions.create(
      model=self.model,
      messages=list(messages),
      temperature=0,
      seed=self.seed,
      stream=True,
      extra_headers={'Accept-Encoding': 'identity'},
      **options,
    ) as stream:
      for chunk in stream:
        if isinstance(chunk.model, str) and chunk.model:
          model = chunk.model[:200]
        if chunk.choices:
          parts.append(chunk.choices[0].delta.content or '')
          characters += len(parts[-1])
          ended |= chunk.choices[0].finish_reason is not None
        if characters > self._max_characters:
          raise ValueError(f'more than {self._max_characters} characters.')
    if not ended or not any(parts):
      raise ValueError('the reply broke off.' if any(parts) else 'no reply.')
    return Completion(''.join(parts), model)


class _Limit:
  """Ends the responses of one try that are too late or too long.

  Attributes:
    broken: what was raised, if anything was.
  """

  def __init__(self, seconds: float, size: int):
    self._seconds, self._size = seconds, size
    self._deadline, self._left = time.monotonic() + seconds, size
    self.broken: Exception | None = None

  def watch(self, response: Any) -> None:
    """Takes the place of a response's stream; also that of an error."""
    # Not asked for, and a few bytes could become any number.
    if response.headers.get('content-encoding', 'identity') != 'identity':
      self.broken = ValueError('the reply is compressed.')
      raise self.broken
    raw, check = response.stream, self._check
    # httpx or its successor, whichever this openai uses.
    package = sys.modules[type(response).__module__.partition('.')[0]]

    class Limited(package.SyncByteStream):
      def __iter__(self) -> Iterator[bytes]:
        for data in raw:
          check(len(data))
          yield data

      def close(self) -> None:
        raw.close()

    response.stream = Limited()

  def late(self) -> Exception:
    self.broken = TimeoutError(f'the reply took longer than {self._seconds} s.')
    return self.broken

  def _check(self, size: int) -> None:
    self._left -= size
    if self._left < 0:
      self.broken = ValueError(f'more than {self._size} bytes.')
      raise self.broken
    if time.monotonic() > self._deadline:
      raise self.late()
