"""The whole models that are benchmarked: one entry a model."""

from __future__ import annotations

from collections.abc import Mapping

from fusegen.bench import picture_models, text_models
from fusegen.bench.whole import Suite

MODELS: Mapping[str, Suite] = {"emoji": picture_models.EMOJI, "pycode": text_models.PYCODE}
