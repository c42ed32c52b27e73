import csv

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from sheeprlhf.engine.metrics import MetricWriter


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


def test_each_tag_and_step_is_there_once_after_resumes(tmp_path, monkeypatch):
    # TensorBoard numbers a process's files and reads them in the order of their names, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    session(tmp_path, 0, [1, 2])  # no checkpoint yet
    session(tmp_path, 0, range(1, 8))  # checkpoint at 4
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,train/lo")  # killed while it wrote
    session(tmp_path, 4, range(5, 9))  # checkpoint at 8
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


def test_values_are_exact_and_odd_ones_stay_readable(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.log({"a": 0.1 + 0.2, "b": float("inf")}, 1)
    writer.log_text("t", "\x1b[31mlone \ud800 surrogate", 1)
    writer.log_text("t2", "second", 1)
    assert rows(tmp_path) == [(1, "a", 0.1 + 0.2), (1, "b", float("inf"))]
    assert (tmp_path / "samples/step-1.txt").read_text() == "--- t\nlone ? surrogate\n--- t2\nsecond\n"
    writer.close()
