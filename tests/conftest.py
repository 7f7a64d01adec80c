"""For every test: what is skipped on this machine, a fixed seed, one thread."""

import os
import platform

import pytest
import torch


def pytest_report_header():
    kind = os.environ.get("FASTOPT_TEST_SQRT")
    if kind and not hasattr(torch.Tensor.sqrt, "__code__"):
        raise pytest.UsageError("FASTOPT_TEST_SQRT without tests/tools/torch_sqrt in PYTHONPATH: see make test-sqrt")
    return f"torch's square root: {kind}" if kind else None


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA or ROCm device")
    no_fma = pytest.mark.skip(reason="ATEN_CPU_CAPABILITY=default: torch's own formula is another one, without fma")
    torch_has_fma = platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if not torch_has_fma:
            item.add_marker(no_fma)


@pytest.fixture(autouse=True)
def _reproducible():
    """One seed and one thread, unless the test sets more: the pool's barriers are slow on a busy machine."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
