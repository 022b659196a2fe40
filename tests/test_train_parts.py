"""What the training loop is made of: configuration, batches, schedule, averages, saved states."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fastchgnet.config import Config, OptimConfig, RunConfig, load_run_config
from fastchgnet.errors import InputError
from fastchgnet.flat import views
from fastchgnet.train.batches import Batches, prefetch
from fastchgnet.train.checkpoint import Progress, load_state, save_state
from fastchgnet.train.log import RunLog, read_metrics
from fastchgnet.train.optim import Optimizer, learning_rate, step_sizes
from fastchgnet.train.parcel import Layout, send
from fastchgnet.train.sampler import Strategy

MINIMAL = {"data": {"train": "store"}, "train": {"out": "run"}}


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


# configuration


def test_relative_paths_are_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_yaml(tmp_path, yaml.safe_dump(MINIMAL))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_run_config(path).data.train == elsewhere / "store"


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = RunConfig.model_validate(MINIMAL | {"loss": {"preset": "chgnet"}})
    path = write_yaml(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))
    assert load_run_config(path) == config


def test_overrides_are_yaml_and_make_sections(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, yaml.safe_dump(MINIMAL))
    overrides = ["optim.learning_rate=1e-4", "optim.clip_norm=null", "model.readout_hidden=[8, 8]"]
    config = load_run_config(path, overrides)
    assert config.optim.learning_rate == 1e-4 and config.optim.clip_norm is None
    assert config.model.readout_hidden == (8, 8)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("optim: {lr: 1}\ndata: {train: a}\ntrain: {out: b}", [], "unknown key optim.lr"),
        ("data: {train: a}\ntrain: {epochs: 3}", [], "missing key train.out"),
        ("data: {train: a}\ntrain: {out: b, epochs: 0}", [], "train.epochs: Input should be greater than 0"),
        ("data: {train: a}\ntrain: {out: b, out: c}", [], "'out' twice"),
        ("data: [", [], "not YAML"),
        ("just text", [], "expected sections"),
        ("data: {train: a}\ntrain: {out: b}", ["optim.lr=1"], "unknown key optim.lr"),
        ("data: {train: a}\ntrain: {out: b}", ["optim"], "expected section.key=value"),
        ("data: {train: a}\ntrain: {out: b}", ["data.train.x=1"], "data.train is not a section"),
        ("data: {train: a}\ntrain: {out: b}", ["optim.ema_decay=["], "not YAML"),
        ("data: {train: a}\ntrain: {out: b, references: keep}", [], "references: keep needs init"),
        ("data: {train: a}\ntrain: {out: b}", ["optim.learning_rate=.inf"], "should be a finite number"),
        ("data: {train: a}\ntrain: {out: b}", ["optim.base_batch_size=0"], "batch_size: Input should be"),
        ("data: {train: a}\ntrain: {out: b}", ["model.atom_cutoff=500"], "less than or equal to 20"),
        ("data: {train: a}\ntrain: {out: b}", ["model.readout_hidden=[-4]"], "greater than 0"),
        ("data: {train: a}\ntrain: {out: b}", ["model.n_angular=1"], "n_angular must be 3, 5, ..."),
        (
            f"data: {{train: a}}\ntrain: {{out: b, seed: {2**63}}}",
            [],
            "train.seed: Input should be less than",
        ),
        ("data: {train: a}\ntrain: {out: 2020-99-99}", [], "not YAML"),
        ("[" * 5000, [], "not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_run_config(write_yaml(tmp_path, text), overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        load_run_config(tmp_path / "none.yaml")


def test_the_documentation_explains_every_key() -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    for section, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Config)
        for key, inner in field.annotation.model_fields.items():
            assert f"| `{section}.{key}` |" in text and str(inner.description) in text


# batches


SIZES = np.random.default_rng(0).lognormal(3, 0.8, (703, 1)).astype(np.int64) * [1, 60, 4, 70, 400]


@pytest.mark.parametrize("strategy", ["sequential", "paper", "lpt"])
@pytest.mark.parametrize(("n_frames", "size"), [(703, 7), (23, 5), (23, 100), (3, 1), (64, 64)])
def test_every_frame_comes_once_in_an_epoch(strategy: Strategy, n_frames: int, size: int) -> None:
    batches = Batches(SIZES[:n_frames], size, seed=1, strategy=strategy)
    for epoch in (0, 2):
        found = list(batches.epoch(epoch))
        assert len(found) == len(batches) == math.ceil(n_frames / size)
        lengths = {len(batch) for batch in found}
        assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
        assert sorted(np.concatenate(found)) == list(range(n_frames))


@pytest.mark.parametrize("strategy", ["sequential", "paper", "lpt"])
def test_batches_depend_on_seed_and_epoch_alone(strategy: Strategy) -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return tuple(np.concatenate(list(Batches(SIZES, 7, seed, strategy).epoch(number))))

    first = epoch(1, 2)
    np.random.default_rng().random()  # nobody else's numbers matter
    assert epoch(1, 2) == first
    assert len({first, epoch(1, 3), epoch(2, 2)}) == 3


def test_batches_are_even_but_for_those_left_to_chance() -> None:
    spread = {}
    for strategy in ("sequential", "paper", "lpt"):
        rows = np.array([SIZES[batch].sum(0) for batch in Batches(SIZES, 8, 0, strategy).epoch(0)])
        spread[strategy] = (rows.std(0) / rows.mean(0)).max()
    assert 2 * spread["lpt"] < spread["paper"] < spread["sequential"]


def test_any_batch_may_have_the_largest_frame() -> None:
    """Dividing a pool sorts its frames; the batches come in random order all the same."""
    largest = int(SIZES[:64, 0].argmax())
    for strategy in ("paper", "lpt"):
        batches = Batches(SIZES[:64], 8, 0, strategy)
        places = [next(k for k, batch in enumerate(batches.epoch(e)) if largest in batch) for e in range(60)]
        assert set(places) == set(range(8))  # by chance one of the eight is missing in 0.3% of seeds


@pytest.mark.parametrize("strategy", ["paper", "lpt"])
def test_frames_meet_others_in_every_epoch(strategy: Strategy) -> None:
    """A small set is one pool, and sizes alone would divide it in the same way each time."""
    batches = Batches(SIZES[:128], 8, 0, strategy)
    together = np.zeros((128, 128), int)
    for epoch in range(40):
        for batch in batches.epoch(epoch):
            together[np.ix_(batch, batch)] += 1
    # by chance 2.2 times on average, and more than 16 times for one pair in 10^9
    assert together[np.triu_indices(128, 1)].max() <= 16


def test_other_batches_have_another_fingerprint() -> None:
    known = {
        Batches(sizes, size, seed, strategy).fingerprint()
        for sizes in (SIZES, SIZES + 1)
        for size in (7, 8)
        for seed in (0, 1)
        for strategy in ("lpt", "paper")
    }
    assert len(known) == 16 and Batches(SIZES.copy(), 7, 0).fingerprint() in known


def test_prefetch_keeps_the_order_and_stays_two_ahead() -> None:
    asked: list[int] = []
    items = prefetch(lambda n: n * n, (asked.append(n) or n for n in itertools.count()))
    assert [next(items) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert asked == list(range(len(asked))) and 5 <= len(asked) <= 7
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_raises_in_turn() -> None:
    items = prefetch(lambda n: 6 // n, [3, 2, 0, 1])
    assert [next(items), next(items)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(items)


# what goes to a device


def test_a_parcel_holds_tensors_as_they_are() -> None:
    bits = torch.tensor([-1, 2**63 - 1, 0])
    tensors = [
        torch.tensor([[True, False, True]]),
        bits,
        bits.view(torch.float64),  # among them a NaN that must not become another
        torch.tensor(7),
        torch.zeros(0, 3),
        torch.arange(6.0).view(3, 2).t(),
        torch.tensor([0.5, math.inf], dtype=torch.float64),
    ]
    layout = Layout.of(tensors)
    assert layout == Layout.of([t.clone() for t in tensors]) and hash(layout) == hash(Layout.of(tensors))
    assert layout != Layout.of(tensors[::-1])
    buffer = layout.packed(tensors, torch.device("cpu"))
    found = layout.views(buffer)
    for one, other in zip(found, tensors, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.is_contiguous()
        assert one.numpy().tobytes() == other.contiguous().numpy().tobytes()
        assert one.untyped_storage().data_ptr() == buffer.data_ptr()
        assert one.storage_offset() * one.itemsize % 16 == 0
    # a step that is taken again must not write where the copy of the first may still read
    assert layout.packed(tensors, torch.device("cpu")).data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_sent_arrives_in_its_shapes(device: str) -> None:
    tensors = [torch.zeros(2, 3), torch.ones(5, dtype=torch.bool), torch.tensor(3)]
    found = send(tensors, torch.device(device))
    for one, other in zip(found, tensors, strict=True):
        assert one.device.type == device and (one.dtype, one.shape) == (other.dtype, other.shape)


# schedule, averages, clipping


def test_learning_rate_warms_up_and_anneals() -> None:
    rates = [learning_rate(step, 14, 3, 2.0, 0.1) for step in range(14)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[-1] == pytest.approx(0.2)
    # Half a cosine from step 3 to step 13: its middle is at step 8.
    assert rates[8] == pytest.approx(1.1)
    assert rates[4] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 10)) / 2)
    assert [learning_rate(s, 1, 0, 2.0, 0.1) for s in (0,)] == [2.0]


def test_learning_rate_grows_with_the_batch_where_it_is_asked_to() -> None:
    paper = OptimConfig(learning_rate=3e-4, base_batch_size=128)
    assert [paper.highest_rate(size) for size in (32, 128, 2048)] == pytest.approx([7.5e-5, 3e-4, 4.8e-3])
    assert [OptimConfig(learning_rate=3e-4).highest_rate(size) for size in (32, 2048)] == [3e-4, 3e-4]


def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    current = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)).double()
    return current, copy.deepcopy(current)


@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_steps_are_those_of_torch(clip_norm: float | None) -> None:
    current, average = twins()
    theirs, their_average = twins()
    adam = torch.optim.Adam(theirs.parameters())
    optimizer = Optimizer(dict(current.named_parameters()), dict(average.named_parameters()), clip_norm)
    for step in range(5):
        gradients = [(step + 1) * torch.randn_like(p) for p in current.parameters()]
        sizes = step_sizes(step, rate=0.1 / (step + 1), ema_decay=0.2)
        flat = torch.zeros_like(optimizer.weights)
        for view, gradient in zip(views(flat, optimizer.parameters), gradients, strict=True):
            view.copy_(gradient)
        norm = flat.new_empty(())
        optimizer.update(flat, torch.tensor(sizes, dtype=torch.float64), norm)

        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or 1e9)
        adam.param_groups[0]["lr"] = 0.1 / (step + 1)
        adam.step()
        keep = (0.1, 2 / 11, 0.2, 0.2, 0.2)[step]
        with torch.no_grad():
            for mean, parameter in zip(their_average.parameters(), theirs.parameters(), strict=True):
                mean.copy_(keep * mean + (1 - keep) * parameter)
        torch.testing.assert_close(norm, expected)
        # the same formulas in another order, in fp64
        for mine, other in ((current, theirs), (average, their_average)):
            for found, wanted in zip(mine.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_without_decay_the_average_is_the_current_weights() -> None:
    current, average = twins()
    optimizer = Optimizer(dict(current.named_parameters()), dict(average.named_parameters()), None)
    sizes = torch.tensor(step_sizes(9, rate=0.1, ema_decay=0.0), dtype=torch.float64)
    optimizer.update(torch.randn_like(optimizer.weights), sizes, optimizer.weights.new_empty(()))
    assert all(torch.equal(a, c) for a, c in zip(average.parameters(), current.parameters(), strict=True))


def test_parameters_become_views_of_one_buffer() -> None:
    current, average = twins()
    before = [p.detach().clone() for p in current.parameters()]
    optimizer = Optimizer(dict(current.named_parameters()), dict(average.named_parameters()), None)
    starts = [(p.data_ptr() - optimizer.weights.data_ptr()) / 8 for p in current.parameters()]
    assert all(start % 64 == 0 for start in starts)
    assert all(torch.equal(p, q) for p, q in zip(current.parameters(), before, strict=True))
    optimizer.weights.zero_()
    assert not any(p.any() for p in current.parameters()) and any(p.any() for p in average.parameters())


# saved states


def save(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.full((3,), float(step)), "scalar": torch.tensor(step)}
    save_state(folder, tensors, Progress(step=step, best_loss=0.1 + step))
    return tensors


def test_states_keep_two_generations(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for step in (3, 12, 100):
        saved = save(tmp_path, step)
    loaded = load_state(tmp_path)
    assert loaded is not None
    tensors, progress = loaded
    assert progress == Progress(step=100, best_loss=100.1)
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-0000000012.safetensors",
        "step-0000000100.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / "step-0000000002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes({"truncated": content[:-5], "flipped": content, "empty": b""}[damage])
    loaded = load_state(tmp_path)
    assert loaded is not None and loaded[1].step == 1
    save(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="every saved state is damaged"):
        load_state(tmp_path)


def test_metrics_after_the_state_are_forgotten(tmp_path: Path) -> None:
    with RunLog(tmp_path, epoch=0) as log:
        for epoch in (1, 2, 3):
            log.append({"epoch": epoch, "val": {"loss": 0.5, "magmoms_mmub": None}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "val')  # killed while writing
    with RunLog(tmp_path, epoch=2) as log:
        log.append({"epoch": 3, "val": {"loss": 0.25, "magmoms_mmub": None}})
    assert [(row["epoch"], row["val"]["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]


@pytest.mark.parametrize("line", ["{garbage", "5", '{"epoch": 1}', '{"loss": 0.5}'])
def test_a_line_that_is_no_epoch_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 1, "val": {{"loss": 0.5}}}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not the row of an epoch"):
        read_metrics(tmp_path)
