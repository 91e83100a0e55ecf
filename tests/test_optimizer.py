"""The optimiser: masters, averages, Muon and AdamW, and a state that goes on bit by bit."""

import copy

import pytest
import torch
from torch import nn

from coser import train_autoencoder, train_denoiser, train_judge
from coser.optimizer import BatchedMuon, MasterOptimizer, learning_rate, schedule


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Flatten(), nn.Linear(16, 8))
    return layers.to(dtype, memory_format=torch.channels_last)


def train(net, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 3, 3, generator=generator).to(net[0].weight.dtype)
        net(x).float().square().mean().backward()
        optimizer.step(schedule(step / 10, step, warmup=2))


@pytest.mark.parametrize("use_muon", [True, False], ids=["muon", "adamw"])
def test_a_training_that_stops_and_goes_on_ends_with_the_same_bits(use_muon):
    whole, first, second = model(), model(), model(seed=5)  # the second starts from other weights: all must be loaded
    options = dict(lr=0.01, use_muon=use_muon)
    o_whole, o_first, o_second = (MasterOptimizer(m, **options) for m in (whole, first, second))
    train(whole, o_whole, range(6))
    train(first, o_first, range(3))
    o_second.load_state(o_first.state())
    train(second, o_second, range(3, 6))
    expected, found = o_whole.state(), o_second.state()
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    state = MasterOptimizer(model())
    assert [type(o).__name__ for o in state.optimizers] == ["AdamW", "BatchedMuon"]
    assert {tuple(p.shape) for p in state.optimizers[1].param_groups[0]["params"]} == {(16, 27), (8, 16)}
    assert [type(o).__name__ for o in MasterOptimizer(model(), use_muon=False).optimizers] == ["AdamW"]


def test_muon_moves_every_direction_of_a_matrix_alike():
    net = nn.Linear(16, 8, bias=False)
    before = net.weight.detach().clone()
    optimizer = MasterOptimizer(net, lr=0.1, weight_decay=0.0)
    net(torch.randn(32, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    values = torch.linalg.svdvals(net.weight.detach() - before)
    assert float(values.max() / values.min()) < 2.5


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-5), (torch.float32, 0.05)], ids=str)
def test_matrices_taken_together_move_as_torch_s_muon_moves_them(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 27), (16, 27), (32, 8), (8, 8), (16, 27)]
    ours = [torch.randn(s, generator=generator) for s in shapes]
    theirs = [p.clone() for p in ours]
    optimizers = [BatchedMuon(ours, lr=0.1, weight_decay=0.1, dtype=dtype),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape, generator=generator)
        before = [p.clone() for p in ours]
        for optimizer in optimizers:
            optimizer.step()
    for a, b, old in zip(ours, theirs, before):  # torch's own iterates in bfloat16 always
        assert float((a - b).norm() / (a - old).norm()) < tolerance


