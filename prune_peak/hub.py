"""`push()`: a written folder to the Hub, with huggingface_hub."""

import logging
from collections.abc import Iterable
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .errors import PrunePeakError, UsageError
from .export.digests import is_read
from .option_fields import takes
from .options import PushOptions
from .verification import verify

log = logging.getLogger(__name__)

MESSAGE = "Upload a checkpoint pruned with prune-peak"


def check_login(repo_id: str) -> None:
    """Check the login and the name of the repository before work starts.

    Raises:
        UsageError: an invalid `repo_id`.
        PrunePeakError: no token, an invalid one, or no connection to the Hub.
    """
    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except HFValidationError:
        raise UsageError(f"{repo_id} is not a valid name of a repository; expected USER/NAME.") from None
    except (HTTPError, OSError) as error:
        raise PrunePeakError(f"cannot push to {repo_id}: {_explain(error)}") from None


@takes(PushOptions)
def push(folder: str | Path, repo_id: str, **options: Any) -> str:
    """Push a folder that `compress` wrote, and return the address of its repository.

    The folder is verified first. Files that the Hub has are not sent again, so after a failure the same call resumes.
    Weights, tokenizers and configs of another model in the repository are removed in the same commit.

    Args:
        folder: what `compress` wrote.
        repo_id: USER/NAME, or NAME for the account that is logged in; created if it does not exist.
        {options}

    Raises:
        UsageError: an invalid `repo_id`.
        PrunePeakError: a folder that does not verify, or a push that failed; the folder is not changed.

    Example:
        >>> push("SmolLM2-135M-peak-0.3", "me/SmolLM2-135M-peak-0.3", private=True)  # doctest: +SKIP
        'https://huggingface.co/me/SmolLM2-135M-peak-0.3'
    """
    given = PushOptions(**options)
    check_login(repo_id)
    verification = verify(Path(folder))
    if not verification.passed:
        failed = next(check for check in verification.checks if not check["passed"])
        raise PrunePeakError(f"{folder} does not verify, so it was not pushed: {failed['check']} ({failed['seen']}).")
    api, revision = HfApi(), given.revision
    try:
        url = api.create_repo(repo_id, private=given.private or None, exist_ok=True)
        if given.private and not api.model_info(url.repo_id).private:
            raise PrunePeakError(
                f"{url.repo_id} exists and is public. Make it private on the Hub, or choose another name."
            )
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        message = given.commit_message or MESSAGE
        stale = _find_stale(Path(folder), api.list_repo_files(url.repo_id, revision=revision))
        if stale:
            log.warning("%s has files of another model, which this push removes: %s.", repo_id, ", ".join(stale))
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=[escape(name) for name in stale],
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # uploads wrap errors in RuntimeErrors
        raise PrunePeakError(
            f"the push to {repo_id} failed: {_explain(error)} {folder} is complete; `prune-peak push {folder} "
            f"{repo_id}` resumes, and sends nothing twice."
        ) from None
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _find_stale(folder: Path, names: Iterable[str]) -> list[str]:
    """The files of a repository that would be read with a folder, and that the folder does not replace."""
    return sorted(name for name in names if is_read(name) and not (folder / name).exists())


def _explain(error: Exception) -> str:
    """What happened, and what to do if that is known, in one line."""
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the Hub does not accept the token. Run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "the token has no write access there. Check the name and the permissions of the token."
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return (" ".join(str(cause).split()) or type(cause).__name__).rstrip(".") + "."
