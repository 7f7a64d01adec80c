"""No crash, whatever code of the user's does that runs in the middle of a step: the table of interruptions.py."""

import os
import subprocess
import sys

import pytest

from .optimizers import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_interruptions(row):
    """In a process of its own, where freed memory is overwritten, so that none who reads it gets away with it."""
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-m", "tests.interruptions", row.name]
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONMALLOC": "debug"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name, silent = done.stdout.splitlines()[-1].split(" never calls: ")  # torch 2.10's Gloo has a line too
    assert name == row.name
    not_looked_up = ("foreach", "fused", *row.constructor_only)
    assert set(silent.split(", ")) <= {f"option {name}" for name in not_looked_up}
