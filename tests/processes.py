"""Running a module as two processes of four devices that form one run."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_two(module: str, *arguments: str) -> list[str]:
  """What each process printed; fails unless both exit 0."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': '2',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-m', module, *arguments],
      cwd=ROOT,
      env={**environment, 'JAX_PROCESS_ID': str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs):
    assert process.returncode == 0, output[-3000:]
  return outputs
