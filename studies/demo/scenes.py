"""Scenes of textured figures with thin and detailed outlines: what they contain, and how they are painted.

:func:`describe_scene` decides what a scene contains, :func:`paint_scene` turns that description into an image and a map
that says which object owns each pixel. ``generate_scenes.py`` stores them as datasets.

Example:
    >>> scene = next(iter(scenes(seed=0, split="train", count=1, size=160)))
    >>> image, owner = paint_scene(scene)
    >>> image.shape, owner.shape, owner.max() < len(scene.objects)
    ((160, 160, 3), (160, 160), np.True_)
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

Colour = Sequence[float]  # RGB in [0, 1]

SPLITS = ("train", "val")
#: Every object keeps at least this many visible pixels, and this share of what it would show alone.
MIN_PIXELS, MIN_VISIBLE = 20, 0.4
#: The most figures of a scene by default; the least is a quarter of it.
FIGURES = 8
#: Bounds of a figure's radius, of which one pair is drawn with these odds, as shares of the scene's size.
RADII, SHARES = ((0.04, 0.065), (0.065, 0.125), (0.125, 0.23)), (0.25, 0.4, 0.35)
SUPERSAMPLING = 4
HUE_DEVIATION = 0.06
#: The coloured light has the colours of a grid of so many cells, and is smooth between them.
LIGHT_CELLS = 3
#: Where in each block of 20 scenes the crowds and the scenes without objects come, so that small splits have both.
CROWDED, EMPTY = (3, 11, 15), (6,)


# ------------------------------------------------------------------------------------------------------------- outlines
def star(u: np.ndarray, v: np.ndarray, detail: float) -> np.ndarray:
    points, waist = 5 + round(2 * detail), 0.42 - 0.08 * detail
    sector = np.pi / points
    r, a = np.hypot(u, v), np.abs((np.arctan2(v, u) + sector) % (2 * sector) - sector)
    # Inside of the edge that runs from the tip (1, 0) to the waist, in the sector folded onto one half.
    edge_x, edge_y = waist * np.cos(sector) - 1, waist * np.sin(sector)
    return edge_x * r * np.sin(a) - edge_y * (r * np.cos(a) - 1) >= 0


def ring(u: np.ndarray, v: np.ndarray, detail: float) -> np.ndarray:
    r = np.hypot(u, v)
    return (r <= 1) & (r >= 0.62 + 0.14 * detail)


def cross(u: np.ndarray, v: np.ndarray, detail: float) -> np.ndarray:
    arm = 0.26 - 0.1 * detail
    return ((np.abs(u) <= arm) & (np.abs(v) <= 1)) | ((np.abs(v) <= arm) & (np.abs(u) <= 1))


def crescent(u: np.ndarray, v: np.ndarray, detail: float) -> np.ndarray:
    return (np.hypot(u, v) <= 1) & (np.hypot(u - 0.5 + 0.15 * detail, v) >= 0.88)


def gear(u: np.ndarray, v: np.ndarray, detail: float) -> np.ndarray:
    r, teeth = np.hypot(u, v), 7 + round(4 * detail)
    return (r >= 0.3) & (r <= np.where(np.cos(teeth * np.arctan2(v, u)) > 0.1, 1.0, 0.74))


def key(u: np.ndarray, v: np.ndarray, detail: float) -> np.ndarray:
    bow = np.hypot(u + 0.58, v)
    shaft = (u >= -0.3) & (u <= 1) & (np.abs(v) <= 0.11)
    bit = (v >= 0) & (v <= 0.42) & (((u >= 0.82) & (u <= 1)) | ((u >= 0.4 + 0.1 * detail) & (u <= 0.6 + 0.1 * detail)))
    return ((bow <= 0.42) & (bow >= 0.2)) | shaft | bit


#: Each says which points of the plane belong to the category's figure, whose extent is the unit circle.
OUTLINES = {outline.__name__: outline for outline in (star, ring, cross, crescent, gear, key)}
CATEGORIES = tuple(OUTLINES)


# ---------------------------------------------------------------------------------------------------- description
@dataclass(frozen=True)
class Figure:
    """One drawn figure. Lengths are in pixels, the angle in radians."""

    x: float
    y: float
    radius: float
    angle: float
    detail: float  # in [0, 1]: how thin, how many points or teeth
    colour: Colour
    accent: Colour


@dataclass(frozen=True)
class SceneObject:
    """What one annotation describes: a single figure, or a crowd of figures of one category."""

    category: str
    figures: Sequence[Figure]
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """A square scene of ``size`` pixels; ``objects`` are listed from back to front.

    The background is two ``colours`` mixed by smooth noise, a periodic pattern over them, and grain.
    """

    size: int
    colours: Sequence[Colour]
    pattern: str  # 'plain', 'stripes', 'checks' or 'dots'
    period: float
    angle: float
    strength: float
    noise_seed: int
    objects: list[SceneObject] = field(default_factory=list)


def _describe_figure(
    rng: np.random.Generator, category: str, position: np.ndarray, radius: float, scene: Scene
) -> Figure:
    # A figure that nobody could tell from its background would be noise in the annotations.
    for _ in range(20):
        # Every category has its usual hue, as things have; neighbours' hues overlap, so that shape counts too.
        hue = (CATEGORIES.index(category) / len(CATEGORIES) + rng.normal(0, HUE_DEVIATION)) % 1
        colour = colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 1.0), rng.uniform(0.3, 1.0))
        if min(np.abs(np.subtract(colour, other)).sum() for other in scene.colours) > 0.8:
            break
    brightness = rng.uniform(0.7, 1.3)
    return Figure(
        x=float(position[0]),
        y=float(position[1]),
        radius=radius,
        angle=rng.uniform(-0.6, 0.6),
        detail=rng.uniform(),
        colour=colour,
        accent=[min(channel * brightness, 1.0) for channel in colour],
    )


def _describe_crowd(rng: np.random.Generator, scene: Scene) -> SceneObject:
    category, size = str(rng.choice(CATEGORIES)), scene.size
    centre = rng.uniform(0.25 * size, 0.75 * size, 2)
    radius = max(0.05 * size, 5.0)
    positions = np.clip(centre + rng.normal(0, 0.09 * size, (int(rng.integers(9, 15)), 2)), 0, size)
    figures = [
        _describe_figure(rng, category, position, radius * rng.uniform(0.8, 1.2), scene) for position in positions
    ]
    return SceneObject(category, figures, crowd=True)


def describe_scene(
    rng: np.random.Generator, size: int, figures: int = FIGURES, crowded: bool = False, empty: bool = False
) -> Scene:
    """Decide what a square scene of ``size`` pixels contains: objects visible well enough to be annotated.

    ``figures`` is the most single figures, of which a full scene refuses some; ``crowded`` adds a crowd of equals.
    """
    scene = Scene(
        size,
        colours=[colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.4), rng.uniform(0.25, 0.75)) for _ in range(2)],
        pattern=str(rng.choice(["plain", "stripes", "checks", "dots"])),
        period=rng.uniform(6, 24),
        angle=rng.uniform(0, np.pi),
        strength=rng.uniform(0.04, 0.12),
        noise_seed=int(rng.integers(2**31)),
    )
    objects = scene.objects
    owner = np.full((size, size), -1)
    alone: list[int] = []  # how many pixels each object would show with nothing before it

    def add(candidate: SceneObject) -> None:
        """Put the candidate before the others unless that hides one of them, or it is hardly inside the image."""
        after = owner.copy()
        _claim(after, candidate, len(objects))
        shown = np.bincount(after[after >= 0], minlength=len(objects) + 1)
        needed = [max(MIN_PIXELS, MIN_VISIBLE * pixels) for pixels in alone] + [MIN_PIXELS]
        if np.all(shown >= needed):
            owner[:] = after
            objects.append(candidate)
            alone.append(int(shown[-1]))

    while crowded and not empty and not objects:
        add(_describe_crowd(rng, scene))
    wanted = 0 if empty else int(rng.integers(max(figures // 4, 1), figures + 1))
    for _ in range(4 * wanted):  # a full scene may refuse some: it then has fewer, never hidden, objects
        if len(objects) >= wanted:
            break
        radius = max(rng.uniform(*rng.choice(RADII, p=SHARES)) * size, 4.5)
        if objects and rng.uniform() < 0.4:  # beside an earlier figure, so that occlusion is common
            near = objects[rng.integers(len(objects))].figures[0]
            position = np.array([near.x, near.y]) + rng.normal(0, near.radius, 2)
        else:
            position = rng.uniform(0, size, 2)
        # At most half of the figure's width lies outside.
        position = np.clip(position, radius * 0.2, size - radius * 0.2)
        category = str(rng.choice(CATEGORIES))
        add(SceneObject(category, [_describe_figure(rng, category, position, radius, scene)]))
    return scene


# ------------------------------------------------------------------------------------------------------- painting
def _coverage(category: str, figure: Figure, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window (rows, columns) that the figure touches, and which share of each pixel there it covers."""
    reach = figure.radius * 1.1 + 1  # the key's bit and the cross's corners reach a little over the unit circle
    centre = np.array([figure.y, figure.x])
    low, high = np.clip([np.floor(centre - reach), np.ceil(centre + reach)], 0, size).astype(int)
    rows, columns = [
        (np.arange(a * SUPERSAMPLING, b * SUPERSAMPLING) + 0.5) / SUPERSAMPLING for a, b in zip(low, high, strict=True)
    ]
    x, y = (columns[None, :] - figure.x) / figure.radius, (rows[:, None] - figure.y) / figure.radius
    cos, sin = np.cos(figure.angle), np.sin(figure.angle)
    inside = OUTLINES[category](cos * x + sin * y, cos * y - sin * x, figure.detail)
    height, width = high - low
    coverage = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean((1, 3))
    return (slice(low[0], high[0]), slice(low[1], high[1])), coverage


