"""What every experiment shares: command line, workdir, claims, result page."""

from experiments.contract.claims import Claim, claim, interval, save_claims
from experiments.contract.command import main
from experiments.contract.seeds import reported_seeds
from experiments.contract.table import Table
from experiments.contract.workdir import (
  Workdir, fingerprint, write_bytes, write_text,
)  # fmt: skip
