"""ModelScope's plain HTTP interface against a server on localhost: what is downloaded, completed, verified and refused."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import modelscope_server
import pytest

from glmtuner.config.compose import compose
from glmtuner.data import find, load
from glmtuner.data.catalog import at_modelscope
from glmtuner.errors import CheckpointError, ConfigError, DataError
from glmtuner.families import download
from glmtuner.families.hub import read_config, source_of
from glmtuner.families.modelscope import endpoint, listed, snapshot
from glmtuner.launch.register import register_presets

register_presets()
WEIGHTS = bytes(range(256)) * 4000
RECORDS = [{"instruction": f"{n}?", "input": "", "output": f"{n}!"} for n in range(7)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[modelscope_server.ModelScope]:
    model = tmp_path / "remote/models/org/tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "glm", "architectures": ["GlmForCausalLM"]}', encoding="utf-8")
    (model / "model.safetensors").write_bytes(WEIGHTS)
    (model / "pytorch_model.bin").write_bytes(WEIGHTS)
    (model / "README.md").write_text("# tiny", encoding="utf-8")
    (model / "onnx").mkdir()
    (model / "onnx/model.onnx").write_bytes(b"o")
    data = tmp_path / "remote/datasets/org/set"
    (data / "part").mkdir(parents=True)
    (data / "train.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (data / "part/more.jsonl").write_text(json.dumps(RECORDS[0]) + "\n", encoding="utf-8")
    (data / "configuration.json").write_text("{}", encoding="utf-8")
    for name in ("http_proxy", "HTTP_PROXY", "MODELSCOPE_API_TOKEN", "GLMTUNER_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with modelscope_server.serving(tmp_path / "remote") as about:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", about.address)
        yield about


def everything(paths):
    return paths


def small(paths):
    return [path for path in paths if path == "config.json"]


def model_of(*words: str):
    return compose(
        ["model=causal_lm", "model.model_name_or_path=org/tiny", "model.use_modelscope=true", *words]
    ).run.model


def test_a_model_is_read_without_its_weights_until_these_are_asked_for(server, tmp_path):
    model = model_of()
    assert read_config(model)["model_type"] == "glm"
    assert server.files_asked() == ["config.json"]
    folder = Path(source_of(model, "org/tiny", weights=True))
    assert folder == tmp_path / "cache/modelscope/models/org/tiny/master"  # main is called master there
    assert server.files_asked() == ["config.json", "model.safetensors"]  # once, in one format, and no other library's
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "Revision=master" in server.asked[0][0]


def test_an_interrupted_download_goes_on_where_it_was_cut_off(server, tmp_path, capsys):
    server.cuts["model.safetensors"] = [300_000, 500_000]
    folder = snapshot("models", "org/tiny", "v1", everything, label="here")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [given for url, given in server.asked if "model.safetensors" in url]
    assert ranges == [None, "bytes=300000-", "bytes=800000-"]
    assert "goes on after 300,000 bytes" in capsys.readouterr().out


def test_a_download_that_an_earlier_command_began_is_completed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS_S", ())
    server.cuts["model.safetensors"] = [300_000]
    with pytest.raises(DataError, match="the connection was lost after 300,000 of 1,024,000 bytes"):
        snapshot("models", "org/tiny", "main", everything, label="here")
    folder = snapshot("models", "org/tiny", "main", everything, label="here")
    assert [given for url, given in server.asked if "model.safetensors" in url] == [None, "bytes=300000-"]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() == hashlib.sha256(WEIGHTS).digest()
    assert not list(folder.rglob("*.part*"))


def test_the_rest_of_another_file_is_not_joined_to_the_beginning_of_this_one(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS_S", ())
    server.digests["model.safetensors"] = None  # so that only the ETag tells
    server.cuts["model.safetensors"] = [300_000]
    with pytest.raises(DataError, match="the connection was lost"):
        snapshot("models", "org/tiny", "main", everything, label="here")
    changed = WEIGHTS[::-1]
    (server.root / "models/org/tiny/model.safetensors").write_bytes(changed)
    folder = snapshot("models", "org/tiny", "main", everything, label="here")
    assert (folder / "model.safetensors").read_bytes() == changed


def test_a_wrong_hash_is_one_paragraph_and_nothing_is_left_of_the_file(server):
    server.digests["model.safetensors"] = "0" * 64
    with pytest.raises(
        DataError, match=r"here: model.safetensors of org/tiny has sha256 \w{64}, and the server lists 0{64}; .*again"
    ):
        snapshot("models", "org/tiny", "main", everything, label="here")
    folder = snapshot("models", "org/tiny", "main", small, label="here")
    assert not list(folder.glob("*.safetensors*")) and not list(folder.glob(".*part*"))


def test_a_damaged_or_changed_file_is_downloaded_again_and_no_other(server):
    folder = snapshot("models", "org/tiny", "main", everything, label="here")
    before = len(server.files_asked())
    snapshot("models", "org/tiny", "main", everything, label="here")
    assert len(server.files_asked()) == before
    (folder / "model.safetensors").write_bytes(b"short")
    (server.root / "models/org/tiny/config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    snapshot("models", "org/tiny", "main", everything, label="here")
    assert server.files_asked()[before:] == ["config.json", "model.safetensors"]
    assert "llama" in (folder / "config.json").read_text(encoding="utf-8")


def test_a_full_disk_is_said_before_anything_is_downloaded(server, monkeypatch):
    monkeypatch.setattr(
        "glmtuner.families.modelscope.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000)
    )
    with pytest.raises(
        DataError, match=r"files of 2,0\d\d,\d{3} bytes are to be downloaded, and .* has 1,000 bytes of free space"
    ):
        snapshot("models", "org/tiny", "main", everything, label="here")
    assert server.files_asked() == []


def test_without_the_server_what_is_here_is_used_and_what_is_not_is_an_error(server, monkeypatch, tmp_path, capsys):
    snapshot("models", "org/tiny", "main", small, label="here")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "RETRY_WAITS_S", ())
    snapshot("models", "org/tiny", "main", small, label="here")
    assert "the copy of an earlier download is used" in capsys.readouterr().out
    with pytest.raises(DataError, match="could not be downloaded"):
        snapshot("models", "org/tiny", "main", everything, label="here")


def test_offline_nothing_is_asked_and_what_is_missing_is_said(server, monkeypatch, tmp_path):
    monkeypatch.setenv("GLMTUNER_CACHE", str(tmp_path / "folder"))
    snapshot("models", "org/tiny", "main", small, label="here")
    asked = len(server.asked)
    monkeypatch.setenv("GLMTUNER_OFFLINE", str(tmp_path / "folder"))
    model = model_of()
    assert read_config(model)["model_type"] == "glm"
    with pytest.raises(
        CheckpointError,
        match=r"it lacks model.safetensors; GLMTUNER_OFFLINE=.*type python -m glmtuner prefetch --folder",
    ):
        source_of(model, "org/tiny", weights=True)
    with pytest.raises(CheckpointError, match="no files of it are here; GLMTUNER_OFFLINE="):
        read_config(model_of("model.model_revision=v2"))
    assert len(server.asked) == asked


@pytest.mark.parametrize("path", ["../out.json", "/etc/passwd", "a/../../out", "a\\b", ""])
def test_a_listed_path_that_leads_out_of_the_folder_is_refused(server, tmp_path, path):
    server.extra = [{"Path": path, "Type": "blob", "Size": 1, "Sha256": "0" * 64}]
    with pytest.raises(DataError, match="which is not a path in the repository; nothing is downloaded"):
        snapshot("models", "org/tiny", "main", everything, label="here")
    assert server.files_asked() == []


@pytest.mark.parametrize("repository", ["tiny", "org/tiny/more", "../org", "org/..", "", "https://a.b/c"])
def test_what_is_no_repository_is_refused(server, repository):
    with pytest.raises(DataError, match="is not the id of a repository of ModelScope, organisation/name"):
        snapshot("models", repository, "main", everything, label="here")
    assert server.asked == []


def test_an_unknown_repository_and_a_server_of_something_else_are_paragraphs(server, monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"model.use_modelscope=true model.model_name_or_path=org/other: .* answers 404"
    ):
        source_of(model_of("model.model_name_or_path=org/other"), "org/other")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", f"{server.address}/api/v1/models/org/tiny/repo?FilePath=config.json&x=")
    with pytest.raises(DataError, match="does not answer with a list of files; check MODELSCOPE_DOMAIN="):
        listed("models", "org/tiny", "master", "here")


def test_the_address_of_the_server(monkeypatch):
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    assert endpoint() == "https://modelscope.cn"
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.ai")
    assert endpoint() == "https://www.modelscope.ai"
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "ftp://a.b")
    with pytest.raises(ConfigError, match=r"MODELSCOPE_DOMAIN=ftp://a\.b: ftp is not read; legal: http and https"):
        endpoint()


def test_a_token_is_sent_to_the_server(server, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-good")
    snapshot("models", "org/tiny", "main", small, label="here")
    assert {*server.tokens} == {"Bearer ms-good"}


def entry(tmp_path: Path, **keys) -> Path:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"mine": keys}), encoding="utf-8")
    return tmp_path / "data"


def read_all(spec, tmp_path: Path):
    loaded = load(spec, dataset_dir=tmp_path, package_data=tmp_path, cache_dir=tmp_path / "hub")
    return [example.messages[0].content for example in loaded.examples], loaded.files


def test_an_entry_whose_only_source_is_modelscope_is_read_from_there(server, tmp_path):
    spec = find("mine", entry(tmp_path, ms_hub_url="org/set", data_files="train.json"), [])
    questions, files = read_all(spec, tmp_path)
    assert questions == [record["instruction"] for record in RECORDS]
    assert server.files_asked() == ["train.json"]
    (label,) = files
    assert label == "modelscope org/set" and files[label].startswith("sha256 ")
    assert read_all(spec, tmp_path)[1] == files  # the key of the encoded rows


def test_an_entry_of_both_hubs_is_read_from_modelscope_only_if_that_is_asked_for(server, tmp_path, capsys):
    both = find("mine", entry(tmp_path, hf_hub_url="org/hf", ms_hub_url="org/set", folder="part"), [])
    chosen = at_modelscope(both)
    assert (both.hf_hub_url, chosen.hf_hub_url) == ("org/hf", None)
    assert read_all(chosen, tmp_path)[0] == ["0?"] and server.files_asked() == ["part/more.jsonl"]
    other = find("mine", entry(tmp_path, hf_hub_url="org/hf"), [])
    assert at_modelscope(other) == other
    assert "has no ms_hub_url, and is read from the Hugging Face hub" in capsys.readouterr().out


def test_a_dataset_of_many_files_is_listed_page_by_page(server):
    many = server.root / "datasets/org/many"
    many.mkdir(parents=True)
    for n in range(205):
        (many / f"{n:03}.json").write_text("[]", encoding="utf-8")
    assert len(listed("datasets", "org/many", "master", "here")) == 205
    assert sum("PageNumber" in url for url, _ in server.asked) == 3


def test_a_dataset_without_records_is_one_paragraph(server, tmp_path):
    with pytest.raises(
        DataError,
        match=r"ms_hub_url=org/set: the dataset has no file of records that the entry could mean; check folder",
    ):
        read_all(find("mine", entry(tmp_path, ms_hub_url="org/set", folder="nowhere"), []), tmp_path)
    with pytest.raises(DataError, match="ms_hub_url='a b': the id of a dataset of ModelScope is expected"):
        find("mine", entry(tmp_path, ms_hub_url="a b"), [])
