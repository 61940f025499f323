"""Redaction of secrets (tokens, API keys, passwords) from everything that a run writes.

A secret is recognized by the name of its key (`trainer.hub_token`, `HF_TOKEN=…` inside a shell line), or by its shape, which
the services that issue tokens give them (`hf_…`, `sk-…`, `https://user:password@…`). The run itself gets the values as typed.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

HIDDEN = "<hidden>"  # in place of a secret's value

# Names, by the words that they are made of: `AWS_SECRET_ACCESS_KEY`, `clientSecret` and `hub-token` all are.
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[\u4e00-\u9fff]+")
SECRET_ENDINGS = (
    "password", "passwd", "passphrase", "secret", "secrets", "apikey", "credential", "credentials", "accesstoken",
    "authtoken", "密码", "密钥", "口令", "令牌",
)  # fmt: skip
SECRET_WORDS = {
    "auth", "authorization", "bearer", "cookie", "creds", "jwt", "pass", "passcode", "pwd", "sas", "sig", "signature",
    "webhook",
}  # fmt: skip
# what a token is if it is not a credential: part of a text, or a number of such parts
TEXT_TOKENS = {
    "additional", "bos", "boi", "boa", "class", "cls", "decoder", "end", "eoa", "eoi", "eos", "extra", "first",
    "generated", "image", "audio", "video", "last", "mask", "max", "min", "new", "newline", "next", "num", "pad",
    "padding", "per", "prefix", "sep", "special", "start", "step", "stop", "think", "total", "unk", "user",
    "assistant", "system", "prompt",
}  # fmt: skip
KEY_WORDS = {  # kinds and issuers of keys; a `query_key` is none
    "access", "account", "admin", "api", "app", "auth", "client", "deploy", "encryption", "license", "master",
    "private", "secret", "service", "session", "signing", "ssh", "storage", "subscription", "aws", "azure",
    "anthropic", "dashscope", "deepseek", "gcp", "github", "gitlab", "google", "hf", "hub", "huggingface", "mistral",
    "modelscope", "moonshot", "openai", "slack", "stripe", "wandb", "zhipu", "zhipuai",
}  # fmt: skip
# a `token_path` names a file, a `key_id` or `secret_name` an entry
NEUTRAL_WORDS = {
    "count", "dir", "file", "folder", "id", "ids", "index", "length", "limit", "name", "names", "path", "type", "url",
}  # fmt: skip
NOT_SECRET = {"", "true", "false", "null", "none", "yes", "no", "???", HIDDEN, "'<hidden>'", '"<hidden>"'}
FROM_ENVIRONMENT = re.compile(r"""['"]?\$\{oc\.env:\w+\}['"]?|['"]?\$\{?[A-Za-z_]\w*\}?['"]?""")  # it names a variable
SPECIAL_TOKEN = re.compile(r"""['"]?[<\[(｜|].{0,40}[>\])｜|]['"]?""")

# Shapes. The first group, if there is one, is the secret; else all of it is.
SHAPES = re.compile(
    "|".join(
        (
            r"-----BEGIN[A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END[A-Z ]*PRIVATE KEY-----|\Z)",
            r"(?<![A-Za-z0-9])(?:hf|api_org)_(?:[A-Za-z0-9]{30,}|(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{10,})",
            r"(?<![A-Za-z0-9])(?:sk|rk|pk)[-_](?=[\w-]*\d)(?:[a-z]+[0-9]*[-_]){0,3}[A-Za-z0-9_-]{16,}",
            r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{16,}",
            r"(?<![A-Za-z0-9])github_pat_\w{16,}",
            r"(?<![A-Za-z0-9])gl(?:pat|dt|rt|ptt|soat|agent|ft|cbt)-[\w-]{16,}",
            r"(?<![A-Za-z0-9])(?:AKIA|ASIA|AIDA|AROA)[A-Z0-9]{12,}",
            r"(?<![A-Za-z0-9])(?:LTAI|AKID)[A-Za-z0-9]{12,}",
            r"(?<![A-Za-z0-9])AIza[\w-]{30,}",
            r"(?<![A-Za-z0-9])ya29\.[\w-]{16,}",
            r"(?<![A-Za-z0-9])GOCSPX-[\w-]{20,}",
            r"(?<![A-Za-z0-9])xox[a-z]-[\w-]{8,}",
            r"(?<![A-Za-z0-9])xapp-[\w-]{16,}",
            r"(?<![A-Za-z0-9])eyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?",
            r"(?<![A-Za-z0-9])(?:npm|r8|gsk|shpat|shpss|wandb_v1|lsv2_pt|lsv2_sk|dop_v1|pplx|xai|nvapi|tvly)[-_][\w-]{20,}",
            r"(?<![A-Za-z0-9])pypi-[\w-]{30,}",
            r"(?<![A-Za-z0-9])SG\.[\w-]{16,}\.[\w-]{16,}",
            r"(?<![A-Za-z0-9])hv[sb]\.[\w-]{20,}",
            r"(?<![A-Za-z0-9])dapi[0-9a-f]{32}",
            r"(?<![A-Za-z0-9])AGE-SECRET-KEY-1[A-Z0-9]{20,}",
            r"(?<![A-Za-z0-9])[0-9a-f]{32}\.[A-Za-z0-9]{16}(?![A-Za-z0-9])",  # of bigmodel.cn
            r"(?<![0-9])[0-9]{8,10}:[\w-]{35}(?![\w-])",  # of a Telegram bot
            r"(?<=hooks\.slack\.com/)(?:services|workflows)/[\w/-]{16,}",
        )
    )
)
BEARER = re.compile(r"(?i:\b(?:bearer|authorization['\"]?\s*[:=]\s*['\"]?(?:basic|token))\s+)([\w.~+/=-]{8,})")
# user and password of a URL, which may hold a slash in that of a database; a name alone is a token for https
USERINFO = re.compile(
    r"(?<=://)(?:(?<!http://)(?<!https://)[^\s/'\"@:]*:[^\s'\"]+(?=@)|[^\s/'\"@:]*:[^\s/'\"]*(?=@)|(?<=https://)[^\s/'\"@:]{8,}(?=@))"
)
COMMANDS = re.compile(
    r"\b(?:wandb\s+login(?:\s+--\S+)*|sshpass\s+-p|curl(?:\s+\S+)*?\s+(?:-u|--user))\s+([^\s'\",\]\\-][^\s'\",\]\\]*)"
)
# in quotes, in the escaped quotes of a quoted text, or without
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\\'(?:(?!\\?').)*\\'|\\"(?:(?!\\?").)*\\\""""
BARE = r"""(?:\$\{[^{}]*\}|[^\s,;&|'"\])}\\]|\\(?!['"])|[\])}](?![\s,\])}'"]|$)|,(?!\s|$|[\w.-]+\s*[=:]|\w+\s))+"""
NAME = r"[A-Za-z_\u4e00-\u9fff][\w.-]*"
QUOTE = r"""(?:\\?['"])?"""
ASSIGNMENT = re.compile(rf"(?<![\w.])({NAME}){QUOTE}\s*=(?!=)\s*({QUOTED}|{BARE})")
ENTRY = re.compile(
    rf"""(?m)(?:^|(?<=[{{,'"(\[]))\s*{QUOTE}({NAME}){QUOTE}\s*:(?!//)\s*"""
    rf"""({QUOTED}|[^\s,{{}}\[\]'"\\](?:[^,{{}}\n'"\\]|\\(?!['"]))*)"""
)
FLAG = re.compile(rf"(?<![\w-])--?({NAME})\s+({QUOTED}|{BARE})")

