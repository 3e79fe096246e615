"""Finds and masks the secrets in command lines, titles and paths."""

from gpumon_core.attribution.secrets.mask import Mask
from gpumon_core.attribution.secrets.texts import STARS
from gpumon_core.attribution.secrets.words import is_secret

__all__ = ["STARS", "Mask", "is_secret"]
