"""A search whose decisions are simulated, for tests."""

from __future__ import annotations

from typing import Any

from bessemer.spec.search import SearchSpec

__all__ = ["SEARCH", "spec"]

SEARCH: dict[str, Any] = {
    "name": "mine",
    "job": "job.yaml",
    "space": {
        "training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-3]},
        "ema.half_life_kimg": {"uniform": [0.5, 2.0]},
    },
    "objective": {"metric": "kid_efflite0", "rungs_kimg": [1, 2, 3]},
    "budget": {"trials": 8},
    "searcher": {"name": "random"},
}


def spec(**fields: Any) -> SearchSpec:
    """The search with other fields."""
    return SearchSpec.model_validate({**SEARCH, **fields})
