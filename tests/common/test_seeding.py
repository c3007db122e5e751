import random

import numpy as np
import torch

from msae_plugin.common.seeding import RandomStream, derive_seed, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_all_three_generators_are_seeded() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_streams_do_not_disturb_each_other_nor_the_outside() -> None:
    seed_everything(0)
    undisturbed = [draw(), draw()]
    seed_everything(0)
    a, b = RandomStream(1), RandomStream(2)
    outside = [draw()]
    with a.active():
        first_a = draw()
    with b.active():
        draw()
    with a.active():
        second_a = draw()
    outside.append(draw())
    assert outside == undisturbed

    alone = RandomStream(1)
    with alone.active():
        assert [draw(), draw()] == [first_a, second_a]


def test_derived_seeds_differ_by_every_label_and_stay_in_numpys_range() -> None:
    seeds = {
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", "b"),
        derive_seed(0, "ab"),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)
