"""A server that speaks the chat protocol, well or badly, as a script says."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time

RELEASE = threading.Event()  # Lets hanging handlers end with their test.


def verdict(decision='suppress', clause='pirate', **changes):
  """The reply of a model that made up its mind."""
  reply = {
    'action': 'verdict',
    'text': None,
    'decision': decision,
    'strength': 1.0,
    'confidence': 0.9,
    'clause': clause,
    'rationale': 'it speaks like a pirate',
  }
  return json.dumps(reply | changes)


def ask(action, text=None):
  nothing = dict.fromkeys(
    ('decision', 'strength', 'confidence', 'clause', 'rationale')
  )
  return json.dumps({'action': action, 'text': text} | nothing)


class Server:
  """What the server got, and what it will do.

  A script is a list of behaviours, one per request, the last repeated: text is
  streamed as the reply; an int is that HTTP status; `hang`, `drip` (a reply
  that never ends), `cut` (a stream that breaks off) and `error` (an error
  object in mid-stream) are what they say; a key of DRIPS sends that for 15
  seconds; a function gets the request's JSON and returns one of these.

  Attributes:
    model: what it calls its model.
    message: of its errors.
  """

  def __init__(self, script, url):
    self.script, self.url = list(script), url
    self.requests, self.model, self.message = [], 'tiny-judge-1', 'status'


_EVENTS = b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n'
DRIPS = {  # Name: what comes once, what comes again and again, seconds between.
  'comments': (_EVENTS + b'\r\n', b': ping\n\n', 0.05),
  'error body': (b'HTTP/1.1 500 Oh\r\n\r\n', b' ', 0.05),
  'headers': (_EVENTS, b'X-Again: 1\r\n', 0.05),
  'one line': (_EVENTS + b'\r\ndata: "', b'x' * 65536, 0.0),
  'compressed': (
    _EVENTS + b'Content-Encoding: gzip\r\n\r\n', b'\0' * 9, 0.05
  ),
}  # fmt: skip


@contextlib.contextmanager
def serve(*script):
  RELEASE.clear()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
      pass

    def do_POST(self):
      body = self.rfile.read(int(self.headers['Content-Length']))
      request = json.loads(body)
      state.requests.append(request)
      act = state.script[0]
      if len(state.script) > 1:
        del state.script[0]
      act = act(request) if callable(act) else act
      with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        self.behave(act)

    def behave(self, act):
      self.close_connection = True
      if isinstance(act, int):
        error = {'message': f'{state.message} {act}'}
        text = json.dumps({'error': error}).encode()
        self.send_response(act)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        return
      if act == 'hang':
        RELEASE.wait(30)
        return
      if act in DRIPS:
        first, again, pause = DRIPS[act]
        self.wfile.write(first)
        ends = time.monotonic() + 15
        while time.monotonic() < ends and not RELEASE.wait(pause):
          self.wfile.write(again)
        return
      self.send_response(200)
      self.send_header('Content-Type', 'text/event-stream')
      self.end_headers()
      if act == 'drip':
        while not RELEASE.is_set():
          self.chunk('x' * 50)
          time.sleep(0.005)
      elif act == 'cut':
        self.chunk('{"action": "ver')
        self.wfile.write(b'data: {"id": "broken')
      elif act == 'error':
        self.chunk('{"action"')
        self.wfile.write(b'data: {"error": {"message": "overloaded"}}\n\n')
      else:
        for start in range(0, len(act), 40):
          self.chunk(act[start : start + 40])
        self.chunk('', 'stop')
        self.wfile.write(b'data: [DONE]\n\n')

    def chunk(self, text, finish=None):
      chunk = {
        'id': 'x',
        'object': 'chat.completion.chunk',
        'created': 0,
        'model': state.model,
        'choices': [
          {'index': 0, 'delta': {'content': text}, 'finish_reason': finish}
        ],
      }
      self.wfile.write(f'data: {json.dumps(chunk)}\n\n'.encode())
      self.wfile.flush()

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  state = Server(script, f'http://127.0.0.1:{server.server_port}/v1')
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield state
  finally:
    RELEASE.set()
    server.shutdown()
    thread.join()
    server.server_close()