def few_channels():
    """A kernel that is no matrix, channels_last: AdamW's, whose fused steps walk through memory."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("model", [model, few_channels])
def test_adamw_alone_equals_torch_s_adamw(model):
    ours, theirs = model(), model()
    optimizer = MasterOptimizer(ours, lr=0.01, use_muon=False, clip=1e9)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(3):
        x = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        for net in (ours, theirs):
            net(x.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_updates_too_small_for_bfloat16_still_add_up_in_the_masters():
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(net.weight)
    optimizer = MasterOptimizer(net, lr=1e-3, use_muon=False)  # a step is a quarter of bfloat16's spacing below 1
    for _ in range(10):
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
    torch.testing.assert_close(optimizer.masters[0], torch.tensor([[0.99]]), atol=1e-4, rtol=0)
    assert net.weight.item() == pytest.approx(0.99, abs=0.004)


def test_masters_begin_at_the_weights_that_a_rounded_model_was_made_of():
    exact = {name: weight.detach().clone() for name, weight in model().named_parameters()}
    optimizer = MasterOptimizer(model(dtype=torch.bfloat16), start=exact | {"of another": torch.zeros(1)})
    for name, master in zip(optimizer.names, optimizer.masters):
        assert torch.equal(master.reshape(exact[name].shape), exact[name])


def test_the_average_follows_its_formula():
    net = nn.Linear(2, 2)
    optimizer = MasterOptimizer(net, lr=0.1, ema_decay=0.3)
    expected = net.weight.detach().clone()
    for step in range(1, 5):
        net.weight.grad = torch.full((2, 2), float(step))
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(optimizer.ema[optimizer.names.index("weight")], expected)


def test_the_average_comes_and_goes_without_a_trace():
    net = model(dtype=torch.bfloat16)
    optimizer = MasterOptimizer(net, lr=0.05)
    train(net, optimizer, range(3))
    trained = copy.deepcopy(net.state_dict())
    optimizer.use_average()
    assert not torch.equal(net[3].weight, trained["3.weight"])
    assert torch.equal(net[3].weight, optimizer.ema[optimizer.names.index("3.weight")].bfloat16())
    optimizer.use_masters()
    assert all(torch.equal(v, trained[k]) for k, v in net.state_dict().items())


def test_the_averaged_copy_is_rounded_once():
    net = model(dtype=torch.bfloat16)
    optimizer = MasterOptimizer(net, lr=0.05)
    train(net, optimizer, range(3))
    copied = optimizer.averaged_copy(net)
    for name, ema in zip(optimizer.names, optimizer.ema):
        assert torch.equal(copied.get_parameter(name).flatten(), ema.half().flatten())
    assert net[0].weight.dtype == torch.bfloat16


def test_a_large_gradient_is_clipped_and_its_norm_told():
    net = nn.Linear(1, 1, bias=False)
    optimizer = MasterOptimizer(net, lr=0.0, use_muon=False, clip=1.0)
    net.weight.grad = torch.full((1, 1), 50.0)
    assert optimizer.step() == pytest.approx(50.0)
    assert optimizer.masters[0].grad.item() == pytest.approx(1.0, abs=1e-4) and net.weight.grad is None


def test_parameters_without_gradients_stay():
    net = model()
    net[3].requires_grad_(False)
    frozen = net[3].weight.detach().clone()
    optimizer = MasterOptimizer(net, lr=0.1)
    train(net, optimizer, range(2))
    assert torch.equal(net[3].weight, frozen) and not any(n.startswith("3.") for n in optimizer.names)


def test_a_state_of_another_model_or_optimiser_is_refused():
    net = model()
    trained = MasterOptimizer(net, lr=0.1)
    train(net, trained, range(1))
    with pytest.raises(ValueError, match="missing"):
        MasterOptimizer(nn.Linear(2, 2)).load_state(trained.state())
    wider = nn.Sequential(nn.Conv2d(3, 16, 5), nn.GroupNorm(4, 16), nn.Flatten(), nn.Linear(16, 8))
    with pytest.raises(ValueError, match="0.weight"):
        MasterOptimizer(wider).load_state(trained.state())
    with pytest.raises(ValueError, match="AdamW and Muon"):
        MasterOptimizer(model(), use_muon=False).load_state(trained.state())


@pytest.mark.parametrize("module", [train_autoencoder, train_denoiser, train_judge])
def test_each_optimiser_has_a_rate_of_its_own_unless_one_is_asked_for(module):
    for preset in module.PRESETS.values():
        assert learning_rate(preset, muon=False) == preset["lr"] < learning_rate(preset, muon=True)
        assert learning_rate(preset, muon=True, asked=0.5) == learning_rate(preset, muon=False, asked=0.5) == 0.5


def test_no_warm_up_starts_at_the_full_rate():
    assert schedule(0.0, 0, warmup=0) == 1


def test_the_rate_warms_up_stays_and_falls():
    rates = [schedule(step / 100, step, warmup=10, decay_from=0.6, floor=0.02) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:61] == [1.0] * 52
    assert all(a > b for a, b in zip(rates[60:], rates[61:])) and rates[100] == pytest.approx(0.02)
