"""rfdetr-pipeline models: the registry for people."""

from __future__ import annotations

import getpass
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from pipelines.local import BUCKET, RUNS
from rfdetr_core.errors import ConfigError, MissingObjectError, PublicationError
from rfdetr_core.publication import fetch
from rfdetr_core.registry import Champion, Registry, model_names
from rfdetr_core.storage import Location, location

models = typer.Typer(no_args_is_help=True, help="Registered models: versions, the champion, and who may be it.")
console = Console(highlight=False)

ROOT = typer.Option(
    "--root", envvar="RFDETR_ROOT", help="Store: s3://bucket/prefix or a folder. [default: that of local runs]"
)
NAME = typer.Argument(help="The model's name, as in the config.")
VERSION = typer.Argument(help="A version, which is a run id. [default: the champion]")
UNGUARDED = typer.Option(
    "--allow-unguarded-store", help="Also on a store that ignores conditional writes, if nobody else promotes now."
)
DEBUG = typer.Option("--debug", help="Show tracebacks.")  # main reads it
METRICS = ("map", "map50", "map75", "mar", "f1")


@models.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="One model's versions. [default: all models]")] = None,
    root: Annotated[str | None, ROOT] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Versions and champions, by name."""
    store = _store(root)
    names = [name] if name else model_names(store)
    scores = (Column("mAP", justify="right"), Column("mAP50", justify="right"))
    table = Table("model", "version", "", *scores, "of test", "made")
    rows = 0
    for model in names:
        registry = Registry(store, model)
        champion = registry.champion()
        for version in registry.versions():
            mark = "champion" if champion and champion.version == version else ""
            table.add_row(model, version, *_row(registry, version, mark))
            rows += 1
    if rows:
        console.print(table)
        console.print("Numbers of different test digests were measured on different images.")
    else:
        console.print(f"no versions{f' of {name}' if name else ''} in {store.uri}", soft_wrap=True, markup=False)


def _row(registry: Registry, version: str, mark: str) -> tuple[str, ...]:
    """What `list` says of a version; one that is damaged must not hide the others."""
    try:
        made = registry.manifest(version).created
        metrics = _json(registry, version, "metrics.json")
    except PublicationError:
        return (f"{mark} damaged".strip(), "", "", "", "")
    row = metrics["candidate"]
    return (mark, f"{row['map']:.3f}", f"{row['map50']:.3f}", str(metrics["test_digest"])[:8], made)


@models.command()
def show(
    name: Annotated[str, NAME],
    version: Annotated[str | None, VERSION] = None,
    root: Annotated[str | None, ROOT] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """What a version is, how good, and the chain from the model to the images that made it."""
    registry = Registry(_store(root), name)
    champion = registry.champion()
    version = version or _need(champion, name).version
    manifest = registry.manifest(version)
    provenance = _json(registry, version, "provenance.json")
    metrics = _json(registry, version, "metrics.json")
    lines = [f"{name} {version}{' (champion)' if champion and champion.version == version else ''}"]
    if champion and champion.version == version:
        lines.append(f"  promoted {champion.promoted} by {champion.by}")
        earlier = [row["version"] for row in champion.history]
        lines.append(f"  champions before it: {', '.join(earlier) or 'none'}")
    scores = ", ".join(f"{key} {metrics['candidate'][key]:.4f}" for key in METRICS)
    lines.append(f"  {metrics['split']}: {scores} on {metrics['images']} images")
    lines += [f"  {file:30s} {entry.size / 1e6:9.2f} MB  {entry.sha256}" for file, entry in manifest.files.items()]
    lines += ["", *_chain(manifest.files["model.onnx"].sha256, provenance)]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _chain(onnx: str, provenance: Mapping[str, Any]) -> Iterator[str]:
    """From the file that is used to the images it was learned from, each with what names it."""
    files = {place: said["files"] for place, said in provenance["publications"].items()}
    stages, dataset = provenance["stages"], provenance["dataset"]
    yield f"model.onnx        {onnx}"
    yield f"  exported from   {provenance['model']['weights_sha256']} ({provenance['model']['source']} weights)"
    checkpoint = files["train"].get("checkpoints/checkpoint_best_total.pth")
    if checkpoint != provenance["model"]["weights_sha256"]:
        yield f"  NOT the run's   {checkpoint}"
    yield f"  trained by run  {provenance['run_uri']}, seed {provenance['seed']}"
    started = provenance["parent"]["pretrain_weights"]
    origin = f"{started.get('uri')} md5 {started.get('md5')}" if started else "random weights"
    yield f"  beginning with  {origin}"
    yield f"  compared with   {provenance['parent']['champion'] or 'no champion'}"
    yield f"  by code         {provenance['code']['version']}, revision {provenance['code']['revision'] or 'unknown'}"
    for stage, said in sorted(stages.items(), key=lambda item: str(item[1]["started"])):
        hardware = said["hardware"] or {}
        image = said["image"] or "no image: a process"
        yield f"    {stage:16s} {image}; {said['started']}, {hardware.get('cpus')} cores; {_versions(said)}"
    yield f"  on dataset      {dataset['digest']}"
    yield f"  prepared from   {dataset['source']}"
    for split, counts in (dataset["splits"] or {}).items():
        yield f"    {split:16s} {counts['images']} images, {counts['boxes']} boxes"
    yield f"    images by name and SHA-256: {dataset['location']}/<split>/index.json"
    classes = ", ".join(str(row["name"]) for row in provenance["classes"] or ())
    yield f"  of classes      {classes}"


def _versions(said: Mapping[str, Any]) -> str:
    wanted = ("torch", "onnxruntime", "python")
    return ", ".join(f"{name} {said['versions'][name]}" for name in wanted if name in (said["versions"] or {}))


@models.command()
def diff(
    name: Annotated[str, NAME],
    first: Annotated[str, typer.Argument(help="A version.")],
    second: Annotated[str | None, VERSION] = None,
    root: Annotated[str | None, ROOT] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """What differs between two versions: metrics, classes, data, code and every field of the config."""
    registry = Registry(_store(root), name)
    second = second or _need(registry.champion(), name).version
    pair = (first, second)
    for version in pair:
        registry.manifest(version)
    metrics = [_json(registry, version, "metrics.json") for version in pair]
    made = [_json(registry, version, "provenance.json") for version in pair]
    table = Table("", *pair, Column("difference", justify="right"))
    same_test = metrics[0]["test_digest"] == metrics[1]["test_digest"]
    for key in METRICS:
        before, after = (found["candidate"][key] for found in metrics)
        table.add_row(key, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}" if same_test else "other images")
    for key, values in _differing(
        *(_facts(found, provenance) for found, provenance in zip(metrics, made, strict=True))
    ):
        table.add_row(key, *(_short(value) for value in values), "")
    console.print(table)
    if not same_test:
        console.print("The two were measured on different test images: their metrics do not compare.")


def _facts(metrics: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ, flat and dotted."""
    facts = {
        "test images": metrics["test_digest"],
        "dataset": provenance["dataset"]["digest"],
        "code": provenance["code"]["revision"],
        "weights": provenance["model"]["weights_sha256"],
        "classes": [row["name"] for row in provenance["classes"] or ()],
    }
    for section, fields in provenance["config"].items():
        rows = fields.items() if isinstance(fields, dict) else [("", fields)]
        facts |= {f"{section}.{key}".rstrip("."): value for key, value in rows}
    return facts


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in dict.fromkeys([*first, *second]):
        pair = (first.get(key), second.get(key))
        if pair[0] != pair[1]:
            yield key, pair


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 44 else text[:43] + "…"