Replace = Callable[[str], str]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted keys; an empty dictionary is kept as a value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def is_secret_name(name: str) -> bool:
    """Whether a dotted key, or the name of an environment variable, is the name of a secret."""
    return any(_is_secret_part(part) for part in re.split(r"[./]", name))


def _is_secret_part(part: str) -> bool:
    words = [word.lower() for word in WORD.findall(part)]
    while words and words[-1].isdigit():
        words.pop()
    if not words:
        return False
    *before, last = words
    previous = before[-1] if before else ""
    if last in NEUTRAL_WORDS:
        return words[-3:] == ["access", "key", "id"]
    if any(word.endswith(SECRET_ENDINGS) for word in words):
        return True
    if last == "token":
        return previous not in TEXT_TOKENS
    if last in ("tokens", "key", "keys"):
        return previous in KEY_WORDS
    return last in SECRET_WORDS


def is_secret(name: str, value: Any) -> bool:
    """Whether the value of the key is a secret: a text, and not a switch, a special token or the name of a variable."""
    if isinstance(value, bool) or not is_secret_name(name):
        return False
    if isinstance(value, int):
        return not name.lower().endswith(("token", "key"))
    if not isinstance(value, str) or value.strip().lower() in NOT_SECRET or FROM_ENVIRONMENT.fullmatch(value.strip()):
        return False
    last = name.lower()
    return not (
        (last.endswith("token") and SPECIAL_TOKEN.fullmatch(value)) or (last.endswith("pwd") and value.startswith("/"))
    )


