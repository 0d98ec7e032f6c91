"""Kernels under Triton's interpreter, on CPU tensors.

Triton decides at import whether its kernels are interpreted, for the whole process. So these files are collected only
where TRITON_INTERPRET=1 is set from the start: `tests/test_kernels.py` runs each of them in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from gossamer.kernels import interpreted

collect_ignore_glob = [] if interpreted() else ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
