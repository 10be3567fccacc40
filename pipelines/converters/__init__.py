"""Converters: one pure function per format, record in, feedback rows out; one dict that names them all.

A converter imports neither Beam nor a model. To add one: write `matches` and `convert`, add a
`Converter` line to its module's `CONVERTERS`, and a golden test with a hand-written fixture.
"""

from pipelines.converters import llama_factory, public, trl
from pipelines.converters.base import Converter, LeftOut, Policy, detect, nearest

# The most specific shapes first: the first converter that matches a record names its format.
CONVERTERS: dict[str, Converter] = {c.name: c for c in (*public.CONVERTERS, *llama_factory.CONVERTERS, *trl.CONVERTERS)}

__all__ = ["CONVERTERS", "Converter", "LeftOut", "Policy", "detect", "nearest"]
