"""What only a GPU can show. Run them with `python -m pytest tests/gpu` on a machine that has one."""

from __future__ import annotations

import pytest
import torch

from gossamer.kernels import available

DEVICE = torch.device("cuda", 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and available(DEVICE):
        return
    skip = pytest.mark.skip(reason="needs Triton and a CUDA device of capability 9.0")
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(skip)
