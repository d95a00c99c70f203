"""Which files of a folder or repository a model needs, by their names. Needs the standard library alone.

choose_gguf("org/repo", names, "Q4_K_M")       # the parts of one GGUF file
choose_safetensors("org/repo", names, read)    # the shards that the index names
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable

from ..errors import CheckpointError, ModelError, first_line

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.IGNORECASE)
_QUANT = re.compile(
    r"(?:^|[-._ ])((?:UD-)?(?:I?Q\d|TQ\d|MXFP4|NVFP4|FP8|BF16|FP?16|FP?32)(?:_[a-z0-9]+)*)$", re.IGNORECASE
)
MANIFEST = "moestro.json"  # of a packed folder
EXPERT_FILE = re.compile(r"experts-\d{5}\.bin")  # of a packed folder
_BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


def beside_weights(names: Iterable[str]) -> list[str]:
    """The small files that a checkpoint's config, tokenizer, templates and own code are in."""
    return [
        name
        for name in names
        if name.endswith(_BESIDE) and ("/" not in name or name.startswith("additional_chat_templates/"))
    ]


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether a tokenizer is among the files."""
    return any(name in _TOKENIZERS or name.endswith(".tiktoken") for name in names)


def choose_safetensors(model: str, names: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """The files that Transformers would read weights from; none where there are no such files.

    Args:
        names: all files, by their paths with "/" between folders.
        read: gives the bytes of one of them.

    Raises:
        CheckpointError: the index cannot be read, or names a file that is not there.
    """
    for single in _SINGLES:
        if single in names:
            return [single]
        index = f"{single}.index.json"
        if index in names:
            try:
                shards = sorted(set(json.loads(read(index))["weight_map"].values()))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{model}: {index} is no index of weights ({first_line(error)})") from error
            if missing := [name for name in shards if name not in names]:
                raise CheckpointError(
                    f"{model} lacks {missing[0]}, which its index names; download it again, or take another revision"
                )
            return shards
    return []


def choose_gguf(model: str, names: Iterable[str], quant: str | None) -> list[str]:
    """The parts of one GGUF file, in order.

    Args:
        model: as the user named it, without `quant`.
        names: all files, by their paths with "/" between folders.
        quant: how the file is quantized, like "Q4_K_M", or its name; None where only one file will do.

    Raises:
        ModelError: no file, or more than one, fits. CheckpointError: parts of it are not there.
    """
    found = _gguf_sets(names)
    if not found:
        raise ModelError(f"{model} has no GGUF file" + (f", so no {quant}; leave :{quant} out" if quant else ""))
    fitting = list(found) if quant is None else _fitting(found, quant)
    there_are = ", ".join(sorted({_label(stem) for stem, _ in found}))
    if not fitting:
        raise ModelError(f"{model} has no GGUF file {quant}; there are {there_are}")
    if len(fitting) > 1:
        if quant is None:
            raise ModelError(f"{model} has {len(found)} GGUF files; name one, as {model}:NAME; there are {there_are}")
        files = ", ".join(sorted(found[one][min(found[one])] for one in fitting))
        raise ModelError(f"{model} has {len(fitting)} GGUF files {quant}; name one, as {model}:FILE: {files}")
    parts, of = found[fitting[0]], fitting[0][1]
    if missing := [part for part in range(1, of + 1) if part not in parts]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{model} lacks part {missing[0]} of {of}{more} of {fitting[0][0]}.gguf")
    return [parts[part] for part in range(1, of + 1)]


def gguf_parts(name: str) -> tuple[str, int, int]:
    """Of a GGUF file's name: the name without ending and part, which part it is, and of how many."""
    stem = name[: -len(".gguf")]
    split = _SPLIT.fullmatch(stem)
    return (split[1], int(split[2]), int(split[3])) if split else (stem, 1, 1)


def _gguf_sets(names: Iterable[str]) -> dict[tuple[str, int], dict[int, str]]:
    """The GGUF files of models: (name without ending and part, number of parts) -> part -> file."""
    found: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        last = name.rsplit("/", 1)[-1].lower()
        if last.endswith(".gguf") and "mmproj" not in last and "imatrix" not in last:
            stem, part, of = gguf_parts(name)
            found.setdefault((stem, of), {})[part] = name
    return found


def _fitting(found: Iterable[tuple[str, int]], quant: str) -> list[tuple[str, int]]:
    """The files that `quant` may mean: those that it names best."""
    wanted = quant.lower()
    named = gguf_parts(wanted)[0] if wanted.endswith(".gguf") else wanted
    part_of_name = re.compile(rf"(^|[-._/ ]){re.escape(wanted)}([-./ ]|$)")
    ways: tuple[Callable[[str], bool], ...] = (
        lambda stem: named in (stem, stem.rsplit("/", 1)[-1]),
        lambda stem: _label(stem).lower() == wanted,
        lambda stem: re.search(rf"[-._/ ]{re.escape(wanted)}$", stem) is not None,
        lambda stem: part_of_name.search(stem) is not None,
    )
    return next((fits for way in ways if (fits := [one for one in found if way(one[0].lower())])), [])


def _label(stem: str) -> str:
    """How a GGUF file is quantized, by its name; the whole name where it does not say."""
    last = stem.rsplit("/", 1)[-1]
    quant = _QUANT.search(last)
    return quant[1] if quant else last


def choose_packed(names: Iterable[str]) -> list[str]:
    """The files of weights of a packed folder; none where it is not one."""
    names = list(names)
    if MANIFEST not in names:
        return []
    return [name for name in names if EXPERT_FILE.fullmatch(name) or name in ("dense.bin", "rest.safetensors")]
