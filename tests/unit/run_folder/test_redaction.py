"""Which values are secrets, by the names of their keys and by their shapes, and which are not."""

import pytest
from omegaconf import OmegaConf

from glmtuner.config.schema import legal_keys
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.redaction import (
    HIDDEN,
    is_secret_name,
    redact_config,
    redact_overrides,
    redact_text,
    redact_value,
    secrets_in,
)
from glmtuner.run_folder.saved_config import interpolated_keys

register_presets()

# as their issuers make them, with random characters
SHAPES = [
    "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", "hf_abcdefghijklmnopqrstuvwxyz012345", "api_org_QwErTyUiOpAsDfGhJkLzXcVbNm",
    "sk-QwErTyUiOp1234567890AsDfGhJk", "sk-proj-QwErTyUiOp_1234567890-AsDfGh", "sk-ant-api03-QwErTyUiOp1234567890",
    "sk_live_QwErTyUiOp1234567890", "ghp_QwErTyUiOp1234567890AsDfGhJkLzXcVb", "gho_QwErTyUiOp1234567890AsDfGhJkLzXcVb",
    "github_pat_11ABCDEFG0aBcDeFgHiJkL_mNoPqRsTuVwXyZ", "glpat-QwErTyUiOp1234567890", "AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv", "ya29.a0AfH6SMBqwertyuiop", "GOCSPX-1234567890abcdefghijkl", "xoxb-1234567890-abcdefghij",
    "xoxp-1234567890-abcdefghij", "xapp-1-A0123456789-0123456789", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w",
    "npm_QwErTyUiOpAsDfGhJkLzXcVbNm1234567890", "gsk_QwErTyUiOp1234567890AsDf", "pypi-AgEIcHlwaS5vcmcCJDQwErTyUiOpAsDfGh",
    "SG.QwErTyUiOp1234567890.AsDfGhJkLzXcVbNm1234567890", "hvs.CAESIQwErTyUiOp1234567890", "LTAI5tQwErTyUiOp12345678",
    "0123456789abcdef0123456789abcdef.QwErTyUiOp123456", "123456789:AAQwErTyUiOpAsDfGhJkLzXcVbNm1234567",
    "dapi0123456789abcdef0123456789abcdef", "nvapi-QwErTyUiOp1234567890AsDf", "r8_QwErTyUiOp1234567890AsDfGhJk",
    "wandb_v1_QwErTyUiOp1234567890AsDfGhJk",
]  # fmt: skip
NAMES = [
    "trainer.hub_token", "HF_TOKEN", "hf_token", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id",
    "AWS_SESSION_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "apikey", "APIKEY", "ApiKey", "x-api-key", "clientSecret", "secret",
    "client_secret_value", "DB_PASSWORD", "PGPASSWORD", "MYSQL_PWD", "db_pass", "passwd", "passphrase", "ssh_key", "private_key",
    "credential", "GOOGLE_CREDENTIALS", "auth", "http.auth", "Authorization", "bearer", "cookie", "jwt", "accessToken", "authtoken",
    "SLACK_WEBHOOK", "tracker.secret.value", "ZHIPUAI_API_KEY", "DASHSCOPE_API_KEY", "SECRET_2", "密码", "wandb_key",
]  # fmt: skip
NO_SECRETS = [
    "tokenizer", "model.tokenizer_name", "use_fast_tokenizer", "max_tokens", "max_new_tokens", "num_input_tokens_seen", "eos_token",
    "pad_token", "bos_token_id", "token_type", "token_type_ids", "stop_token", "special_tokens", "tokens_per_second", "key", "keys",
    "query_key_value", "key_value", "past_key_values", "lora_target", "primary_key", "keyboard", "author", "authors", "passes",
    "bypass", "compass", "secretary_name", "cookbook", "token_path", "hf_token_file", "password_length", "hub_model_id", "basic",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert redact_overrides([f"+a.{name}=x9"]) == [f"+a.{name}={HIDDEN}"]
    assert "x9" not in redact_overrides([f"hydra.launcher.setup=['export {name}=x9',true]"])[0]


@pytest.mark.parametrize("name", NO_SECRETS)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)
    assert redact_overrides([f"+a.{name}=x9"]) == [f"+a.{name}=x9"]


