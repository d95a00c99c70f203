"""What a model's name stands for, and which files it needs: a folder, a GGUF file, or a repository on the hub.

Knows names, sizes and the hub's answers, not what is in the files. Imports no torch, and huggingface_hub, which takes a
while, only where the hub is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from ..errors import CheckpointError, ModelError, MoestroError, first_line
from ..planning.spelling import spelled
from .access import Access, access
from .choose import beside_weights, choose_gguf, choose_packed, choose_safetensors, gguf_parts
from .once import known, once

DEMO = "demo"
_HUB_NAME = re.compile(r"(?:(?:https://)?(?:hf\.co|huggingface\.co)/)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?")
_TOKEN = "set HF_TOKEN or run `hf auth login`"


@dataclass(frozen=True)
class Wanted:
    """The files that a model needs, here or on the hub.

    model: as the user named it. root: the folder that they are in; None on the hub.
    sizes: each file's bytes, by its path in the folder or repository. weights: those of them that hold weights.
    repo, revision, commit: where they are on the hub. blobs: each file's name in the cache's folder of contents.
    access: how the hub is asked for them.
    """

    model: str
    root: Path | None
    sizes: Mapping[str, int]
    weights: tuple[str, ...]
    repo: str = ""
    revision: str = "main"
    commit: str = ""
    blobs: Mapping[str, str] = field(default_factory=dict)
    access: Access = field(default_factory=access)

    @property
    def n_bytes(self) -> int:
        """The bytes of all files."""
        return sum(self.sizes.values())

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in GGUF files."""
        return any(name.lower().endswith(".gguf") for name in self.weights)

    @property
    def cache(self) -> Path:
        """The folder of this repository in the hub's cache."""
        return _cache(self.repo, self.access)

    def path(self, root: Path) -> Path:
        """What a reader is given where all is in the folder `root`: the first GGUF file, or the folder."""
        return root / self.weights[0] if self.is_gguf else root

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file, fewer where it ends before.

        Raises:
            MoestroError: one line on why they cannot be read.
        """
        stop = self.sizes[name] if stop is None else min(stop, self.sizes[name])
        if start >= stop:
            return b""
        here = self.root / name if self.root is not None else self.cache / "snapshots" / self.commit / name
        try:
            if self.root is not None or here.exists():
                with here.open("rb") as file:
                    file.seek(start)
                    return file.read(stop - start)
            return _read_remote(self, name, start, stop)
        except MoestroError:
            raise
        except Exception as error:  # of a disk or a connection
            raise explain(error, self.repo or self.model, self.revision) from error


def find_files(model: str, revision: str | None = None, *, weights: bool = True) -> Wanted:
    """The files that a model needs.

    Args:
        model: a folder, a GGUF file (of a split one, the first part), or a hub id, also as hf.co/ORG/REPO and with a
            quantization as ORG/REPO:Q4_K_M; or demo.
        revision: of a hub id, a branch, tag or commit.
        weights: False for config and tokenizer alone, unless they are in a GGUF file.

    Raises:
        ModelError, CheckpointError: no such model, or not all of it; one line.
    """
    path = local_path(model)
    if path.is_dir():
        return _choose(Wanted(model, path, _sizes(path), ()), None, weights)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf_file(model, path)
    if path.exists():
        raise ModelError(f"{model} is a file; name the folder with its config.json, or a .gguf file")
    named = _HUB_NAME.fullmatch(model)
    if (
        named is None
        or model.startswith((".", "/", "~", "\\"))
        or (model.lower().endswith(".gguf") and ":" not in model)
    ):
        raise ModelError(f"no folder {model}; name a checkpoint's folder, a hub id like org/name, or demo")
    repo, quant = named.groups()
    listed = once(("files", repo, revision or "main", access()), lambda: _listing(repo, revision or "main"))
    return _choose(listed, quant, weights)


def local_path(model: str) -> Path:
    """The path that a model's name is where it is no hub id; nothing may be there."""
    return Path(str(files("moestro") / "demo") if model == DEMO else model).expanduser()


