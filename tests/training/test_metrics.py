"""One line per step, valid JSON, whatever interrupts the writing."""

import json
import math
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from idesign.training import MetricsWriter, read_metrics


def lines(path):
  return path.read_text().splitlines()


def strict(line):
  """Parses as JSON without the NaN extension of Python."""

  def refuse(constant):
    raise ValueError(constant)

  return json.loads(line, parse_constant=refuse)


def test_round_trip_with_values_that_are_not_finite(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with MetricsWriter(path) as writer:
    writer.write(1, {'a': 0.5, 'b': jnp.float32(2), 'c': np.int64(3)})
    writer.write(2, {'a': math.nan, 'b': jnp.inf, 'c': np.array([-np.inf])})
    writer.write(4, {'ok': True})
  assert [strict(line)['step'] for line in lines(path)] == [1, 2, 4]
  first, second, third = read_metrics(path)
  assert first == {'step': 1, 'a': 0.5, 'b': 2.0, 'c': 3}
  assert isinstance(first['c'], int) and third['ok'] is True
  assert math.isnan(second['a'])
  assert (second['b'], second['c']) == (math.inf, -math.inf)


@pytest.mark.parametrize(
  'step, kept', [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])]
)
def test_resume_drops_what_came_later(tmp_path, step, kept):
  path = tmp_path / 'metrics.jsonl'
  with MetricsWriter(path) as writer:
    for n in (1, 2, 3):
      writer.write(n, {'a': n})
  with MetricsWriter(path) as writer:
    writer.resume(step)
    writer.write(10, {'a': 10})
  assert [r['step'] for r in read_metrics(path)] == [*kept, 10]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


@pytest.mark.parametrize('tail', ['{"step": 2, "a', '{"step": 2, "a": 1}'])
def test_a_half_written_line_does_not_count(tmp_path, tail):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "a": 1}\n' + tail)
  assert [r['step'] for r in read_metrics(path)] == [1]
  with MetricsWriter(path) as writer:
    writer.write(2, {'a': 2})
  assert [r['a'] for r in read_metrics(path)] == [1, 2]


def test_lines_are_readable_while_the_file_is_open(tmp_path):
  with MetricsWriter(tmp_path / 'm') as writer:
    writer.write(1, {'a': 1})
    assert len(read_metrics(tmp_path / 'm')) == 1
    writer.sync()


@pytest.mark.parametrize(
  'step, metrics, match',
  [
    (3, {'a': 1}, r'already holds step 3.*resume\(2\)'),
    (2, {'a': 1}, 'already holds step 3'),
    (4, {'a': np.ones(2)}, r"'a' of step 4 .*shape \(2,\)"),
    (4, {'step': 1}, 'other than "step"'),
    (4, {'a': 'high'}, "'a' must be a number; got 'high'"),
  ],
)
def test_bad_lines_are_refused_and_leave_the_file_alone(
  tmp_path, step, metrics, match
):
  with MetricsWriter(tmp_path / 'm') as writer:
    writer.write(3, {'a': 1})
    before = (tmp_path / 'm').read_bytes()
    with pytest.raises(ValueError, match=match):
      writer.write(step, metrics)
    assert (tmp_path / 'm').read_bytes() == before


@pytest.mark.parametrize(
  'line', ['nonsense', '[1]', '{"loss": 1}', '{"step": "x"}']
)
def test_damaged_files_are_named_and_kept(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  text = '{"step": 1}\n' + line + '\n{"step": 2}\n'
  path.write_text(text)
  for read in (read_metrics, MetricsWriter):
    with pytest.raises(ValueError, match='metrics.jsonl, line 2'):
      read(path)
  assert path.read_text() == text


def test_missing_folder_and_closed_writer(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
    MetricsWriter(tmp_path / 'nowhere' / 'metrics.jsonl')
  with MetricsWriter(tmp_path / 'm') as writer:
    pass
  with pytest.raises(ValueError, match='closed'):
    writer.write(1, {})


def test_a_full_disk_names_the_file_and_keeps_its_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  writer = MetricsWriter(path)
  writer.write(1, {'loss': 0.5})
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
  try:
    with pytest.raises(OSError, match='metrics.jsonl.*step 2.*make room'):
      writer.write(2, {'loss': 0.25})
    writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert read_metrics(path) == [{'step': 1, 'loss': 0.5}]
  with MetricsWriter(path) as writer:
    writer.write(2, {'loss': 0.25})
  assert [r['step'] for r in read_metrics(path)] == [1, 2]
