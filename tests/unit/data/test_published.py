"""Where a data set is published, as provenance.json says it."""

import pytest

from glmtuner.data.spec import DatasetSpec


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ({"hf_hub_url": "a/b", "license": "mit"}, "a/b"),
        ({"url": "https://x.example/y.json", "file_name": "y.json"}, "https://x.example/y.json"),
        ({"file_name": "shipped.json", "kind": "catalogue"}, "package://shipped.json"),
        ({"file_name": "other.json", "kind": "catalogue"}, None),
        ({"file_name": "shipped.json", "kind": "dataset_info"}, None),  # the user's own file of that name
        ({}, None),
    ],
)
def test_the_source_and_the_licence_of_an_entry(tmp_path, entry, source):
    (tmp_path / "shipped.json").write_text("[]")
    assert DatasetSpec(name="x", **entry).published(tmp_path) == {"source": source, "license": entry.get("license")}
