"""What carafe_plugin/models says of other libraries: of what they define, and without them."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from carafe_plugin.models import libraries

#: Whose interpolations are of masks, scores, embeddings, depths or images, or of features by a scale that changes.
NOT = {
    "segmentation_models_pytorch": ("ASPPPooling", "FPABlock", "PSPBlock", "PSPModule", "DPTSegmentationHead"),
    "timm": ("GhostModuleV2", "GatherExcite", "Hiera", "MobileVitBlock", "Block"),
    "torchvision": ("ASPPPooling", "KeypointRCNNPredictor"),
    "transformers": (
        *(
            "BeitRelativePositionBias",
            "UperNetForSemanticSegmentation",
            "UperNetPyramidPoolingModule",
            "DetrConvEncoder",
        ),
        *(
            "Mask2FormerMaskPredictor",
            "RTDetrConvEncoder",
            "ViltEmbeddings",
            "TvpFramePadPrompter",
            "DepthProPatchEncoder",
        ),
        *(
            "PromptDepthAnythingFeatureFusionLayer",
            "DepthAnythingDepthEstimationHead",
            "Sam2Model",
            "HieraPatchEmbeddings",
        ),
    ),
    "ultralytics": ("MaskDownSampler", "PromptEncoder", "SAM2Model", "Hiera", "SemanticSegment", "Depth"),
}


def interpolating(library):
    """Names of the classes of an installed library that call something named interpolate."""
    spec = importlib.util.find_spec(library)
    if spec is None:
        pytest.skip(f"{library} is not installed")
    found = set()
    for path in Path(spec.origin).parent.rglob("*.py"):
        text = path.read_text()
        if "interpolate(" not in text or path.name.startswith("modular_"):  # of which transformers generates the others
            continue
        for each in ast.walk(ast.parse(text)):
            calls = (ast.unparse(part.func) for part in ast.walk(each) if isinstance(part, ast.Call))
            if isinstance(each, ast.ClassDef) and any(call.rpartition(".")[2] == "interpolate" for call in calls):
                found.add(each.name)
    return found


@pytest.mark.parametrize("library", libraries.KNOWN)
def test_patterns_are_of_classes_that_interpolate(library):
    classes = interpolating(library)
    patterns = importlib.import_module(f"carafe_plugin.models.{library}").FEATURES
    for pattern in patterns:
        assert [name for name in classes if fnmatchcase(name, pattern)], f"{pattern} matches no class of this version"
    for name in NOT[library]:
        assert name in classes, f"{name}: of another version?"
        assert not [pattern for pattern in patterns if fnmatchcase(name, pattern)], name


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_none_is_imported():
    """By this package, or by a conversion of a model that is none of theirs."""
    result = python(
        "import sys, torch; from carafe_plugin import convert\n"
        "import carafe_plugin.models.ultralytics\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Upsample(scale_factor=2))\n"
        "convert(model, torch.rand(1, 3, 8, 8))\n"
        f"print([name for name in {libraries.KNOWN!r} if name in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_register_without_the_library():
    result = python(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ultralytics': raise ModuleNotFoundError('none', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from carafe_plugin.models import ultralytics; ultralytics.register()"
    )
    expected = (
        "ImportError: carafe_plugin.models.ultralytics needs ultralytics, which is not installed: install ultralytics"
    )
    assert result.stderr.strip().endswith(expected), result.stderr
