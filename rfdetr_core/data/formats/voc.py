"""Reads Pascal VOC: an XML file per image, in one of three layouts.

    Annotations/a.xml, JPEGImages/a.jpg (or images/), ImageSets/Main/{train,val,test}.txt      VOC itself
    {train,valid,test}/ with a.xml beside a.jpg, or with Annotations/ and JPEGImages/ each     a folder per split
    a.xml beside a.jpg, or the first layout without ImageSets                                  all is train

Boxes are the corners as written: x = xmin, w = xmax - xmin. Classes are the names that occur, in alphabetical order,
since VOC has no list of them. XML with a document type is refused: it is how entities blow up or fetch files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.parsers import expat

import numpy as np

from rfdetr_core.data.formats.source import (
    IMAGE_SUFFIXES,
    UNPRINTABLE,
    Remark,
    SourceCategory,
    SourceSplit,
    read_annotation_file,
    shown,
)
from rfdetr_core.errors import DatasetError

LAYOUT = "Annotations/*.xml with JPEGImages/, or train/, valid/ and test/ with XML files beside the images"
MAX_XML_MB = 64
MAX_DEPTH = 32  # of elements; an object's part's corner is at 6
_IMAGE_FOLDERS = ("JPEGImages", "images")
_SPLIT_FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


@dataclass
class VocObject:
    """An object as written: name, the four corners as texts, and its number in the file, from 1."""

    number: int
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class VocFile:
    """What an annotation file says."""

    filename: str = ""
    width: str = ""
    height: str = ""
    objects: list[VocObject] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Where a split lies: XML files, the images, and the stems that belong to it (None: all XML files)."""

    annotations: Path
    images: Path
    stems: tuple[str, ...] | None = None


def find_voc(folder: Path) -> dict[str, _Place]:
    """The place of each split, keyed by train, valid, test; without train it is no VOC dataset: empty."""
    own = _place(folder)
    if own is not None:
        sets = _image_sets(folder / "ImageSets" / "Main")
        if sets:
            return {split: _Place(own.annotations, own.images, stems) for split, stems in sets.items()}
        return {"train": own}
    found: dict[str, _Place] = {}
    for split, names in _SPLIT_FOLDERS.items():
        place = next((p for name in names if (p := _place(folder / name)) is not None), None)
        if place is not None:
            found[split] = place
    return found if "train" in found else {}