def lacking_bytes(wanted: Wanted) -> int:
    """How much of a model's files of weights is not on this machine yet."""
    if wanted.root is not None:
        return 0
    snapshot = wanted.cache / "snapshots" / wanted.commit
    lacking = [name for name in wanted.weights if not (snapshot / name).exists()]
    return sum(wanted.sizes[name] - here_bytes(wanted, name) for name in lacking)


def here_bytes(wanted: Wanted, name: str) -> int:
    """How much of a file came before, in another revision or in a run that ended early."""
    blob = blob_path(wanted, name)
    here = blob if blob.exists() else part_path(blob)
    return min(here.stat().st_size, wanted.sizes[name]) if here.exists() else 0


def blob_path(wanted: Wanted, name: str) -> Path:
    """Where the cache has the contents of a file."""
    return wanted.cache / "blobs" / wanted.blobs[name]


def part_path(blob: Path) -> Path:
    """Where what came of contents so far is."""
    return blob.with_name(f"{blob.name}.part")


def explain(error: Exception, repo: str, revision: str = "main") -> MoestroError:
    """One line on why the hub, the connection or the cache did not give what was asked for."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(
            f"no model {repo}: no folder of that name here, HF_HUB_OFFLINE is set, and the hub's cache lacks it; "
            "unset HF_HUB_OFFLINE to download it"
        )
    if isinstance(error, GatedRepoError):
        return ModelError(f"{repo} is gated: accept its terms at https://hf.co/{repo}, then {_TOKEN}")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{repo} has no revision {revision}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return ModelError(
            f"no model {repo}: no folder of that name here, and on the hub it does not exist or is private, which look "
            f"alike; check the name, or {_TOKEN}"
        )
    if isinstance(error, HFValidationError):
        return ModelError(f"no folder {repo}, and it is no hub id either; one is like org/name")
    if status == 403:
        return ModelError(f"the hub refuses {repo} (403): accept its terms at https://hf.co/{repo}, then {_TOKEN}")
    if status is not None:
        return CheckpointError(f"the hub answers {status} for {repo}; try again later")
    if is_cut(error):
        return CheckpointError(
            f"no model {repo}: no folder of that name here, the hub's cache lacks it, and there is no connection to "
            f"{constants.ENDPOINT} ({first_line(error)})"
        )
    if isinstance(error, OSError):
        return CheckpointError(f"{repo} cannot be read: {first_line(error)}")
    return CheckpointError(
        f"what {constants.ENDPOINT} answers for {repo} is not what a hub would ({first_line(error)}); check "
        "HF_ENDPOINT and the proxy"
    )


def is_cut(error: Exception) -> bool:
    """Whether a connection was not made, was cut, or was silent too long; later it may hold."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) and type(error).__module__.startswith("http")


def _choose(listed: Wanted, quant: str | None, weights: bool) -> Wanted:
    """Of all files listed, those that are needed."""
    names = listed.sizes
    chosen: list[str] = []
    if quant is None:
        chosen = (choose_packed(names) or choose_safetensors(listed.model, names, listed.read)) if weights else []
        only_gguf = not any(name.endswith((".safetensors", ".bin")) for name in names)
    if quant is not None or (only_gguf and any(name.lower().endswith(".gguf") for name in names)):
        chosen = choose_gguf(listed.model, names, quant)
    elif weights and not chosen:
        raise CheckpointError(
            f"{listed.model} has no weights: no model.safetensors, index of shards, or GGUF file; name one that has"
        )
    needed = [*beside_weights(names), *chosen]
    return Wanted(
        listed.model if quant is None else f"{listed.model}:{quant}",
        listed.root,
        {name: names[name] for name in needed},
        tuple(chosen),
        listed.repo,
        listed.revision,
        listed.commit,
        {name: listed.blobs[name] for name in needed if name in listed.blobs},
        listed.access,
    )


