"""Read a folder of images as samples of a model with one image input."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp.data.fit import Item, fit
from onnxcomp.data.specs import Array, InputSpec
from onnxcomp.errors import DataError, OptionError, RequirementError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_CHANNELS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How an image becomes an input: ``(pixels * scale - mean) / std``, after a bilinear resize (no crop).

    A model that takes uint8 gets the pixels as they are.

    Attributes:
        size: Height and width in pixels; by default the model's.
        layout: "nchw" or "nhwc"; by default what the model's channel axis says.
        mean: One value a channel, or one for all, in the units after `scale`.
        std: The same, to divide by.
        scale: The factor for pixels of 0 to 255.
        color: "rgb", "bgr" or "gray"; by default rgb, or gray if the model has one channel.
    """

    size: tuple[int, int] | None = None
    layout: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1 / 255
    color: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            message = f"image size must be a height and a width of at least 1, got {self.size}"
            raise OptionError(message)
        for name, value, allowed in (
            ("layout", self.layout, ("nchw", "nhwc")),
            ("color", self.color, ("rgb", "bgr", "gray")),
        ):
            if value is not None and value not in allowed:
                message = f"image {name} must be one of {', '.join(allowed)}, got {value!r}"
                raise OptionError(message)
        if any(value == 0 for value in self.std):
            message = f"image std must not be 0, got {self.std}"
            raise OptionError(message)


@dataclass(frozen=True)
class _Recipe:
    """The options, settled for one model."""

    height: int
    width: int
    layout: str
    color: str
    raw: bool
    options: ImageOptions


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and the folders in it, in order of their paths."""
    found = [path for path in folder.rglob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def image_items(
    folder: Path, files: Sequence[Path], specs: Sequence[InputSpec], where: str, options: ImageOptions
) -> Iterator[Item]:
    """Read images one by one, with the labels of `labels.csv` (file name, label) if the folder holds one."""
    recipe = _recipe(specs, where, options)
    labels = _labels(folder / "labels.csv", where)
    for number, path in enumerate(files):
        name = path.relative_to(folder).as_posix()
        if labels is not None and name not in labels:
            message = f"{where}: labels.csv has no line for {name!r}; give every image a label"
            raise DataError(message)
        array = _read(path, f"{where}: {name}", recipe)
        label = None if labels is None else np.asarray(labels[name])
        yield fit(specs, {specs[0].name: array}, label, where, single=True, first=number)


def _recipe(specs: Sequence[InputSpec], where: str, options: ImageOptions) -> _Recipe:
    if len(specs) != 1 or specs[0].rank != 4:
        message = (
            f"{where}: images fit a model with one input of four axes, but this one wants "
            f"{', '.join(f'{spec.name!r} {spec}' for spec in specs)}; give an .npz"
        )
        raise DataError(message)
    shape = specs[0].shape
    layout = options.layout or ("nhwc" if shape[3] in _CHANNELS and shape[1] not in _CHANNELS else "nchw")
    channels, height, width = (shape[1], shape[2], shape[3]) if layout == "nchw" else (shape[3], shape[1], shape[2])
    color = options.color or ("gray" if channels == 1 else "rgb")
    expected = 1 if color == "gray" else 3
    if isinstance(channels, int) and channels != expected:
        message = (
            f"{where}: {color} images have {expected} channels, but input {specs[0].name!r} is {specs[0]} ({layout})"
        )
        raise DataError(message)
    if options.size is not None:
        height, width = options.size
    if not isinstance(height, int) or not isinstance(width, int):
        message = f"{where}: input {specs[0].name!r} is {specs[0]}: it does not say how large images are; give a size"
        raise OptionError(message)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (0, 1, expected):
            message = f"image {name} must be one value or {expected}, one a channel, got {len(values)}"
            raise OptionError(message)
    raw = specs[0].dtype.kind in "iu"
    if raw and (options.mean or options.std):
        message = f"input {specs[0].name!r} takes {specs[0].dtype.name}: pixels as they are, without mean and std"
        raise OptionError(message)
    return _Recipe(height, width, layout, color, raw, options)


def _labels(path: Path, where: str) -> dict[str, int | float | str] | None:
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"{where}: labels.csv cannot be read: {error}; expected lines of file name, label"
        raise DataError(message) from error
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            message = f"{where}: line {number} of labels.csv has {len(row)} columns; expected two: file name, label"
            raise DataError(message)
    if rows and Path(rows[0][0]).suffix.lower() not in SUFFIXES:
        rows = rows[1:]  # a line of column titles
    return dict(zip((row[0] for row in rows), _numbers([row[1].strip() for row in rows]), strict=True))


def _numbers(texts: Sequence[str]) -> Sequence[int | float | str]:
    """Read all as whole numbers, or all as numbers, or leave all as text: labels are of one type."""
    for kind in (int, float):
        try:
            return [kind(text) for text in texts]
        except ValueError:
            continue
    return texts


def _read(path: Path, where: str, recipe: _Recipe) -> Array:
    """Return one image, (C, H, W) or (H, W, C), float32 or uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        message = f"{where}: reading images needs Pillow; install it: pip install 'onnxcomp[images]'"
        raise RequirementError(message) from error
    try:
        with Image.open(path) as image:
            resized = image.convert("L" if recipe.color == "gray" else "RGB").resize(
                (recipe.width, recipe.height), Image.Resampling.BILINEAR
            )
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"{where}: it is not an image that can be read: {error}"
        raise DataError(message) from error
    pixels: Array = np.asarray(resized).reshape(recipe.height, recipe.width, -1)
    if recipe.color == "bgr":
        pixels = pixels[..., ::-1]
    if not recipe.raw:
        pixels = pixels.astype(np.float32) * np.float32(recipe.options.scale)
        if recipe.options.mean:
            pixels = pixels - np.asarray(recipe.options.mean, np.float32)
        if recipe.options.std:
            pixels = pixels / np.asarray(recipe.options.std, np.float32)
    return pixels.transpose(2, 0, 1) if recipe.layout == "nchw" else pixels
