"""What a student is compared by with its teacher: pure functions of tensors, each a scalar with a gradient.

The teacher is never differentiated. Types narrower than float32 are computed in float32.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from onnxcomp.errors import DataError, ModelError

__all__ = [
    "attention_maps",
    "feature_maps",
    "graph_based",
    "hard_targets",
    "log_probabilities",
    "normalised_mse",
    "relational",
    "soft_targets",
]

CONSTANT = 1e-10
"""A teacher's variance of less than this share of its mean square is that of a constant, which float32 rounds."""

TINY = 1e-12
"""Below this share of the mean square, the squared distance of two samples is that of one and the same."""

LEAST_PROBABILITY = 1e-12
"""The floor of probabilities before their logarithm is taken."""

MAX_ANGLE_SAMPLES = 64
"""Angles are taken among so many samples: 64 of them have 250,000 angles, 2 MB a tensor of them."""

HUBER_DELTA = 1.0


# --- classes ----------------------------------------------------------------------------------------------------------


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of class probabilities at a temperature, times its square (Hinton et al. 2015, section 2).

    KL(softmax(teacher / T) || softmax(student / T)) * T^2 over the last axis, the mean over all other positions. The
    factor keeps the gradients as large as those of `hard_targets` whatever T is. Classes that both mask with -inf count
    for nothing.

    Args:
        student: Logits or log-probabilities.
        teacher: The same of the teacher, in the same shape.
        temperature: How much probabilities are evened out.

    Raises:
        ModelError: The shapes differ.

    Example:
        >>> soft_targets(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 2.0).item().__round__(4)
        0.4438
    """
    student, teacher = _pair(student, teacher)
    _same_shape(student, teacher)
    wanted = functional.log_softmax(teacher / temperature, dim=-1)
    got = functional.log_softmax(student / temperature, dim=-1)
    share = wanted.exp()
    apart = torch.where(share > 0, wanted - got, torch.zeros_like(got))  # 0 * (-inf + inf) would be no number
    return (share * apart).sum(-1).mean() * temperature**2


def hard_targets(student: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy with labels, the mean over all positions; labels of -100 count for nothing.

    Args:
        student: Logits or log-probabilities, the classes on the last axis.
        labels: Class numbers, in the shape of the other axes.

    Raises:
        DataError: The labels are of another shape, not whole numbers or not classes.
    """
    student = _wide(student)
    classes = student.shape[-1]
    if labels.is_floating_point() or labels.shape != student.shape[:-1]:
        got = f"{labels.dtype} of shape {list(labels.shape)}".removeprefix("torch.")
        message = f"labels: expected whole numbers of shape {list(student.shape[:-1])}, got {got}"
        raise DataError(message)
    numbers = labels.long().reshape(-1)
    counted = numbers != _IGNORED
    wrong = numbers[counted & ((numbers < 0) | (numbers >= classes))]
    if len(wrong):
        message = f"labels: expected classes from 0 to {classes - 1}, got {int(wrong[0])}"
        raise DataError(message)
    total = functional.cross_entropy(
        student.reshape(-1, classes), numbers, reduction="sum", ignore_index=_IGNORED
    )  # the mean of no labels would be no number
    return total / counted.sum().clamp_min(1)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logarithms of probabilities with a floor, which `soft_targets` and `hard_targets` take as logits."""
    return _wide(probabilities).clamp_min(LEAST_PROBABILITY).log()


# --- values -----------------------------------------------------------------------------------------------------------


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error over the teacher's variance: 1 is as far off as the mean of all would be.

    A teacher that is constant is divided by its mean square, one that is zero by nothing. Where the teacher is not
    finite (masks of -inf) nothing is compared; a student that is not finite elsewhere makes the loss so too.

    Raises:
        ModelError: The shapes differ.

    Example:
        >>> normalised_mse(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0])).item()
        2.0
    """
    student, teacher = _pair(student, teacher)
    _same_shape(student, teacher)
    held = torch.isfinite(teacher)
    count = held.sum().clamp_min(1)
    kept = torch.where(held, teacher, torch.zeros_like(teacher))
    square = kept.square().sum() / count
    mean = kept.sum() / count
    variance = torch.where(held, kept - mean, torch.zeros_like(kept)).square().sum() / count
    scale = torch.where(variance > CONSTANT * square, variance, square)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    error = torch.where(held, student - kept, torch.zeros_like(kept)).square().sum() / count
    return error / scale


# --- inner tensors ----------------------------------------------------------------------------------------------------


def feature_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """The normalised squared error of inner tensors; where channels were pruned, the distance of attention maps.

    What has as many channels in both is compared value by value (`normalised_mse`). Nothing tells which channels of a
    narrower student belong to which of the teacher's: those are compared by `attention_maps`, which adds them up.

    Raises:
        ModelError: The shapes differ in more than the channels.
    """
    if student.shape == teacher.shape:
        return normalised_mse(student, teacher)
    return attention_maps(student, teacher)


def attention_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """The distance of activation-based attention maps (Zagoruyko & Komodakis 2017, section 3.1).

    A map is the mean over channels of squared activations, flattened and divided by its L2 norm. The squared distance
    is summed over positions, so that it is 0 to 2 for maps of any size, and its mean over the batch is taken. Channels
    are axis 1 of rank 4 (for attention weights, the heads) and the last axis of rank 3; their counts may differ.

    Raises:
        ModelError: The rank is neither 3 nor 4, or batch or positions differ.
    """
    student, teacher = _pair(student, teacher)
    if student.ndim != teacher.ndim or student.ndim not in _CHANNEL_AXIS:
        _refuse("attention maps need tensors of rank 3 or 4", student, teacher)
    maps = [_attention(student), _attention(teacher)]
    if maps[0].shape != maps[1].shape:
        _refuse("attention maps need the same batch and positions", student, teacher)
    one, other = (_unit(each.flatten(1)) for each in maps)
    return (one - other).square().sum(1).mean()


