"""Names on the Hugging Face hub: found in its cache on this machine, downloaded where they are not."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILES = [
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
]  # fmt: skip
# The published models have two names each; a cache may have either.
OWNERS = dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-gpt"), "openai-community")
OWNERS |= {"distilgpt2": "distilbert"}
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REVISION = re.compile(r"\w[\w./-]*")
COMMIT = re.compile("[0-9a-f]{40}")


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself where it is one, else the hub's snapshot of that name.

    Args:
        revision: commit, tag or branch on the hub (default: main).

    Raises:
        ValueError: `revision` cannot be one.
        FileNotFoundError: no such folder here, and no such model, or revision, on the hub; or it is not in the cache,
            and the hub cannot be reached.
    """
    if not name or "\0" in name:  # Path("") is the current folder
        raise FileNotFoundError(f"there is no folder {name!r}")
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file; a model is a folder")
    if not NAME.fullmatch(name) or ".." in name:
        raise FileNotFoundError(f"there is no folder {name}")
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(f"{revision!r} is no commit, tag or branch")
    # A commit never changes; and without a network the library asks half a minute long for one.
    if revision and COMMIT.fullmatch(revision):
        for known in (name, _other_name(name)):
            if known and (cached := _cached(known, revision)) and _has_weights(cached):
                return cached
    import huggingface_hub
    from huggingface_hub import errors

    here = f"there is no folder {name}"
    wanted = f"{name} at {revision}" if revision else name
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FILES))
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{here}, and {name} on the Hugging Face hub asks you to log in: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} on the Hugging Face hub has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{here}, and no model of that name on the Hugging Face hub") from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{here}, and the Hugging Face hub has no such names: {error}") from error
    except Exception as error:  # those of its HTTP library, too, which are no OSErrors
        if (other := _other_name(name)) and (cached := _cached(other, revision)):
            return cached
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
        why = "HF_HUB_OFFLINE forbids asking it" if offline else "it cannot be reached"
        raise FileNotFoundError(
            f"{here}; the Hugging Face hub's {wanted} is not in its cache on this machine, and {why}"
        ) from error


def _has_weights(folder: Path) -> bool:
    """Whether it has: whoever asked for a tokenizer alone has a snapshot without."""
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _other_name(name: str) -> str | None:
    owner, slash, model = name.rpartition("/")
    if slash:
        return model if OWNERS.get(model) == owner else None
    return f"{OWNERS[name]}/{name}" if name in OWNERS else None


def _cached(name: str, revision: str | None) -> Path | None:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FILES, local_files_only=True)
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError):
        return None
