"""Noise is a pure function of seed, draw and element."""

from __future__ import annotations

import pytest
import torch

from fastdiff.errors import ShapeError
from fastdiff.sampling.noise import GeneratorNoise, PhiloxNoise, philox

# Known answers of philox4x32-10 from the Random123 distribution (kat_vectors)
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, words):
    got = philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert got[:, 0].tolist() == words


def test_a_seed_draws_the_same_in_any_company():
    like = torch.empty(5, 3, 7, 5)
    seeds, number = torch.tensor([3, 1, 2**62, 9, 1]), torch.tensor([0, 4, 2, 7, 4])
    together = PhiloxNoise(seeds).draw(number, like)
    for i in range(5):
        alone = PhiloxNoise(seeds[i : i + 1]).draw(number[i : i + 1], like[:1])
        assert torch.equal(together[i : i + 1], alone)
    assert torch.equal(together[1], together[4])


def test_seeds_draws_and_elements_all_differ():
    like = torch.empty(1, 1, 32, 32)
    draws = [
        PhiloxNoise(torch.tensor([seed])).draw(torch.tensor([number]), like)
        for seed, number in [(0, 0), (1, 0), (0, 1), (2**32, 0)]
    ]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert (first != second).float().mean() > 0.99
    assert draws[0].unique().numel() > 0.99 * draws[0].numel()


def test_the_noise_is_standard_normal():
    like = torch.empty(64, 4, 32, 32)
    noise = PhiloxNoise(torch.arange(64)).draw(torch.zeros(64, dtype=torch.int64), like).double()
    n = noise.numel()
    # five standard errors of each moment of a standard normal
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((noise**power).mean() - moment) < 5 * (variance / n) ** 0.5
    neighbours = noise.view(64, -1)
    assert abs((neighbours[:, 1:] * neighbours[:, :-1]).mean()) < 5 / n**0.5
    assert abs((neighbours[1:] * neighbours[:-1]).mean()) < 5 / n**0.5


def test_generators_draw_in_diffusers_order():
    noise = GeneratorNoise(torch.Generator().manual_seed(7), (2, 1, 4, 4), draws=2)
    generator = torch.Generator().manual_seed(7)
    expected = [torch.randn(2, 1, 4, 4, generator=generator) for _ in range(3)]
    for number, want in enumerate(expected):
        assert torch.equal(noise.draw(torch.tensor([number, number]), want), want)


def test_a_wrong_number_of_generators_is_refused():
    with pytest.raises(ShapeError, match="2 generators for a batch of 3"):
        GeneratorNoise([torch.Generator(), torch.Generator()], (3, 1, 4, 4), draws=1)
