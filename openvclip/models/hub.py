"""The Hugging Face Hub: whether it can be reached, downloads and uploads of models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvclip.errors import HubError, OpenVCLIPError

PREFIX = "hf-hub:"
"""Marks the name of a repository on the Hub."""

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Files that describe a model: configurations, vocabularies, and the contract.
_SMALL = (".json", ".txt", ".model", ".md", ".jinja")
_CONNECT = 5.0  # seconds


@dataclass(frozen=True)
class HubSource:
    """A model on the Hugging Face Hub.

    Attributes:
        repo: the repository, such as ``"user/name"``.
        revision: a branch, a tag or a commit. Default: the main branch.
        cache_dir: the folder of downloaded files. Default: the cache of huggingface_hub.
        local_files_only: whether only downloaded files are used.
        token: a token of the Hub. Default: the stored token, if there is one.
        prefix: what stands before the repository in errors, as the caller gave it.
    """

    repo: str
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | None = None
    prefix: str = PREFIX

    def __post_init__(self) -> None:
        if not isinstance(self.repo, str) or not _REPOSITORY.fullmatch(self.repo):
            raise HubError(
                f"{self.repo!r} is not the name of a repository on the Hugging Face Hub; expected "
                f"user/name, as in VideoCLIP.from_pretrained('{PREFIX}user/name')."
            )

    @property
    def cache(self) -> str | None:
        """The folder of downloaded files as a text."""
        return None if self.cache_dir is None else os.fspath(self.cache_dir)

    @property
    def name(self) -> str:
        """The source as a text for errors."""
        return f"{self.prefix}{self.repo}" + (f" ({self.revision})" if self.revision else "")


def is_offline(name: str) -> bool:
    """Return whether ``name`` is on the Hugging Face Hub and the Hub can't be reached.

    huggingface_hub tries again and again, for half a minute, before it says so. With
    ``local_files_only=True``, files that were downloaded before are loaded from its cache at once.

    Args:
        name: a folder, or a name on the Hub.
    """
    from huggingface_hub import constants, get_session

    if Path(name).is_dir():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT)
    except Exception:  # the errors of its libraries have no common class in all versions
        return True
    return False


def download(source: HubSource, choose: Callable[[Path, list[str]], Sequence[str]]) -> Path:
    """Return a folder with the files of a model on the Hub.

    One request asks the Hub for the list of files. If the Hub does not answer, the error comes
    after this request, without the retries of a download; files that were downloaded before are
    used instead, if they are there.

    Args:
        source: the model.
        choose: function from a folder with the small files of the model, and the names of all
            files, to the names of the files of weights.

    Raises:
        HubError: there is no such repository or revision, access is denied, or the Hub can't be
            reached and the files were not downloaded before.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if source.local_files_only:
        return _downloaded(source, "local_files_only=True", choose)
    try:
        api = HfApi(token=source.token)
        info = api.model_info(
            source.repo, revision=source.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except OfflineModeIsEnabled:
        return _downloaded(source, "HF_HUB_OFFLINE is set", choose)
    except Exception as error:  # of huggingface_hub, and of the HTTP library of its version
        if _answered(error):
            raise _refusal(error, f"{source.name} can't be loaded") from error
        return _downloaded(source, _no_answer(error), choose)
    names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    small = [name for name in names if name.endswith(_SMALL)]
    with _hub_errors(f"{source.name} can't be downloaded"):
        folder = _snapshot(source, small)
        weights = choose(folder, names)
        return _snapshot(source, [*small, *weights])


def require_connection(repo: str) -> None:
    """Raise an error if nothing of a repository was downloaded and the Hub does not answer.

    open_clip and transformers would try again for a minute before they raise an error.

    Args:
        repo: the repository, such as ``"user/name"``. Other names pass.

    Raises:
        HubError: the Hub does not answer. A refusal is no error here.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    if not _REPOSITORY.fullmatch(repo) or (folder.is_dir() and any(folder.iterdir())):
        return
    if is_offline(repo):
        raise _not_downloaded(f"{PREFIX}{repo}", f"{constants.ENDPOINT} can't be reached")


def _snapshot(source: HubSource, names: Sequence[str], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.repo,
            revision=source.revision,
            cache_dir=source.cache,
            token=source.token,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in names],
            **options,
        )
    )


def _downloaded(
    source: HubSource, reason: str, choose: Callable[[Path, list[str]], Sequence[str]]
) -> Path:
    """Return the folder of a model that was downloaded before."""
    folder = _cached_folder(source)
    if folder is not None:
        weights = choose(folder, sorted(path.name for path in folder.iterdir()))
        if weights and all((folder / weight).is_file() for weight in weights):
            return folder
    raise _not_downloaded(source.name, reason)


def _cached_folder(source: HubSource) -> Path | None:
    """Return the folder of downloaded files of a repository, if it holds a configuration."""
    from huggingface_hub import try_to_load_from_cache

    revision = source.revision or "main"
    for name in ("openvclip.json", "open_clip_config.json", "config.json"):
        file = try_to_load_from_cache(source.repo, name, cache_dir=source.cache, revision=revision)
        if isinstance(file, str):
            return Path(file).parent
    return None


def _not_downloaded(name: str, reason: str) -> HubError:
    return HubError(
        f"{name} can't be downloaded: {reason}; and the whole model was not downloaded before. "
        "Connect to the Hub, or copy the folder of the model here and give its path."
    )


def require_token(repo: str, token: str | None) -> None:
    """Raise :class:`HubError` if there is no token, or ``repo`` is no name of a repository."""
    from huggingface_hub import get_token

    HubSource(repo)
    if not (token or get_token()):
        raise HubError(
            f"There is no token of the Hugging Face Hub, so {repo} can't be written. Run `hf auth "
            "login`, set HF_TOKEN, or give token=, with a token that may write."
        )


def upload(
    folder: Path,
    repo: str,
    *,
    keeps: Callable[[str], bool],
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the files of a folder to a repository on the Hub, in one commit.

    Args:
        folder: the folder.
        repo: the repository, such as ``"user/name"``; created if it does not exist.
        keeps: whether a model card that is in the repository is kept. Called with its text.
        private: whether a new repository is private. Default: the setting of the user.
        token: a token that may write. Default: the stored token.
        revision: the branch. Default: the main branch.
        commit_message: the message of the commit.
        create_pr: whether a pull request is opened.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: access is denied, or the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _hub_errors(f"{repo} can't be written"):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        card = _card_of(repo, revision, token)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a model for videos, written by openvclip",
            create_pr=create_pr,
            ignore_patterns=["README.md"] if card is not None and keeps(card) else None,
        )
    return str(commit.pr_url or commit.commit_url)


def _card_of(repo: str, revision: str | None, token: str | None) -> str | None:
    """Return the text of the model card of a repository, or ``None`` if it has no card."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        path = hf_hub_download(repo, "README.md", revision=revision, token=token)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Raise the errors of huggingface_hub in the block as errors of this package."""
    try:
        yield
    except OpenVCLIPError:
        raise
    except Exception as error:  # of huggingface_hub, and of the HTTP library of its version
        if _answered(error):
            raise _refusal(error, what) from error
        raise HubError(f"{what}: {_no_answer(error)}. Check the connection and try again.") from (
            error
        )


def _answered(error: Exception) -> bool:
    """Return whether the Hub answered with a refusal. Errors of the server count as no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status < 500


def _refusal(error: Exception, what: str) -> HubError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        reason = "its owner must grant you access. Ask for access on its page, and give a token"
    elif isinstance(error, RevisionNotFoundError):
        reason = "there is no such revision. Give a branch, a tag or a commit of the repository"
    elif isinstance(error, RepositoryNotFoundError):
        reason = (
            "the Hub has no such repository, or it is private. Check the name; for a private "
            "repository run `hf auth login`, set HF_TOKEN or give token="
        )
    else:
        status = getattr(getattr(error, "response", None), "status_code", None)
        first = str(error).strip().splitlines()[0].rstrip(".")
        reason = f"the Hub answered with {status} ({first}). Check the name and your token"
    return HubError(f"{what}: {reason}.")


def _no_answer(error: Exception) -> str:
    from huggingface_hub import constants

    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return f"{constants.ENDPOINT} can't be reached ({reason})"
