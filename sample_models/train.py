"""Train the three sample models on Fashion-MNIST and export them to ONNX.

Writes ``fashion_lenet.onnx``, ``fashion_mobilenet.onnx``, ``fashion_vit.onnx``,
``fashion_calib.npz`` and ``fashion_test.npz``, then measures each model on all
test images through ONNX Runtime. Needs torch, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

DEFAULT_DATA = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION_IMAGES = 512
TEST_IMAGES = 1000
OPSET = 17
CLASSES = 10
BATCH = 64

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


# --- data ---------------------------------------------------------------------


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped idx file of unsigned bytes.

    Args:
        path: The ``.gz`` file.

    Returns:
        The array, in the shape that the file's header gives.

    Raises:
        ValueError: If the file does not hold unsigned bytes.
    """
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        message = f"{path}: expected an idx file of unsigned bytes, got one that begins with {raw[:4].hex()}"
        raise ValueError(message)
    rank = raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw, dtype=">u4", count=rank, offset=4))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(folder: Path, prefix: str) -> tuple[FloatArray, IntArray]:
    """Load one split of the data set.

    Args:
        folder: The folder that holds the idx files.
        prefix: ``train`` or ``t10k``.

    Returns:
        Images (N, 1, 28, 28) in [0, 1] and labels (N,).
    """
    pixels = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    images = pixels[:, None].astype(np.float32) / np.float32(255)
    return images, labels.astype(np.int64)


def write_samples(data: Path, out: Path) -> None:
    """Write the calibration images (unlabelled) and the test sample.

    Args:
        data: The folder that holds the idx files.
        out: The folder to write to.
    """
    train_images, _ = load_split(data, "train")
    test_images, test_labels = load_split(data, "t10k")
    np.savez_compressed(out / "fashion_calib.npz", image=train_images[:CALIBRATION_IMAGES])
    np.savez_compressed(
        out / "fashion_test.npz",
        image=test_images[:TEST_IMAGES],
        label=test_labels[:TEST_IMAGES],
    )


def augment(images: Tensor, generator: torch.Generator, shift: int) -> Tensor:
    """Shift each image by up to ``shift`` pixels and mirror half of them.

    Args:
        images: A batch (N, 1, H, W).
        generator: The source of randomness.
        shift: The largest shift along either axis.

    Returns:
        A batch of the same shape.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (shift, shift, shift, shift))
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(count)[:, None, None]
    return padded[sample, 0, rows[:, :, None], columns[:, None, :]][:, None]


# --- models -------------------------------------------------------------------


def build_lenet() -> nn.Module:
    """Build the fully connected 784-300-100-10 network (LeNet-300-100)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Make a convolution with "same" padding and its batch normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


