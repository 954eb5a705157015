"""The families of models that other people's files hold. To add one: its file, and its name here."""

from ldm.families.family import Family
from ldm.families.sd1 import SD1
from ldm.families.sd2 import SD2
from ldm.families.sdxl import REFINER, SDXL
from ldm.text.tower import TextConfig

__all__ = ["FAMILIES", "KNOWN", "Family", "family_of"]

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL, REFINER)}
KNOWN = ", ".join(family.title for family in FAMILIES.values())


def family_of(text: TextConfig) -> Family:
    """The family whose files a model with this text side can be written as; our own small towers go as SD 1 or 2."""
    return next((family for family in FAMILIES.values() if family.tells(text)), SD1)
