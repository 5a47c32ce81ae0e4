"""Every island has all experts: rows stay where they are, and results are those of one process all the same."""

import pytest
import torch

from moedist.config import config_from_dict
from moedist.dispatch import Sharing, build_transport
from moedist.engine import TorchEngine
from moedist.errors import PlacementError
from moedist.model import Batch, Transformer
from moedist.placement import LayerPlan, Plan
from moedist.routing import RouterInput
from tests.dispatch.counting import Counting
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.moe_cases import Case, build_layer, on_islands, run_case
from tests.ranks import run_ranks

ISLANDS = (0, 1, 1)
OWNERS = ((0, 1), (0, 2), (0, 1), (0, 1, 2), (0, 2), (0, 1))  # of expert 3 island 1 has two
SHARES = ((0.5, 0.5), (0.5, 0.5), (0.5, 0.5), (0.5, 0.125, 0.375), (0.5, 0.5), (0.5, 0.5))
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def apart(sequences, **more) -> Case:
    return Case(OWNERS, sequences, shares=SHARES, islands=ISLANDS, apart=True, aux=False, **more)


@pytest.mark.parametrize("sharing", [Sharing(), Sharing("island", (torch.int8, torch.int8), True), Sharing("rank", pieces=2)],
                         ids=str)
@pytest.mark.parametrize("sequences, top_k", [((2, 0, 3), 2), ((0, 1, 2), 1), ((3, 0, 0), 6)], ids=str)
def test_equals_one_process(sequences, top_k, sharing):
    """Rows that would be rounded between islands are not: none goes there."""
    case = apart(sequences, top_k=top_k, sharing=sharing)
    alone = run_ranks(1, run_case, case.alone())[0]
    parts = run_ranks(3, run_case, case)
    torch.testing.assert_close(torch.cat([p.y for p in parts]), alone.y, **EXACT)
    torch.testing.assert_close(torch.cat([p.grad_x for p in parts]), alone.grad_x, **EXACT)
    for name, grad in alone.expert_grads.items():
        torch.testing.assert_close(sum(p.expert_grads[name] for p in parts if name in p.expert_grads), grad, **EXACT)
    # a rank sees the loads of its island; what it sends to an expert with two owners there is cut 1 : 3
    assert torch.equal(parts[1].load, parts[2].load) and not parts[0].load[1:].any() and not parts[1].load[0].any()
    assert torch.equal((parts[0].load + parts[1].load).sum(0), alone.load.sum(0))
    assert parts[0].rows_W[1:] == [0, 0] and parts[1].rows_W[0] == 0
    wanted = [sum(parts[1].load[:, e].sum() * {3: cut}.get(e, 1.0) for e in range(6) if rank in OWNERS[e])
              for rank, cut in ((1, 0.25), (2, 0.75))]
    assert parts[1].rows_W[1:] == pytest.approx([float(n) for n in wanted], abs=1)


def calls_of(world, case):
    """What a layer calls, forward and backward."""
    layer, _ = build_layer(world, case)
    transport, calls = layer.dispatcher.transport, []
    transport.outer = Counting(transport.outer, "outer", calls)
    layer.dispatcher.inner.transport = Counting(transport.native, "native", calls)
    x = torch.randn(case.sequences[world.rank], 6, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    y, _ = layer(RouterInput(x, ids, ids, 0, True))
    y.sum().backward()
    return [call for call in calls if not call.endswith("done")]


def test_nothing_crosses_between_islands():
    for rank, calls in enumerate(run_ranks(3, calls_of, apart((1, 2, 1)))):
        assert calls == ["counts"] + ["native"] * (4 if rank else 0), "island 0 is one rank, and counts by itself"


def model_config(**train):
    return config_from_dict({
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 6, "top_k": 3, "expert_hidden": 8},
        "data": {"sequence_length": 6}, "train": {"batch": 8, "eps": 1e-5, **train}})