def relational(
    student: Tensor, teacher: Tensor, *, distances: float = 1.0, angles: float = 2.0, samples: int = MAX_ANGLE_SAMPLES
) -> Tensor:
    """Distances and angles between the samples of a batch (relational knowledge distillation, Park et al. 2019).

    Section 3 of the paper: distances of pairs over their mean, cosines of the angles of triplets, each with Huber loss
    and averaged. Sizes of embeddings may differ; all axes but the first are flattened. Distances take the whole batch.
    Angles take memory with the cube of the batch, so that only its first `samples` have them. Fewer samples than two
    (three for angles) have no relations: 0.

    Args:
        student: Embeddings, a sample a row.
        teacher: Embeddings of the same samples.
        distances: Weight of the distances.
        angles: Weight of the angles; the paper takes twice that of distances.
        samples: How many samples of the batch angles are taken among.

    Raises:
        ModelError: The batches differ.
    """
    student, teacher = _pair(student, teacher)
    _same_batch(student, teacher)
    one, other = _gram(student), _gram(teacher)
    count = len(one)
    result = one.sum() * 0
    if count >= 2 and distances:
        pairs = torch.triu_indices(count, count, 1, device=student.device)
        got, wanted = (_mean_one(_distances(gram)[pairs[0], pairs[1]]) for gram in (one, other))
        result = result + distances * functional.huber_loss(got, wanted, delta=HUBER_DELTA)
    count = min(count, samples)
    if count >= 3 and angles:
        number = torch.arange(count, device=student.device)
        corner, left, right = number[:, None, None], number[None, :, None], number[None, None, :]
        held = (corner != left) & (corner != right) & (left != right)
        got, wanted = (_cosines(gram[:count, :count])[held] for gram in (one, other))
        result = result + angles * functional.huber_loss(got, wanted, delta=HUBER_DELTA)
    return result.to(student.dtype)


def graph_based(student: Tensor, teacher: Tensor) -> Tensor:
    """The distance of the similarities between samples (similarity-preserving distillation, Tung & Mori 2019).

    Batch x batch Gram matrices, each row over its L2 norm; the squared Frobenius norm of their difference over the
    square of the batch. Sizes may differ; all axes but the first are flattened.

    Raises:
        ModelError: The batches differ.
    """
    student, teacher = _pair(student, teacher)
    _same_batch(student, teacher)
    one, other = (each.flatten(1) for each in (student, teacher))
    return (_unit(one @ one.T) - _unit(other @ other.T)).square().sum() / len(one) ** 2


# --- parts ------------------------------------------------------------------------------------------------------------

_IGNORED = -100
_CHANNEL_AXIS = {3: 2, 4: 1}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = _wide(student)
    return student, teacher.detach().to(student)


def _unit(rows: Tensor) -> Tensor:
    """Rows over their L2 norms; a row of zeros stays so, and has no gradient that is as large as one over nothing."""
    square = rows.square().sum(-1, keepdim=True)
    zero = square <= torch.finfo(rows.dtype).tiny
    return torch.where(zero, torch.zeros_like(rows), rows / torch.where(zero, torch.ones_like(square), square).sqrt())


def _attention(tensor: Tensor) -> Tensor:
    # A map's scale is divided out: taken out first, it cannot overflow or vanish when it is squared twice.
    largest = tensor.detach().abs().flatten(1).amax(1).clamp_min(torch.finfo(tensor.dtype).tiny)
    scaled = tensor / largest.reshape(-1, *[1] * (tensor.ndim - 1))
    return scaled.square().mean(_CHANNEL_AXIS[tensor.ndim])


def _gram(tensor: Tensor) -> Tensor:
    """Products of all pairs of samples around their mean; in float64, since distances are small differences of them."""
    rows = tensor.reshape(len(tensor), -1).double()
    rows = rows - rows.mean(0, keepdim=True)
    scale = rows.detach().square().sum(1).mean()
    return rows @ rows.T / torch.where(scale > 0, scale, torch.ones_like(scale))


def _root(square: Tensor) -> tuple[Tensor, Tensor]:
    """The root of squared distances, and where there is any distance."""
    there = square > TINY
    return torch.where(
        there, torch.where(there, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square)
    ), there


def _distances(gram: Tensor) -> Tensor:
    squares = gram.diagonal()
    return _root(squares[:, None] + squares[None, :] - 2 * gram)[0]


def _mean_one(distances: Tensor) -> Tensor:
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean))


def _cosines(gram: Tensor) -> Tensor:
    """The cosine of the angle at corner j between i and k, as [j, i, k], out of products of pairs."""
    squares = gram.diagonal()
    products = gram[None, :, :] - gram[:, :, None] - gram[:, None, :] + squares[:, None, None]
    lengths, there = _root(squares[:, None] + squares[None, :] - 2 * gram)
    lengths = torch.where(there, lengths, torch.ones_like(lengths))
    cosines = products / (lengths[:, :, None] * lengths[:, None, :])
    return torch.where(there[:, :, None] & there[:, None, :], cosines, torch.zeros_like(cosines))


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        _refuse("student and teacher must have the same shape", student, teacher)


def _same_batch(student: Tensor, teacher: Tensor) -> None:
    if not student.ndim or not teacher.ndim or len(student) != len(teacher):
        _refuse("student and teacher must have the same batch on axis 0", student, teacher)


def _refuse(expected: str, student: Tensor, teacher: Tensor) -> NoReturn:
    message = f"{expected}, got {list(student.shape)} and {list(teacher.shape)}"
    raise ModelError(message)
