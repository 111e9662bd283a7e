"""The whole models that are benchmarked: one entry a model."""

from __future__ import annotations

from collections.abc import Mapping

from fusegen.bench import gan_models, picture_models, text_models
from fusegen.bench.published import suites
from fusegen.bench.whole import Suite

MODELS: Mapping[str, Suite] = {
    "emoji": picture_models.EMOJI,
    "pycode": text_models.PYCODE,
    "emoji-gan": gan_models.EMOJI_GAN,
    "stylegan2-256": gan_models.STYLEGAN2_256,
    **suites.SUITES,
}
