"""Lines about the progress."""

from titans_pretrain.evaluate import progress


def test_lines_come_now_and_then_and_at_the_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = []
    line = progress.Progress("requests", 2000, lines.append)
    for second, done in ((101, 250), (102, 500), (103, 600), (110, 2000)):
        now[0] = second
        line.show(done)
    assert lines == ["requests 500/2,000  6s left", "requests 2,000/2,000  in 10s"]
