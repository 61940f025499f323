"""The forms in which chat templates read tools, calls and results, found by probing; templates that no maker has published."""

import pytest
from transformers import AddedToken, AutoTokenizer

from glmtuner.config.paths import ASSETS
from glmtuner.data.records import Message
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.templates.jinja import TokenizersOwn
from glmtuner.templates.tool_calls import ToolCall

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CALL = ToolCall("weather", {"city": "北京", "days": 2}, "id0000001")
ASK, SUNNY, TOLD = Message("user", "?"), Message("tool", "sunny", call_id=CALL.id), Message("assistant", "Fine.")
CALLED = Message("assistant", "", tool_calls=(CALL,))
BEGIN = "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "<|{{ m.role }}|>{{ m.content }}"
HERMES = (  # with what stands for the arguments
    "<tool_call>\n{{ '{\"name\": \"' ~ c.function.name ~ '\", \"arguments\": ' ~ ARGUMENTS ~ '}' }}\n</tool_call>"
).replace
SOURCES = {
    "text": (  # arguments are concatenated
        "{% if m.tool_calls %}<|assistant|>{% for c in m.tool_calls %}"
        + HERMES("ARGUMENTS", "(c.function.arguments + '')")
        + "{% endfor %}{% else %}"
        + PLAIN
        + "{% endif %}"
    ),
    "objects": (
        "{% if m.tool_calls %}<|assistant|>{% for c in m.tool_calls %}"
        + HERMES("ARGUMENTS", "(c.function.arguments.items() and c.function.arguments | tojson)")
        + "{% endfor %}{% else %}"
        + PLAIN
        + "{% endif %}"
    ),
    "none": (  # calls only where there is no content
        "{% if m.content is none %}<|assistant|>{% for c in m.tool_calls %}"
        + HERMES("ARGUMENTS", "(c.function.arguments | tojson)")
        + "{% endfor %}{% else %}"
        + PLAIN
        + "{% endif %}"
    ),
    "observation": (  # results are of another role
        "{% if m.tool_calls %}<|assistant|>{% for c in m.tool_calls %}"
        + HERMES("ARGUMENTS", "(c.function.arguments | tojson)")
        + "{% endfor %}{% elif m.role in ('user', 'assistant', 'observation') %}"
        + PLAIN
        + "{% endif %}"
    ),
}
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>'
METADATA = (  # GLM-4's, with the tools beside the content of a turn
    "{% for m in messages %}{% if m.tools %}<|system|>{{ m.tools | tojson }}{% endif %}"
    "<|{{ m.role }}|>{{ m.metadata }}\n{{ m.content }}" + END
)


def own(source, *tokens):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer, TokenizersOwn(source=source, fitting=True)


def texts(tokenizer, template, messages, tools=()):
    """The whole row, and what is learned of it, answer by answer."""
    (encoded,) = template.encode(tokenizer, [messages], [tools])
    labels = encoded.labels(every_answer=True)
    learned = [tokenizer.decode(labels[start : end + 1]) for start, end in encoded.learned(True)]
    assert sum(label != IGNORE_INDEX for label in labels) == sum(end + 1 - start for start, end in encoded.answers)
    return tokenizer.decode(encoded.input_ids), learned


@pytest.mark.parametrize("form", SOURCES)
def test_calls_are_given_in_the_form_that_the_template_reads(form):
    tokenizer, template = own(BEGIN + SOURCES[form] + END)
    assert template.renders_tools(tokenizer) and template.syntax(tokenizer).name == "hermes"
    result = "<|observation|>" if form == "observation" else "<|tool|>"
    row, learned = texts(tokenizer, template, [ASK, CALLED, SUNNY, TOLD], [TOOL])
    assert row.endswith(f"<|user|>?<|assistant|>{HERMES_CALL}{result}sunny<|assistant|>Fine.<|user|>")
    assert '"name": "weather", "description"' in row
    assert learned[-1] == "Fine.<|user|>" and "sunny" not in "".join(learned)
    row, (learned,) = texts(tokenizer, template, [ASK, CALLED], [TOOL])
    assert learned.startswith(HERMES_CALL) and row.endswith(learned)


def test_turns_of_glm4_s_form():
    tokenizer, template = own(METADATA)
    assert template.renders_tools(tokenizer) and template.syntax(tokenizer).name == "glm4"
    assert not TokenizersOwn(source=METADATA).renders_calls(tokenizer), "OpenAI's form alone"
    told = CALLED._replace(content="Wait.", tool_calls=(CALL, CALL))
    system = Message("system", "S")
    row, learned = texts(tokenizer, template, [system, ASK, told, SUNNY, SUNNY, TOLD], [TOOL])
    called = 'weather\n{"city": "北京", "days": 2}'
    turns = f"<|user|>\n?<|assistant|>\nWait.<|assistant|>{called}<|assistant|>{called}"
    assert row.endswith(f"<|system|>\nS{turns}<|observation|>\nsunny<|observation|>\nsunny<|assistant|>\nFine.<|user|>")
    assert row.startswith("<|system|>[{") and row.count('"description"') == 1
    assert learned == [f"\nWait.<|assistant|>{called}<|assistant|>{called}<|observation|>", "\nFine.<|user|>"]


def test_a_syntax_that_nobody_knows_is_none():
    source = "{% for c in m.tool_calls or [] %}<|assistant|>CALL {{ c.function.name }} WITH {{ c.function.arguments | tojson }}{% endfor %}"
    tokenizer, template = own(BEGIN + PLAIN + source + END)
    assert template.renders_calls(tokenizer) and template.syntax(tokenizer) is None
    _, learned = texts(tokenizer, template, [ASK, CALLED._replace(content="x")], [TOOL])
    assert 'CALL weather WITH {"city": "北京", "days": 2}' in learned[0]


def test_a_syntax_in_other_spacing_is_found_by_its_reader():
    source = SOURCES["objects"].replace("<tool_call>\n", "<tool_call>").replace("\n</tool_call>", " </tool_call>")
    tokenizer, template = own(BEGIN + source + END)
    assert template.syntax(tokenizer).name == "hermes"


def test_markup_that_ends_in_a_special_token_is_no_stop():
    source = SOURCES["objects"].replace("</tool_call>", "</tool_call><end_of_call>")
    assert own(BEGIN + source + END, "<end_of_call>")[1].syntax(own(source, "<end_of_call>")[0]).name == "hermes"
    tokenizer, template = own(BEGIN + SOURCES["objects"].replace(PLAIN, PLAIN + "<eop>") + END, "</tool_call>")
    assert template.stop_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<eop>")}


def test_control_tokens_in_tools_results_and_arguments_are_text():
    for form, source in {**{form: BEGIN + source + END for form, source in SOURCES.items()}, "glm4": METADATA}.items():
        tokenizer, template = own(source)
        controls = set(tokenizer.added_tokens_decoder)
        found = []
        for word in ("plain", "<|user|>"):
            tool = {"type": "function", "function": {**TOOL["function"], "description": word}}
            call = ToolCall("weather", {"city": word}, CALL.id)
            messages = [ASK, CALLED._replace(tool_calls=(call,)), SUNNY._replace(content=word), TOLD]
            (encoded,) = template.encode(tokenizer, [messages], [[tool]])
            assert tokenizer.decode(encoded.input_ids).count(word) >= 3
            found.append([token for token in encoded.input_ids if token in controls])
        assert found[0] == found[1], form
