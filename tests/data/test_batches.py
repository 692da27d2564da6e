"""Splits, and batches that a resumed run continues exactly."""

import io
from itertools import islice, pairwise

import pytest
import torch

from fastnas.data import Batches, split


def test_split_in_order():
    train, valid = split(10, 0.5)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert valid.tolist() == [5, 6, 7, 8, 9]
    assert train.dtype == valid.dtype == torch.int64
    assert len(split(1797, 0.5)[0]) == 898  # the floor, as in DARTS
    assert len(split(50_000, 0.5)[0]) == 25_000


def test_split_at_random():
    train, valid = split(100, 0.3, torch.Generator().manual_seed(0))
    assert len(train) == 30
    assert sorted(torch.cat((train, valid)).tolist()) == list(range(100))
    assert train.tolist() != sorted(train.tolist())
    again, _ = split(100, 0.3, torch.Generator().manual_seed(0))
    other, _ = split(100, 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(train, again)
    assert not torch.equal(train, other)


@pytest.mark.parametrize(
    ("n", "portion"), [(10, 0.0), (10, 1.0), (10, 0.05), (1, 0.5), (0, 0.5), (10, -1), (10, float("nan"))]
)
def test_split_leaves_no_part_empty(n, portion):
    with pytest.raises(ValueError, match=r"portion=.* leaves one part empty"):
        split(n, portion)


@pytest.mark.parametrize(
    ("n", "size", "drop_last", "expected"), [(10, 3, False, 4), (10, 3, True, 3), (9, 3, False, 3), (2, 5, False, 1)]
)
def test_an_epoch_goes_through_every_index_once(n, size, drop_last, expected):
    indices = torch.arange(100, 100 + n)
    batches = Batches(indices, size, seed=0, drop_last=drop_last)
    assert len(batches) == expected
    epochs = [list(batches) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == expected
        assert all(len(batch) == min(size, n) for batch in epoch[:-1])
        seen = torch.cat(epoch).tolist()
        assert len(set(seen)) == len(seen) == (expected * size if drop_last else n)
        assert set(seen) <= set(indices.tolist())
    if n > 2:
        assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()


def test_seed_decides_and_nothing_else():
    def epoch(seed):
        return torch.cat(list(Batches(range(50), 7, seed=seed))).tolist()

    first = epoch(3)
    state = torch.get_rng_state()
    assert epoch(3) == first
    assert epoch(4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_endless():
    batches = Batches(range(10), 4, seed=0)
    ends = [len(batch) for batch in islice(batches.endless(), 7)]
    assert ends == [4, 4, 2, 4, 4, 2, 4]


def test_sample_draws_from_the_whole_set_each_time():
    batches = Batches(range(10), 4, seed=0)
    drawn = [batches.sample() for _ in range(2000)]
    assert all(len(set(batch.tolist())) == 4 for batch in drawn)
    counts = torch.bincount(torch.cat(drawn), minlength=10).double()
    assert float(((counts - 800) ** 2 / 800).sum()) < 30  # 9 degrees of freedom
    # With replacement across steps: neighbouring batches share indices, which two batches of an epoch never do.
    shared = sum(bool(set(a.tolist()) & set(b.tolist())) for a, b in pairwise(drawn))
    assert 0.85 < shared / 1999 < 1  # 1 - C(6,4)/C(10,4) = 0.93
    assert len(Batches(range(3), 8, seed=0).sample()) == 3


def test_sampling_does_not_disturb_the_epoch():
    batches = Batches(range(20), 3, seed=0)
    seen = []
    for batch in batches:
        batches.sample()
        seen += batch.tolist()
    assert sorted(seen) == list(range(20))


def save(batches):
    """Writes and reads the state as a checkpoint does."""
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(batches, steps):
    """Steps of a search: a batch of the endless epochs and a sample each."""
    endless = batches.endless()
    return [(next(endless).tolist(), batches.sample().tolist()) for _ in range(steps)]


@pytest.mark.parametrize("stop", range(9))
@pytest.mark.parametrize("drop_last", [False, True])
def test_resumed_run_continues_exactly(stop, drop_last):
    whole = run(Batches(range(10), 3, seed=1, drop_last=drop_last), 12)
    first = Batches(range(10), 3, seed=1, drop_last=drop_last)
    assert run(first, stop) == whole[:stop]
    resumed = Batches(range(10), 3, seed=99, drop_last=drop_last)
    resumed.load_state_dict(save(first))
    assert run(resumed, 12 - stop) == whole[stop:]


@pytest.mark.parametrize("stop", range(4))
def test_state_saved_inside_the_loop_finishes_that_epoch(stop):
    batches = Batches(range(10), 3, seed=1)
    epoch, state = [], None
    for step, batch in enumerate(batches):
        epoch.append(batch.tolist())
        if step == stop:
            state = save(batches)
    following = [batch.tolist() for batch in batches]

    resumed = Batches(range(10), 3, seed=2)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == epoch[stop + 1 :]
    assert [batch.tolist() for batch in resumed] == following


def test_loop_left_early_is_continued():
    batches = Batches(range(10), 3, seed=1)
    seen = next(iter(batches)).tolist()
    for batch in batches:
        seen += batch.tolist()
    assert sorted(seen) == list(range(10))


def test_state_is_a_copy():
    batches = Batches(range(10), 3, seed=1)
    next(iter(batches))
    state = batches.state_dict()
    rest = [batch.tolist() for batch in batches]
    list(batches)
    for _ in range(2):
        batches.load_state_dict(state)
        assert [batch.tolist() for batch in batches] == rest


def test_errors():
    with pytest.raises(ValueError, match="indices must be"):
        Batches([], 3, seed=0)
    with pytest.raises(ValueError, match="indices must be"):
        Batches(torch.zeros(2, 2), 3, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        Batches([1], 0, seed=0)
    with pytest.raises(ValueError, match="drop_last would leave no batch"):
        Batches([1, 2], 3, seed=0, drop_last=True)
    state = Batches(range(10), 3, seed=0).state_dict()
    with pytest.raises(ValueError, match="batch_size=3 and these batches have 4"):
        Batches(range(10), 4, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="indices=10 and these batches have 11"):
        Batches(range(11), 3, seed=0).load_state_dict(state)
