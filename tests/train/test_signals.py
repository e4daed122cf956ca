import os
import signal
import time

import pytest

from titans_pretrain.train.directory import RunDirectory
from titans_pretrain.train.signals import ASKING, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    """Puts the signal handlers of the tests' process back."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_the_first_signal_and_the_time_of_the_first_sigterm_are_remembered(number):
    stop = StopRequest()
    assert stop.name is None
    signal.raise_signal(number)
    assert (stop.terminated is None) == (number != signal.SIGTERM)
    before = time.time()
    signal.raise_signal(signal.SIGTERM)
    assert stop.name == number.name
    assert number == signal.SIGTERM or before <= stop.terminated <= time.time()


def test_a_second_sigterm_does_not_put_the_end_off():
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    stop.terminated = first = 5.0
    signal.raise_signal(signal.SIGTERM)
    assert stop.terminated == first


def test_a_signal_in_the_middle_of_a_long_call_is_known_at_once():
    """Python's own handler would run only after the call."""
    stop = StopRequest()
    signal.signal(signal.SIGUSR1, lambda number, frame: None)  # as if it had not run yet
    os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while stop.name is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.name == "SIGUSR1"


def test_the_first_failure_of_a_start_is_kept_and_that_of_another_start_is_in_nobody_s_way(
    tmp_path,
):
    run = RunDirectory(tmp_path)
    assert run.keep_failure({"start": "one", "rank": 1})
    assert not run.keep_failure({"start": "one", "rank": 0})
    assert '"rank": 1' in run.error.read_text()
    assert run.keep_failure({"start": "two", "rank": 2})
    assert '"rank": 2' in run.error.read_text()
    run.forget_last()
    assert list(tmp_path.iterdir()) == []
