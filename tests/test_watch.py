"""Whatever is changed in a loaded model, fast paths compute what Transformers computes after the same change.

Every attribute of every module and of the config is changed in turn, in ours and in Transformers' own model, and so is
every tensor that a module shows. What Transformers makes of it we must make of it too, or refuse it in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.utils import ModelOutput

from families import EXPERTS, save_model
from moestro import load
from moestro.compute.cpu import levels
from moestro.decode.cpu import attention, decoder_layer, fuse, norm, rotary, router, stretch
from moestro.errors import MoestroError

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
# Every token to every expert: where two are nearly equal, a rounding would decide which one a token goes to.
HEADS |= {"num_experts_per_tok": EXPERTS}
TORCH_KEEPS = frozenset(vars(nn.Module()))
needs_kernels = pytest.mark.skipif(not levels(), reason="built without the kernels: no compiler was there")
# Without norms on queries, with them over all heads, over each head; with biases and shared experts; with multipliers.
FAMILIES = ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "granitemoe", "gpt_oss"]
_IN_MINUTES = {"olmoe", "qwen3_moe", "granitemoe"}  # what they share with others is tried there


def of_families(*more: tuple[str, torch.dtype]) -> list[Any]:
    """The families, and some of them in other dtypes too; `make test-long` has all."""
    every = [*((family, torch.float32) for family in FAMILIES), *more]
    return [pytest.param(*one, marks=pytest.mark.long if one[0] in _IN_MINUTES else ()) for one in every]


def _changed(value: Any) -> Any:
    """Another value of the same kind; None for what is not changed here."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value - 1 if value > 1 else value + 1
    return value * 1.75 + 0.0625 if isinstance(value, float) else None


def _attributes(model: Any) -> Iterator[tuple[str, str]]:
    """Every module by name with each of its attributes that can be changed; config stands for the config."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in TORCH_KEEPS and not attribute.startswith("_") and _changed(value) is not None:
                yield name, attribute
    yield from (("config", key) for key, value in vars(model.config).items() if _changed(value) is not None)


def _owner(model: Any, name: str) -> Any:
    return model.config if name == "config" else model.get_submodule(name)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Of a prompt and of three decoded tokens."""
    ids, cache = torch.arange(40, 49)[None], DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([6, 1, 1, 1], 1)]
    return torch.cat(parts, 1).float()


def _outcome(model: Any) -> Tensor | Exception:
    try:
        return _logits(model)
    except Exception as error:
        return error


def _compare(ours: Tensor | Exception, theirs: Tensor | Exception, what: str, tolerance: float = 1e-4) -> str | None:
    """What is wrong, if anything: a line of ours is right, and any error where Transformers has one."""
    if isinstance(ours, MoestroError):
        return None
    if isinstance(theirs, Exception):
        return None if isinstance(ours, Exception) else f"{what}: Transformers raises {theirs!r:.100}, we compute"
    if isinstance(ours, Exception):
        return f"{what}: we raise {ours!r:.120}"
    same = ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()
    error = float((ours - theirs).norm() / theirs.norm()) if ours.shape == theirs.shape else float("nan")
    return None if same else f"{what}: relative error {error:.1e}"


def _models(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    reference = save_model(family, folder, HEADS).to(dtype)
    return reference, load(str(folder), device="cpu", threads=1, dtype=dtype)


@pytest.mark.sample(2)
@needs_kernels
@pytest.mark.parametrize(("family", "dtype"), of_families())
def test_every_attribute_that_is_changed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, model = _models(family, tmp_path, dtype)
    wrong = [_compare(_outcome(model), _outcome(reference), "nothing")]
    for name, attribute in list(_attributes(reference)):
        both = [_owner(m, name) for m in (reference, model)]
        if not all(hasattr(owner, attribute) for owner in both):
            continue
        before = [getattr(owner, attribute) for owner in both]
        for owner, value in zip(both, before, strict=True):
            setattr(owner, attribute, _changed(value))
        wrong.append(_compare(_outcome(model), _outcome(reference), f"{name}.{attribute}"))
        for owner, value in zip(both, before, strict=True):
            setattr(owner, attribute, value)
    wrong.append(_compare(_outcome(model), _outcome(reference), "all back"))
    assert not [line for line in wrong if line]


def _edits() -> dict[str, Callable[[Any, str, Tensor], Any]]:
    """Ways to change a tensor: given its module, its name and the new values."""
    return {
        "in place": lambda module, name, new: getattr(module, name).copy_(new),
        "through data": lambda module, name, new: getattr(module, name).data.copy_(new),
        "a row": lambda module, name, new: getattr(module, name)[:1].zero_(),
        "other data": lambda module, name, new: setattr(getattr(module, name), "data", new),
        "another parameter": lambda module, name, new: setattr(module, name, _like(getattr(module, name), new)),
        "a state dict": lambda module, name, new: module.load_state_dict({name: new}, strict=False),
        "foreach": lambda module, name, new: torch._foreach_mul_([getattr(module, name)], 1.5),
        "an output": lambda module, name, new: torch.mul(new, 1.25, out=getattr(module, name)),
    }


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) or not old.is_leaf else new