def test_glmtuners_own_keys() -> None:
    assert {key for key in legal_keys() if is_secret_name(key)} == {"trainer.hub_token", "model.use_auth_token"}
    assert redact_overrides(["model.use_auth_token=true"]) == ["model.use_auth_token=true"]


@pytest.mark.parametrize("secret", SHAPES)
def test_shapes_of_secrets(secret: str) -> None:
    for text in (
        secret,
        f"[{secret},b]",
        f"{{a: '{secret}'}}",
        f"x {secret}; y",
        f"https://h/a?b={secret}&c=1",
        f"/a/{secret}/b",
    ):
        redacted = redact_overrides([f"name={text}"])[0]
        assert secret not in redacted and redacted == f"name={text.replace(secret, HIDDEN)}"


@pytest.mark.parametrize(
    "text",
    [
        "0" * 40, "d41d8cd98f00b204e9800998ecf8427e", "THUDM/chatglm-6b", "/data/hf_models/glm", "hf_checkpoint_of_tuesday",
        "outputs/sweeps/task-sk-learn", "disk-cache-2024-11-26", "https://huggingface.co/org/name@v1", "http://h:8080/a@b",
        "bearer of good news", "2024-11-26T12:00:00", "[query_key_value,dense]", "<|endoftext|>", "${oc.env:HOME}", "x: y", "a=b",
        "sqlite:///study.db", "postgresql://host:5432/db", "git@github.com:org/name.git", "module load cuda", "export OMP_NUM_THREADS=4",
        "eyJ", "key=value", "{num_cycles: 2}", "python -m glmtuner chat outputs/x", "token", "the password is wrong", "a token: b",
        "1e-5,1e-4", "tag(log, interval(1e-5, 1e-2))", "skip-connection-ablation-study-3", "pk-lora-8",
    ],
)  # fmt: skip
def test_texts_without_secrets_stay_as_they_are(text: str) -> None:
    assert redact_text(text) == text and redact_overrides([f"name={text}"]) == [f"name={text}"]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql://me:pw@h/db", "postgresql://<hidden>@h/db"),
        ("mysql+pymysql://me:p@ss/w:rd@h:3306/db", "mysql+pymysql://<hidden>@h:3306/db"),
        ("redis://:pw@h:6379", "redis://<hidden>@h:6379"),
        ("https://me:pw@h/x", "https://<hidden>@h/x"),
        ("https://gitlabtoken9@h/x.git", "https://<hidden>@h/x.git"),
        ("https://h/x?access_token=ab&y=1", "https://h/x?access_token=<hidden>&y=1"),
        ("https://h/x?X-Amz-Signature=ab&sig=c", "https://h/x?X-Amz-Signature=<hidden>&sig=<hidden>"),
        ("Authorization: Bearer abcdefgh1", "Authorization: <hidden>"),
        ("curl -H 'Authorization: Basic bWU6cHc9'", "curl -H 'Authorization: <hidden>'"),
        ("'curl -H \\'Authorization: Bearer abcdefgh1\\' h'", "'curl -H \\'Authorization: <hidden>\\' h'"),
        ("'x \\'A_TOKEN=b\\' \\'c: d\\' -u e'", "'x \\'A_TOKEN=<hidden>\\' \\'c: d\\' -u e'"),
        ("'export PW_TOKEN=\\'a b\\'; x'", "'export PW_TOKEN=<hidden>; x'"),
        ("curl -s -u me:pw https://h", "curl -s -u <hidden> https://h"),
        ("wandb login 0123456789abcdef", "wandb login <hidden>"),
        ("huggingface-cli login --token abc --add", "huggingface-cli login --token <hidden> --add"),
        ("sshpass -p pw ssh h", "sshpass -p <hidden> ssh h"),
        ("export DB_PASSWORD='a b'; export B=2", "export DB_PASSWORD=<hidden>; export B=2"),
        ("env HF_TOKEN=ab]cd python", "env HF_TOKEN=<hidden> python"),
        ("{user: me, password: a b, n: 3}", "{user: me, password: <hidden>, n: 3}"),
        ('{"api_key": "a, b"}', '{"api_key": <hidden>}'),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\nx\n-----END RSA PRIVATE KEY-----\nrest", "<hidden>\nrest"),
        ("export HF_TOKEN=$HF_TOKEN", "export HF_TOKEN=$HF_TOKEN"),
        ("export HF_TOKEN=${HF_TOKEN}", "export HF_TOKEN=${HF_TOKEN}"),
        ("hub_token=${oc.env:HF_TOKEN}", "hub_token=${oc.env:HF_TOKEN}"),
        ("hub_token=${oc.env:HF_TOKEN,fallback9}", "hub_token=<hidden>"),
        (
            "DefaultEndpointsProtocol=https;AccountKey=ab==;x=1",
            "DefaultEndpointsProtocol=https;AccountKey=<hidden>;x=1",
        ),
    ],
)
def test_secrets_inside_a_text(text: str, redacted: str) -> None:
    assert redact_text(text) == redacted
    assert redact_text(redacted) == redacted


