"""Metrics on disk: JSON lines and event files, also with a full disk and with damaged lines."""

import errno
import json
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from rdm_jax.runtime.files import is_whole_png
from rdm_jax.training import metric_writer


def events(folder) -> list[Event]:
    """The events of all files. Each has its length in 8 bytes, a checksum in 4, the data, a
    checksum."""
    found = []
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def scalars(folder) -> list[tuple[int, float]]:
    return [
        (event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
    ]


def test_metric_writer_writes_lines_and_events(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 0)
    writer.write(1, images=8, loss=0.5)
    writer.write(2, images=16, loss=float("nan"))
    assert [line["loss"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [0.5, None]
    assert scalars(tmp_path) == [(1, 8), (1, 0.5), (2, 16)]  # before it is closed
    writer.close()
    writer = metric_writer.MetricWriter(tmp_path, 1)
    writer.write(2, images=16)
    writer.close()
    assert [line["step"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [1, 2]
    # A session log hides the events after step 1.
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [2]


def test_metric_writer_retries_lines_on_a_full_disk(tmp_path, monkeypatch, caplog):
    writer = metric_writer.MetricWriter(tmp_path, 0)
    writer.write(1, loss=1.0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(metric_writer.Path, "open", full)
        patched.setattr(RecordWriter, "write", full)
        writer.write(2, loss=2.0)
        writer.write(3, loss=3.0)
    assert (
        "metrics.jsonl cannot be written (No space left on device); training continues"
        in caplog.text
    )
    assert [line["step"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [1]
    writer.write(4, loss=4.0)
    assert [line["step"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert scalars(tmp_path) == [(1, 1.0), (4, 4.0)]
    writer.close()


@pytest.mark.parametrize(
    "bad", [b"\xff{", b"{", b"7", b'{"images": 8}', b'{"step": "1"}', b"[" * 5000]
)
def test_metric_writer_skips_and_names_damaged_lines(tmp_path, caplog, bad):
    sound = json.dumps({"step": 1, "images": 8}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(
        sound + b"\n" + bad + b"\n" + sound + b"\n" + sound[:5]
    )
    assert metric_writer.read(tmp_path / "metrics.jsonl") == [{"step": 1, "images": 8}] * 2
    metric_writer.MetricWriter(tmp_path, 1).close()
    assert (
        "metrics.jsonl: line 2 is damaged and skipped" in caplog.text
        and "line 4" not in caplog.text
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == (sound + b"\n") * 2


def test_metric_writer_recreates_a_moved_file(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 0)
    writer.write(1, loss=1.0)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "moved.jsonl")
    writer.write(2, loss=0.5)
    writer.close()
    assert [line["step"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [2]


def test_curves_draw_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    writer, picture = metric_writer.MetricWriter(tmp_path, 0), tmp_path / "loss.png"
    writer.write(1, images=8, loss=0.5)
    curves = metric_writer.Curves(tmp_path)
    curves.draw(last=False)
    assert not picture.exists()
    curves.draw(last=True)
    assert is_whole_png(picture)
    picture.unlink()
    monkeypatch.setattr(metric_writer, "SECONDS_BETWEEN_CURVES", 0)
    metric_writer.Curves(tmp_path).draw(last=False)
    assert is_whole_png(picture)
    writer.close()


def test_metric_writer_without_optional_libraries(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    for name in ("tensorboardX", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level("INFO", "rdm_jax"):
        writer, curves = metric_writer.MetricWriter(tmp_path, 0), metric_writer.Curves(tmp_path)
        writer.write(1, images=8, loss=0.5)
        curves.draw(last=True)
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert metric_writer.read(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5
    assert [message.partition(" is not installed. ")[2] for message in caplog.messages] == [
        "Run pip install 'rdm_jax[tensorboard]'.",
        "Run pip install 'rdm_jax[plots]'.",
    ]


def test_metrics_notice_at_the_start_what_an_optional_library_lacks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with caplog.at_level("INFO", "rdm_jax"):
        writer = metric_writer.MetricWriter(tmp_path, 0)
    assert "google is not installed. Run pip install 'rdm_jax[tensorboard]'." in caplog.text
    writer.write(1, images=8, loss=0.5)
    writer.close()
    assert [line["step"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [1]
