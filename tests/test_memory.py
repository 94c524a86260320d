"""The account of memory: what it counts, that it is of what runs, and that models of full size fit small cards."""

from __future__ import annotations

import pytest
import torch
from narrow_unets import narrow_sizes

from fastdiff.benchmarks.gpu import memory
from fastdiff.benchmarks.live_bytes import LiveBytes, weights


@torch.no_grad()
def test_storages_are_counted_once_and_until_nobody_holds_them():
    before = torch.empty(7)
    with LiveBytes() as live:
        a = torch.empty(1000, device="meta")
        b = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        view, seen = b.view(10, 100), before[:3]
        del a, b
        assert live.now == 4000, "a view holds its storage; one of a tensor from before is not counted"
        view.relu_()
        del view, seen
    assert (live.now, live.peak) == (0, 8000)
    assert weights([torch.nn.Linear(3, 2)]) == 32


@pytest.mark.parametrize("name", list(memory.FAMILIES))
def test_the_account_of_no_device_is_that_of_a_run(name):
    assert memory.account(narrow_sizes(name)) == memory.account(narrow_sizes(name), "cpu")


@pytest.mark.parametrize("name", list(memory.FAMILIES))
def test_models_of_full_size_fit_small_cards_by_account(name):
    found = memory.account(memory.sizes(name))
    largest = max(found["unet_peak"], found["vae_peak"]) / memory.GIGABYTE
    assert found["unet_weights"] < found["unet_peak"] and largest < 0.75 * memory.BOUNDS[name]
