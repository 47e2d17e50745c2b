"""The configurations that come with the package: found by name from any folder."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from maskrcnn.errors import InputError
from maskrcnn.paths import expand

SUFFIXES = (".yaml", ".yml")

_PACKAGE = Path(__file__).parents[1]
# In a checkout, the recipes are the folder `configs` beside the package.
RECIPES = next(path for path in (_PACKAGE / "recipes", _PACKAGE.parent / "configs") if path.is_dir())


def find_config(name: Path) -> Path:
    """Return the configuration file that a path or the name of a recipe stands for.

    A file wins over a recipe. The name of a recipe has no suffix: `coco/mask_rcnn_r50_fpn_1x`.

    Raises:
        InputError: neither exists, and `name` has no suffix. A missing file with a suffix is reported by its reader.
    """
    name = expand(name)
    if name.suffix in SUFFIXES or os.path.lexists(name):
        return name
    recipe = RECIPES / f"{name}.yaml"
    if os.path.isfile(recipe):
        return recipe
    names = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    similar = get_close_matches(name.as_posix(), names, n=1)
    hint = f"; did you mean '{similar[0]}'?" if similar else ""
    raise InputError(f"{name}: neither a file nor the name of a recipe{hint}")
