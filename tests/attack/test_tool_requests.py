"""Requests with tools from clients that are broken or hostile: each gets an answer or an error of the API within ten seconds.

ATTACK_TOOL_REQUESTS is their number (300), ATTACK_SEED their seed. The model has learned calls a little, so that whole ones, broken
ones and stray markup are among its answers.
"""

import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from glmtuner.cli.main import main
from glmtuner.config.paths import ASSETS

sys.path.insert(0, str(Path(__file__).parent))
from test_requests import LIMIT_S, SEED, VALUES, check, port, post  # noqa: F401  # the fixture `port` serves `run`

COUNT = int(os.environ.get("ATTACK_TOOL_REQUESTS", "300"))
MARKUP = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
# in the manner of GLM-4.5: calls of tags, and results under the role of an observation
SOURCE = """\
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' %}<|observation|>{{ m.content }}
{%- else %}<|{{ m.role }}|>
{%- if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key><arg_value>
{{- value if value is string else value | tojson }}</arg_value>{% endfor %}</tool_call>
{%- endfor %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif -%}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a random model behind SOURCE; its folder is named m, as the requests call it."""
    folder = tmp_path_factory.mktemp("tool_requests")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in MARKUP])
    tokenizer.chat_template = SOURCE
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ASSETS / "tiny_glm", vocab_size=len(tokenizer), num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    asked = [{"role": "user", "content": "1+1?"}]
    function = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
    lines = [
        {
            "messages": [
                *asked, {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": call} for call in made]},
            ],
            "tools": [function],
        }
        for text, made in (
            ("", [{"name": "get", "arguments": {}}]), ("a", [{"name": "get", "arguments": {"a": 1}}]),
            ("", [{"name": "get", "arguments": {}}] * 2), ("two", []),
        )
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = (
        f"model.model_name_or_path={folder}/base", "model.family=auto", "model.template=tokenizer",
        f"data.dataset={folder}/data.jsonl", "finetuning=full", "trainer.max_steps=120", "trainer.learning_rate=3e-3",
        "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1",
        f"trainer.output_dir={folder}/m", "trainer.disable_tqdm=true", "tracker=none",
    )  # fmt: skip
    assert main([*words]) == 0
    return folder / "m"


def deep(levels: int) -> Any:
    value: Any = {"a": 1}
    for _ in range(levels):
        value = {"a": value}
    return value


NAMES: list[Any] = [
    "get",
    "get_weather",
    "查询天气",
    "a.b-c",
    "name",
    "tool_call",
    "x" * 128,
    "x" * 129,
    "",
    " ",
    "a b",
    "<think>",
    None,
    5,
]
TEXTS: list[Any] = [
    "", "hi", "你好" * 50, "<|user|>", "<think>a</think>b", "<tool_call>get</tool_call>", "</think>", "[gMASK]<sop>", "\x00", "{{ x }}",
    "\ud83d", "\U000f0000\U000f0001", "get_weather\n{}", "<|observation|>" * 20, [{"type": "text", "text": "<tool_call>"}], None, [], 7,
]  # fmt: skip
PARAMETERS: list[Any] = [
    None, {}, {"type": "object", "properties": {"city": {"type": "string"}}}, {"properties": []}, {"properties": {"a": None}},
    {"type": ["object", None]}, deep(60), deep(70), deep(900), {"a": float("nan")}, {"a": 1e308, "b": 10**400}, [], "{}",
    {"<|user|>": "<tool_call>"}, {"properties": {"city": {"enum": [1, "a"], "anyOf": 5}}}, {"\ud800": 1}, {"a": "\U000f0000"},
]  # fmt: skip
ARGUMENTS: list[Any] = [
    "{}", '{"city": "北京"}', '{"a": {"b": [1, 2.5, null, true]}}', '{"<think>": "</tool_call>"}', "", " ", "[]", "null", '"a"', "{", "{}{}",
    '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud83d"}', '{"a": ' + "[" * 500 + "]" * 500 + "}", "[" * 5000, '{"a": 1e999}', {}, None,
    '{"a": ' + "9" * 5000 + "}", '{"\\u0000": "\\u202e"}', '{"items": 1, "keys": 2}',
]  # fmt: skip
IDS: list[Any] = ["a", "b", "call00001", "", "x" * 1024, "x" * 1025, "\ud800", None, 3, "<|user|>"]
CHOICES: list[Any] = [
    "auto", "none", "required", None, "any", "", [], {}, {"type": "function"}, {"type": "function", "function": {"name": "get"}},
    {"type": "function", "function": {"name": "nope"}}, {"type": "custom", "custom": {"name": "get"}},
    {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
]  # fmt: skip


def likely(draw: random.Random, values: list[Any], legal: int) -> Any:
    """Mostly one of the first values, which are legal; seldom any of them."""
    return draw.choice(values[:legal] if draw.random() < 0.97 else values)


def tool(draw: random.Random) -> Any:
    function = {
        "name": likely(draw, NAMES, 7),
        "description": likely(draw, TEXTS, 10),
        "parameters": likely(draw, PARAMETERS, 7),
    }
    function |= draw.choice([{}, {}, {"strict": likely(draw, [True, None, 1], 2)}])
    if draw.random() < 0.05:
        function.pop(draw.choice([*function]))
    whole = {"type": "function", "function": function}
    return likely(draw, [whole, function, {"type": "custom", "custom": function}, None, "get"], 1)


def calls(draw: random.Random) -> list[Any]:
    return [
        {
            "id": likely(draw, [f"call{draw.randrange(10**5)}", *IDS], 1), "type": "function",
            "function": {"name": likely(draw, NAMES, 7), "arguments": likely(draw, ARGUMENTS, 4)},
        }
        for _ in range(draw.choice([1, 1, 1, 2, 2, 3]))
    ]  # fmt: skip


def conversation(draw: random.Random) -> list[Any]:
    messages: list[Any] = [{"role": "user", "content": likely(draw, TEXTS, 10)}]
    for _ in range(draw.randint(0, 3)):
        answer = {"role": "assistant", "content": draw.choice([None, "", likely(draw, TEXTS, 10)])}
        if draw.random() < 0.3:
            answer["reasoning_content"] = likely(draw, TEXTS, 10)
        made = calls(draw) if draw.random() < 0.7 else None
        messages.append({**answer, **({"tool_calls": made} if made else {})})
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": likely(draw, TEXTS, 10)} for call in made or ()
        ]
        if draw.random() < 0.15:
            draw.shuffle(results)
        if draw.random() < 0.1 and results:
            results.pop()
        messages += results
        if draw.random() < 0.5 or not results:
            messages.append({"role": "user", "content": likely(draw, TEXTS, 10)})
    if draw.random() < 0.05:
        draw.shuffle(messages)
    return messages


def fuzzed(draw: random.Random) -> tuple[bytes, dict[str, Any]]:
    """(body, the request in it): conversations with tools that are legal in most of their parts."""
    request: dict[str, Any] = {
        "model": "m",
        "messages": conversation(draw),
        "tools": [tool(draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))],
    }
    if draw.random() < 0.02:
        request["tools"] = [tool(draw) for _ in range(draw.choice([128, 129]))]
    if draw.random() < 0.7:
        request["tool_choice"] = likely(draw, CHOICES, 3)
    for name, values in (
        ("parallel_tool_calls", [True, False, None]), ("stream", [True, False]), ("n", [1, 3]), ("max_tokens", [1, 16]),
        ("temperature", [0, 1, 2]), ("stop", ["a", "<tool_call>", ["</think>", "的"]]), ("seed", [1]),
        ("chat_template_kwargs", [{"enable_thinking": True}, {"enable_thinking": False}, {}]), ("top_k", [0, 1]),
    ):  # fmt: skip
        if draw.random() < 0.3:
            request[name] = draw.choice(values)
    if draw.random() < 0.1:
        request[draw.choice(["tools", "tool_choice", "parallel_tool_calls", "messages"])] = draw.choice(VALUES)
    try:
        body = json.dumps(request, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of more digits than Python writes
        body = json.dumps({**request, "messages": [], "tools": []}).encode()
    return body, request


def check_calls(answer: dict[str, Any], request: dict[str, Any]) -> int:
    """The number of calls in a whole answer, each of which is one that the next request can send back."""
    known = {call["id"] for turn in request["messages"] for call in turn.get("tool_calls") or ()}
    count = 0
    for choice in answer["choices"]:
        message = choice["message"]
        made = message.get("tool_calls", [])
        assert (choice["finish_reason"] == "tool_calls") <= bool(made)
        assert message["content"] is not None or made
        ids = {call["id"] for call in made}
        assert len(ids) == len(made) and not ids & known
        for call in made:
            assert isinstance(json.loads(call["function"]["arguments"]), dict) and call["function"]["name"]
        count += len(made)
        assert len(made) <= 1 or request.get("parallel_tool_calls") is not False
    return count


def test_fuzzed_tool_requests(port: int) -> None:  # noqa: F811
    draw = random.Random(SEED)
    requests = [fuzzed(draw) for _ in range(COUNT)]
    statuses: list[int] = []
    num_calls: list[int] = []

    def ask(number: int) -> None:
        body, request = requests[number]
        status, answer, seconds = post(port, body)
        check(status, answer, request)
        assert seconds < LIMIT_S, (seconds, request)
        statuses.append(status)
        if status == 200 and not answer.startswith(b"data: "):
            num_calls.append(check_calls(json.loads(answer), request))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(COUNT)))
    assert statuses.count(200) > COUNT / 10 and statuses.count(400) > COUNT / 10, statuses
    assert {*statuses} <= {200, 400, 404, 413}
    assert COUNT < 300 or sum(num_calls) > 10
