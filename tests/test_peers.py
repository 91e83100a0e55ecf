"""Processes that train together do what one does: the same batches, noise, gradients, steps and checkpoints."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coser.data.dataset import LatentRings, Ring
from coser.optimizer import MasterOptimizer
from coser.peers import Peers, train_together
from coser.train import main
from coser.train_loop import Budget, Options, checkpoints, train_loop


def test_shares_are_all_samples_once():
    assert [Peers(rank, 3).share(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(range(5))[Peers().share(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5 samples cannot be dealt out evenly to 2 processes"):
        Peers(0, 2).share(5)


def test_batches_can_be_shared_whatever_the_view_count():
    rings = [Ring(Path(f"{i}-0.safetensors"), str(i), "cube", ("a cube",), ()) for i in range(3)]
    batches = LatentRings(rings, [torch.zeros(12, 1, 1, 1)] * 3, [20.0] * 3, 0, (4, 6, 12), views_per_batch=36,
                          multiple=2)
    drawn = {batch.latents.shape[1]: batch.latents.shape[0] for batch in map(batches, range(40))}
    assert drawn == {4: 8, 6: 6, 12: 2}


def toy_training(folder: Path, budget: Budget, peers: Peers) -> None:
    """A linear map of four samples; the second process is late, and both write down what they end with."""
    torch.manual_seed(0)
    net, samples = nn.Linear(3, 2), torch.arange(12.0).reshape(4, 3)

    def loss_of_step(step):
        time.sleep(0.002 * peers.rank)
        return net(samples[peers.share(4)]).square().mean() / 100, {"rank": peers.rank}

    def save(to: Path) -> None:
        save_file(net.state_dict(), to / "net.safetensors")

    steps = train_loop(MasterOptimizer(net), loss_of_step, save, lambda step, log: None,
                       Options(run=folder, budget=budget, save_every=2, log_every=1), peers=peers)
    save_file(net.state_dict() | {"steps": torch.tensor(steps)}, folder / f"end-{peers.rank}.safetensors")


def toy_trainings(folder: Path, peers: Peers) -> None:
    """One that goes on where another ended, and one that the clock ends."""
    toy_training(folder / "steps", Budget(steps=4), peers)
    toy_training(folder / "steps", Budget(steps=7), peers)
    toy_training(folder / "timed", Budget(minutes=0.02), peers)


def test_two_processes_end_where_one_does_at_the_same_step_by_one_clock(tmp_path):
    for processes in (1, 2):
        train_together(toy_trainings, processes, "cpu", tmp_path / str(processes))
    one, two, other = (load_file(tmp_path / name) for name in (
        "1/steps/end-0.safetensors", "2/steps/end-0.safetensors", "2/steps/end-1.safetensors"))
    assert int(one["steps"]) == 7 and all(torch.equal(two[k], other[k]) for k in one)
    assert all(torch.allclose(one[k], two[k], rtol=1e-5) for k in one)
    assert [p.name for p in checkpoints(tmp_path / "2" / "steps")] == ["checkpoint-6", "checkpoint-7"]
    logs = [[json.loads(line) for line in (tmp_path / name / "steps" / "log.jsonl").read_text().splitlines()]
            for name in "12"]
    assert len(logs[0]) == len(logs[1]) and all(line["rank"] == 0 for line in logs[1] if "rank" in line)
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        assert [a[k] for k in ("loss", "norm") if k in a] == pytest.approx([b[k] for k in ("loss", "norm") if k in b])
    ends = [load_file(tmp_path / "2" / "timed" / f"end-{rank}.safetensors") for rank in (0, 1)]
    assert int(ends[0]["steps"]) >= 1 and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def doubled_in_parts(folder: Path, peers: Peers) -> None:
    """Doubles three tensors, one of them as long as the others together; writes down what is there and who did it."""
    tensors, mine = [torch.arange(n).bfloat16() for n in (3, 5, 2)], []

    def work(tensor):
        mine.append(len(tensor))
        return 2 * tensor

    peers.each_a_part(tensors, [3, 5, 2], work)
    whole = {str(len(t)): t for t in tensors}
    save_file(whole | {"mine": torch.tensor(mine)}, folder / f"{peers.size}-{peers.rank}.safetensors")


def test_work_is_dealt_out_evenly_and_its_results_reach_all(tmp_path):
    for processes in (1, 2):
        train_together(doubled_in_parts, processes, "cpu", tmp_path)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert [sorted(found["mine"].tolist()) for found in (one, first, second)] == [[2, 3, 5], [5], [2, 3]]
    for found in (one, first, second):
        assert all(torch.equal(found[str(n)], 2 * torch.arange(n).bfloat16()) for n in (3, 5, 2))


def trained_by_one_and_by_two(command: list[str], folder: Path) -> tuple[list[list[dict]], list[dict]]:
    """Logs and training states of three steps of a training, by one process and by two."""
    logs, states = [], []
    for processes in ("1", "2"):
        main([*command, "--run", str(folder / processes), "--processes", processes, "--steps", "3"])
        logs.append([json.loads(line) for line in (folder / processes / "log.jsonl").read_text().splitlines()])
        states.append(load_file(checkpoints(folder / processes)[-1] / "training_state.safetensors"))
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 3]
    return logs, states


def test_a_denoiser_trained_by_two_processes_is_the_one_that_one_trains(renders, pipeline_folder, tmp_path):
    command = ["denoiser", "--preset", "tiny", "--renders", str(renders[0]), "--held-out", str(renders[1]), "--device",
               "cpu", "--dtype", "float32", "--autoencoder", str(pipeline_folder / "vae"), "--no-samples",
               "--view-counts", "4", "--views-per-batch", "8", "--correspondence", "0.1", "--warmup", "1",
               "--log-every", "1"]
    logs, states = trained_by_one_and_by_two(command, tmp_path)
    for one, two in zip(*logs):
        names = [name for name in one if name in ("loss", "norm") or name.startswith("loss_")]
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], rel=2e-3)
    moved = {k: v for k, v in states[0].items() if k.startswith("master/")}
    assert all(torch.allclose(v, states[1][k], atol=1e-4) for k, v in moved.items()) and len(moved) > 50


def test_an_autoencoder_trained_by_two_processes_is_nearly_the_one_that_one_trains(renders, tmp_path):
    """Nearly: what of the loss is weighed within a batch is weighed within each one's share."""
    command = ["autoencoder", "--preset", "tiny", "--renders", str(renders[0]), "--held-out", str(renders[1]), "--device",
               "cpu", "--dtype", "float32", "--batch-size", "4", "--warmup", "1", "--log-every", "1"]
    logs, states = trained_by_one_and_by_two(command, tmp_path)
    for one, two in zip(*logs):
        names = [name for name in one if name not in ("progress", "seconds")]
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], rel=0.1)
    assert states[0].keys() == states[1].keys()


def test_an_error_in_one_process_ends_all(renders, pipeline_folder, tmp_path):
    with pytest.raises(Exception, match="view_counts must divide the 4 rendered views"):
        main(["denoiser", "--preset", "tiny", "--renders", str(renders[0]), "--held-out", str(renders[1]), "--device",
              "cpu", "--autoencoder", str(pipeline_folder / "vae"), "--run", str(tmp_path), "--steps", "1",
              "--view-counts", "3", "--processes", "2"])


def test_several_processes_are_refused_on_a_gpu():
    for processes, device in ((2, "cuda"), (0, "cpu")):
        refusal = f"processes must be 1, or more on a processor, got {processes} on {device}"
        with pytest.raises(ValueError, match=refusal):
            train_together(toy_training, processes, device)