@models.command()
def promote(
    name: Annotated[str, NAME],
    version: Annotated[str, typer.Argument(help="The version that becomes the champion.")],
    root: Annotated[str | None, ROOT] = None,
    unguarded: Annotated[bool, UNGUARDED] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Make a registered version the champion, whatever the gate said: a person's decision, recorded as one."""
    registry = Registry(_store(root), name)
    champion = registry.champion()
    if champion is not None and champion.version == version:
        console.print(f"{version} is the champion of {name} already")
        return
    _move(registry, champion, version, unguarded=unguarded)
    console.print(f"{version} is the champion of {name} now; before: {champion.version if champion else 'none'}")


@models.command()
def rollback(
    name: Annotated[str, NAME],
    root: Annotated[str | None, ROOT] = None,
    unguarded: Annotated[bool, UNGUARDED] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Make the champion before this one the champion again; repeated, the one before that."""
    registry = Registry(_store(root), name)
    champion = _need(registry.champion(), name)
    if not champion.history:
        raise ConfigError(
            f"{champion.version} is the first champion of {name}: there is none before it",
            hint=f"promote another version: rfdetr-pipeline models list {name}",
        )
    before = champion.history[-1]["version"]
    _move(registry, champion, before, unguarded=unguarded, history=champion.history[:-1])
    console.print(f"{before} is the champion of {name} again; {champion.version} stays registered")


def _move(
    registry: Registry,
    champion: Champion | None,
    version: str,
    *,
    unguarded: bool,
    history: tuple[dict[str, str], ...] | None = None,
) -> None:
    """Move the pointer, after every byte of the version was held against its manifest."""
    registry.manifest(version)
    metrics = _json(registry, version, "metrics.json", whole=True)
    if not registry.require_guard(allow_unguarded=unguarded, permit="give --allow-unguarded-store"):
        console.print("note: this store does not guard the pointer against a second writer")
    registry.move(
        champion,
        version,
        metrics=metrics["candidate"],
        test_digest=metrics["test_digest"],
        by=_person(),
        history=history,
    )


def _json(registry: Registry, version: str, name: str, *, whole: bool = False) -> Any:
    """A JSON file of a version, verified against its manifest; with `whole`, so is every other file."""
    place = registry.version(version)
    with tempfile.TemporaryDirectory(prefix="rfdetr-models-") as scratch:
        folder = fetch(place, Path(scratch), names=None if whole else [name], progress=False)
        return json.loads((folder / name).read_bytes())


def _store(root: str | None) -> Location:
    """The store that is named, or the one that local runs write to."""
    if root:
        return location(root)
    local = RUNS / "s3" / BUCKET
    if not local.is_dir():
        raise ConfigError("no store to look into", hint="give --root s3://bucket/prefix, or set RFDETR_ROOT")
    return location(str(local.absolute()))


def _need(champion: Champion | None, name: str) -> Champion:
    if champion is None:
        raise MissingObjectError(f"{name} has no champion", hint=f"name a version: rfdetr-pipeline models list {name}")
    return champion


def _person() -> str:
    """Who sits here, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
