"""Find the files of a model: its folder, or a download from the Hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import PrunePeakError, brief
from .side_files import CARD, SIDE_FILES, TERMS_IN_ANY_CASE
from .untrusted import check_folder

FETCHED = (CARD, "*.json", *SIDE_FILES, *TERMS_IN_ANY_CASE)  # from the Hub
# Not downloaded from the Hub: subfolders (except chat templates) and duplicates of the weights
NOT_FETCHED = ("*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "*/*.bin", "consolidated*", "*.fp16*", "*.fp32*")


def strip_slash(name: str) -> str:
    """A name without the slash that completion puts after a folder."""
    return str(name).rstrip("/") or str(name)


def locate(
    name: str, revision: str | None, patterns: list[str], others: Sequence[str] = NOT_FETCHED
) -> tuple[Path, str | None]:
    """The folder with a model's files, and the commit if it was downloaded.

    Args:
        name: a folder or a Hub id.
        patterns: of the files to download.
        others: patterns of files that are not downloaded.

    Raises:
        PrunePeakError: neither a folder nor a model of the Hub that can be downloaded.
    """
    folder = Path(name)
    try:
        if folder.is_dir():
            check_folder(folder)
            return folder, None
        if folder.exists():
            raise PrunePeakError(
                f"{name} is a file; expected a model folder or a Hub id. Pass the folder that contains the file."
            )
    except OSError as error:
        raise PrunePeakError(
            f"{name} cannot be opened ({error.strerror}). Expected a readable model folder or a Hub id."
        ) from None
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=[*others]))
    except HFValidationError:
        raise PrunePeakError(f"{name} is neither a folder nor a Hub id. Check the spelling.") from None
    except LocalEntryNotFoundError as error:
        reason = brief(error.__cause__ or error)
        raise PrunePeakError(
            f"{name} is neither a folder nor in the Hub's cache, and the Hub cannot be reached ({reason}). Check the "
            "path and the connection."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise PrunePeakError(f"{name} is not a folder, and the download from the Hub failed: {brief(error)}") from None
    return found, found.name
