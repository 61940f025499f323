"""Downloads: which URLs are opened, what their files are called, and what happens when a connection is lost."""

import hashlib
import json
import shutil
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from file_server import FileServer, serving

from glmtuner.data import fetch
from glmtuner.data.catalog import find
from glmtuner.data.read import read
from glmtuner.errors import DataError
from glmtuner.families import addresses, download, web
from glmtuner.families.addresses import (
    AddressRefused,
    checked_addresses,
    is_public,
    trusted_origins,
    url_problem,
)

CONTENT = json.dumps([{"instruction": "q", "output": "a" * 50_000}]).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with serving({"/set.json": CONTENT}) as about:
        yield about


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


def entry(folder: Path, /, **keys: object) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/dataset_info.json").write_text(json.dumps({"x": keys}))
    return folder / "data"


def loaded(folder: Path, /, **keys: object):
    """The records of an entry with these keys, from its dataset_info.json on."""
    dataset_dir = entry(folder, **keys)
    spec = find("x", dataset_dir, [])
    return read(spec, dataset_dir=dataset_dir, package_data=folder, cache_dir=folder / "cache")


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Names


ESCAPES = [
    "/%2e%2e%2f%2e%2e%2f%2e%2e%2f.bashrc", "/..%2f..%2fescaped.json", "/%2fetc%2fescaped.json", "/a%00b.json",
    "/%2e%2e%5c%2e%2e%5cescaped.json", "/C%3a%5cescaped.json", "/con.json", f"/{'n' * 300}.json", "/x.json%2f..%2f..",
    "/%252e%252e%252fescaped.json", "/..;/escaped.json", "/escaped.json;x", "/-rf.json", "/~root.json", "/$(touch x).json",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_nothing_of_a_url_becomes_a_path(path: str, server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)  # which the user named
    server.files[path] = CONTENT
    try:
        assert len(list(loaded(tmp_path, url=server.url(path), sha256=SHA256))) == 1
    except DataError as error:
        assert "url=" in str(error)
        assert server.asked == [] and files_in(tmp_path) == ["data/dataset_info.json"]
    else:
        assert files_in(tmp_path) == [f"cache/glmtuner/{SHA256[:16]}/data.json", "data/dataset_info.json"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"url": "https://h/a.json", "sha256": "../../../../tmp/x"}, "64 hexadecimal digits"),
        ({"url": "https://h/.bashrc", "sha256": SHA256}, "does not end in .json, .jsonl"),
        ({"url": "https://h/a.sh", "sha256": SHA256}, "does not end in .json, .jsonl"),
        ({"url": "file:///etc/passwd.json", "sha256": SHA256}, "file is not read; legal: http and https"),
        ({"url": "ftp://h/a.json", "sha256": SHA256}, "ftp is not read"),
        ({"url": "data:application/json,[{}].json", "sha256": SHA256}, "data is not read"),
        ({"url": "/etc/a.json", "sha256": SHA256}, "no scheme is not read"),
        ({"url": "https://good\\@evil/a.json", "sha256": SHA256}, "no spaces, backslashes"),
        ({"url": "https://h/a\n.json", "sha256": SHA256}, "no spaces, backslashes"),
        ({"url": "https://user:pw@h/a.json", "sha256": SHA256}, "credentials in a URL are not sent"),
        ({"url": "https://h:99999/a.json", "sha256": SHA256}, "not a URL"),
        ({"url": "https:///a.json", "sha256": SHA256}, "no host"),
        ({"file_name": "../../secret.json"}, "leads out of its folder"),
        ({"file_name": "a/..\\b.json"}, "leads out of its folder"),
        ({"file_name": "set", "folder": "../.."}, "leads out of its folder"),
        ({"file_name": "set", "folder": "/etc"}, "is absolute"),
        ({"hf_hub_url": "org/name", "data_files": ["/etc/passwd"]}, "is absolute"),
        ({"hf_hub_url": "org/name", "data_files": "http://169.254.169.254/latest"}, "is an address"),
        ({"hf_hub_url": "org/name", "data_files": "~/.ssh/id"}, "is absolute"),
        ({"hf_hub_url": "org/name", "data_files": "C:\\x.json"}, "is absolute"),
        ({"hf_hub_url": "org/name", "revision": "../../../x"}, "leads out of its folder"),
        ({"hf_hub_url": "json", "data_files": "x.json"}, "the id of a dataset of the hub is expected"),
        ({"hf_hub_url": "../../private"}, "the id of a dataset of the hub is expected"),
        ({"hf_hub_url": "/home"}, "the id of a dataset of the hub is expected"),
        ({"hf_hub_url": "http://h/x"}, "the id of a dataset of the hub is expected"),
    ],
)
def test_a_place_that_an_entry_may_not_name(keys: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, **keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert files_in(tmp_path) == ["data/dataset_info.json"]


@pytest.mark.parametrize(
    "keys",
    [
        {
            "hf_hub_url": "org/name",
            "data_files": ["en/a..b.json", "*.parquet"],
            "revision": "refs/pr/1",
            "folder": "en",
        },
        {"hf_hub_url": "squad"},
        {"hf_hub_url": "a.b-c_d/1.0"},
        {"file_name": "zh/..name.json"},
        {"url": "https://example.org/文件.jsonl?download=1", "sha256": SHA256.upper()},
        {"url": "https://example.org/download", "file_name": "a.csv", "sha256": SHA256},
        {"url": "HTTP://example.org:8080/x.PARQUET#part", "sha256": SHA256},
    ],
)
def test_legal_places(keys: dict[str, object], tmp_path: Path) -> None:
    assert find("x", entry(tmp_path, **keys), []).name == "x"


def test_a_file_outside_of_the_folder_is_read_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "big.json").write_bytes(CONTENT)
    assert len(list(loaded(tmp_path, file_name=str(tmp_path / "big.json")))) == 1
    assert (
        f"its file_name is not in data.dataset_dir={tmp_path / 'data'}: {tmp_path / 'big.json'}"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("url", "file_name", "suffix"),
    [
        ("https://h/a.JSONL", None, ".jsonl"), ("https://h/a%2ejson", None, ".json"), ("https://h/a", None, ""),
        ("https://h.json/", None, ".json"), ("https://h/x.tar.gz", None, ""), ("https://h/x.jsonl.gz?y=.sh", None, ".jsonl.gz"),
        ("https://h/x", "a.csv", ".csv"), ("https://h/x.sh", "a.csv", ""), ("https://h/.gz", None, ""), ("https://h/.json", None, ".json"),
    ],
)  # fmt: skip
def test_suffixes(url: str, file_name: str | None, suffix: str) -> None:
    assert fetch.readable_suffix(url, file_name) == suffix


