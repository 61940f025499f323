"""The shipped entries that name a dataset of ModelScope, and what data.use_modelscope makes of an entry."""

from pathlib import Path

from glmtuner.config.paths import conf_dir
from glmtuner.data.catalog import at_modelscope, find


def test_shipped_entries_of_both_hubs_can_be_read_from_either():
    folders = [conf_dir() / "dataset"]
    specs = [find(path.stem, Path("nowhere"), folders) for path in sorted(folders[0].glob("*.yaml"))]
    both = [spec for spec in specs if spec.ms_hub_url]
    assert len(both) >= 30 and all(spec.hf_hub_url for spec in both)
    chosen = [at_modelscope(spec) for spec in both]
    assert all((spec.hf_hub_url, spec.revision) == (None, None) and spec.ms_hub_url for spec in chosen)
