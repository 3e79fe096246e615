"""By what use can be added up. Apart from its reading, which needs pandas: help texts and descriptions do not."""

from __future__ import annotations

from typing import Literal, get_args

Dimension = Literal["user", "container", "workload", "model", "process", "gpu", "job"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
