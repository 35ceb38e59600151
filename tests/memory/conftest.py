"""One thread, and the allocators' own word where the extension that asks them is built."""

import sys

import pytest

from longtrain.memory.trace import missing


@pytest.fixture(autouse=True)
def small_models(one_thread):
    """What is profiled here is small."""


@pytest.fixture(params=["allocator", "storages"])
def source(request, monkeypatch):
    """Both ways to know of memory: from the allocators, and from the storages of tensors where the extension is not built."""
    if request.param == "allocator":
        if (why := missing()) is not None:
            pytest.skip(f"NO ALLOCATOR TRACE: {why}")
    else:
        monkeypatch.setattr(sys.modules["longtrain.memory.profile"], "missing", lambda: "a test left the extension out")
    return request.param


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than a tiny step; tests that ask for `picture` draw."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("longtrain.memory.picture.draw", lambda *_: None)


@pytest.fixture
def picture():
    pytest.importorskip("matplotlib", reason='needs pip install "longtrain[plot]"')


@pytest.fixture
def allocators():
    if (why := missing()) is not None:
        pytest.skip(f"NO ALLOCATOR TRACE: {why}")
