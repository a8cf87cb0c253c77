"""Looks at every image file once without decoding its pixels: size, form, digest, and whether it is whole.

20,000 files take seconds; what only the pixels can tell is found when they are decoded (`pixels.py`).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rfdetr_core import hardware
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.source import SourceSplit
from rfdetr_core.data.images import SWAPS_AXES, orientation_of, to_rgb

SUFFIXES = {
    "BMP": {".bmp", ".dib"},
    "GIF": {".gif"},
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"},
    "JPEG2000": {".jp2", ".j2k", ".jpx"},
    "MPO": {".mpo", ".jpg", ".jpeg"},
    "PNG": {".png", ".apng"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm"},
    "TIFF": {".tif", ".tiff", ".dng"},
    "WEBP": {".webp"},
    "AVIF": {".avif", ".avifs"},
}
"""Formats that are read, and their extensions. Not all of Pillow's: its EPS reader, for one, starts a program."""

FILE_BYTES = 512 * 1024 * 1024  # an image of more is refused: it is read whole where it is decoded
_TAIL = 4096  # bytes at the end in which a whole JPEG says that it ends
_MPO_FRAMES = "MPO"  # a photo with a preview or a depth map; its first frame is the photo

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ImageFile:
    """What an image file is: its size as displayed, in pixels, and the digest of its bytes."""

    path: Path
    width: int
    height: int
    orientation: int  # the EXIF orientation to apply on decoding; 1 = as stored
    sha256: str
    bytes: int
    exif_orientation: int = 1  # what the file asks for; another one than `orientation` if the boxes contradict it


class Problem(NamedTuple):
    """Why an image cannot be used: a code of the report, and words."""

    code: str
    why: str


class Examined(NamedTuple):
    """An image file, or why it is none; and the codes of what is worth a word about it."""

    file: ImageFile | Problem
    remarks: tuple[tuple[str, str], ...] = ()


def survey(
    source: SourceSplit, report: Report, progress: Callable[[int], None] | None = None
) -> list[ImageFile | None]:
    """Examine every listed image; None where it cannot be used, which the report says."""
    names = source.file_names
    fits = _StoredFrame(source)
    limit = report.options.max_image_pixels
    inside = _Inside(source.root)

    def examined(i: int) -> Examined:
        path = source.path_of(names[i])
        return Examined(Problem("outside-dataset", "")) if not inside(path) else examine(path, limit)

    files: list[ImageFile | None] = []
    formats = image_formats()  # loads Pillow's plugins, before threads do
    assert formats
    for i, (file, remarks) in enumerate(in_order(examined, range(len(names)))):
        where = f"{source.name}/{names[i]}"
        if isinstance(file, Problem):
            report.add(file.code, [f"{where}: {file.why}" if file.why else where])
            files.append(None)
        else:
            for code, words in remarks:
                report.add(code, [f"{where}: {words}" if words else where])
            files.append(_oriented(file, i, where, fits, report))
        if progress is not None:
            progress(1)
    return files


def in_order(work: Callable[[T], R], items: Iterable[T], *, threads: int | None = None) -> Iterator[R]:
    """The results in the order of the items, several at work, and only a few finished ones in memory."""
    threads = threads or hardware.cpu_count()
    waiting: list[Future[R]] = []
    rest = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        try:
            while True:
                waiting += [pool.submit(work, item) for item in islice(rest, 4 * threads - len(waiting))]
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def image_formats() -> list[str]:
    """Those of `SUFFIXES` that this Pillow reads."""
    Image.init()
    return [name for name in SUFFIXES if name in Image.OPEN]


def examine(path: str, max_pixels: int) -> Examined:
    """Read a file's header, digest and end; pixels only where its end is not the expected one."""
    try:
        file = open(path, "rb")  # noqa: SIM115, PTH123 - Path costs as much as reading the header
    except FileNotFoundError:
        return Examined(Problem("missing-image", ""))
    except OSError as error:
        return Examined(Problem("unreadable-image", error.strerror or type(error).__name__))
    with closing(file):
        try:
            return _examine(file, path, max_pixels)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return Examined(Problem("oversized-image", ""))
        except Exception as error:  # Pillow's decoders let a broken file raise whatever it leads them to
            return Examined(problem_of(error))


def problem_of(error: Exception) -> Problem:
    """Words for what Pillow raised of a file that is not empty."""
    if isinstance(error, UnidentifiedImageError):
        return Problem("unreadable-image", "no image format that is read")
    why = " ".join(str(error).split()) or type(error).__name__
    cut = isinstance(error, EOFError) or "truncated" in why.lower() or "not enough image data" in why
    return Problem("truncated-image" if cut else "unreadable-image", why)


def _examine(file: BinaryIO, path: str, max_pixels: int) -> Examined:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return Examined(Problem("empty-image", ""))
    if size > FILE_BYTES:
        return Examined(Problem("oversized-image", f"{size} bytes"))
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    with Image.open(file, formats=image_formats()) as image:
        stored, form = image.size, str(image.format)
        if stored[0] * stored[1] > max_pixels:
            return Examined(Problem("oversized-image", f"{stored[0]}x{stored[1]}, dataset.max_image_pixels"))
        exif = _orientation(image, file, form)
        remarks = tuple(_remarks(image, form, path))
        to_rgb_or_raise(image)
        if not _ends_well(file, form, size):
            image.load()
        stored = image.size  # a TIFF is turned as it is loaded
    displayed = (stored[1], stored[0]) if exif in SWAPS_AXES else stored
    return Examined(ImageFile(Path(path), *displayed, exif, digest, size, exif), remarks)


