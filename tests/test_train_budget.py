"""What trainings within a budget ask of the loop, the data and the machine: clocks, counted operations, captions."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coser import latents, train_denoiser, train_loop
from coser.cameras import Cameras
from coser.caption_states import encode_captions
from coser.data.dataset import RingBatch, ViewBatches, list_rings
from coser.flow import flow_loss
from coser.optimizer import MasterOptimizer
from coser.stopwatch import matmul_rate
from coser.throughput import Throughput, bytes_kept, flop_of
from coser.train_denoiser import sample_flop
from coser.train_loop import Budget, Options, checkpoints


def log(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


class Clock:
    """A clock that goes on when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed_run(folder, clock, until, step_seconds=1.0, end_seconds=5.0, **options) -> tuple[int, list[float]]:
    """A toy training in which a step and an evaluation take so long: steps done, and the progress at each."""
    net = nn.Linear(2, 1)

    def loss_of_step(step):
        clock.now += step_seconds
        return net(torch.ones(1, 2)).square().mean(), {}

    def evaluate(step, log):
        clock.now += end_seconds

    steps = train_loop.train_loop(MasterOptimizer(net), loss_of_step, lambda folder: None, evaluate,
                                  Options(folder, Budget(until=until), save_every=1000, log_every=1, **options))
    progress = [e["progress"] for e in log(folder) if "norm" in e] if steps else []
    return steps, progress


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train_loop, "time", SimpleNamespace(perf_counter=clock))
    return clock


def test_a_run_until_a_moment_has_its_last_evaluation_behind_it_then(tmp_path, clock):
    steps, progress = timed_run(tmp_path, clock, until=160.0)
    assert 159 <= clock.now <= 161  # one rehearsed end, fifty steps, the end
    assert steps == 50 and progress == sorted(progress) and 0 < progress[0] < 0.15 and 0.95 < progress[-1] < 1
    assert checkpoints(tmp_path)[-1].name == "checkpoint-50"


def test_a_resumed_run_is_as_far_as_its_share_of_all_the_time(tmp_path, clock):
    timed_run(tmp_path, clock, until=160.0)
    steps, progress = timed_run(tmp_path, clock, until=clock.now + 60)
    assert steps > 85 and progress[50] == pytest.approx(0.53, abs=0.05)


def test_what_is_evaluated_more_often_than_saved_is_measured_on_the_averages(tmp_path):
    net, evaluated = nn.Linear(2, 1), {}
    optimizer = MasterOptimizer(net, lr=0.1, ema_decay=0.9)
    train_loop.train_loop(optimizer, lambda step: (net(torch.ones(1, 2)).square().mean(), {}), lambda folder: None,
                          lambda step, log: evaluated.update({step: net.weight.clone()}),
                          Options(tmp_path, Budget(steps=11), save_every=5, evaluate_every=2, warmup=1))
    assert list(evaluated) == [2, 4, 6, 8, 10, 11]
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert torch.equal(evaluated[11].half(), optimizer.averaged_copy(net).weight)
    assert not torch.allclose(evaluated[11], net.weight, atol=1e-3), "the training went on with its own weights"


def test_checkpoints_are_made_by_the_clock(tmp_path, clock):
    timed_run(tmp_path, clock, until=400.0, end_seconds=0.0, save_minutes=1.0)
    # the step in which a minute is over ends first: after 62, 124, 186 and 248 seconds, and at the end
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-248", "checkpoint-300"]


def test_a_step_without_time_for_its_end_is_not_begun(tmp_path, clock):
    assert timed_run(tmp_path, clock, until=107.0)[0] == 0 and clock.now == 105.0
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-0"]
    assert timed_run(tmp_path / "late", clock, until=90.0)[0] == 0 and not checkpoints(tmp_path / "late")


def test_rings_that_appear_are_drawn_from_once_they_are_listed(renders):
    everything = list_rings(renders[0])
    there = everything[:1]
    growing = ViewBatches(everything[:1], 6, relist=lambda: there, relist_every=2)
    assert torch.equal(growing(1), ViewBatches(everything[:1], 6)(1))
    there = everything
    assert torch.equal(growing(1), ViewBatches(everything[:1], 6)(1))  # not yet
    for step in (2, 3):
        assert torch.equal(growing(step), ViewBatches(everything, 6)(step))
    cached = ViewBatches(everything[:1], 6, on_device=True, relist=lambda: everything, relist_every=1)
    assert torch.equal(cached(3), growing(3))


def test_operations_of_products_are_counted_also_inside_compiled_parts_and_gradients():
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(16, 64, requires_grad=True)
    layer.compile()
    assert flop_of(lambda: layer(x)) == 2 * 16 * 64 * 32
    assert flop_of(lambda: layer(x).sum().backward()) == 3 * 2 * 16 * 64 * 32
    assert matmul_rate(torch.device("cpu"), torch.float32) > 0


def test_what_a_backward_pass_needs_is_counted_once():
    layer, x = nn.Linear(32, 64), torch.randn(16, 32)
    assert bytes_kept(lambda: layer(x)) == 4 * 16 * 32
    assert bytes_kept(lambda: layer(x).relu()) == 4 * (16 * 32 + 16 * 64)
    assert bytes_kept(lambda: layer(x) + layer(x.view(8, 64).view(16, 32))) == 4 * 16 * 32


