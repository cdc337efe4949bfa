"""Uploads to the Hugging Face hub."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from llmevo.errors import LlmevoError, UserError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


def create(repo: str, private: bool) -> str:
    """Create a model repository if it does not exist, and return its address.

    Raises UserError without a login or for an invalid name, LlmevoError when the hub cannot be reached.
    """
    with _errors(repo):
        if not get_token():
            raise LocalTokenNotFoundError
        return str(HfApi().create_repo(repo, private=private, exist_ok=True))


def upload(folder: Path, repo: str, message: str) -> None:
    """Upload a folder's files as one commit. Raises the same errors as `create`."""
    with _errors(repo):
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)


@contextmanager
def _errors(repo: str) -> Generator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push {repo}: not logged in to the Hugging Face hub; {LOGIN}") from error
    except HFValidationError as error:
        raise UserError(f"--push {repo}: is not a valid repository name, OWNER/NAME ({error})") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE forbids the hub; unset it") from error
    except HfHubHTTPError as error:
        reason, status = str(error).strip().splitlines()[0], error.response.status_code
        if status in (401, 403):
            raise UserError(f"--push {repo}: the Hugging Face hub refuses ({reason}); {LOGIN}") from error
        raise LlmevoError(f"--push {repo}: the Hugging Face hub fails ({reason})") from error
    except Exception as error:  # without a network: each version of the hub's client has its own HTTP library
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LlmevoError(f"--push {repo}: the Hugging Face hub cannot be reached ({reason})") from error
