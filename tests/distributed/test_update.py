"""Two gloo processes compute what one does, with one gradient synchronisation per optimizer step."""

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from sheeprlhf.engine.step import evaluate, update
from sheeprlhf.utils.errors import DataError, NonFiniteError
from tests.unit.engine.toy import Net, micro_batch, on_ranks, toy_loss

# Per case the micro-batches of each rank, as rows; row i has (1, 3, 17, 64)[i % 4] items.
CASES = {
    "even": ([(0, 1)], [(2, 3)]),
    "uneven tokens, accumulation 4": ([(0,), (1,), (0,), (1,)], [(2,), (3,), (2,), (3,)]),
    "different numbers of micro-batches": ([(0,), (1,), (2,)], [(3,)]),
    "rank 1 has none": ([(0, 1), (2, 3)], []),
    "rank 0 has none": ([], [(0,), (1, 2, 3)]),
    "rank 1 has an empty one": ([(0, 1), (2, 3)], [()]),
}


def train(fabric, steps_of_ranks, lr=1.0):
    """Weights (after SGD at rate 1: minus the gradients), metrics of every step, and gradient syncs of every step."""
    torch.manual_seed(3)
    module = Net()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    module, optimizer = fabric.setup(module, optimizer)
    syncs: list[int] = []

    def counted(state, bucket):
        syncs[-1] += 1
        assert syncs[-1] == 1  # with processes that disagree on their number, the next one would wait for ever
        return allreduce_hook(state, bucket)

    if fabric.world_size > 1:
        module._forward_module.register_comm_hook(None, counted)
    metrics = []
    for ranks in steps_of_ranks:
        syncs.append(0)
        micros = [micro_batch(*rows) for rows in ranks[fabric.global_rank]]
        metrics.append(update(fabric, module, optimizer, micros, toy_loss, max_grad_norm=0.5))
    weights = torch.cat([p.detach().flatten() for p in module.module.parameters()])
    return {"weights": weights.tolist(), "metrics": metrics, "syncs": syncs}


@pytest.fixture(scope="module")
def results():
    """Every case as the first step of its own run, and all of them as one run: 2 processes, then 1."""
    cases = [*([case] for case in CASES.values()), list(CASES.values())]
    two = on_ranks(2, train_all, cases)
    one = on_ranks(1, train_all, [[(ranks[0] + ranks[1],) for ranks in steps] for steps in cases])
    return dict(zip([*CASES, "all in turn"], zip(two[0], two[1], one[0], strict=True), strict=True))


def train_all(fabric, cases):
    return [train(fabric, steps, lr=1.0 if len(steps) == 1 else 0.1) for steps in cases]


@pytest.mark.parametrize("name", [*CASES, "all in turn"])
def test_two_processes_equal_one(results, name):
    rank_0, rank_1, single = results[name]
    assert rank_0["weights"] == rank_1["weights"]  # bit for bit: they never drift apart
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor(rank_0["weights"]), torch.tensor(single["weights"]), **tolerance)
    assert rank_0["metrics"] == rank_1["metrics"]
    for ours, expected in zip(rank_0["metrics"], single["metrics"], strict=True):
        assert ours == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", [*CASES, "all in turn"])
def test_one_gradient_sync_per_step(results, name):
    for rank in results[name][:2]:
        assert rank["syncs"] == [1] * len(rank["syncs"])


def train_broken(fabric, bad_rank):
    torch.manual_seed(3)
    module, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.second.parameters(), lr=1.0))
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    rows = (fabric.global_rank,)
    micro = micro_batch(*rows)
    if fabric.global_rank == bad_rank:
        micro = micro._replace(batch=micro.batch * float("nan"))
    try:
        update(fabric, module, optimizer, [micro], toy_loss, max_grad_norm=1.0)
    except NonFiniteError as error:
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        return str(error), torch.equal(before, after)
    return "no error", False


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_all_ranks_refuse_what_is_not_finite_on_one(bad_rank):
    for message, unchanged in on_ranks(2, train_broken, bad_rank):
        assert f"(rank {bad_rank}: rows [{bad_rank}])" in message
        assert unchanged


def evaluate_cases(fabric, cases):
    torch.manual_seed(3)
    module = fabric.setup(Net(dropout=0.5))
    found = []
    for ranks in cases:
        micros = (micro_batch(*rows) for rows in ranks[fabric.global_rank])
        try:
            found.append(evaluate(fabric, module, micros, toy_loss))
        except DataError as error:
            found.append(str(error))
    return found


def test_evaluation_on_two_ranks_equals_one():
    cases = [*CASES.values(), ([], [])]
    two = on_ranks(2, evaluate_cases, cases)
    one = on_ranks(1, evaluate_cases, [(ranks[0] + ranks[1],) for ranks in cases])
    assert two[0] == two[1]
    for ours, expected in zip(two[0][:-1], one[0][:-1], strict=True):
        assert ours == pytest.approx(expected, rel=1e-6)
    assert two[0][-1] == one[0][-1]
    assert "nothing to evaluate" in two[0][-1]
