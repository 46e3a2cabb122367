"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onnxcomp.commands.guard import parsed
from onnxcomp.errors import OptionError

if TYPE_CHECKING:
    from onnxcomp.data import ImageOptions

__all__ = [
    "check_code",
    "data_options",
    "image_from",
    "json_option",
    "output_options",
    "plain_option",
    "sample_options",
    "shape_option",
    "shapes_from",
]

Command = TypeVar("Command", bound=Callable[..., Any])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"expected numbers divided by commas, one a channel, got {text!r}"
        raise OptionError(message) from None


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        message = f"expected HEIGHTxWIDTH or one number, such as 224x224, got {text!r}"
        raise OptionError(message)
    height, width = int(parts[0]), int(parts[-1])
    return height, width


_DATA = (
    click.option(
        "--data", metavar="PATH", help="Samples: an .npz, a folder of .npz, .npy or images, or module:function."
    ),
    click.option("--allow-code", is_flag=True, help="Let --data, --metric and recipes name module:function to run."),
    click.option(
        "--image-size", callback=parsed(_size), metavar="HxW", help="Resize images to this; else the model's."
    ),
    click.option(
        "--image-layout", type=click.Choice(["nchw", "nhwc"]), help="Order of the axes; else as in the model."
    ),
    click.option("--image-mean", callback=parsed(_numbers), metavar="M,M,M", help="Subtracted after --image-scale."),
    click.option("--image-std", callback=parsed(_numbers), metavar="S,S,S", help="Divided by after --image-mean."),
    click.option("--image-scale", type=float, metavar="X", help="Factor for pixels of 0 to 255; 1/255 unless given."),
    click.option("--image-color", type=click.Choice(["rgb", "bgr", "gray"]), help="Order of the channels; else rgb."),
)
_METRIC = click.option("--metric", metavar="NAME", help="top1, top5, mse, auc, or module:function(outputs, labels).")
_SHAPE = click.option(
    "--shape",
    "shape",
    multiple=True,
    metavar="NAME=N,N,...",
    help="Sizes of a dynamic input, such as image=1,3,224,224.",
)
_OUTPUT = (
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks of internal errors."),
)
_PLAIN = click.option("--plain", is_flag=True, help="Print for logs: ASCII, no colours, bars or wrapped lines.")
_JSON = click.option("--json", "json_path", metavar="PATH", help="Write all of it as JSON too; - is stdout.")


def sample_options(command: Command) -> Command:
    """Add what says which samples there are, and how to read them."""
    for option in reversed(_DATA):
        command = option(command)
    return command


def data_options(command: Command) -> Command:
    """Add what says which samples there are, how to read them, and what they are judged by."""
    return sample_options(_METRIC(command))


def shape_option(command: Command) -> Command:
    """Add --shape."""
    return _SHAPE(command)


def json_option(command: Command) -> Command:
    """Add --json."""
    return _JSON(command)


def plain_option(command: Command) -> Command:
    """Add --plain."""
    return _PLAIN(command)


def output_options(command: Command) -> Command:
    """Add -q and -v."""
    for option in reversed(_OUTPUT):
        command = option(command)
    return command


def shapes_from(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]] | None:
    """The shapes that --shape gave."""
    from onnxcomp.data import parse_shapes

    return parse_shapes(texts) or None


def image_from(options: dict[str, Any]) -> ImageOptions | None:
    """Take the image options out of a command's arguments; None if there are none."""
    given = {name: options.pop(f"image_{name}") for name in ("size", "layout", "mean", "std", "scale", "color")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    from onnxcomp.data import ImageOptions

    return ImageOptions(**given)


def check_code(*, allow_code: bool, **texts: str | None) -> None:
    """Refuse module:function unless --allow-code was given.

    Raises:
        OptionError: A text names code to run.
    """
    from pathlib import Path

    from onnxcomp.data.user_code import is_reference

    for name, text in texts.items():
        if text and not allow_code and is_reference(text) and not Path(text).exists():
            message = f"--{name} {text!r} names code to run; allow it with --allow-code"
            raise OptionError(message)
