"""Two images with a box each, as ultralytics reads them."""

import numpy as np


def write_data(folder):
    """``data.yaml`` and what it names."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index in range(2):
        Image.fromarray(rng.integers(255, size=(64, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames:\n  0: thing\n")
    return data
