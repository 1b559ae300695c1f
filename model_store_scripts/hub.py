"""A model on the Hugging Face hub as a source, fetched through the hub client's cache.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HUB_CACHE` are read by the client.
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
from typing_extensions import override

from model_store_scripts.progress import ProgressBar
from model_store_scripts.sources import Source
from runners.config.files import MODEL_HEADS
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound

_SHA256 = re.compile("[0-9a-f]{64}")


class HubSource(Source):
    """A hub repository at one commit. The constructor fetches only the listing and the head file.

    Raises: ModelNotFound (no such model or revision), IncompleteModel (no model in it), ConfigError
    (gated, offline, unreachable).
    """

    ignored = ()

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        # The client's advice, such as to sign in, would hide the one sentence of an error.
        hub_logging.set_verbosity(logging.ERROR)
        self._repo_id = repo_id
        with _config_errors(repo_id, revision):
            self.root = Path(_download(repo_id, revision, MODEL_HEADS))
        self.revision = self.root.name
        self.names = self._listing()
        if self.names.isdisjoint(MODEL_HEADS):
            raise IncompleteModel(
                f"{repo_id} has no model to serve: it has neither config.json (text) "
                "nor model_index.json (image)"
            )

    @override
    def fetch(self, names: Iterable[str]) -> None:
        with _config_errors(self._repo_id, self.revision):
            _download(self._repo_id, self.revision, names)

    @override
    def checksums(self) -> Mapping[str, str]:
        # The cache names a large file by the hub's sha256 of it.
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
def _config_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into ConfigErrors."""
    hub = constants.ENDPOINT
    at = f" at {revision}" if revision else ""
    try:
        yield
    except GatedRepoError:
        advice = "HF_TOKEN's account has no access" if get_token() else "then set HF_TOKEN"
        raise ConfigError(
            f"{repo_id} is gated: request access at {hub}/{repo_id}; {advice}"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{repo_id} has no revision {revision}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelNotFound(
            f"{repo_id} is neither a local folder nor a model on {hub} "
            "(a private model needs HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{repo_id}{at} is not completely in the cache, and HF_HUB_OFFLINE is set"
            ) from None
        raise ConfigError(f"{hub} cannot be reached ({_reason(error)})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ConfigError(f"{hub} answered {status} for {repo_id}{at}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise ConfigError(
            f"{repo_id}{at} cannot be downloaded from {hub}: {_reason(error)}"
        ) from None


def _reason(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
