import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models: importlib mode adds no folder


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few thousand weights compute faster than a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