def replace_secrets(text: str, replace: Replace, *, assignments: bool = True) -> str:
    """The text with `replace(secret)` in place of each secret in it, by shape and, with `assignments`, by name."""

    def replaced(match: re.Match[str]) -> str:
        secret = match.group(match.lastindex or 0)
        if secret.startswith(HIDDEN):
            return match.group()
        start = match.start(match.lastindex or 0) - match.start()
        return match.group()[:start] + replace(secret) + match.group()[start + len(secret) :]

    def if_named(match: re.Match[str]) -> str:
        return replaced(match) if is_secret(match.group(1), match.group(2)) else match.group()

    # names first: the value of a name is a secret as a whole, whatever its shape
    for pattern in (ASSIGNMENT, ENTRY, FLAG) if assignments else ():
        text = pattern.sub(if_named, text)
    for pattern in (USERINFO, BEARER, COMMANDS, SHAPES):
        text = pattern.sub(replaced, text)
    return text


def redact_text(text: str, known: Iterable[str] = (), *, assignments: bool = True) -> str:
    """The text with HIDDEN in place of each secret in it, and of each `known` one."""
    for secret in sorted({*known, *environment_secrets()}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return replace_secrets(text, lambda _: HIDDEN, assignments=assignments)


def environment_secrets() -> set[str]:
    """The secrets in the environment variables, by their names; short ones and paths, which may be anything, are left out."""
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= 12 and not value.startswith("/") and is_secret(name, value)
    }


def redact_value(value: Any, *, assignments: bool = True) -> Any:
    """A copy of nested dictionaries and lists in which secrets are redacted, in keys too."""
    if isinstance(value, dict):
        return {
            redact_value(key, assignments=assignments): HIDDEN
            if is_secret(str(key), part)
            else redact_value(part, assignments=assignments)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [redact_value(part, assignments=assignments) for part in value]
    return redact_text(value, assignments=assignments) if isinstance(value, str) else value


def redact_config(config: "DictConfig") -> "DictConfig":
    """A resolved copy of the config without secrets: null in place of a value that is one, HIDDEN where a text holds one."""
    from omegaconf import DictConfig, OmegaConf

    copy = OmegaConf.create(_redacted(OmegaConf.to_container(config, resolve=True, enum_to_str=True)))
    assert isinstance(copy, DictConfig)
    return copy


def _redacted(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _redacted(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part, name) for part in value]
    if is_secret(name, value):
        return None
    return escape_interpolations(redact_text(value)) if isinstance(value, str) else value


def escape_interpolations(text: str) -> str:
    """The text such that OmegaConf reads it as it is: `\\${` in place of `${`, which would start an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + "\\${", text)


def redact_overrides(overrides: Iterable[str]) -> list[str]:
    """The overrides with HIDDEN in place of secrets."""
    replaced = [replace_in_override(override, lambda _: HIDDEN) for override in overrides]
    return [redact_text(override, assignments=False) for override in replaced]


def replace_in_override(override: str, replace: Replace) -> str:
    """The override `key=value` with `replace(secret)` in place of its value, or of what is secret in it."""
    key, equals, value = override.partition("=")
    if not equals:
        return replace_secrets(override, replace)
    if is_secret(key.lstrip("+~"), value):
        return f"{key}={replace(value)}"
    return f"{key}={replace_secrets(value, replace)}"


def secrets_in(overrides: Iterable[str]) -> set[str]:
    """The secrets of the overrides, without quotes; too short ones would hide other text."""
    found: set[str] = set()

    def add(secret: str) -> str:
        found.add(secret.strip("'\""))
        return HIDDEN

    for override in overrides:
        replace_in_override(override, add)
    return {secret for secret in found if len(secret) >= 4}
