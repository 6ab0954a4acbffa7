"""Bad input: each kind with a message that names the argument, what was expected and what came."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from carafe_plugin.ops import carafe
from carafe_plugin.ops._derivatives import raise_lack_of_memory

FEATURES = torch.zeros(2, 8, 5, 6)
MASKS = torch.zeros(2, 18, 10, 12)
GROUPS = "^group_size must be at least 1 and divide the channels, "
SHAPE = (
    r"^masks must have shape \(2, 18, 10, 12\): batch size of features, group_size \* kernel_size \*\* 2, output size "
    r"\(5 x 6 features scaled by 2/1\), got "
)


def check(error, message, *, features=FEATURES, masks=MASKS, kernel_size=3, group_size=2, scale_factor=2):
    with pytest.raises(error, match=message):
        carafe(features, masks, kernel_size, group_size, scale_factor)


def test_the_unchanged_case_is_right():
    assert carafe(FEATURES, MASKS, 3, 2, 2).shape == (2, 8, 10, 12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": np.zeros((2, 8, 5, 6))}, TypeError, r"^features must be a torch\.Tensor, got ndarray$"),
        ({"masks": [[0.0]]}, TypeError, r"^masks must be a torch\.Tensor, got list$"),
        ({"features": FEATURES.to_sparse()}, TypeError, r"^features must be a dense tensor, .* got torch\.sparse_coo$"),
        ({"masks": MASKS.to_mkldnn()}, TypeError, r"^masks must be a dense tensor, .* got torch\._mkldnn$"),
        ({"features": FEATURES.int()}, TypeError, r"^features: the dtype must be float64, .*, got torch\.int32$"),
        ({"masks": MASKS.bool()}, TypeError, r"^masks: the dtype must be float64, .*, got torch\.bool$"),
        ({"features": FEATURES[0]}, ValueError, r"^features must have 4 .*, got 3: \(8, 5, 6\) is not \(N, C, H, W\)$"),
        ({"masks": MASKS[..., None]}, ValueError, r"^masks must have 4 .*, got 5: \(2, 18, 10, 12, 1\) is not"),
        ({"masks": MASKS[:1]}, ValueError, SHAPE + r"\(1, 18, 10, 12\)$"),
        ({"masks": MASKS[:, :9]}, ValueError, SHAPE + r"\(2, 9, 10, 12\)$"),
        ({"masks": MASKS[:, :, :9]}, ValueError, SHAPE + r"\(2, 18, 9, 12\)$"),
        ({"masks": MASKS[..., :11]}, ValueError, SHAPE + r"\(2, 18, 10, 11\)$"),
        ({"kernel_size": 4}, ValueError, r"^kernel_size must be odd and at least 1, got 4$"),
        ({"kernel_size": -1}, ValueError, r"^kernel_size must be odd and at least 1, got -1$"),
        ({"kernel_size": 3.0}, TypeError, r"^kernel_size must be an int, got float$"),
        ({"group_size": 0}, ValueError, GROUPS + "got 0 for 8 channels$"),
        ({"group_size": "2"}, TypeError, r"^group_size must be an int, got str$"),
        ({"features": FEATURES[:, :7]}, ValueError, GROUPS + "got 2 for 7 channels$"),
        ({"scale_factor": 0}, ValueError, r"^scale_factor must be finite and greater than 0, got 0$"),
        ({"scale_factor": -2.0}, ValueError, r"^scale_factor must be finite and greater than 0, got -2\.0$"),
        ({"scale_factor": math.inf}, ValueError, r"^scale_factor must be finite and greater than 0, got inf$"),
        ({"scale_factor": math.nan}, ValueError, r"^scale_factor must be finite and greater than 0, got nan$"),
        ({"scale_factor": math.pi}, ValueError, r"^scale_factor must be a rational number that is written exactly"),
        ({"scale_factor": 1 / 3}, ValueError, r"did you mean fractions\.Fraction\(1, 3\)\?$"),
        ({"scale_factor": 1 / 300}, ValueError, r"did you mean fractions\.Fraction\(1, 300\)\?$"),
        ({"scale_factor": 0.1}, ValueError, r"did you mean fractions\.Fraction\(1, 10\)\?$"),
        ({"scale_factor": 1e-9}, ValueError, r"did you mean fractions\.Fraction\(1, 1000000000\)\?$"),
        (
            {"scale_factor": np.float64(0.1)},
            ValueError,
            r"got the float 0\.1, which .* fractions\.Fraction\(1, 10\)\?$",
        ),
        ({"scale_factor": 100.01}, ValueError, r"did you mean fractions\.Fraction\(10001, 100\)\?$"),
        ({"scale_factor": "2"}, TypeError, r"^scale_factor must be an int, a float or a fractions\.Fraction, got str$"),
        ({"scale_factor": True}, TypeError, r"got bool$"),
        ({"masks": MASKS.double()}, TypeError, r"same dtype outside autocast, got torch\.float32 and torch\.float64$"),
        ({"masks": MASKS.to("meta")}, ValueError, r"same device, got features on cpu, masks on meta$"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_python_check(changes, error, message):
    check(error, message, **changes)


def test_fractions_are_scales():
    assert carafe(FEATURES, MASKS[..., :3, :3], 3, 2, Fraction(1, 2)).shape == (2, 8, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": FEATURES[0]}, "features must have 4 dimensions, got 3"),
        ({"masks": MASKS.double()}, "features and kernels must have the same dtype, got float32 and float64"),
        ({"masks": MASKS[..., :11]}, r"kernels must have shape \(2, 18, 10, 12\), got \(2, 18, 10, 11\)"),
        ({"masks": MASKS.to("meta")}, "features and kernels must be on the same device, got cpu and meta"),
        ({"features": None}, "features must be a torch.Tensor, got NoneType"),
        ({"masks": None}, "kernels must be a torch.Tensor, got NoneType"),
        ({"features": FEATURES.to("meta"), "masks": MASKS.to("meta"), "down": 0}, "up and down must be at least 1"),
        ({"kernel_size": 2}, "kernel_size must be odd and at least 1, got 2"),
        ({"group_size": 3}, "group_size must be at least 1 and divide the channels, got 3 for 8 channels"),
        ({"up": 0}, "up and down must be at least 1, got 0 and 1"),
        ({"up": 2**62 + 1}, "up, down, height and width at most 2147483647, got 3, 4611686018427387905"),
        ({"kernel_size": 2**33 + 1}, "kernel_size must be at most 32767"),
        ({"features": FEATURES[:0].int(), "masks": MASKS[:0].int()}, "dtype must be float64"),
        ({"features": FEATURES.int(), "masks": MASKS.int()}, "dtype must be float64, float32, float16 or bfloat16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_kernels_check_for_themselves(changes, message):
    # torch.ops callers do not pass through the Python checks; nothing may read out of bounds for them either.
    given = {"features": FEATURES, "masks": MASKS, "kernel_size": 3, "group_size": 2, "up": 2, "down": 1, **changes}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.carafe_plugin.carafe(*given.values())


@pytest.mark.parametrize("fits", [False, True])
def test_lack_of_memory_has_torchs_own_type_on_a_gpu(fits):
    """Of the stable ABI's error, which says no more than that aten::empty failed."""
    error, like = RuntimeError("aten::empty failed"), torch.empty(2, 8, 10, 12, dtype=torch.float16, device="meta")

    class OnGpu:  # what is asked of a tensor there
        device = torch.device("cuda:0")

        def new_empty(self, shape, dtype):
            assert (tuple(shape), dtype) == ((2, 8, 10, 12), torch.float16)
            if not fits:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return self

        numel, element_size = (lambda self: 1920), (lambda self: 2)

    message = (
        "_carafe_grad_features needs scratch memory beside its result of 3840 bytes" if fits else "Tried to allocate"
    )
    with pytest.raises(torch.cuda.OutOfMemoryError, match=message):
        raise_lack_of_memory("_carafe_grad_features", OnGpu(), like, error)
    raise_lack_of_memory("carafe", FEATURES, like, error)  # a CPU's has no type of its own: the caller raises it again
