"""The kernels by file path: natively where there is a CUDA device, else through Triton's
interpreter, which has to be chosen before triton is imported.

Other tests of the same process may have imported triton, or will, to compile: while a test of this
folder runs, an interpreting copy of triton's modules takes the place of theirs.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
_interpreting_modules = {}


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """TRITON_INTERPRET and the interpreting copy of triton's modules, on the way out undone."""
    others = _take_triton_modules()
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules.update(_interpreting_modules)
    try:
        yield
    finally:
        _interpreting_modules.update(_take_triton_modules())
        sys.modules.update(others)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _take_triton_modules() -> dict:
    """triton's Python modules; the compiled one cannot be loaded twice and does not care."""
    names = [n for n in sys.modules if n.split(".")[0] == "triton"]
    return {n: sys.modules.pop(n) for n in names if not n.startswith("triton._C")}


def load_kernels():
    path = ROOT / "kernels" / "infonce_triton.py"
    spec = importlib.util.spec_from_file_location("infonce_triton_tested", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def _kernels():
    if torch.cuda.is_available():
        yield load_kernels()
        return
    with interpreter():
        module = load_kernels()
    yield module
    for name in _interpreting_modules:  # the exit hooks of triton expect to find its modules
        sys.modules.setdefault(name, _interpreting_modules[name])


@pytest.fixture
def kernels(_kernels):
    if torch.cuda.is_available():
        yield _kernels
    else:
        with interpreter():
            yield _kernels


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where a test's tensors lie: every test runs natively too where it can."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "interpreter" and torch.cuda.is_available():
        pytest.skip("triton runs natively in this process")
    return "cuda" if request.param == "cuda" else "cpu"
