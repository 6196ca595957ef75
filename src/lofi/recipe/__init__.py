"""The recipe: everything a training run was asked for, checked before anything starts.

Knows  the keys of DESIGN section 2, their types and ranges, where each value came from, and how to say what is wrong.
Knows not  torch, models or data: whether a file exists or a module is there is for the rooms that open them.
Rejected  pydantic's own error text (it names neither the file's line nor the nearest key), and defaults in the command
    line's flags (several peers keep theirs in three places): a default lives once, in its section, LoRA's own in
    `lofi.adapters.config.LoraConfig`.
"""

from __future__ import annotations

from lofi.recipe.build import load_recipe, make_recipe
from lofi.recipe.sections import DataSection, LoraSection, Recipe, TrainSection

__all__ = ["DataSection", "LoraSection", "Recipe", "TrainSection", "load_recipe", "make_recipe"]
