"""What the launcher makes of the ranks it started: signals, errors, environment."""

import io
import signal
import subprocess
import sys

import pytest

from titans_pretrain.train import launch, signals

THREE_LINES = "error: no file\\nwhere: data\\nfix:   give one"


@pytest.fixture(autouse=True)
def handlers():
    """Puts the signal handlers of the tests' process back."""
    numbers = signals.ASKING
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def watch():
    """``watch(program, ...)``: watches ranks that run these Python programs."""
    local = []

    def start(*programs):
        for number, program in enumerate(programs):
            complaints = launch._complaints()
            process = subprocess.Popen([sys.executable, "-c", program], stderr=complaints)
            local.append(launch.LocalRank(number, process, complaints))
        return launch._Watch(local)

    yield start
    for rank in local:
        rank.process.kill()
        rank.process.wait()
        rank.complaints.close()


def failing(code, complaint):
    return f"import sys; print('{complaint}', file=sys.stderr); sys.exit({code})"


def test_noise_does_not_bury_the_error(watch, capsys):
    noise = "lib.py:3: FutureWarning: error: soon\\n"
    assert watch(failing(2, noise), failing(2, noise + THREE_LINES)).wait() == 2
    assert capsys.readouterr().err == "error: no file\nwhere: data\nfix:   give one\n"


def test_without_an_error_what_a_failed_rank_wrote_is_told(watch, capsys):
    assert watch(failing(1, ""), failing(1, "Segmentation fault")).wait() == 1
    assert capsys.readouterr().err == "Segmentation fault\n"


def test_complaints_that_are_no_text_are_told_too(watch, capsys):
    program = "import os; os.write(2, b'\\xff\\nerror: bad\\n\\xfe'); os._exit(1)"
    assert watch(program).wait() == 1
    assert capsys.readouterr().err == "error: bad\n\ufffd\n"


def test_a_closed_terminal_does_not_change_the_exit_code(watch, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    assert watch(failing(75, THREE_LINES)).wait() == 75


def test_a_rank_killed_over_a_cut_file_is_told_of_the_data_and_not_of_memory(watch, capsys):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGBUS)"
    assert watch(program).wait() == 1
    told = capsys.readouterr().err
    assert told.startswith("error: rank 0 was killed by SIGBUS\n")
    assert "titans data verify" in told
    assert "--resume" in told
    assert "memory" not in told


def test_a_second_ctrl_c_ends_at_once_and_blames_no_memory(watch, capsys):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the ranks inherit that
    watching = watch("import time; time.sleep(60)")
    watching.pass_on(signal.SIGINT, None)
    watching.pass_on(signal.SIGINT, None)
    assert watching.wait() == 1
    complaints = capsys.readouterr().err
    assert complaints.startswith("error: ended at once by a second Ctrl-C")
    assert "memory" not in complaints


def test_a_signal_to_stop_is_heard_but_nohup_keeps_the_hang_up_ignored():
    heard = []
    signals.on_asking(lambda number, frame: heard.append(number))
    for number in signals.ASKING:
        signal.raise_signal(number)
    assert heard == list(signals.ASKING)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.on_asking(lambda number, frame: None)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("own", [None, "ib0"])
def test_started_ranks_talk_over_the_loopback_unless_told_otherwise(monkeypatch, own):
    class Started(Exception):
        pass

    def popen(command, *, env, **options):
        raise Started(env["GLOO_SOCKET_IFNAME"])

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if own:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", own)
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(Started, match=own or "lo"):
        launch.start(["train"], 1, signals.StopRequest())