# mypy does not follow torch (see pyproject.toml), hence the ignores below.
class InvertedResidual(nn.Module):  # type: ignore[misc]
    """Expand, filter each channel, project; with a shortcut where shapes agree.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Stride of the depthwise convolution.
        expand: How many times wider the block is inside.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *conv_bn(inputs, hidden, 1),
            nn.ReLU6(),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *conv_bn(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


def build_mobilenet() -> nn.Module:
    """Build a small network of inverted residuals (MobileNetV2 style)."""
    # (outputs, stride, expand): most weights sit where the image is small,
    # because training time goes with the size of the activations.
    blocks = [(24, 1, 2), (40, 2, 3), (40, 1, 4), (80, 2, 4), (80, 1, 4), (80, 1, 4)]
    width = 24
    layers = [*conv_bn(1, width, 3, stride=2), nn.ReLU6()]
    for outputs, stride, expand in blocks:
        layers.append(InvertedResidual(width, outputs, stride, expand))
        width = outputs
    layers += [*conv_bn(width, 3 * width, 1), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * width, CLASSES)]
    return nn.Sequential(*layers)


class Attention(nn.Module):  # type: ignore[misc]
    """Multi-head self-attention.

    Args:
        width: Features of a token.
        heads: Number of heads; divides ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of x (N, tokens, width)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class EncoderBlock(nn.Module):  # type: ignore[misc]
    """A pre-norm transformer block.

    Args:
        width: Features of a token.
        heads: Attention heads.
        hidden: Width inside the feed-forward part.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):  # type: ignore[misc]
    """A small vision transformer that averages its tokens for the classifier.

    Args:
        width: Features of a token.
        depth: Number of blocks.
        heads: Attention heads in a block.
        patch: Side of a patch in pixels; divides 28.
    """

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, patch: int = 7) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, 4 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images (N, 1, 28, 28)."""
        tokens = self.embed(image).flatten(2).transpose(1, 2) + self.position
        tokens = self.norm(self.blocks(tokens))
        logits: Tensor = self.classify(tokens.mean(1))
        return logits


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained.

    Attributes:
        build: Makes the untrained model.
        epochs: Passes over the training images.
        rate: The one-cycle schedule's peak learning rate.
        shift: Augmentation moves images by up to this many pixels.
    """

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    shift: int


RECIPES = {
    "lenet": Recipe(build_lenet, epochs=30, rate=2e-3, shift=1),
    "mobilenet": Recipe(build_mobilenet, epochs=8, rate=5e-3, shift=1),
    "vit": Recipe(VisionTransformer, epochs=14, rate=2e-3, shift=2),
}


# --- training -----------------------------------------------------------------


def train(recipe: Recipe, data: Path, epochs: int, seed: int) -> nn.Module:
    """Train one model; the last epoch's weights are kept, so no test data is used.

    Args:
        recipe: What to build and how to train it.
        data: The folder that holds the idx files.
        epochs: Passes over the training images.
        seed: Seeds the weights, the order of the images and the augmentation.

    Returns:
        The trained model, in evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in load_split(data, "train"))
    # Channels-last is about a third faster for convolutions on a CPU.
    model = recipe.build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.02)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        # The incomplete last batch is dropped: its statistics are noisier.
        batches = torch.randperm(len(images), generator=generator).split(BATCH)[: steps // epochs]
        for chosen in batches:
            optimizer.zero_grad()
            logits = model(augment(images[chosen], generator, recipe.shift))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        spent = time.perf_counter() - start
        print(f"  epoch {epoch + 1}/{epochs}: loss {total / len(batches):.4f}, {spent:.0f} s", flush=True)
    return model.eval()


# --- export and measurement ---------------------------------------------------


def export(model: nn.Module, path: Path) -> None:
    """Write a model as one ONNX file with a dynamic batch axis.

    Args:
        model: A trained model in evaluation mode.
        path: The file to write.
    """
    torch.onnx.export(
        model.to(memory_format=torch.contiguous_format),
        (torch.rand(2, 1, 28, 28),),
        str(path),
        # Most ONNX files in use come from this exporter. It leaves the shape
        # arithmetic in and writes no stack traces, which name local files.
        dynamo=False,
        # The model is in evaluation mode already; this keeps BatchNormalization.
        training=torch.onnx.TrainingMode.PRESERVE,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def accuracy(path: Path, images: FloatArray, labels: IntArray) -> float:
    """Measure an ONNX file's accuracy through ONNX Runtime.

    Args:
        path: The model.
        images: Images (N, 1, 28, 28) in [0, 1].
        labels: Their labels (N,).

    Returns:
        The share of images whose largest logit is the label's.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    correct = 0
    for first in range(0, len(images), 500):
        part = slice(first, first + 500)
        (logits,) = session.run(["logits"], {"image": images[part]})
        correct += int((np.asarray(logits).argmax(axis=1) == labels[part]).sum())
    return correct / len(images)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export and measure.

    Args:
        arguments: The command line; the process's own if None.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the idx .gz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--only", choices=RECIPES, help="train this model alone")
    parser.add_argument("--epochs", type=int, help="instead of each model's own number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    # One thread: sums in a fixed order, and models can train side by side.
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    write_samples(options.data, options.out)
    images, labels = load_split(options.data, "t10k")
    rows = []
    for name in [options.only] if options.only else RECIPES:
        recipe = RECIPES[name]
        print(name, flush=True)
        model = train(recipe, options.data, options.epochs or recipe.epochs, options.seed)
        path = options.out / f"fashion_{name}.onnx"
        export(model, path)
        weights = sum(parameter.numel() for parameter in model.parameters())
        rows.append((path.name, weights, path.stat().st_size, accuracy(path, images, labels)))
    print("| model | weights | bytes | accuracy |\n| --- | --- | --- | --- |")
    for file, weights, size, score in rows:
        print(f"| {file} | {weights:,} | {size:,} | {score:.4f} |")


if __name__ == "__main__":
    main()
