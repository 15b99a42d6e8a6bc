"""The package as a whole: what it exports, and what importing it costs."""

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys

import pytest

import unclip
from unclip import errors
from unclip.diffusion import scheduler
from unclip.settings import SAMPLERS

ALL = [
    "AutoregressivePrior",
    "BipartiteLatent",
    "Cancelled",
    "CheckpointError",
    "Concepts",
    "ConfigError",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DataError",
    "DiffusionProcess",
    "EmbeddingPrior",
    "EmbeddingPriorNetwork",
    "EmbeddingScaleWarning",
    "EmbeddingStatistics",
    "Embeddings",
    "ImageError",
    "ImagePipelineOutput",
    "InputError",
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyPipeline",
    "KandinskyPriorPipeline",
    "KandinskyPriorPipelineOutput",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintCombinedPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorPipeline",
    "Manipulator",
    "MissingDependencyError",
    "MissingFileError",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "PrincipalComponents",
    "PriorTransformer",
    "StableUnCLIPImageNormalizer",
    "StableUnCLIPImg2ImgPipeline",
    "StableUnCLIPPipeline",
    "TrainingError",
    "Translator",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UnCLIPImageInterpolationPipeline",
    "UnCLIPImageVariationPipeline",
    "UnCLIPInpaintPipeline",
    "UnCLIPPipeline",
    "UnCLIPScheduler",
    "UnCLIPTextInterpolationPipeline",
    "UnCLIPTextProjModel",
    "UnclipError",
    "UnknownCaptionWarning",
    "UnsafeFileError",
    "VQModel",
    "VectorPrior",
    "WeightsError",
    "__version__",
    "edit",
    "even_places",
    "interpolate",
    "path_at",
    "read_embeddings",
    "recorded_settings",
]


def test_all_is_what_it_was():
    assert sorted(unclip.__all__) == ALL
    assert dir(unclip) == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_name_resolves(name):
    value = getattr(unclip, name)
    assert name == "__version__" or value.__name__ == name
    assert getattr(unclip, name) is value


def test_every_name_has_a_home_and_a_type_checkers_import():
    assert sorted([*unclip._HOMES, "__version__"]) == sorted(ALL)
    source = inspect.getsource(unclip)
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__ =")]
    for name, home in unclip._HOMES.items():
        star = f"from unclip.{home} import *" in block and hasattr(importlib.import_module(f"unclip.{home}"), name)
        assert star or re.search(rf"from unclip\.{re.escape(home)} import \(?[^()]*\b{name}\b", block), name


def test_every_sampler_has_a_scheduler():
    assert {row.scheduler for row in SAMPLERS.values()} | {"DDPMScheduler"} == set(scheduler.SCHEDULERS)
    assert set(scheduler.__all__) == set(scheduler.SCHEDULERS)


def test_a_star_import_gives_them_all():
    found = {}
    exec("from unclip import *", found)
    assert set(ALL) <= set(found)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'unclip' has no attribute 'UnClipPipeline'"):
        unclip.UnClipPipeline  # noqa: B018
    with pytest.raises(ImportError):
        exec("from unclip import nothing_of_that_name", {})


IMPORT = """
import sys, time
started = time.process_time()
import unclip
seconds = time.process_time() - started
heavy = {"torch", "numpy", "PIL", "transformers", "diffusers", "accelerate", "huggingface_hub", "typer"}
print(seconds, *sorted(heavy & set(sys.modules)))
"""


def test_importing_is_instant_and_loads_nothing_heavy():
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        first, *heavy = run.stdout.split()
        assert heavy == []
        seconds.append(float(first))
    assert min(seconds) < 0.3


def test_an_error_can_be_named_without_torch():
    code = "from unclip import InputError; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def tree(text):
    """name → (parent, bases beside it), as a docstring draws them."""
    found, path, margin = {}, [], text.index("UnclipError") - text.rindex("\n", 0, text.index("UnclipError")) - 1
    for line in text.splitlines():
        drawn = re.match(r"^[\s│]*(?:[├└]── )?(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?(?:\s|$)", line)
        if drawn is None or not ("──" in line or line.strip() == "UnclipError"):
            continue
        depth = (drawn.start("name") - margin) // 4
        path = [*path[:depth], drawn["name"]]
        found[drawn["name"]] = (path[-2] if len(path) > 1 else None, drawn["also"])
    return found


def test_the_drawn_tree_of_errors_is_the_real_one():
    drawn = tree(errors.__doc__)
    real = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and not issubclass(cls, Warning)}
    assert drawn.keys() == real.keys()
    for name, cls in real.items():
        parent, also = drawn[name]
        bases = [base.__name__ for base in cls.__bases__]
        assert bases[0] == (parent or "Exception"), name
        assert bases[1:] == ([also] if also else []), name
        assert cls.__doc__
    assert set(real) <= set(ALL)


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("unclip") == unclip.__version__
