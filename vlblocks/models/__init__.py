"""Towers, and importers of other projects' weights."""

from vlblocks.models.importers import (
    Imported,
    ImportReport,
    import_hf_roberta,
    import_timm_vit,
    import_unimo2,
    load_imported,
)
from vlblocks.models.paddle import read_paddle
from vlblocks.models.towers import ImageTower, JointStates, JointTower, TextTower

__all__ = [
    "ImageTower",
    "ImportReport",
    "Imported",
    "JointStates",
    "JointTower",
    "TextTower",
    "import_hf_roberta",
    "import_timm_vit",
    "import_unimo2",
    "load_imported",
    "read_paddle",
]
