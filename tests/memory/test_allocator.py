"""Segments of torch's CUDA allocator grow unless someone has set it, or uses it already."""

from __future__ import annotations

import os

import pytest
import torch

from unsloth.memory import allocator


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in allocator.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.delenv(allocator.ALLOCATOR_VARIABLES[0], raising=False)


def test_segments_grow_where_nothing_was_set():
    assert allocator.grow_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not allocator.grow_segments()


@pytest.mark.parametrize("name", allocator.ALLOCATOR_VARIABLES)
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert not allocator.grow_segments()
    assert os.environ[name] == "max_split_size_mb:64"


def test_a_gpu_in_use_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    assert allocator.grow_segments() and told == ["expandable_segments:True"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_a_torch_without_the_setter_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
    assert not allocator.grow_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