def steps_of(world, is_apart, steps):
    """Losses of so many steps, each of two forward passes, and what the outer transport was asked for in the last."""
    config, calls = model_config(accumulate=2), []
    world = on_islands(world, ISLANDS if is_apart else ())
    layer = LayerPlan(OWNERS, SHARES, ISLANDS) if is_apart else LayerPlan.single([0, 0, 1, 1, 2, 2])
    transport = build_transport(world)
    model = Transformer(config, 21, Plan(3, ((0, layer), (1, layer)), (1.0,) * 3), transport, world.device, torch.float32,
                        world.meter)
    if is_apart:
        transport.outer = Counting(transport.outer, "outer", calls)
    engine, losses = TorchEngine(model, config.train, world), []
    mine = slice(2 * world.rank, 2 * world.rank + 2) if world.rank < 2 else slice(4, 4)  # rank 2 has no sequences
    for step in range(steps):
        calls.clear()
        total = torch.zeros(1, dtype=torch.float64)
        for part in range(2):
            ids = (torch.arange(4).unsqueeze(1) * 5 + step + 4 * part + 2 * torch.arange(7)) % 21
            keys = torch.arange(4 * 6).view(4, 6)[mine]
            loss, _ = engine.forward(Batch(ids[mine, :-1], keys, step), ids[mine, 1:], torch.float32)
            engine.backward(loss / 48)
            total += loss.detach().double() / 48
        losses.append(engine.step(0.01, total).sums.item())
    return losses, [call for call in calls if not call.endswith("done")]


def test_a_training_has_the_losses_of_a_plain_one_and_islands_meet_once_a_step():
    """Copies are updated by one rank each, and are equal afterwards."""
    wanted = run_ranks(3, steps_of, False, 30)[0][0]
    assert wanted[-1] < wanted[0] - 0.5
    for losses, calls in run_ranks(3, steps_of, True, 30):
        assert losses == pytest.approx(wanted, abs=1e-5)
        assert calls == ["outer", "outer"], "gradients of copies, and their weights back; no counts, no rows"


def build_for_other_islands(world):
    world = on_islands(world, (0, 0, 1))
    layer = LayerPlan(OWNERS, SHARES, ISLANDS)
    with pytest.raises(PlacementError, match=r"keeps rows in islands \[0, 1, 1\], but rows travel in \[0, 0, 1\]"):
        Transformer(model_config(), 21, Plan(3, ((0, layer), (1, layer)), (1.0,) * 3), build_transport(world), world.device,
                    torch.float32)


def test_a_plan_for_other_islands_is_refused():
    run_ranks(3, build_for_other_islands)


def options(folder):
    return ["train", *QUICKSTART[:1], *QUICKSTART[4:], "train.accumulate=2", "router.balance_loss=0", "train.eps=1e-5",
            "train.schedule=constant", "checkpoint.every=15", f"folder={folder}"]


def test_a_run_in_which_every_island_has_all_experts(tmp_path, cache):
    """As a user starts it: `auto` sees that copies are less, says why, and the losses are those of one island. The run goes on
    from its checkpoint."""
    speeds = ["placement.speeds=[2,1,1]", "placement.batch_shares=null"]
    moedist(3, cache, *options(tmp_path / "plain"), "phases=[{train: 30}]", *speeds)
    islands = ["world.islands=[nvidia,amd,amd]", *speeds]
    done = moedist(3, cache, *options(tmp_path / "apart"), "phases=[{train: 15}]", *islands)
    assert "islands meet once a step, every one has all experts: " in done.stdout
    assert "rows of an expert would cross between islands in a step; above 18, 0.75 of its" in done.stdout
    assert "rows stay in islands [nvidia, amd, amd]" in done.stdout
    run = only_run(tmp_path / "apart")
    moedist(3, cache, "train", "--resume", str(run), "phases=[{train: 30}]", *islands)
    found, wanted = metrics(run), metrics(only_run(tmp_path / "plain"))
    assert found == pytest.approx(wanted, abs=1e-5) and found[30] < found[1] - 0.3
    assert metrics(run, "moe/load_imbalance")[1] == pytest.approx(
        metrics(only_run(tmp_path / "plain"), "moe/load_imbalance")[1]), "loads are those of all islands"
