"""The stored figures: per group one array file, in which each configuration is one flat vector beside one index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent

Values = dict[str, np.ndarray]  # of one configuration, by name


def save(group: str, goldens: dict[str, Values]) -> None:
    index = {name: {key: list(value.shape) for key, value in values.items()} for name, values in goldens.items()}
    vectors = {name: np.concatenate([value.ravel() for value in values.values()]) for name, values in goldens.items()}

    np.savez_compressed(FOLDER / f'{group}.npz', index=np.frombuffer(json.dumps(index).encode(), np.uint8), **vectors)


def load(group: str) -> dict[str, Values]:
    with np.load(FOLDER / f'{group}.npz') as file:
        index = json.loads(file['index'].tobytes())
        return {name: unpack(file[name], shapes) for name, shapes in index.items()}


def unpack(vector: np.ndarray, shapes: dict[str, list[int]]) -> Values:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    parts = np.split(vector, ends[:-1])
    return {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts)}
