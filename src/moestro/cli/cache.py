"""`moestro cache`: what is kept of quantized models, and of the hub's downloads; checked and removed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, MoestroError, RequestError
from ..planning.budget import format_bytes
from .envelope import print_json
from .options import Json, WholeHelp, takes_options

if TYPE_CHECKING:
    from ..loading.packed.cache import Entry

cache = typer.Typer(
    cls=WholeHelp,
    help="List, verify or remove what is kept: quantized models here, downloads in the hub's cache.",
    epilog="Example: moestro cache verify",
    rich_markup_mode=None,
)


@cache.callback(invoke_without_command=True)
@takes_options()
def _list(context: typer.Context, as_json: Json = False) -> None:
    """List what is kept: quantized models here, downloads in the hub's cache."""
    if context.invoked_subcommand is not None:
        return
    from ..loading.packed.cache import cache_folder, entries

    ours, hub = [_values(one) for one in reversed(entries())], _downloads()
    if as_json:
        print_json({"folder": str(cache_folder()), "packed": ours, "hub": hub})
        return
    print(f"quantized models in {cache_folder()} (moestro cache remove NAME)")
    for one in ours:
        print(
            f"  {one['name']}  {format_bytes(one['n_bytes']):>10}  {one['last_used']}  {one['model']}  {one['formats']}"
        )
    print("downloads in the hub's cache (hf cache rm model/NAME)")
    for one in hub:
        print(f"  {one['name']}  {format_bytes(one['n_bytes']):>10}  {one['last_used']}")


@cache.command(epilog="Example: moestro cache verify")
def verify() -> None:
    """Read all quantized models that are kept, and compare their checksums."""
    from ..compute.cpu import core_cpus
    from ..loading.packed.cache import entries
    from ..loading.packed.read import verify_packed

    damaged = 0
    for entry in entries():
        if entry.is_unfinished:
            print(f"{entry.folder.name}  unfinished; its layers are checked when the load goes on")
            continue
        try:
            verify_packed(entry.folder, len(core_cpus()))
            print(f"{entry.folder.name}  whole")
        except MoestroError as error:
            damaged += 1
            print(f"{entry.folder.name}  {error}")
    if damaged:
        raise CheckpointError(
            f"{damaged} of the cache's models cannot be used; they are made again when they are needed"
        )


@cache.command(epilog="Example: moestro cache remove --all")
def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="As listed.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all quantized models that are kept.")] = False,
) -> None:
    """Remove quantized models that are kept."""
    from ..loading.packed.cache import cache_folder, entries
    from ..loading.packed.cache import remove as remove_entry

    found = {entry.folder.name: entry for entry in entries()}
    chosen = list(found) if everything else names or []
    if not chosen and not everything:
        raise RequestError("name what to remove, as moestro cache lists it, or --all")
    if missing := [name for name in chosen if name not in found]:
        raise RequestError(f"no {missing[0]} in {cache_folder()}; moestro cache lists what is there")
    for name in chosen:
        remove_entry(found[name].folder)
        print(f"removed {name}, {format_bytes(found[name].n_bytes)}")


def _values(entry: Entry) -> dict[str, Any]:
    made = entry.manifest
    formats = () if made is None else (*(one.format for one in made.layers), *(one.format for one in made.dense))
    return {
        "name": entry.folder.name,
        "n_bytes": entry.n_bytes,
        "last_used": _day(entry.used_s),
        "model": _name_of(entry),
        "formats": "+".join(dict.fromkeys(formats)),
    }


def _name_of(entry: Entry) -> str:
    if entry.manifest is not None:
        return str(entry.manifest.source.get("model", ""))
    return "unfinished" if entry.is_unfinished else "damaged"


def _downloads() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        {"name": one.repo_id, "n_bytes": one.size_on_disk, "last_used": _day(one.last_accessed)}
        for one in sorted(repos, key=lambda repo: -repo.last_accessed)
        if one.repo_type == "model"
    ]


def _day(used_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(used_s))
