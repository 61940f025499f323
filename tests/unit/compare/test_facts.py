"""What runs were computed from: values that differ, kinds that an earlier version did not record, how they are shown."""

from glmtuner.compare.facts import facts_of, input_differences, shown

NINE = {"glmtuner": "0.1.0", "torch": "2.0"}
BEFORE = {
    "python": "3.11.7", "packages": {**NINE, "attrs": "1"}, "code": {"data": "0" * 16}, "git": {"commit": "a" * 40, "dirty": False, "diff_sha256": None},
    "weights": {"model.model_name_or_path": {"model.safetensors": "1" * 64}}, "tokenizer": "2" * 64, "template": {"name": "glm4", "form": {"stop": "<|user|>"}},
    "thinking": None, "machine": {"device": "cpu", "ranks": 1}, "data": {"a": {"sha256": {"a.json": "3" * 64}, "records": 4, "skipped": []}},
}  # fmt: skip


def test_the_same_provenance_has_no_differences_whenever_and_however_it_was_typed():
    assert input_differences(
        [facts_of({**BEFORE, "started": "1", "command": "x"}), facts_of({**BEFORE, "started": "2"})]
    ) == ([], [])


def test_every_kind_that_changed_is_named_with_both_values():
    after = {
        **BEFORE, "python": "3.12.1", "packages": {**NINE, "torch": "3.0"}, "code": {"data": "9" * 16}, "tokenizer": "8" * 64,
        "weights": {"model.model_name_or_path": {"model.safetensors": "7" * 64}}, "machine": {"device": "cpu", "ranks": 2},
        "template": {"name": "glm4", "form": {"stop": "<eos>"}}, "git": None, "data": {"a": {"sha256": {"a.json": "6" * 64}, "records": 5}},
        "plugins": [{"name": "mine", "sha256": "5" * 64}],
    }  # fmt: skip
    found, unknown = input_differences([facts_of(BEFORE), facts_of(after)])
    named = {(each.kind, each.name): each.shown() for each in found}
    assert named == {
        ("data", "a: file a.json"): ["3" * 12, "6" * 12],
        ("data", "a: records"): ["4", "5"],
        ("weights", "model.model_name_or_path: model.safetensors"): ["1" * 12, "7" * 12],
        ("tokenizer", "tokenizer"): ["2" * 12, "8" * 12],
        ("template", "form.stop"): ["<|user|>", "<eos>"],
        ("plugins", "mine"): ["(none)", "5" * 12],
        ("packages", "python"): ["3.11.7", "3.12.1"],
        ("packages", "torch"): ["2.0", "3.0"],
        ("code", "glmtuner/data"): ["0" * 12, "9" * 12],
        ("git", "commit"): ["a" * 12, "(none)"],
        ("machine", "ranks"): ["1", "2"],
    }
    assert unknown == ["most packages"]  # the second run has none but those of earlier versions


def test_what_an_earlier_version_did_not_record_is_said_and_no_difference():
    old = {name: BEFORE[name] for name in ("python", "data", "template", "thinking", "git")} | {"packages": NINE}
    found, unknown = input_differences([facts_of(old), facts_of(BEFORE)])
    assert unknown == ["weights", "tokenizer", "most packages", "code", "machine"]
    assert found == []


def test_values_are_shown_as_they_are_typed_on_one_line_and_without_secrets():
    assert (
        shown(None, "configuration") == "null"
        and shown(None) == "(none)"
        and shown(True) == "true"
        and shown(0.001) == "0.001"
    )
    assert shown(["a", "b"]) == '["a", "b"]' and shown("\n") == '"\\n"' and shown("a" * 64) == "a" * 12
    assert "hf_" not in shown("token=hf_abcdefghijklmnopqrstuvwxyz012345")
    assert len(shown("x" * 10_000)) == 300
