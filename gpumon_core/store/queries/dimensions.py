"""The dimensions by which use can be added up. In a module without pandas, for help texts and descriptions."""

from __future__ import annotations

from typing import Literal, get_args

Dimension = Literal["user", "container", "workload", "model", "process", "gpu", "job"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
