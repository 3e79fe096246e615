"""Figures as Plotly understands them: what it does not know in one fails the test."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import plotly.graph_objects as go

from gpumon_core import figures


def drawn(figure: figures.Figure) -> go.Figure:
    """The figure after its way through the text that the browser gets."""
    sent = json.loads(figures.as_json(figure))
    arrays = [_array(array) for array in sent.pop("arrays")]
    return go.Figure(_whole(sent, arrays))


def _array(sent: dict[str, str]) -> np.ndarray[Any, Any]:
    values = np.frombuffer(base64.b64decode(sent["bdata"]), dtype=sent["dtype"])
    return values.reshape([int(size) for size in sent["shape"].split(",")]) if "shape" in sent else values


def _whole(value: Any, arrays: list[Any]) -> Any:
    if isinstance(value, list):
        return [_whole(inner, arrays) for inner in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    return {key: _whole(inner, arrays) for key, inner in value.items()}
