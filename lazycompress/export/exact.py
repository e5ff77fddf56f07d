"""Keeps gates, clock and forecasts in float32 whatever precision an OpenVINO plugin computes in.

With bfloat16 a timestep stops counting (199 reads as 200) and a score near the threshold flips. The runtime attribute
`precise` exempts a node; it cannot be set from Python, so it goes into the saved XML.

What is marked, walking up from every branch's condition and from the states that are not caches: all of it, up to and with
the mean over tokens where a gate reads its stream. The stream itself keeps the plugin's precision. What leads to a sine or
cosine, in the branches too: the embedding of a rounded timestep is that of another one. And what forecasts are made of, down from
their states: a value that moves on call by call would lose its digits.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

_POOL = "ReduceMean"
_SHAPES = {"Reshape", "Convert", "Transpose", "Unsqueeze", "Squeeze"}
_STREAM = {"If"}
_PERIODIC = {"Sin", "Cos"}
_NO_VALUES = {"Const", "ShapeOf", "Result"}


def keep_exact(path: Path, clock: set[str], forecasts: set[str]) -> int:
    """Mark the nodes in the XML at `path`; returns how many.

    Args:
        path: a saved model with one `If` per branch.
        clock: names of the inputs, outputs and variables of the clock.
        forecasts: the same of forecasts; caches are in neither.
    """
    tree = ET.parse(path)
    graphs = [element for element in tree.iter() if element.find("layers") is not None]
    marked = sum(_mark(graph, *((clock, forecasts) if graph is tree.getroot() else (None, set()))) for graph in graphs)
    tree.write(path, encoding="utf-8", xml_declaration=True)
    return marked


def _mark(graph: ET.Element, clock: set[str] | None, forecasts: set[str]) -> int:
    """Mark one graph; a branch's body has no states (None)."""
    layers = {layer.get("id", ""): layer for layer in graph.iterfind("layers/layer")}
    sources: dict[str, list[tuple[int, str]]] = {}
    for edge in graph.iterfind("edges/edge"):
        sources.setdefault(edge.get("to-layer", ""), []).append(
            (int(edge.get("to-port", "0")), edge.get("from-layer", ""))
        )
    order = {key: [source for _, source in sorted(found)] for key, found in sources.items()}
    roots = [key for key, layer in layers.items() if layer.get("type") in _PERIODIC]
    ahead: set[str] = set()
    if clock is not None:
        roots += [order[key][0] for key, layer in layers.items() if layer.get("type") == "If"]
        roots += [key for key, layer in layers.items() if _state(layer) in clock]
        ahead = _down(layers, order, forecasts)
        timed = _down(layers, order, clock)
        roots += [source for key in ahead for source in order.get(key, []) if source in timed]
    marked = {key for key in ahead if layers[key].get("type") not in _NO_VALUES}
    waiting = [(root, False) for root in roots]
    while waiting:
        key, pooled = waiting.pop()
        layer = layers[key]
        kind = layer.get("type")
        if key in marked or kind in _STREAM or (pooled and kind not in _SHAPES | {_POOL}):
            continue
        if kind not in _NO_VALUES:
            marked.add(key)
        waiting += [(source, pooled or kind == _POOL) for source in order.get(key, [])]
    for key in marked:
        layer = layers[key]
        info = layer.find("rt_info")
        if info is None:
            info = ET.Element("rt_info")
            data = layer.find("data")
            layer.insert(0 if data is None else 1, info)
        ET.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    return len(marked)


def _state(layer: ET.Element) -> str | None:
    """The state that a node reads or writes: a variable, an input or an output."""
    data = layer.find("data")
    variable = data.get("variable_id") if data is not None else None
    return variable or (layer.get("name") if layer.get("type") in ("Parameter", "Result") else None)


def _down(layers: dict[str, ET.Element], order: dict[str, list[str]], states: set[str]) -> set[str]:
    """All that is computed from states, as far as branches."""
    readers: dict[str, list[str]] = {}
    for key, sources in order.items():
        for source in sources:
            readers.setdefault(source, []).append(key)
    found: set[str] = set()
    waiting = [key for key, layer in layers.items() if _state(layer) in states and layer.get("type") != "Assign"]
    while waiting:
        key = waiting.pop()
        if key in found or layers[key].get("type") in _STREAM:
            continue
        found.add(key)
        waiting += readers.get(key, [])
    return found
