"""Towers, and importers of other projects' weights."""

from vlblocks.models.importers import Imported, import_hf_roberta, import_timm_vit, import_unimo2
from vlblocks.models.towers import ImageTower, JointStates, JointTower, TextTower

__all__ = [
    "ImageTower",
    "Imported",
    "JointStates",
    "JointTower",
    "TextTower",
    "import_hf_roberta",
    "import_timm_vit",
    "import_unimo2",
]
