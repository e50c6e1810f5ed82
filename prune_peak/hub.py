"""Push a written folder to the Hub, by huggingface_hub's own client."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx, or of httpx2, as huggingface_hub has it
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .errors import PrunePeakError, UsageError
from .verification import verify

MESSAGE = "Upload a checkpoint cut with prune-peak"


def check_login(repo_id: str) -> None:
    """See that somebody is logged in, and that the name is one, before work starts.

    Raises:
        UsageError: `repo_id` is no name of a repository.
        PrunePeakError: no token, one that the Hub does not know, or no Hub.
    """
    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except HFValidationError:
        raise UsageError(f"{repo_id} is no name of a repository; expected USER/NAME.") from None
    except (HTTPError, OSError) as error:
        raise PrunePeakError(f"cannot push to {repo_id}: {_explain(error)}") from None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Push a folder that `compress` wrote, and return the address of its repository.

    The folder is verified first. What the Hub has already is not sent again, so after a failure the same call goes on.

    Args:
        folder: what `compress` wrote.
        repo_id: USER/NAME; NAME alone goes to whoever is logged in. Made if it is not there.
        private: make it a private one; refused where it exists and is public.
        revision: a branch, made if it is not there.
        commit_message: the commit's first line.

    Raises:
        UsageError: `repo_id` is no name of a repository.
        PrunePeakError: a folder that does not verify, or a push that failed; the folder stays as it is.

    Example:
        >>> push("SmolLM2-135M-peak-0.3", "me/SmolLM2-135M-peak-0.3", private=True)  # doctest: +SKIP
        'https://huggingface.co/me/SmolLM2-135M-peak-0.3'
    """
    check_login(repo_id)
    verification = verify(Path(folder))
    if not verification.passed:
        failed = next(check for check in verification.checks if not check["passed"])
        raise PrunePeakError(f"{folder} does not verify, so it was not pushed: {failed['check']} ({failed['seen']}).")
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise PrunePeakError(f"{url.repo_id} exists and is public. Make it private there, or choose another name.")
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, revision=revision, commit_message=commit_message or MESSAGE
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # uploads wrap what they meet in RuntimeErrors
        raise PrunePeakError(
            f"the push to {repo_id} failed: {_explain(error)} {folder} is whole; "
            f"`prune-peak push {folder} {repo_id}` goes on, and sends nothing twice."
        ) from None
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _explain(error: Exception) -> str:
    """One line on what happened, and on what to do where that is known."""
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is logged in. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the Hub does not know the token. Run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "the token may not write there. Check the name, and that the token has the right to write."
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return (" ".join(str(cause).split()) or type(cause).__name__).rstrip(".") + "."
