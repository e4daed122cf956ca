"""The command line itself: exit codes, help, and what the system refuses."""

import argparse
import errno
import os
import subprocess
import sys

import pytest
from checkpoint.checkpoint_cases import cut, make_tensors

from titans_pretrain import cli, errors
from titans_pretrain.checkpoint.save import save

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "pyarrow", "wandb", "matplotlib"}


def _verbs(parser, words=()):
    """The words of every verb and job that can be given, groups included."""
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _verbs(inner, (*words, name))


VERBS = list(_verbs(cli._parser()))


def _run(code, *arguments, **options):
    """A process of its own, as the installed command is one."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


MAIN = "import sys; from titans_pretrain import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.fixture
def verb(monkeypatch):
    """Let ``titans report x`` do something else."""

    def replace(action):
        monkeypatch.setattr(cli, "report", lambda options: action())
        return cli.main(["report", "x"])

    return replace


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_has_help(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {' '.join(('titans', *words))}")
    assert "%(" not in told


def test_help_and_refused_words_load_nothing_heavy():
    done = _run(
        "import sys; from titans_pretrain import cli\n"
        "for words in map(str.split, sys.argv[1:]):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "print('modules', *sys.modules)",
        *(" ".join((*words, "--help")) for words in VERBS),
        "nothing",
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert "titans_pretrain.cli" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("words", [[], ["nothing"], ["data", "nothing"], ["train"], ["report"]])
def test_what_is_no_command_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: titans" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (errors.UserError("a", where="b", fix="c"), 2, "error: a\nwhere: b\nfix:   c\n"),
        (errors.TitansError("a", where="b", fix="c"), 1, "error: a\nwhere: b\nfix:   c\n"),
        (errors.StoppedEarly("a"), 75, "error: a\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
    ],
)
def test_a_failure_has_its_code_and_no_traceback(error, code, told, verb, capsys):
    def fail():
        raise error

    assert verb(fail) == code
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_a_verb_may_give_the_code_itself(returned, code, verb):
    assert verb(lambda: returned) == code


@pytest.mark.parametrize("bug", [KeyError("a"), ValueError("a"), OSError("made by a library")])
def test_a_bug_keeps_its_traceback(bug, verb, capsys):
    def fail():
        raise bug

    assert verb(fail) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "in fail" in told


@pytest.mark.parametrize(
    ("number", "names", "where", "fix"),
    [
        (errno.EACCES, ("/a/b",), "/a/b", "change its permissions"),
        (errno.ENOENT, (b"/a/b",), "/a/b", "give a path that exists"),
        (errno.EEXIST, ("/a", None, "/b"), "/a -> /b", "move away what is there"),
        (errno.ENOTDIR, ("/a/b",), "/a/b", "a part of this one is a file"),
        (errno.EISDIR, ("/a",), "/a", "give a file"),
        (errno.ENOSPC, (), "operating system, which names no file", "free space"),
        (errno.EIO, ("/a",), "/a", "run the same command again"),
        (errno.EPIPE, (), "operating system, which names no file", "run the same command again"),
        (errno.ENOENT, (3,), "operating system, which names no file", "give a path that exists"),
    ],
)
def test_what_the_system_refuses_is_told_in_three_lines(number, names, where, fix, verb, capsys):
    def fail():
        raise OSError(number, os.strerror(number), *names)

    assert verb(fail) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"error: {os.strerror(number)}"
    assert second == f"where: {where}"
    assert third.startswith("fix:   ")
    assert fix in third


@pytest.mark.parametrize("words", ["checkpoint list", "checkpoint verify", "generate"])
def test_a_path_that_the_system_refuses_is_told_in_three_lines(words, capsys):
    name = "x" * 300
    assert cli.main([*words.split(), name, *["prompt"] * (words == "generate")]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "error: File name too long"
    assert name in second
    assert third.startswith("fix:   ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_ends_the_command_quietly(lines, unbuffered):
    code = (
        "import sys; from titans_pretrain import cli\n"
        f"cli.report = lambda options: [print('line') for _ in range({lines})] and None\n"
        "sys.exit(cli.main(['report', 'x']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_an_export_that_passes_over_a_damaged_checkpoint_says_so(tmp_path):
    for step in (1, 2):
        shards = cut(make_tensors(), 0, 1)
        save(tmp_path / "checkpoints", step, shards, state={}, files={}, keep=2)
    damaged = tmp_path / "checkpoints" / "step-2"
    (damaged / "state.json").unlink()
    done = _run(MAIN, "export", tmp_path, tmp_path / "out")
    told = done.stderr.splitlines()
    assert told[0] == f"{damaged} is damaged and was skipped: state.json is missing"
    assert told[1] == "error: the checkpoint holds no config.yaml"
    assert done.returncode == 1
