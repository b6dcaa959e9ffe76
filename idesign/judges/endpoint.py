"""An OpenAI-compatible chat endpoint, for one JSON object at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import random
import time
from typing import Any, NamedTuple

Message = dict[str, str]


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


class ChatEndpoint:
  """Calls `POST {base_url}/chat/completions` through the `openai` client.

  Asks for the schema first (`json_schema`); a server that refuses that is
  asked for any JSON object, then in the prompt alone, and what it took is
  remembered. What comes back is *not* validated here.

  Replies are streamed, so that one which is too long or too slow is cut off.
  429, 5xx, broken connections and streams, and timeouts are tried again after
  `2^n` seconds and some jitter; anything else (a wrong key, an unknown model)
  fails at once.
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
      base_url: of the server; OPENAI_BASE_URL or OpenAI's own if None.
      api_key: OPENAI_API_KEY if None; local servers take anything.
      timeout: seconds for a whole reply.
      tries: how often a failing call is made in all.
      backoff: seconds before the first repetition.
      max_characters: a longer reply is an error.
      seed: sent along, with temperature 0.

    Raises:
      ImportError: without the `llm` extra.
      ValueError: for a number that is not positive.
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
      if not value > 0:
        raise ValueError(f'{name}={value} must be positive.')
    self._openai = openai
    self._client = openai.OpenAI(
      base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0
    )
    self.model, self.seed = model, seed
    self._timeout, self._tries, self._backoff = timeout, tries, backoff
    self._max_characters = max_characters
    self._formats = ['json_schema', 'json_object', 'prompt']

  def __call__(
    self, messages: Sequence[Message], schema: dict[str, Any]
  ) -> Completion:
    """One reply.

    Raises:
      EndpointError: after the last try, or at once where repeating is no use.
    """
    failures: list[str] = []
    while len(failures) < self._tries:
      if failures:
        wait = self._backoff * 2 ** (len(failures) - 1)
        time.sleep(wait * (1 + random.random() / 4))
      try:
        return self._stream(messages, schema)
      except self._openai.APIStatusError as error:
        status = error.status_code
        if status in (400, 422) and len(self._formats) > 1:
          del self._formats[0]  # Not a failure: ask in simpler words.
          continue
        failures.append(f'HTTP {status}: {str(error)[:200]}')
        if status not in (408, 409, 429) and status < 500:
          break
      # What the client lets through of a broken stream is of many kinds.
      except Exception as error:
        failures.append(f'{type(error).__name__}: {str(error)[:200]}')
    raise EndpointError(
      f'{self._client.base_url} gave no answer in {len(failures)} of '
      f'{self._tries} tries: {" | ".join(failures)}'
    )

  def _stream(self, messages, schema) -> Completion:
    style = self._formats[0]
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
    started, parts, model = time.monotonic(), [], self.model
    ended = False
    with self._client.chat.completions.create(
      model=self.model,
      messages=list(messages),
      temperature=0,
      seed=self.seed,
      stream=True,
      **options,
    ) as stream:
      for chunk in stream:
        model = chunk.model or model
        if chunk.choices:
          parts.append(chunk.choices[0].delta.content or '')
          ended |= chunk.choices[0].finish_reason is not None
        if time.monotonic() - started > self._timeout:
          raise TimeoutError(f'the reply took longer than {self._timeout} s.')
        if sum(map(len, parts)) > self._max_characters:
          raise ValueError(f'more than {self._max_characters} characters.')
    if not ended or not any(parts):
      raise ValueError('the reply broke off.' if any(parts) else 'no reply.')
    return Completion(''.join(parts), model)
