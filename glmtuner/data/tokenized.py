"""Where encoded rows are cached, and by which names."""

from pathlib import Path

from glmtuner.config.offline import offline_folder
from glmtuner.config.paths import cache_root

ROWS, COUNTS, HASHES = "rows.arrow", "counts.json", "hashes"


def tokenized_folder(key: str) -> Path:
    """The cache's folder for the rows with this key; that of GLMTUNER_OFFLINE if it has them, which may be read-only."""
    prefetched = (offline_folder() or cache_root()) / "tokenized" / key
    return prefetched if (prefetched / COUNTS).is_file() else cache_root() / "tokenized" / key
