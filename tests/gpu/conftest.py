"""What only a GPU can show. `make test-gpu` runs it; without one, and among all tests, it is skipped."""

import os

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms

import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The first GPU, computing float32 as such."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible: run `make test-gpu` on a machine with one")
    torch.cuda.init()  # there are no memory statistics to reset before
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", 0)
