import csv

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from sheeprlhf.engine import metrics
from sheeprlhf.engine.metrics import MetricWriter, _next_stamp


def session(run_dir, start, steps):
    """A process that logs `steps` and is killed: nothing is closed."""
    writer = MetricWriter(run_dir, start)
    for step in steps:
        writer.log({"train/loss": 10.0 + step, "val/loss": 0.1 * step}, step)
        writer.log_text("sample", f"text of {step}", step)
    return writer


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        header, *found = csv.reader(file)
    assert header == ["step", "tag", "value", "wall_time"]
    return [(int(step), tag, float(value)) for step, tag, value, _ in found]


def expected_rows(steps):
    return [row for s in steps for row in ((s, "train/loss", 10.0 + s), (s, "val/loss", 0.1 * s))]


@pytest.mark.parametrize(
    "jumps", [(2e9 + 1, 2e9 + 2, 2e9 + 3), (2e9, 2e9, 2e9), (1e9, 5e8, 0.0), (9_999_999_999.5, 2e9, 3e9), (3e10, 5, -5)]
)
def test_each_tag_and_step_is_there_once_after_resumes(jumps, tmp_path, monkeypatch):
    clock = [2_000_000_000.0]  # moves backwards between processes, as after a correction
    monkeypatch.setattr(metrics.time, "time", lambda: clock[0])
    session(tmp_path, 0, [1, 2])  # no checkpoint yet
    clock[0] = jumps[0]
    session(tmp_path, 0, range(1, 8))  # checkpoint at 4
    clock[0] = jumps[1]
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,train/lo")  # killed while it wrote
    session(tmp_path, 4, range(5, 9))  # checkpoint at 8
    clock[0] = jumps[2]
    writer = session(tmp_path, 8, range(9, 11))
    writer.close()
    assert rows(tmp_path) == expected_rows(range(1, 11))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, value in (("train/loss", lambda s: 10.0 + s), ("val/loss", lambda s: 0.1 * s)):
        assert [event.step for event in events.Tensors(tag)] == list(range(1, 11))
        for event in events.Tensors(tag):
            assert abs(event.tensor_proto.float_val[0] - value(event.step)) < 1e-5
    assert [event.step for event in events.Tensors("sample/text_summary")] == list(range(1, 11))
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {f"step-{step}.txt" for step in range(1, 11)}
    assert (tmp_path / "samples/step-6.txt").read_text() == "--- sample\ntext of 6\n"


def test_a_new_name_sorts_after_all_earlier_ones():
    for stamps in (
        ["0000000000"],
        ["2000000000", "1999999999"],
        ["9" * 10],
        ["9" * 10, "9" * 9 + "80"],
        ["30000000000"],
    ):
        for now in (-1.0, 0.0, 2e9, 1e10, 1e30):
            name = f"events.out.tfevents.{_next_stamp(stamps, now)}.host"
            assert all(name > f"events.out.tfevents.{stamp}.zzz" for stamp in stamps), (stamps, now)


def test_values_are_exact_and_odd_ones_stay_readable(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.log({"a": 0.1 + 0.2, "b": float("inf")}, 1)
    writer.log_text("t", "\x1b[31mlone \ud800 surrogate", 1)
    writer.log_text("t2", "second", 1)
    assert rows(tmp_path) == [(1, "a", 0.1 + 0.2), (1, "b", float("inf"))]
    assert (tmp_path / "samples/step-1.txt").read_text() == "--- t\nlone ? surrogate\n--- t2\nsecond\n"
    writer.close()


class Recorder:
    """A tracker that keeps what it gets, and fails from one step on."""

    run_id = "id"

    def __init__(self, fails_at: int = 99) -> None:
        self.fails_at, self.points, self.texts, self.ended = fails_at, [], [], None

    def log(self, metrics, step):
        if step >= self.fails_at:
            raise RuntimeError("gone")
        self.points += [(step, tag, value) for tag, value in metrics.items()]

    def log_text(self, tag, text, step):
        self.texts.append((step, tag, text))

    def close(self, finished):
        self.ended = finished


def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path):
    said, good, bad = [], Recorder(), Recorder(fails_at=2)
    writer = MetricWriter(tmp_path, tensorboard=False, trackers={"bad": bad, "good": good}, say=said.append)
    for step in (1, 2, 3):
        writer.log({"train/loss": 10.0 + step, "val/loss": 0.1 * step}, step)
    writer.close(finished=False)
    assert good.points == rows(tmp_path) == expected_rows((1, 2, 3))
    assert bad.points == expected_rows([1])
    assert (good.ended, bad.ended) == (False, None)
    assert len(said) == 1 and "log=bad" in said[0]
    assert not list(tmp_path.glob("events.out.tfevents.*"))


def test_a_resumed_run_sends_no_point_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine")
    tracker = Recorder()
    for start, steps in ((0, range(1, 7)), (4, range(5, 9))):  # killed after step 6; the checkpoint is of step 4
        writer = MetricWriter(tmp_path, start, trackers={"one": tracker})
        for step in steps:
            writer.log({"train/loss": 10.0 + step, "val/loss": 0.1 * step}, step)
    writer.log_text("samples", "it is a-secret-of-mine", 8)
    assert tracker.points == rows(tmp_path) == expected_rows(range(1, 9))
    [(_, _, text)] = tracker.texts
    assert "a-secret-of-mine" not in text and text.startswith("it is ")
