"""A run is followed by the trackers that its recipe names.

Knows accelerate's trackers and their settings; knows nothing of training. Called by the trainer.
"""

from collections.abc import Iterable
from pathlib import Path

import accelerate
from accelerate import Accelerator
from accelerate.utils import LoggerType

from unclip.errors import ConfigError
from unclip.training.recipe import Recipe, as_dict, flat


def check_trackers(names: Iterable[str]) -> None:
    """Raises: ConfigError for a tracker that the installed accelerate is too old for."""
    known = [kind.value for kind in LoggerType]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"trackers has {name!r}, which accelerate {accelerate.__version__} does not know: "
                "pip install --upgrade accelerate, or leave it out"
            )


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path, run_id: str | None) -> None:
    """Tell the recipe's trackers its settings.

    Args:
        accelerator: made with them.
        recipe: the run's.
        folder: the run's, whose name is that of the run.
        run_id: the same for all parts of a run that was interrupted, so that they stay one run for the tracker.
    """
    settings = flat(as_dict(recipe))
    plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.items()}
    name = folder.absolute().name
    how = {
        "wandb": {"name": name, "dir": str(folder), "id": run_id, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow"},
    }
    accelerator.init_trackers("unclip", config=plain, init_kwargs=how)
