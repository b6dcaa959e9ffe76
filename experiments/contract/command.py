"""The command line that every experiment has."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from idesign import training


def main(run: Callable[[object, pathlib.Path], None]) -> None:
  """Runs an experiment from its command line.

  Args:
    run: `run(config, workdir)`; writes results, figures and `claims.json`.
  """
  config = config_flags.DEFINE_config_file(
    'config', None, 'Config file and preset, as in configs/NAME.py:cpu.'
  )
  workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.')
  strict = flags.DEFINE_bool('strict', False, 'Exit 1 if a claim fails.')
  flags.mark_flags_as_required(['config', 'workdir'])

  def start(argv):
    if len(argv) > 1:
      raise app.UsageError(f'Unknown arguments: {argv[1:]}.')
    # The libraries' progress reports would drown the progress bar.
    logging.set_verbosity(logging.WARNING)
    training.initialize_distributed()
    print(f'{jax.device_count()} x {jax.devices()[0].device_kind}', flush=True)
    folder = pathlib.Path(workdir.value)
    run(config.value, folder)
    if jax.process_index() != 0:
      return  # Process 0 speaks for all.
    if config.value.get('preset') == 'smoke':
      print('smoke only runs every code path: no claim is meant to hold')
    failed = []
    for c in json.loads((folder / 'claims.json').read_text('utf-8')):
      verdict = 'holds' if c['passed'] else 'FAILS'
      low, high = c['ci95']
      print(
        f'{verdict}  {c["statement"]}: {c["value"]:.2f} [{low:.2f}, {high:.2f}]'
        f' {c["comparator"]} {c["target"]:g}'
      )
      failed += [] if c['passed'] else [c['id']]
    if failed and strict.value:
      sys.exit(f'{len(failed)} claim(s) failed: {", ".join(failed)}')

  def parse(arguments):
    try:
      return flags.FLAGS(arguments)
    except AttributeError as error:  # What a ConfigDict raises.
      # Its message is the repr of a message.
      what = str(error).strip('"\'').replace('\\n', '. ').replace('\\', '')
      sys.exit(
        f'Unknown config key: {what}. A key is set with --config.KEY=VALUE; '
        'the config file that --config names lists them.'
      )

  app.run(start, flags_parser=parse)