def read_voc_folder(folder: Path) -> dict[str, SourceSplit]:
    """All splits found in `folder`, keyed by train, valid, test.

    Raises:
        DatasetError: no folder, or no VOC dataset in it; an ImageSets file that cannot be read.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", hint="give the folder that holds Annotations/")
    places = find_voc(folder)
    if not places:
        raise DatasetError(f"{folder}: no Pascal VOC dataset in it", hint=f"it has {LAYOUT}")
    read = {split: _read(split, folder, place) for split, place in places.items()}
    ids = {name: i for i, name in enumerate(sorted({name for found in read.values() for name in found.names}))}
    return {split: found.as_split(folder, ids) for split, found in read.items()}


def _place(folder: Path) -> _Place | None:
    if _has_xml(folder / "Annotations"):
        images = next((folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()), folder)
        return _Place(folder / "Annotations", images)
    return _Place(folder, folder) if _has_xml(folder) else None


def _has_xml(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(".xml") for entry in entries)
    except OSError:
        return False


def _image_sets(folder: Path) -> dict[str, tuple[str, ...]]:
    """Stems by split; trainval stands for train where that is absent."""
    found: dict[str, tuple[str, ...]] = {}
    for split, names in {"train": ("train", "trainval"), "valid": ("val", "valid"), "test": ("test",)}.items():
        path = next((p for name in names if (p := folder / f"{name}.txt").is_file()), None)
        if path is not None:
            found[split] = _stems(path, folder.parent.parent)
    return found if "train" in found else {}


def _stems(path: Path, root: Path) -> tuple[str, ...]:
    try:
        text = read_annotation_file(path, root, MAX_XML_MB).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from error
    stems = dict.fromkeys(line.split()[0] for line in text.splitlines() if line.strip())
    for stem in stems:
        if "/" in stem or "\\" in stem or stem in (".", "..") or UNPRINTABLE.search(stem):
            raise DatasetError(f"{path}: {shown(stem)} is no name of an image", hint="a name per line, no extension")
    return tuple(stems)


@dataclass
class _Split:
    """A split as it is read; each list has an entry per image, or per object."""

    split: str
    place: _Place
    file_names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def remark(self, code: str, row: str) -> None:
        self.remarks.setdefault(code, []).append(row)

    def as_split(self, root: Path, ids: dict[str, int]) -> SourceSplit:
        """With class ids that are positions among the names of the whole dataset."""
        sizes = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        count = len(self.boxes)
        own = sorted(set(self.names))
        return SourceSplit(
            name=self.split,
            root=root,
            path=self.place.annotations,
            image_folder=self.place.images,
            image_ids=np.arange(len(self.file_names), dtype=np.int64),
            file_names=tuple(self.file_names),
            widths=sizes[:, 0],
            heights=sizes[:, 1],
            annotation_ids=np.arange(1, count + 1, dtype=np.int64),
            annotation_images=np.array(self.images, dtype=np.int64),
            annotation_categories=np.array([ids[name] for name in self.names], dtype=np.int64),
            bboxes=np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            areas=np.full(count, np.nan),
            crowd=np.zeros(count, dtype=np.bool_),
            categories=tuple(SourceCategory(ids[name], name, "") for name in own),
            lines=np.array(self.numbers, dtype=np.int64),
            label_suffix=".xml object",
            remarks=tuple(Remark(code, tuple(rows)) for code, rows in self.remarks.items()),
        )


def _read(split: str, root: Path, place: _Place) -> _Split:
    found = _Split(split, place)
    on_disk = _by_stem(place.images)
    stems = place.stems if place.stems is not None else tuple(sorted(_xml_stems(place.annotations)))
    real = root.resolve()
    for stem in stems:
        path = place.annotations / f"{stem}.xml"
        said = _read_file(path, real, found)
        if said is not None:
            name = _image_name(said, stem, on_disk, found)
            found.file_names.append(name)
            found.sizes.append((_size(said.width), _size(said.height)))
            for voc_object in said.objects:
                _take(voc_object, f"{split}/{path.name} object {voc_object.number}", found)
    return found


def _read_file(path: Path, root: Path, found: _Split) -> VocFile | None:
    """What the file says; None where it cannot be read, which is remarked."""
    where = f"{found.split}/{path.name}"
    try:
        return parse_voc(read_annotation_file(path, root, MAX_XML_MB))
    except DatasetError as error:
        found.remark("unreadable-labels", f"{where}: {error.message.removeprefix(f'{path}: ')}")
        return None


def parse_voc(data: bytes) -> VocFile:
    """Read the bytes of an annotation file.

    Raises:
        DatasetError: not XML, of another kind, or with a document type.
    """
    said, path, text = VocFile(), list[str](), list[str]()
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name)
        text.clear()
        if len(path) > MAX_DEPTH:
            raise DatasetError("nested too deeply to be an annotation", hint="export it again")
        if len(path) == 1 and name != "annotation":
            raise DatasetError(f"its root is {shown(name)}, not annotation", hint="export it again")
        if path == ["annotation", "object"]:
            said.objects.append(VocObject(len(said.objects) + 1))

    def end(name: str) -> None:
        value = "".join(text).strip()
        if path == ["annotation", "filename"]:
            said.filename = value
        elif path == ["annotation", "size", "width"]:
            said.width = value
        elif path == ["annotation", "size", "height"]:
            said.height = value
        elif path[:2] == ["annotation", "object"] and (len(path) == 3 or path[2:-1] == ["bndbox"]):
            said.objects[-1].values[path[-1]] = value
        path.pop()
        text.clear()

    def refuse(*_: object) -> None:
        raise DatasetError("has a document type, which is not read", hint="export it again")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DatasetError(f"not XML at line {error.lineno}, column {error.offset + 1}: {error}") from None
    except (ValueError, LookupError, UnicodeError) as error:  # an encoding that is not known, for one
        raise DatasetError(f"not XML: {' '.join(str(error).split())}") from None
    return said


def _image_name(said: VocFile, stem: str, on_disk: dict[str, list[str]], found: _Split) -> str:
    """The image that the file names if it is there, else the one of the XML file's own name."""
    named = PurePosixPath(said.filename.replace("\\", "/")).name
    beside = on_disk.get(stem, [])
    if named in on_disk.get(PurePosixPath(named).stem, []):
        if beside and named not in beside:
            found.remark("image-by-other-name", f"{found.split}/{stem}.xml: {shown(named)}, not {shown(beside[0])}")
        return named
    if beside:
        if named:
            found.remark("image-by-other-name", f"{found.split}/{stem}.xml: {shown(named)}, took {shown(beside[0])}")
        return beside[0]
    # Not there: reported as a missing image under the name that a person would look for.
    return named if named and not UNPRINTABLE.search(named) and named != ".." else f"{stem}.jpg"


def _take(voc_object: VocObject, where: str, found: _Split) -> None:
    values = voc_object.values
    name = values.get("name", "")
    if not name or UNPRINTABLE.search(name):
        found.remark("bad-object", f"{where}: its name is {shown(name)}")
        return
    corners = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        try:
            corners.append(float(values[key].replace("_", "?")))
        except (KeyError, ValueError):
            found.remark("bad-object", f"{where}: {key} is {shown(values.get(key))}")
            return
    if values.get("difficult", "0") not in ("", "0", "false", "False"):
        found.remark("difficult-object", where)
    left, top, right, bottom = corners
    found.images.append(len(found.file_names) - 1)
    found.numbers.append(voc_object.number)
    found.names.append(name)
    found.boxes.append((left, top, right - left, bottom - top))


def _size(text: str) -> int:
    """Pixels as declared; -1 where absent, or written as something else than a number of pixels."""
    try:
        value = float(text)
    except ValueError:
        return -1
    return int(value) if math.isfinite(value) and 0 < value < 2**31 else -1


def _xml_stems(folder: Path) -> Iterable[str]:
    return (name.removesuffix(".xml") for name in os.listdir(folder) if name.endswith(".xml"))  # noqa: PTH208


def _by_stem(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if PurePosixPath(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(PurePosixPath(entry.name).stem, []).append(entry.name)
    return found
