"""Read a checkpoint's folder before a model is built: its config, its files, its tensors' names.

    >>> from moestro.loading.download import resolve
    >>> read_config("demo", resolve("demo")).model_type
    'mixtral'

Code that a checkpoint brings is run only with --trust-remote-code; nothing here asks on standard input.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict

from ..errors import CheckpointError, ModelError, MoestroError, RequestError, first_line
from ..planning.options import METHOD
from ..planning.spelling import spelled

logger = logging.getLogger("moestro")

_SUPPORTS = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}


def is_stored(source: str) -> bool:
    """Whether a checkpoint here is quantized: GGUF, or a folder whose config.json or tensors' names say so."""
    path = Path(source)
    if path.is_file():
        return True
    if path.is_dir() and any(path.glob("*.gguf")) and not weight_files(path):
        return True
    try:
        values = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    parts = [values, *(values[name] for name in ("text_config",) if isinstance(values, dict) and name in values)]
    own = [part.get("quantization_config") for part in parts if isinstance(part, dict)]
    return any(isinstance(one, dict) and one.get("quant_method") != METHOD for one in own) or _is_of_hqq(path)


def _is_of_hqq(folder: Path) -> bool:
    """Whether tensors have the names of HQQ's, of which mixtral-offloading's config.json says nothing."""
    try:
        names: Iterable[str] = [name for each in names_of_files(folder).values() for name in each]
        if not names and (single := folder / "model.safetensors").exists():
            with safe_open(single, framework="pt") as opened:
                names = opened.keys()
        return any(name.endswith(".W_q") for name in names)
    except (MoestroError, SafetensorError, OSError):  # which are told where the weights are read
        return False


def read_config(model: str, source: str, trust_remote_code: bool = False, *, quantized: bool = False) -> Any:
    """The checkpoint's Transformers config.

    Args:
        quantized: keep what it says of quantization, for a source that reads such weights.

    Raises:
        ModelError: it has none that Transformers can use, or it describes a model that Moestro does not run.
    """
    _refuse_adapter(model, Path(source))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config.json may hold anything
        refuse_code(model, error)
        if not (Path(source) / "config.json").exists():
            raise ModelError(f"{model} has no config.json; name the folder of a Hugging Face checkpoint") from error
        raise ModelError(f"{model}: Transformers cannot use its config.json: {first_line(error)}") from error
    text_config = config.get_text_config()
    own = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", own)
    if method == METHOD:  # a MoestroConfig says how a model was run; its weights are not quantized
        del config.quantization_config
    elif own is not None and not quantized:
        raise ModelError(
            f"{model} is already quantized ({method}), which Moestro cannot read yet; use the unquantized checkpoint"
        )
    for part in (config, text_config):
        experts, top_k = (getattr(part, name, None) for name in ("num_local_experts", "num_experts_per_tok"))
        if isinstance(experts, int) and isinstance(top_k, int) and not 1 <= top_k <= max(experts, 1):
            raise ModelError(f"{model}: its config.json routes each token to {top_k} of {experts} experts")
        refuse_groups(model, part)
    _refuse_attention(model, config, trust_remote_code)
    return config


def refuse_groups(model: str, config: Any) -> None:
    """Refuse groups of experts that a router of DeepSeek's kind, which sums the best two of each, cannot choose among.

    Raises:
        ModelError: naming the numbers.
    """
    experts, groups, chosen = (getattr(config, name, None) for name in ("n_routed_experts", "n_group", "topk_group"))
    if not (isinstance(experts, int) and isinstance(groups, int) and groups > 1):
        return
    least = 1 if config.model_type == "deepseek_v2" else 2  # which takes the best one
    fits = experts % groups == 0 and experts // groups >= least
    if not fits or (isinstance(chosen, int) and not 1 <= chosen <= groups):
        raise ModelError(
            f"{model}: its config chooses {chosen} of {groups} groups of its {experts} experts, which cannot be"
        )


def refuse_code(model: str, error: BaseException) -> None:
    """Say in one line that a checkpoint needs code of its own, where Transformers' error is about that.

    Raises:
        ModelError: the error is about it.
    """
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{model} needs code of its own (auto_map in its config), which is not run unasked; read that code, then "
            f"give {spelled('trust_remote_code', True)}"
        ) from error