def _tensors(model: Any) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        yield from (
            (name, key) for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None
        )


@pytest.mark.sample(3)
@needs_kernels
@pytest.mark.parametrize(("family", "dtype"), of_families(("qwen3_moe", torch.bfloat16), ("mixtral", torch.float16)))
@torch.no_grad()
def test_every_tensor_that_is_changed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, model = _models(family, tmp_path, dtype)
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    reference.requires_grad_(False)
    wrong, taken, seen = [], 0, set()
    for name, key in list(_tensors(reference)):
        kind = (name.split(".")[-1], key)  # each kind in one layer, the last, in every way
        if ".0." in name or kind in seen:
            continue
        seen.add(kind)
        for way, edit in _edits().items():
            theirs = reference.get_submodule(name)
            before = getattr(theirs, key)
            values = before.clone()
            new = values * 0.5 + 0.25 * torch.randn_like(values) if values.is_floating_point() else values + 1
            what = f"{name}.{key} {way}"
            try:
                edit(model.get_submodule(name), key, new.clone())
            except MoestroError:
                continue
            except Exception as error:
                wrong.append(f"{what}: we raise {error!r:.120}")
                continue
            edit(theirs, key, new.clone())
            wrong.append(_compare(_outcome(model), _outcome(reference), what, tolerance))
            taken += 1
            for owner in (theirs, model.get_submodule(name)):
                owner.load_state_dict({key: values}, strict=False)
                if key in owner._buffers or (way in ("another parameter", "other data") and key in owner._parameters):
                    setattr(owner, key, _like(getattr(owner, key), values.clone()))
            wrong.append(_compare(_outcome(model), _outcome(reference), f"{what}, and back", tolerance))
    assert not [line for line in wrong if line]
    assert taken > 10


class _Scaled(nn.Module):
    """Takes the place of a module and adds something to what it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for name, value in vars(inner).items():  # which code around it may look at
            if name not in TORCH_KEEPS and name != "forward":
                setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _scaled(self.inner(*args, **kwargs))


def _scaled(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * 1.25 if output.is_floating_point() else output
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _scaled(part) for name, part in output.items()})
    return tuple(_scaled(part) for part in output) if isinstance(output, tuple) else output


def _scaling(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _scaled(function(*args, **kwargs))


def _wrap_forward(parent: Any, leaf: str) -> Callable[[], None]:
    module = getattr(parent, leaf)
    had, forward = "forward" in vars(module), module.forward
    module.forward = lambda *args, **kwargs: _scaled(forward(*args, **kwargs))

    def undo() -> None:
        del module.forward
        if had:
            module.forward = forward

    return undo


def _replace(parent: Any, leaf: str) -> Callable[[], None]:
    module = getattr(parent, leaf)
    setattr(parent, leaf, _Scaled(module))
    return lambda: setattr(parent, leaf, module)


def _hook(parent: Any, leaf: str) -> Callable[[], None]:
    return getattr(parent, leaf).register_forward_hook(lambda module, args, output: _scaled(output)).remove


def _pre_hook(parent: Any, leaf: str) -> Callable[[], None]:
    def scale(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {k: _scaled(v) if k == "hidden_states" else v for k, v in kwargs.items()}
        return _scaled(args), kwargs

    return getattr(parent, leaf).register_forward_pre_hook(scale, with_kwargs=True).remove


@needs_kernels
@pytest.mark.parametrize("way", [_wrap_forward, _replace, _hook, _pre_hook])
@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=pytest.mark.long), "qwen2_moe"])
@torch.no_grad()
def test_every_module_that_is_wrapped(family: str, way: Callable[..., Any], tmp_path: Path) -> None:
    """Adapters, hooks and patches that come after loading, before a step and between two, and go again."""
    reference, model = _models(family, tmp_path)
    wrong = [_compare(_outcome(model), _outcome(reference), "nothing")]
    for name, _ in list(reference.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if not name or isinstance(reference.get_submodule(name), nn.ModuleList):
            continue
        undo = [way(m.get_submodule(parent), leaf) for m in (reference, model)]
        wrong.append(_compare(_outcome(model), _outcome(reference), name))
        for each in undo:
            each()
        wrong.append(_compare(_outcome(model), _outcome(reference), f"{name}, and back"))
    assert not [line for line in wrong if line]


@needs_kernels
@torch.no_grad()
def test_patched_classes_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of a family's class, of a cache, and of a cache's layer."""
    reference, model = _models("qwen3_moe", tmp_path)
    kinds = {
        type(module) for module in reference.modules() if type(module).__module__.startswith("transformers.models")
    }
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        for name in {"forward", "_apply_gate"} & vars(kind).keys():
            if not kind.__module__.startswith("transformers.models") or "ForCausalLM" in kind.__name__:
                continue
            monkeypatch.setattr(kind, name, _scaling(getattr(kind, name)))
            assert _compare(_outcome(model), _outcome(reference), f"{kind.__name__}.{name}") is None
            monkeypatch.undo()
            assert _compare(_outcome(model), _outcome(reference), "back") is None
    for layered in (False, True):
        results = []
        for each in (reference, model):
            cache, seen = DynamicCache(config=each.config), []
            each(torch.arange(5, 11)[None], past_key_values=cache)
            owner = cache.layers[1] if layered else cache
            update = owner.update

            def watched(k: Tensor, v: Tensor, *rest: Any, update: Any = update, seen: Any = seen, **more: Any) -> Any:
                seen.append(k.clone())
                return update(k * 2, v, *rest, **more)

            owner.update = watched
            results.append((each(torch.tensor([[7]]), past_key_values=cache).logits, len(seen)))
        torch.testing.assert_close(*[logits for logits, _ in results], rtol=1e-4, atol=1e-4)
        assert results[0][1] == results[1][1] > 0