# Addresses

PRIVATE = [
    "127.0.0.1", "127.8.9.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "0.0.0.0", "10.1.2.3", "172.16.0.1",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[fd12:3456::1]", "[fec0::1]", "[ff02::1]", "[::ffff:127.0.0.1]",
    "[::ffff:a9fe:a9fe]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[::127.0.0.1]", "[2001:db8::1]", "localhost", "localhost.",
    "LOCALHOST",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_before_anything_is_read(host: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    dataset_dir = entry(tmp_path, url=f"http://{host}:8000/a.json", sha256=SHA256)
    with pytest.raises(DataError, match=r"of this machine or of a private network.*data\.dataset=http://"):
        find("x", dataset_dir, [])


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_a_name_is_judged_by_its_addresses_and_these_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [["93.184.216.34"], ["93.184.216.34", "10.0.0.1"], ["198.18.0.7"]]

    def resolve(host, port, **options):
        return [(2, 1, 6, "", (address, port)) for address in found[0]]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolve)
    assert checked_addresses("http://example.org/a.json", ()) == ["93.184.216.34"]
    opener = web._opener("http://example.org/a.json", ())
    assert [handler.addresses for handler in opener.handlers if hasattr(handler, "addresses")] == [found[0]] * 2
    found.pop(0)
    with pytest.raises(AddressRefused, match=r"example\.org \(10\.0\.0\.1\)"):
        checked_addresses("http://example.org/a.json", ())
    assert checked_addresses("http://example.org/a.json", trusted_origins("http://example.org/b.json")) == found[0]
    found.pop(0)
    assert checked_addresses("http://example.org/a.json", ()) == ["198.18.0.7"]  # as a local proxy answers


def test_a_url_by_itself() -> None:
    assert url_problem("https://huggingface.co/a.json") == "" and url_problem("http://[::1") != ""


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/a.json", "http://localhost:1/a.json", "file:///etc/a.json", "//127.0.0.2/x"]
)
def test_a_redirect_is_checked_like_the_url(target: str, server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    server.redirects["/set.json"] = target
    with pytest.raises(DataError, match=r"it redirects to .*(private network|is not read)"):
        list(loaded(tmp_path, url=server.url("/set.json"), sha256=SHA256))
    assert files_in(tmp_path) == ["data/dataset_info.json"]


def test_redirects_are_followed_and_end(server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    server.redirects |= {"/1.json": "/2", "/2": server.url("/set.json"), "/loop.json": "/loop.json"}
    assert len(list(loaded(tmp_path, url=server.url("/1.json"), sha256=SHA256))) == 1
    with pytest.raises(DataError, match="redirects more than 10 times"):
        loaded(tmp_path, url=server.url("/loop.json"), sha256="0" * 64)


def test_a_typed_url_may_be_private(server: FileServer, tmp_path: Path, capsys, waits) -> None:
    url, cache = server.url("/set.json"), tmp_path / "cache"
    spec = find(url, tmp_path, [], cache)
    rows = list(read(spec, dataset_dir=tmp_path, package_data=tmp_path))
    assert [row.raw["instruction"] for row in rows] == ["q"] and rows[0].source == url
    assert find(url, tmp_path, [], cache) == spec and server.asked == ["/set.json"] * 2  # not modified
    server.files["/set.json"] = CONTENT.replace(b'"q"', b'"question"')
    changed = list(read(find(url, tmp_path, [], cache), dataset_dir=tmp_path, package_data=tmp_path))
    assert changed[0].raw["instruction"] == "question"
    server.statuses = [(503, {})] * 9
    find(url, tmp_path, [], cache)
    assert "the server answers 503" in (printed := capsys.readouterr().out) and "copy of an earlier download" in printed
    with pytest.raises(DataError, match=f"has sha256 {hashlib.sha256(server.files['/set.json']).hexdigest()}"):
        server.statuses = []
        find(f"{url}#sha256={SHA256}", tmp_path, [], cache)
    for wrong in (f"{url}#sha256=12", server.url("/set"), server.url("/set.exe"), "http://a b/x.json"):
        with pytest.raises(DataError, match=r"data\.dataset=http"):
            find(wrong, tmp_path, [], cache)


def test_a_typed_url_does_not_open_other_private_addresses(server: FileServer, tmp_path: Path) -> None:
    server.redirects["/set.json"] = "http://127.0.0.1:1/a.json"
    with pytest.raises(DataError, match=r"it redirects to .*data\.dataset=http://127\.0\.0\.1:1/a\.json"):
        find(server.url("/set.json"), tmp_path, [], tmp_path / "cache")


def test_tls_is_verified_for_the_name_and_connects_to_the_checked_address(tmp_path: Path, monkeypatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=files.example", "-addext", "subjectAltName=DNS:files.example"], capture_output=True, check=True,
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    monkeypatch.setattr(web, "checked_addresses", lambda url, trusted, by_proxy=False: ["127.0.0.1"])
    monkeypatch.setattr(download, "RETRY_WAITS_S", ())
    try:
        with pytest.raises(DataError, match="certificate"):
            find(f"https://files.example:{port}/set.json", tmp_path, [], tmp_path / "cache")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert find(f"https://files.example:{port}/set.json", tmp_path, [], tmp_path / "cache").formatting == "alpaca"
        with pytest.raises(DataError, match="certificate"):
            find(f"https://other.example:{port}/set.json", tmp_path, [], tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()


# Connections that are lost


@pytest.mark.parametrize("cuts", [[0], [1], [len(CONTENT) - 1], [25_000, 0, 49_000]])
def test_a_lost_connection_is_tried_again(
    cuts: list[int], server: FileServer, tmp_path, monkeypatch, waits, capsys
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    server.cut_after = [*cuts]
    assert next(iter(loaded(tmp_path, url=server.url("/set.json"), sha256=SHA256))).raw["output"] == "a" * 50_000
    assert waits == [*download.RETRY_WAITS_S[: len(cuts)]]
    assert capsys.readouterr().out.count("trying again in") == len(cuts)
    assert files_in(tmp_path) == [f"cache/glmtuner/{SHA256[:16]}/data.json", "data/dataset_info.json"]


@pytest.mark.parametrize("length", [True, False])
def test_a_connection_that_is_always_lost_is_one_paragraph(length, server: FileServer, tmp_path, waits) -> None:
    server.cut_after, server.announce_length = [1000] * 9, length
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, file_name="none.json")  # the entry's file is missing: nothing is downloaded
    assert "no file" in str(caught.value)
    if length:
        with pytest.raises(DataError, match="the connection was lost after 1,000 of") as caught:
            find(server.url("/set.json"), tmp_path, [], tmp_path / "cache")
        assert len(waits) == len(download.RETRY_WAITS_S)
    else:  # the end cannot be told from a loss, but the records are cut off
        with pytest.raises(DataError, match=r"dataset 'http://127\.0\.0\.1.*"):
            find(server.url("/set.json"), tmp_path, [], tmp_path / "cache")
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(list(tmp_path.rglob("*.part"))) == length, "what can be completed is kept"


@pytest.mark.parametrize(
    ("statuses", "waited", "message"),
    [
        ([(503, {}), (429, {"Retry-After": "7"})], [1.0, 7.0], ""),
        ([(500, {})] * 9, [*download.RETRY_WAITS_S], "the server answers 500"),
        ([(429, {"Retry-After": "3600"})], [], "the server answers 429 .*; wait, and type the same command again"),
        ([(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})], [0.0], ""),
        ([(401, {})], [], "401 .*; it asks for a login"),
        ([(403, {})], [], "403 .*; it refuses access"),
        ([(404, {})], [], "404 .*; check the URL"),
        ([(302, {})], [], "302"),
    ],
)
def test_answers_other_than_the_file(
    statuses, waited, message, server: FileServer, tmp_path, monkeypatch, waits
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    server.statuses = statuses
    keys = {"url": server.url("/set.json"), "sha256": SHA256}
    if message:
        with pytest.raises(DataError, match=message):
            loaded(tmp_path, **keys)
        assert files_in(tmp_path) == ["data/dataset_info.json"]
    else:
        assert len(list(loaded(tmp_path, **keys))) == 1
    assert waits == waited


def test_a_file_larger_than_the_free_space_is_not_begun(server: FileServer, tmp_path, monkeypatch, waits) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="has 1,000 bytes of free space"):
        find(server.url("/set.json"), tmp_path, [], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] and waits == []


def test_a_body_without_an_end_is_cut_off(server: FileServer, tmp_path, monkeypatch, waits) -> None:
    server.announce_length = False
    monkeypatch.setattr(download, "MAX_BYTES", 10_000)
    with pytest.raises(DataError, match="sends more than 10,000 bytes"):
        find(server.url("/set.json"), tmp_path, [], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_download_is_kept_verified_and_downloaded_again_if_damaged(server: FileServer, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    keys = {"url": server.url("/set.json"), "sha256": SHA256}
    assert loaded(tmp_path, **keys).fingerprint() == {"data.json": SHA256}
    loaded(tmp_path, **keys)
    assert server.asked == ["/set.json"]
    kept = tmp_path / f"cache/glmtuner/{SHA256[:16]}/data.json"
    kept.write_text("[")
    loaded(tmp_path, **keys)
    assert kept.read_bytes() == CONTENT and len(server.asked) == 2
    server.files["/set.json"] = b"[{}]"
    kept.unlink()
    changed = hashlib.sha256(b"[{}]").hexdigest()
    with pytest.raises(DataError, match=f"has sha256 {changed} instead of {SHA256}: the file has changed"):
        loaded(tmp_path, **keys)
    assert files_in(tmp_path) == ["data/dataset_info.json"]


def test_a_download_of_an_earlier_version_is_used(tmp_path: Path) -> None:
    old = tmp_path / "cache/glmtuner" / SHA256[:16] / "alpaca.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(CONTENT)
    (old.parent / ".other.json.12.part").write_bytes(CONTENT[:10])
    assert len(list(loaded(tmp_path, url="https://example.org/alpaca.json", sha256=SHA256))) == 1
