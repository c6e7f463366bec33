"""Which weights a server's pipelines compute with: a text begun with some is not ended with others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from gptj_dist.checkpoint.hub import DEMO, local_directory
from gptj_dist.checkpoint.manifest import version_of
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.record import RequestRecord
from gptj_dist.errors import StageFailedError


def weights_of(config: PipelineConfig) -> str:
    """A short name of a model's weights and of the types in which a pipeline computes with them.

    Args:
        config: with the commit of a hub model.

    Raises:
        CheckpointError: the directory holds no weights that are read.
    """
    directory = None if config.model == DEMO else local_directory(config.model)
    version = config.revision if directory is None else version_of(directory)
    facts = (config.model, version, config.dtype, config.wire_dtype, config.quantize)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def require_same(records: Iterable[RequestRecord], weights: str) -> None:
    """Raises StageFailedError if a record has tokens that were generated with other weights."""
    if any(record.token_ids and record.weights != weights for record in records):
        raise StageFailedError("an update replaced the model that began this answer; send the request again")