@needs_kernels
def test_a_gradient_that_is_asked_for(tmp_path: Path) -> None:
    reference, model = _models("mixtral", tmp_path)
    ids = torch.arange(5, 11)[None]
    grads = []
    for each in (reference, model):
        each.requires_grad_(False)
        each.model.norm.weight.requires_grad_(True)
        each(ids).logits.sum().backward() if each is reference else None
        grads.append(each.model.norm.weight.grad)
    with pytest.raises(MoestroError, match="inference"):
        model(ids).logits.sum().backward()


def _noting(kind: type, reads: list[tuple[Any, str]]) -> type:
    """A class that notes which of its own entries an object is asked for."""

    def entries(self: Any) -> Iterator[dict[str, Any]]:
        own = object.__getattribute__(self, "__dict__")
        yield own
        yield from (own[name] for name in ("_parameters", "_buffers", "_modules") if name in own)

    def getattribute(self: Any, name: str) -> Any:
        if name not in TORCH_KEEPS and any(name in part for part in entries(self)):
            reads.append((self, name))
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__getattribute__": getattribute})


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_fast_path_reads_is_noted(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attribute and tensor that is read while a fast path is made stands in what it watches."""
    save_model(family, tmp_path, HEADS)
    model = load(str(tmp_path), device="cpu", threads=1, dtype="float32", fuse=False)
    reads: list[tuple[Any, str]] = []
    for owner in (*model.modules(), model.config):
        owner.__class__ = _noting(type(owner), reads)
    missing, made = [], []

    def note_reads(kind: Any) -> Any:
        class Noted(kind):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                reads.clear()
                super().__init__(*args, **kwargs)
                made.append((self, list(reads)))

        Noted.__name__ = kind.__name__
        return Noted

    for module, name in (
        (norm, "FusedNorm"),
        (router, "FusedRouter"),
        (rotary, "_RotaryTable"),
        (attention, "FusedAttention"),
        (decoder_layer, "FusedLayer"),
        (stretch, "Stretch"),
        (stretch, "_Loop"),
    ):
        monkeypatch.setattr(module, name, note_reads(getattr(module, name)))
    fuse(model, 1)
    in_place = [path for path, _ in made if getattr(path, "watch", None) is not None]
    assert {type(path).__name__ for path in in_place} >= {"FusedNorm", "_RotaryTable"}
    for path, read in made:
        if (watch := getattr(path, "watch", None)) is None:
            continue
        noted = {(id(owner), name) for owner, name in watch.notes()}
        for owner, name in read:
            homes = [owner, vars(owner), vars(owner).get("_parameters"), vars(owner).get("_buffers")]
            if not any((id(home), name) in noted for home in homes if home is not None):
                missing.append(f"{type(path).__name__} reads {type(owner).__name__}.{name}")
    assert not missing


@needs_kernels
def test_each_note_is_compared(tmp_path: Path) -> None:
    """A change of each noted entry is seen, and its way back too."""
    _, model = _models("qwen3_moe", tmp_path)
    layer = model.model.layers[1]
    watches = [
        layer.forward._together.func.__self__.watch,
        model.model.rotary_emb.forward.watch,
        model.model.forward.watch,
    ]
    for watch in watches:
        for owner, name in list(watch.notes()):
            assert watch.holds()
            entries = vars(owner) if isinstance(owner, nn.Module) else owner
            if isinstance(owner, list):
                owner.append(None)
                assert not watch.holds(), name
                owner.pop()
            elif isinstance(owner, Tensor):
                before = owner.data
                owner.data = before.clone()
                assert not watch.holds()
                owner.data = before
            elif isinstance(owner, nn.Module) and name in owner._modules:
                before = owner._modules[name]
                owner._modules[name] = nn.Identity()
                assert not watch.holds(), name
                owner._modules[name] = before
            else:
                before = entries[name]
                entries[name] = object()
                assert not watch.holds(), name
                entries[name] = before
            entries = vars(owner) if isinstance(owner, nn.Module) else owner
            if isinstance(entries, dict):
                entries["something new"] = 1
                assert not watch.holds()
                del entries["something new"]
        assert watch.holds()


@torch.no_grad()
def _replayed(model: Any) -> Tensor | Exception:
    """Logits of decoded tokens with a static cache, which a device captures and replays."""
    ids, cache = torch.arange(40, 51)[None], StaticCache(config=model.config, max_cache_len=16)
    try:
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([6] + [1] * 5, 1)]
    except Exception as error:
        return error
    return torch.cat([part[:, -1:] for part in parts], 1).float()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("attributes", marks=pytest.mark.long),
        "tensors",
        _wrap_forward,
        pytest.param(_hook, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_captured_steps_follow_what_is_changed(way: Any, tmp_path: Path) -> None:
    reference = save_model("qwen3_moe", tmp_path, HEADS).requires_grad_(False)
    options: dict[str, Any] = {"device": "emulated", "policy": "lru", "gpu_memory": "450KiB", "context": 32}
    model = load(str(tmp_path), threads=1, dtype="float32", **options)
    models = (reference, model)
    wrong = [_compare(_replayed(model), _replayed(reference), "nothing")]
    replays, runs = model.forward.figures.replays, 0

    def compare(what: str) -> None:
        wrong.append(_compare(_replayed(model), _replayed(reference), what))

    for name, module in list(reference.named_modules()):
        if ".0." in name or (".experts" in name and way != "attributes"):
            continue
        parent, _, leaf = name.rpartition(".")
        if way == "attributes":
            for owner, attribute in [pair for pair in _attributes(reference) if pair[0] == name]:
                before = [getattr(_owner(m, owner), attribute) for m in models if hasattr(_owner(m, owner), attribute)]
                if len(before) < 2:
                    continue
                for m, value in zip(models, before, strict=True):
                    setattr(_owner(m, owner), attribute, _changed(value))
                compare(f"{name}.{attribute}")
                for m, value in zip(models, before, strict=True):
                    setattr(_owner(m, owner), attribute, value)
        elif way == "tensors":
            for key in [key for key, value in module._parameters.items() if value is not None]:
                for edit in ("through data", "other data", "another parameter"):
                    before = [getattr(m.get_submodule(name), key).clone() for m in models]
                    for m, value in zip(models, before, strict=True):
                        _edits()[edit](m.get_submodule(name), key, value * 0.5 + 0.1)
                    compare(f"{name}.{key} {edit}")
                    for m, value in zip(models, before, strict=True):
                        setattr(m.get_submodule(name), key, nn.Parameter(value, requires_grad=False))
        elif name and not isinstance(module, nn.ModuleList):
            undo = [way(m.get_submodule(parent), leaf) for m in models]
            compare(name)
            for each in undo:
                each()
        compare(f"{name}, and back")
        runs += 1
    model.moestro.close()
    assert not [line for line in wrong if line]
    assert model.forward.figures.replays > replays + 2 * runs  # it was not all done the long way
