"""Uploading to the Hugging Face Hub."""

import logging
import re
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError, needs

log = logging.getLogger("gristmill")

KEPT_CARD = "kept_card"
"""Folder of an export with the dataset card."""
NOT_UPLOADED = ["result.json", "inputs.json", "manifest*.json", "recipe.yaml", ".lock", "*.tmp", f"{KEPT_CARD}/*"]
"""What a stage keeps for itself."""

Kind = Literal["model", "dataset"]
SETTINGS: dict[Kind, str] = {"model": "push_to_hub", "dataset": "push_kept_to_hub"}
WHOLE: dict[Kind, str] = {"model": "student", "dataset": "card"}
"""What goes to the top of a repository."""
TRANSPORT = {"ConnectionError", "TransportError", "RequestException"}
"""Errors of a network that is not there, by whatever library the Hub is asked with."""


def check_name(repository: str | None, setting: str) -> None:
    """Refuse what cannot be the name of a repository."""
    if repository is not None and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repository):
        raise UserError(f"export.{setting}: {repository} is no repository; give owner/name")


def push(repository: str, folders: dict[str, Path], private: bool, kind: Kind = "model") -> str:
    """Upload folders to where they belong in a repository (owner/name), which is made if there is none; its URL.

    The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` left.
    """
    huggingface = needs("huggingface_hub", "torch")
    errors = needs("huggingface_hub.errors", "torch")
    api, setting = huggingface.HfApi(), SETTINGS[kind]
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True, repo_type=kind))
        for where, folder in folders.items():
            upload(api, repository, folder, where, kind)
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        raise UserError(
            f"export.{setting}: {api.endpoint} refused {repository} ({reason(error)}); run hf auth login, or set"
            " HF_TOKEN to a token that may write there"
        ) from None
    except Exception as error:
        if not TRANSPORT & {each.__name__ for each in type(error).__mro__}:
            raise
        raise UserError(
            f"export.{setting}: {api.endpoint} cannot be reached ({reason(error)}); what was exported is kept, run"
            " the same command again"
        ) from None
    log.info("export: uploaded to %s", url)
    return url


def upload(api: Any, repository: str, folder: Path, where: str, kind: Kind) -> None:
    """One folder in one commit."""
    api.upload_folder(
        repo_id=repository,
        repo_type=kind,
        folder_path=folder,
        path_in_repo=where,
        commit_message=f"Upload {where or WHOLE[kind]} with gristmill",
        ignore_patterns=NOT_UPLOADED if where else None,
    )


def reason(error: Any) -> str:
    """The status and the server's words, or what else the error says, on one line."""
    status = getattr(getattr(error, "response", None), "status_code", "")
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(f"{status} {words}".split())[:200]
