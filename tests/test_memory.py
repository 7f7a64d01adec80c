"""The memory a step needs beside parameters, gradients and state does not grow with the model; torch's foreach does."""

import resource
import subprocess
import sys

import pytest

# A fresh process for each, because the peak is the process's: prints the growth of it during three steps, in MB.
SCRIPT = """
import resource, sys
import torch, fastopt
library, name, million, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.zeros(million * 62_500)) for _ in range(16)]
for param in params:
    param.grad = torch.full_like(param, 0.5)
optimizer = getattr(torch.optim if library == "torch" else fastopt, name)(params, **how)
small = [torch.nn.Parameter(torch.zeros(1))]
small[0].grad = torch.ones(1)
warm = type(optimizer)(small, **how)
warm.step()
for param in params:  # the state, without a step
    state = optimizer.state[param]
    for key, value in warm.state[small[0]].items():
        state[key] = value.clone() if key == "step" else torch.full_like(param, 0.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    optimizer.step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def growth(library, name, million, how):
    command = [sys.executable, "-c", SCRIPT, library, name, str(million), repr(how)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_peak_of_a_step_is_flat():
    """1.6 GB of parameters, gradients and state for 100 M parameters; the step adds less than 4 MB at any size."""
    ours = {million: growth("fastopt", "Adam", million, {}) for million in (1, 10, 100)}
    foreach = growth("torch", "Adam", 10, {"foreach": True})
    print(f"a step adds {ours} MB for so many million parameters; torch's foreach {foreach:.0f} MB for 10 million")
    assert max(ours.values()) < 4
    assert foreach > 30  # the measurement sees temporaries where there are some
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 1_500_000  # kB: the model was really that large
