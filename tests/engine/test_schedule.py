"""Who computes what: neighbours stay together, the busiest rank has as little as possible, and nothing is lost."""

import itertools
import random

import pytest

from megaprompt.distributed.world import World
from megaprompt.engine.groups import Groups
from megaprompt.engine.schedule import my_passes, shares
from megaprompt.engine.trunks import Trunks
from megaprompt.prompting.packing import PassSize, pack
from megaprompt.prompting.query import Query
from megaprompt.tasks.task import Instance
from tests.prompting.test_packing import random_queries


def computed(queries) -> int:
    """The tokens that one rank computes, without padding."""
    batch = pack(queries, row_tokens=10_000)
    return int((batch.visible_until[0] > batch.visible_from[0]).sum()) if queries else 0


def busiest(units, owners, ranks) -> int:
    parts = [[query for unit, owner in zip(units, owners, strict=True) if owner == rank for query in unit]
             for rank in range(ranks)]  # fmt: skip
    return max(computed(part) for part in parts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranks", [2, 3])
def test_no_other_division_of_neighbours_has_less_to_do(seed, ranks):
    units = [[query] for query in random_queries(seed, 11)]
    rng = random.Random(seed)
    units = [unit * rng.choice((1, 1, 2)) for unit in units]
    owners = shares(units, ranks)
    order = sorted(range(len(units)), key=lambda i: units[i][0].tokens)
    assert [owners[i] for i in order] == sorted(owners), "neighbours are on one rank"
    best = min(
        busiest([units[i] for i in order], [sum(place >= cut for cut in cuts) for place in range(len(order))], ranks)
        for cuts in itertools.combinations_with_replacement(range(len(order) + 1), ranks - 1)
    )
    assert busiest(units, owners, ranks) == best


def test_what_queries_begin_with_is_computed_by_few_ranks():
    """Dealt in turn, both ranks would compute both passages."""
    passages = [tuple(range(100, 160)), tuple(range(200, 260))]
    units = [[Query((*passage, i, i + 1), (61,))] for i in range(8) for passage in passages]
    owners = shares(units, 2)
    assert [owners[0::2], owners[1::2]] in ([[0] * 8, [1] * 8], [[1] * 8, [0] * 8])
    assert busiest(units, owners, 2) == 60 + 16
    assert busiest(units, [i // 2 % 2 for i in range(16)], 2) == 120 + 16


@pytest.mark.parametrize("row_tokens", [64, None])
def test_all_ranks_together_compute_everything_once(row_tokens):
    instances = [(query,) for query in random_queries(2, 50)] + [tuple(random_queries(3, 4))]
    size = PassSize(row_tokens, 128)
    done = [i for rank in range(4) for part in my_passes(instances, World(rank, 4), size) for i in part]
    assert sorted(done) == list(range(len(instances)))
    assert shares([], 3) == []
    assert set(shares([instances[0]], 3)) == {0}


def test_groups_stay_with_their_rank_in_all_rounds():
    instances = [Instance((query,), 0, str(i % 10)) for i, query in enumerate(random_queries(5, 40))]
    groups = Groups(Trunks(), 0)
    names = [each.group for each in instances]
    first = groups.ranks(names, instances, 3)
    assert len(set(zip(names, first, strict=True))) == 10
    assert len(set(first)) == 3
    assert groups.ranks(names[7:9], instances[7:9], 3) == first[7:9]