def test_gradients_of_attention_cost_five_products():
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    forward = flop_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert forward == 2 * 2 * (2 * 3 * 8 * 8 * 4)
    both = flop_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == forward + 5 * (2 * 2 * 3 * 8 * 8 * 4)


def test_throughput_is_work_over_the_seconds_of_steps(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("coser.throughput.time.perf_counter", clock)
    meter = Throughput(torch.device("cpu"), matmul=2.0)
    for _ in range(2):
        with meter.step():
            clock.now += 0.5
            meter.did(12, 1e12)
            meter.flop_once("counted", lambda: setattr(clock, "now", clock.now + 7))  # its time counts in nothing
        clock.now += 60  # an evaluation
    assert meter.figures() == pytest.approx({"views_per_second": 24.0, "tflops": 2.0, "mfu": 1.0})
    with meter.step():
        clock.now += 1
    assert meter.figures()["views_per_second"] == 0


def test_a_sample_s_operations_are_counted_for_each_view_count_and_are_as_many_as_the_batch_s(pipeline):
    meter, unet = Throughput(torch.device("cpu"), matmul=1.0), pipeline.unet
    counted = {}
    for num_views in (2, 4):
        batch = RingBatch(torch.randn(3, num_views, 4, 8, 8), Cameras.orbit(num_views), ["a"] * 3)
        embeds = pipeline.encode_prompt(batch.captions)
        mixers = tuple(unet.config.mixers)
        counted[num_views] = sample_flop(meter, unet, batch, embeds, mixers)
        fewer = sample_flop(meter, unet, batch, embeds, mixers[:1])
        whole = flop_of(lambda: flow_loss(unet, batch, embeds, torch.Generator().manual_seed(0),
                                                         mixers).backward())
        unet.zero_grad(set_to_none=True)
        assert fewer < counted[num_views] and whole == pytest.approx(3 * counted[num_views], rel=1e-3)
    assert counted[4] > 1.9 * counted[2] and all(p.grad is None for p in unet.parameters())


def test_captions_are_encoded_once(pipeline, tmp_path, monkeypatch):
    captions = ["a red barrel", "a wooden chair with four legs"]
    first = encode_captions(pipeline, captions, tmp_path).states
    more = encode_captions(pipeline, [*captions, "a taxi"], tmp_path).states
    monkeypatch.setattr(type(pipeline), "encode_prompt", None)  # whoever asked would fail
    again = encode_captions(pipeline, ["a taxi", *captions], tmp_path).states
    assert again.keys() == {"", "a taxi", *captions} and again.keys() == more.keys()
    assert all(torch.equal(again[c], more[c]) for c in more) and all(torch.equal(first[c], more[c]) for c in first)


def test_a_table_of_captions_gives_the_same_batches(pipeline):
    texts = encode_captions(pipeline, ["a red barrel", "a wooden chair with four legs"])
    for captions in (["a red barrel", ""], ["a wooden chair with four legs", "", "a red barrel"]):
        ours, theirs = (t.batch(captions, "cpu", torch.float32) for t in (texts.on("cpu"), texts))
        assert all(torch.equal(getattr(ours, k), getattr(theirs, k)) for k in ("states", "mask", "pooled"))


def test_encoding_that_runs_out_of_time_leaves_whole_rings_and_goes_on(renders, pipeline, pipeline_folder, tmp_path,
                                                                       monkeypatch):
    rings, vae = list_rings(renders[0]), pipeline_folder / "vae"
    clock = Clock()
    monkeypatch.setattr(latents, "time", SimpleNamespace(perf_counter=clock))
    loaded = latents.load_file

    def slowly(path):
        clock.now += 10  # the weights, too
        return loaded(path)

    monkeypatch.setattr(latents, "load_file", slowly)
    part = latents.encoded_rings(pipeline.vae, vae, rings, tmp_path, until=115.0)
    monkeypatch.undo()
    stems = {k for k in part if not k.endswith("/elevation")}
    assert 0 < len(stems) < len(rings)
    whole = latents.encoded_rings(pipeline.vae, vae, rings, tmp_path)
    assert {r.path.stem for r in rings} <= whole.keys() and all(torch.equal(whole[k], part[k]) for k in part)


def test_compiled_parts_compute_the_same_loss_gradients_and_names_of_weights(pipeline):
    losses, gradients = [], []
    plain = copy.deepcopy(pipeline.unet)
    compiled = copy.deepcopy(plain)
    train_denoiser.compile_parts(compiled, backend="aot_eager")  # traced as for a compiler, but without one's minutes
    for unet in (plain, compiled):
        generator = torch.Generator().manual_seed(0)
        batch = RingBatch(torch.randn(2, 3, 4, 4, 4, generator=generator), Cameras.orbit(3), ["a", "b"])
        loss = flow_loss(unet, batch, pipeline.encode_prompt(batch.captions), generator)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert sum(m._compiled_call_impl is not None for m in compiled.modules()) > 10
    assert copy.deepcopy(compiled).state_dict().keys() == plain.state_dict().keys()