def _refuse_attention(model: str, config: Any, trust_remote_code: bool) -> None:
    """Refuse an attention implementation that is code from the hub, or that only a server runs.

    Raises:
        ModelError: the config, or that of a part, asks for such a one.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if not isinstance(attention, str):
            continue
        if attention.startswith("paged|"):
            raise ModelError(
                f"{model}: its config.json asks for the attention {attention}, which only a server runs; take it out"
            )
        if is_kernel(attention) and not trust_remote_code:
            raise ModelError(
                f"{model}: its config.json asks for an attention kernel from the hub ({attention}), which is code; "
                f"read it, then give {spelled('trust_remote_code', True)}, or take attn_implementation out of "
                "config.json"
            )


def give_attention(config: Any, kind: Any, name: str | None, trust_remote_code: bool = False) -> None:
    """Have a model's attention computed by what Transformers has under a name; None leaves the config as it is.

    Args:
        kind: the model's class; None where its own code has that.

    Raises:
        RequestError: Transformers has nothing of that name, or not for this model, or it is code that is not trusted.
    """
    if name is None:
        return
    given = spelled("attn_implementation", name, quoted=True)
    names = {"eager": True}
    for each in ALL_ATTENTION_FUNCTIONS.valid_keys():
        is_here = getattr(transformers.utils, f"is_flash_attn_{each[-1]}_available", lambda: True)
        names[each] = not each.startswith("paged|") and (not each.startswith("flash_attention") or is_here())
    if is_kernel(name) and not trust_remote_code:
        trust = spelled("trust_remote_code", True)
        raise RequestError(f"{given} is a kernel from the hub, which is code; read it, then give {trust}")
    if not is_kernel(name) and not names.get(name):
        there_are = ", ".join(each for each, is_here in names.items() if is_here)
        raise RequestError(f"{given}: Transformers has {there_are} here")
    if name in _SUPPORTS and not getattr(kind, _SUPPORTS[name], True):
        raise RequestError(f"{given} is not for {kind.__name__}; leave it out, or take eager")
    config._attn_implementation = name


def check_files(folder: Path) -> None:
    """Open each file of weights to find out whether it is whole.

    Raises:
        CheckpointError: a line that names a file that is absent or cut short.
    """
    for path in weight_files(folder):
        if not path.exists():
            raise CheckpointError(f"{folder} lacks {path.name}, which its index names; download it again")
        logger.debug("weights in %s, %d bytes", path, path.stat().st_size)
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} is damaged or cut short ({size} bytes: {first_line(error)}); download it again"
            ) from error


def tensor_names(source: str) -> list[str]:
    """The names of all tensors in the files of a folder."""
    return [name for path in weight_files(Path(source)) for name in load_state_dict(str(path), map_location="meta")]


def wrong_prefix(found: Iterable[str], wanted: Iterable[str]) -> tuple[str, str] | None:
    """The prefix that most of a checkpoint's tensors have and the one they should have; None if these are equal.

    Args:
        found, wanted: tensor names of the checkpoint and of the model. Names that a family's conversion changes
            may be among them.
    """
    prefixes: dict[str, list[str]] = {}  # of each ending of a found name, what stands before it
    for name in found:
        for at in _starts(name):
            prefixes.setdefault(name[at:], []).append(name[:at])
    votes: Counter[tuple[str, str]] = Counter()
    total = 0
    for name in wanted:
        total += 1
        # Its longest ending that the checkpoint has too, of two parts at least: "weight" alone says nothing.
        ending = next((at for at in _starts(name) if "." in name[at:] and name[at:] in prefixes), None)
        if ending is not None:
            votes.update((prefix, name[:ending]) for prefix in set(prefixes[name[ending:]]))
    best = max(votes, key=lambda pair: (votes[pair], pair == ("", "")), default=("", ""))
    return best if best != ("", "") and votes[best] * 3 > total else None


def _starts(name: str) -> list[int]:
    """Where the dotted parts of a name begin."""
    return [0, *(match.end() for match in re.finditer(r"\.", name))]


def weight_files(folder: Path) -> list[Path]:
    """The files that Transformers would read a folder's weights from; none where there are no weights."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            try:
                return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} is no index of weights ({first_line(error)}); download it again"
                ) from error
    return []


def names_of_files(folder: Path) -> dict[str, list[str]]:
    """The tensors' names that the index of a folder of several files has for each of them; none without an index.

    Raises:
        CheckpointError: it is no index.
    """
    files: dict[str, list[str]] = {}
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return files
    weight_files(folder)  # refuses an index that cannot be read
    for name, file in json.loads(index.read_bytes())["weight_map"].items():
        files.setdefault(file, []).append(name)
    return files


def _refuse_adapter(model: str, folder: Path) -> None:
    """Refuse a PEFT adapter, which Transformers would load or pass over, depending on whether PEFT is installed."""
    if (folder / "adapter_config.json").exists():
        alone = not (folder / "config.json").exists()
        raise ModelError(
            f"{model} holds a PEFT adapter (adapter_config.json), which Moestro does not apply; "
            + ("name its base model, or merge the two" if alone else "merge it, or take adapter_config.json away")
        )
