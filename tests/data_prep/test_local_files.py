"""Globs of local files: what ``glob`` finds is found, and what cannot be looked at is an error."""

import errno
import glob
import os

import pytest

from data_prep import inputs, local_files
from titans_pretrain.errors import UserError

FILES = [
    *("a.txt", "b.jsonl", ".hidden.txt", "[x].txt", "x/a.txt", "x/y/a.txt", "x/.git/a.txt"),
    *("x.txt/a.txt", "z/a-1.txt", "z/a-2.txt"),
]
PATTERNS = [
    *("*.txt", "a.txt", "none.txt", "**", "**/*.txt", "**/a.txt", "x/**", "x/**/y/*", "*/a*.txt"),
    *(".*.txt", "*/.git/*.txt", "[[]x].txt", "[!a].txt", "z/a-[0-9].txt", "a-?.txt", "*/../*.txt"),
    *("x//a.txt", "a.txt/*.txt", "a.txt/b", "*/*/*.txt", "none/*.txt", "l/*.txt", "**/y/*.txt"),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "l").symlink_to("z")
    (tmp_path / "l.txt").symlink_to("z/a-1.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_files_are_those_that_glob_finds(files, pattern):
    for place in (pattern, f"{files}/{pattern}"):
        expected = {os.path.normpath(path) for path in glob.glob(place, recursive=True)}
        expected = {path for path in expected if os.path.isfile(path)}
        assert {os.path.normpath(path) for path in local_files.matching(place)} == expected


@pytest.mark.parametrize("pattern", ["*/*.txt", "**/*.txt", "z/*.txt"])
def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(files, monkeypatch, pattern):
    listed = os.listdir

    def refuses(folder):
        if str(folder).endswith("z"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refuses)
    with pytest.raises(UserError, match="cannot list the folder: Permission denied") as caught:
        inputs.find([f"{files}/{pattern}"])
    assert caught.value.where == f"{files}/z"


@pytest.mark.parametrize("pattern", ["gone.txt", "*.txt", "*/a-1.txt", "**/*.txt"])
def test_a_link_to_nothing_is_an_error_that_names_it(files, pattern):
    (files / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(UserError, match="a link leads to nothing") as caught:
        inputs.find([f"{files}/{pattern}"])
    assert caught.value.where == f"{files}/gone.txt"


def test_a_link_to_nothing_that_does_not_match_is_no_matter(files):
    (files / "gone.json").symlink_to("nowhere.txt")
    assert [item.name for item in inputs.find([f"{files}/a.txt", f"{files}/z/*.txt"])] == [
        *("a.txt", "z/a-1.txt", "z/a-2.txt")
    ]
