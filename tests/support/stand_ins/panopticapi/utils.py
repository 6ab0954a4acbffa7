"""A segment's id and its colour in a PNG: id = R + 256 G + 65536 B."""

import numpy as np


def rgb2id(color):
    return color.astype(np.int64) @ np.array([1, 256, 256**2])


def id2rgb(id_map):
    return np.stack([id_map // 256**i % 256 for i in range(3)], -1)