def _gguf_file(model: str, path: Path) -> Wanted:
    """A GGUF file with its further parts."""
    stem, part, of = gguf_parts(path.name)
    if part != 1:
        raise ModelError(f"{model} is part {part} of {of}; name the first, {stem}-00001-of-{of:05d}.gguf")
    sizes = {name: size for name, size in _sizes(path.parent).items() if name.lower().endswith(".gguf")}
    of_set = {name: size for name, size in sizes.items() if gguf_parts(name)[::2] == (stem, of)}
    return _choose(Wanted(model, path.parent, of_set, ()), path.name, True)


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and of its folders, and their bytes."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _cache(repo: str, way: Access) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return way.cache / repo_folder_name(repo_id=repo, repo_type="model")


def commit_of(model: str, revision: str | None = None) -> str | None:
    """The commit of a hub id as it was listed in this load, or as the cache has it; None of others. Asks nothing."""
    named = _HUB_NAME.fullmatch(model)
    if local_path(model).exists() or named is None:
        return None
    listed = known(("files", named[1], revision or "main", access()))
    if listed is not None:
        return str(listed.commit or listed.root.name)
    kept = _in_cache(named[1], revision or "main")
    return None if kept is None or kept.root is None else kept.root.name


def _in_cache(repo: str, revision: str) -> Wanted | None:
    """The files of a repository that the cache has; None where it has none of them."""
    kept = _cache(repo, access())
    ref = kept / "refs" / revision
    snapshot = kept / "snapshots" / (ref.read_text("utf-8").strip() if ref.is_file() else revision)
    return Wanted(repo, snapshot, _sizes(snapshot), ()) if snapshot.is_dir() else None


def _listing(repo: str, revision: str) -> Wanted:
    """All files of a repository; without a connection, or where none is wanted, those in the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    way = access()
    if way.local_only:
        if (here := _in_cache(repo, revision)) is None:
            raise ModelError(
                f"no model {repo}: no folder of that name here, and the cache {way.cache} has no revision {revision} "
                f"of it; leave {spelled('local_files_only', True)} out to download it"
            )
        return here
    try:
        info = HfApi(token=way.token).model_info(
            repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        blobs = {one.rfilename: str(one.lfs.sha256 if one.lfs else one.blob_id) for one in info.siblings or ()}
        sizes = {one.rfilename: int(one.size or 0) for one in info.siblings or ()}
        commit = str(info.sha)
        if not all(re.fullmatch("[0-9a-f]{40,64}", name) for name in (commit, *blobs.values())):
            raise ValueError("names of contents that are no hashes")
        return Wanted(repo, None, sizes, (), repo, revision, commit, blobs)
    except Exception as error:  # an answer may be anything
        is_away = is_cut(error) or isinstance(error, OfflineModeIsEnabled)
        if is_away and (here := _in_cache(repo, revision)) is not None:
            return here
        raise explain(error, repo, revision) from error


def _read_remote(wanted: Wanted, name: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file on the hub, by one ranged request, made again where it is cut."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(wanted.repo, name, revision=wanted.commit)
    for _ in range(3):
        parts = bytearray()
        try:
            headers = build_hf_headers(token=wanted.access.token) | {"Accept-Encoding": "identity"}
            headers["Range"] = f"bytes={start}-{stop - 1}"
            with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
                hf_raise_for_status(answer)
                skip = start if answer.status_code == 200 else 0  # the whole file, from a server without ranges
                for chunk in answer.iter_bytes():
                    parts += chunk
                    if len(parts) >= skip + stop - start:
                        break
                return bytes(parts[skip : skip + stop - start])
        except Exception as error:
            if not is_cut(error):
                raise
            last = error
    raise CheckpointError(
        f"{wanted.repo}: the connection was cut while {name} was read ({first_line(last)}); try again"
    )
