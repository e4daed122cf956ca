"""An exported directory on the Hugging Face Hub, by its official client. No torch here."""

import glob
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError, UserError

# weights of an earlier export, which transformers might take instead of the new ones
OUTDATED = [
    "model.safetensors",
    "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
    "model.safetensors.index.json",
]
_REFUSALS = {
    401: ("the Hub does not accept the token", "set HF_TOKEN to a valid one, or: hf auth login"),
    403: ("the token may not write there", "give it the right to write, or another REPO"),
    404: ("the Hub knows no such place", "give NAME or ORGANISATION/NAME of one you belong to"),
}
_HTTP = ("httpx", "httpx2", "requests", "urllib3")  # one of them is what the client is built on
_LONGEST = 300
_Answer = TypeVar("_Answer")


def check(repo: str) -> None:
    """Whether ``repo`` can be pushed to, as far as can be told without asking the Hub.

    Raises:
        UserError: it is no name of a repository, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"{repo!r} is no name of a repository: {error}",
            where="--push",
            fix="write NAME or ORGANISATION/NAME",
        ) from None
    if not get_token():
        raise UserError(
            "there is no token for the Hugging Face Hub",
            where=f"--push {repo}",
            fix="set HF_TOKEN to one that may write, or: hf auth login",
        )


def push(directory: Path, repo: str, *, private: bool = False) -> str:
    """Upload an export in one commit, making the repository where there is none.

    Every byte is compared with the manifest first; what it does not name is not pushed, and told.
    Files that the Hub has are not sent again. Weights of an earlier export go.

    Args:
        directory: what ``export`` wrote; it stays whatever happens.
        repo: ``NAME`` or ``ORGANISATION/NAME``.
        private: only for those who may see it.

    Returns:
        The repository's address.

    Raises:
        UserError: the token may not write there, or the repository is public against ``private``.
        TitansError: the export is damaged, or the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    if problems := manifest.problems(directory):
        raise TitansError(
            f"the export is damaged: {'; '.join(problems[:3])}",
            where=str(directory),
            fix="remove it and export again",
        )
    names = [record["name"] for record in manifest.read(directory)["files"]] + [manifest.NAME]
    for stray in sorted({path.name for path in directory.iterdir()} - set(names)):
        print(f"{directory / stray} is not of the export, and not pushed", file=sys.stderr)
    api = HfApi()
    place = _asked(
        directory, repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True)
    )
    if private and not _asked(directory, repo, lambda: api.repo_info(place.repo_id).private):
        raise UserError(
            f"{place.repo_id} is there already, and public",
            where=f"--push {repo} --private",
            fix="make it private in its settings on the Hub, or leave --private out",
        )
    _asked(
        directory,
        repo,
        lambda: api.upload_folder(
            repo_id=place.repo_id,
            folder_path=directory,
            commit_message=f"titans export: {directory.name}",
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=OUTDATED,
        ),
    )
    return str(place)


def _asked(directory: Path, repo: str, question: Callable[[], _Answer]) -> _Answer:
    """An answer of the Hub; a failure is told without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return question()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        told = _REFUSALS.get(status)
        reason = told[0] if told else f"the Hub refuses: {_line(error)}"
        fix = told[1] if told else "try again later"
        kind = UserError if told else TitansError
    except Exception as error:
        away = _is_of_the_network(error)
        kind = TitansError
        what = "the Hub was not reached" if away else "the Hub's client failed"
        reason = f"{what}: {type(error).__name__}: {_line(error)}"
        fix = "mend the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxies)" if away else "mend that"
    raise kind(
        f"{directory} was not pushed: {reason}",
        where=f"--push {repo}",
        fix=f"{fix}; the export is there: the same command again only pushes",
    )


def _is_of_the_network(error: Exception) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or not packages.isdisjoint(_HTTP)


def _line(error: Exception) -> str:
    """What an error says in one line, without the token."""
    from huggingface_hub import get_token

    said = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
    return said.replace(get_token() or "\0", "…")