def _claim(owner: np.ndarray, candidate: SceneObject, index: int) -> None:
    """Write ``index`` where the object covers at least half of a pixel."""
    for figure in candidate.figures:
        window, coverage = _coverage(candidate.category, figure, len(owner))
        owner[window][coverage >= 0.5] = index


def _enlarge(cells: np.ndarray, size: int) -> np.ndarray:
    """A grid of values as a smooth map of ``size`` pixels."""
    return np.asarray(Image.fromarray(cells.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _paint_background(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    size = scene.size
    mix = 0.65 * _enlarge(rng.uniform(0, 1, (5, 5)), size) + 0.35 * _enlarge(rng.uniform(0, 1, (20, 20)), size)
    first, second = np.array(scene.colours)
    image = first + np.clip(mix, 0, 1)[..., None] * (second - first)
    y, x = np.mgrid[:size, :size] * (2 * np.pi / scene.period)
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    pattern = {
        "plain": np.zeros_like(u),
        "stripes": np.sign(np.sin(u)),
        "checks": np.sign(np.sin(u) * np.sin(v)),
        "dots": np.where(np.sin(u) * np.sin(v) > 0.5, 1.0, -0.3),
    }[scene.pattern]
    return image + scene.strength * pattern[..., None]


def paint_scene(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 (size, size, 3) in RGB, and the owner map, int (size, size).

    The owner is the index in ``scene.objects`` of what is seen in a pixel, -1 for the background: masks are disjoint.
    """
    rng = np.random.default_rng(scene.noise_seed)
    image = _paint_background(rng, scene)
    owner = np.full((scene.size, scene.size), -1)
    for index, item in enumerate(scene.objects):
        _claim(owner, item, index)
        for figure in item.figures:
            window, coverage = _coverage(item.category, figure, scene.size)
            y, x = np.mgrid[window]
            # Two tones that change along the figure's own axis, and a little shading towards its rim.
            tone = 0.5 + 0.5 * np.sin(
                ((x - figure.x) * np.sin(figure.angle) + (y - figure.y) * np.cos(figure.angle)) * 6 / figure.radius
            )
            paint = np.array(figure.colour) + tone[..., None] * (np.array(figure.accent) - figure.colour)
            image[window] += coverage[..., None] * (paint - image[window])
    return _to_bytes(image + rng.normal(0, 0.02, image.shape)), owner


def paint_lit_scene(scene: Scene) -> np.ndarray:
    """Paint a scene, uint8 (size, size, 3) in RGB, in coloured light that changes over the image, as in photographs.

    One colour everywhere is then a poor guess at what a hole hides, and its surroundings are a good one.
    """
    rng = np.random.default_rng([scene.noise_seed, 1])  # not the grain's numbers
    cells = rng.uniform(0.15, 0.85, (LIGHT_CELLS, LIGHT_CELLS, 3))
    light = np.stack([_enlarge(cells[..., channel], scene.size) for channel in range(3)], axis=-1)
    image = paint_scene(scene)[0] / 255
    return _to_bytes(light + image - image.mean((0, 1)))


def scenes(seed: int, split: str, count: int, size: int, figures: int = FIGURES) -> Iterator[Scene]:
    """The scenes of one split, in order."""
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        yield describe_scene(rng, size, figures, crowded=index % 20 in CROWDED, empty=index % 20 in EMPTY)
