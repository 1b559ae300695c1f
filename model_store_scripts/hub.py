"""A model of the Hugging Face hub as a source, fetched through the hub client's own cache.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HUB_CACHE` are the client's and work as ever.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging

from model_store_scripts.progress import ProgressBar
from runners.config.files import MODEL_HEADS
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_SHA256 = re.compile("[0-9a-f]{64}")


def is_hub_id(source: str) -> bool:
    """Whether the hub could have a model of this name."""
    return bool(_HUB_ID.fullmatch(source))


class HubSource:
    """A hub repository at one commit. Only its listing and its head file are fetched at first.

    Raises: ModelNotFound (no such model or revision), IncompleteModel (no model in it), ConfigError
    (gated, offline, unreachable).
    """

    ignored: tuple[str, ...] = ()

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        # The client's advice (unauthenticated requests, and so on) would drown our one sentence.
        hub_logging.set_verbosity(logging.ERROR)
        self._repo_id = repo_id
        with _one_sentence(repo_id, revision):
            self.root = Path(_download(repo_id, revision, MODEL_HEADS))
        self.revision = self.root.name
        self.names = self._listing()
        if self.names.isdisjoint(MODEL_HEADS):
            raise IncompleteModel(
                f"{repo_id} holds no model to serve: it has neither config.json (text) "
                "nor model_index.json (image)"
            )

    def fetch(self, names: Iterable[str]) -> None:
        """Download files, with a progress bar on a terminal. Raises: as the constructor."""
        with _one_sentence(self._repo_id, self.revision):
            _download(self._repo_id, self.revision, names)

    @property
    def checksums(self) -> Mapping[str, str]:
        """The hub's sha256 of the large files fetched: what the cache names their content by."""
        blobs = {n: (self.root / n).resolve().name for n in self.names if (self.root / n).exists()}
        return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}

    def _listing(self) -> frozenset[str]:
        try:
            tree = get_cached_repo_tree(self._repo_id, revision=self.revision)
        except CachedRepoTreeNotFoundError:  # offline, with a cache that an older client filled
            files = (p.relative_to(self.root) for p in self.root.rglob("*") if p.is_file())
            return frozenset(f.as_posix() for f in files)
        return frozenset(file.path for file in tree)


def _download(repo_id: str, revision: str | None, names: Iterable[str]) -> str:
    return snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=[glob.escape(name) for name in names],
        tqdm_class=ProgressBar,
    )


@contextlib.contextmanager
def _one_sentence(repo_id: str, revision: str | None) -> Iterator[None]:
    hub = constants.ENDPOINT
    at = f" at {revision}" if revision else ""
    try:
        yield
    except GatedRepoError:
        todo = "HF_TOKEN's account has no access" if get_token() else "then set HF_TOKEN"
        raise ConfigError(
            f"{repo_id} is gated: ask for access at {hub}/{repo_id}; {todo}"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{repo_id} has no revision {revision}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelNotFound(
            f"{repo_id} is neither a folder here nor a model on {hub} "
            "(a private one needs HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{repo_id}{at} is not wholly in the cache, and HF_HUB_OFFLINE is set"
            ) from None
        raise ConfigError(f"{hub} can not be reached ({_reason(error)})") from None
    except HfHubHTTPError as error:
        raise ConfigError(f"{hub} answers {error.response.status_code} for {repo_id}{at}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise ConfigError(
            f"{repo_id}{at} can not be fetched from {hub}: {_reason(error)}"
        ) from None


def _reason(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