def test_a_config_keeps_everything_else_and_reads_back_the_same() -> None:
    config = OmegaConf.create(
        {
            "tracker": {
                "tags": ["a", SHAPES[0]],
                "password": 1234,
                "api_keys": ["k1", "k2"],
                "pad_token": "<pad>",
                "n": 3,
            },
            "data": {"dataset": ["https://h/x.json?token=abc"], "source_prefix": "\\${a} and \\\\\\${b}"},
            "model": {"use_auth_token": True, "step_token": "<step>", "cache_dir": None},
        }
    )
    saved = OmegaConf.create(OmegaConf.to_yaml(redact_config(config)))
    assert interpolated_keys(saved) == []
    assert OmegaConf.to_container(saved, resolve=True) == {
        "tracker": {"tags": ["a", HIDDEN], "password": None, "api_keys": [None, None], "pad_token": "<pad>", "n": 3},
        "data": {"dataset": [f"https://h/x.json?token={HIDDEN}"], "source_prefix": "${a} and \\${b}"},
        "model": {"use_auth_token": True, "step_token": "<step>", "cache_dir": None},
    }
    assert redact_config(saved) == saved


def test_secrets_that_are_known_are_hidden_wherever_they_are(tmp_path, monkeypatch) -> None:
    assert secrets_in(["trainer.hub_token='open sesame'", "+a.b={password: pw12}", "name=x", "a.token=b"]) == {
        "open sesame",
        "pw12",
    }
    monkeypatch.setenv("MY_SERVICE_TOKEN", "value-of-the-environment")
    monkeypatch.setenv("MY_SERVICE_NAME", "the name of a service")
    failure = RunFolder(tmp_path).record_failure(
        RuntimeError("401 for open sesame and value-of-the-environment of the name of a service"),
        ["trainer.hub_token='open sesame'"],
    )
    assert failure["reason"] == "RuntimeError: 401 for <hidden> and <hidden> of the name of a service"
    assert "open sesame" not in (tmp_path / "failed.json").read_text()
    assert "RuntimeError" in failure["traceback"]


def test_nested_values() -> None:
    assert redact_value({"token": "x", "a": [{"password": "y", "n": 1}], SHAPES[0]: "b", "eos_token": "</s>"}) == {
        "token": HIDDEN, "a": [{"password": HIDDEN, "n": 1}], HIDDEN: "b", "eos_token": "</s>",
    }  # fmt: skip