def to_rgb_or_raise(image: Image.Image) -> None:
    """Refuse a mode that has no RGB, by the converter itself and without pixels."""
    if image.mode in ("I", "F") or (image.mode != "RGB" and image.mode not in _USUAL_MODES):
        to_rgb(Image.new(image.mode, (1, 1)))


_USUAL_MODES = frozenset({"L", "P", "RGBA", "CMYK", "1", "LA", "PA", "YCbCr"})


def _orientation(image: Image.Image, file: BinaryIO, form: str) -> int:
    """The EXIF orientation that is left to apply to loaded pixels; loaded only where it takes that."""
    if form == "PNG" and not _png_may_be_turned(file):
        return 1  # asked for EXIF, Pillow would decode the pixels first, since it may stand behind them
    if form == "TIFF" and orientation_of(image) != 1:
        image.load()  # which turns it
    return orientation_of(image)


def _remarks(image: Image.Image, form: str, path: str) -> Iterator[tuple[str, str]]:
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    if suffix not in SUFFIXES[form]:
        yield "extension-differs", form
    if image.mode == "CMYK":
        yield "cmyk-image", ""
    elif image.mode.startswith("I;16"):
        yield "deep-image", ""
    elif image.mode in ("P", "PA"):
        yield "palette-image", ""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        yield "alpha-image", ""
    if form != _MPO_FRAMES and getattr(image, "is_animated", False):
        yield "animated-image", f"{getattr(image, 'n_frames', 2)} frames"


def _ends_well(file: BinaryIO, form: str, size: int) -> bool:
    """Whether the end of the file is that of a whole one; of formats that do not tell, no."""
    if form in ("JPEG", "MPO"):
        file.seek(max(0, size - _TAIL))
        return b"\xff\xd9" in file.read(_TAIL)
    if form == "PNG":
        return any(kind == b"IEND" for kind, _ in _png_chunks(file))
    if form == "WEBP":
        file.seek(4)
        return bool(size >= struct.unpack("<I", file.read(4))[0] + 8)
    return False


def _png_may_be_turned(file: BinaryIO) -> bool:
    return any(
        kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and start.startswith((b"Raw profile", b"XML:")))
        for kind, start in _png_chunks(file)
    )


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Kind and first bytes of every chunk, by jumping from one to the next; ends where the file does."""
    place = 8
    while True:
        file.seek(place)
        head = file.read(8 + 16)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head[:8])
        yield kind, head[8:]
        place += length + 12


class _Inside:
    """Whether a path, with its links followed, lies in the dataset's folder; folders are looked at once."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root).rstrip("/") + "/"
        self._folders: dict[str, bool] = {}

    def __call__(self, path: str) -> bool:
        folder, _, _ = path.rpartition("/")
        known = self._folders.get(folder)
        if known is None:
            known = self._folders[folder] = self._is_inside(folder)
        return known and not (os.path.islink(path) and not self._is_inside(path))  # noqa: PTH114

    def _is_inside(self, path: str) -> bool:
        return (os.path.realpath(path) + "/").startswith(self._root)


class _StoredFrame:
    """Decides for a turned image which frame its boxes are meant for: the one they, and the listed size, fit.

    What is listed decides where it is the size of one frame and not of the other, else the boxes do where they fit
    one and leave the other, else the image is shown as its EXIF orientation says.
    """

    def __init__(self, source: SourceSplit) -> None:
        self._declared = np.stack([source.widths, source.heights], axis=1)
        self._source = source
        self._corners: dict[int, NDArray[np.float64]] | None = None

    def __call__(self, i: int, stored: tuple[int, int]) -> bool:
        """Whether image i is to be shown as stored, w x h, though it asks to be turned by a quarter."""
        declared, turned = tuple(self._declared[i].tolist()), (stored[1], stored[0])
        if stored == turned or self._source.relative:
            return False
        if declared in (stored, turned):
            return declared == stored
        corner = self._largest_corner(int(self._source.image_ids[i]))
        return corner is not None and bool((corner <= stored).all()) and not bool((corner <= turned).all())

    def _largest_corner(self, image_id: int) -> NDArray[np.float64] | None:
        if self._corners is None:
            self._corners = {}
            ends = np.nan_to_num(self._source.bboxes[:, :2] + self._source.bboxes[:, 2:])
            for image, end in zip(self._source.annotation_images.tolist(), ends, strict=True):
                known = self._corners.get(image)
                self._corners[image] = end if known is None else np.maximum(known, end)
        return self._corners.get(image_id)


def _oriented(file: ImageFile, i: int, where: str, fits: _StoredFrame, report: Report) -> ImageFile:
    exif = file.exif_orientation
    if exif == 1:
        return file
    stored = (file.height, file.width)
    if exif in SWAPS_AXES and fits(i, stored):
        report.add("exif-ignored", [f"{where}: {exif}"])
        values: dict[str, Any] = {**vars(file), "width": stored[0], "height": stored[1], "orientation": 1}
        return ImageFile(**values)
    report.add("exif-orientation", [f"{where}: {exif}"])
    return file
