"""New tokens: their ids, texts and rows, in fast tokenizers and in ChatGLM's own, and the words that cannot be tokens."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from small_models import built
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from glmtuner.config.compose import compose
from glmtuner.data.prepare import serialized
from glmtuner.data.records import Message
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.lora import Lora
from glmtuner.finetuning.new_rows import require_new_rows
from glmtuner.launch.register import register_presets
from glmtuner.models.load import load_tokenizer
from glmtuner.models.modeling_chatglm2 import as_glm
from glmtuner.models.new_tokens import ADDED, add_rows, add_tokens, new_rows, row_of
from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer, as_fast
from glmtuner.templates.encoding import encode_text
from glmtuner.templates.jinja import TokenizersOwn
from glmtuner.templates.new_tokens import new_tokens_of

register_presets()

BASE = ["model=tiny_glm", "tracker=none"]
TOKENS = ["<实体>", "[rel]"]
TEXTS = ["<实体>是什么", "a[rel]b <实体> c", "[rel][rel]", "no token", "你好<实体>世界\n  x"]


def tokenizer_of(kind: str, upstream: Path) -> object:
    if kind == "tiny_glm":
        return load_tokenizer(compose(BASE).run.model)
    return AutoTokenizer.from_pretrained(upstream / {"chatglm": "tokenizer_v1", "chatglm2": "chatglm2_realvocab"}[kind])


def llama(**changed: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 3000,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changed}))


@pytest.mark.parametrize("kind", ["tiny_glm", "chatglm", "chatglm2"])
def test_new_tokens_are_one_id_each_and_other_texts_stay_as_they_are(
    kind: str, upstream_files: Path, tmp_path: Path
) -> None:
    before, after = tokenizer_of(kind, upstream_files), tokenizer_of(kind, upstream_files)
    add_tokens(after, TOKENS)
    ids = [row_of(after, token) for token in TOKENS]
    assert ids == [len(before), len(before) + 1] and len(after) == len(before) + 2
    assert encode_text(after, ["no token", "早上好 1"]) == encode_text(before, ["no token", "早上好 1"])
    for text, encoded in zip(TEXTS, encode_text(after, TEXTS), strict=True):
        assert [token for token in encoded if token in ids] == [ids[TOKENS.index(part)] for part in tokens_in(text)]
        expected = text.replace(" <实体> ", "<实体>") if kind == "chatglm" else text  # as next to its control tokens
        assert after.decode(list(encoded), skip_special_tokens=True) == expected
    assert new_tokens_of(after) == {token: list(before(token, add_special_tokens=False).input_ids) for token in TOKENS}
    assert serialized(after) != serialized(before)
    after.save_pretrained(tmp_path)
    for read in (AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(after))):
        assert encode_text(read, TEXTS) == encode_text(after, TEXTS) and new_tokens_of(read) == new_tokens_of(after)
    read = AutoTokenizer.from_pretrained(tmp_path)
    add_tokens(read, [*TOKENS, "<third>"])
    assert row_of(read, "<third>") == len(before) + 2


def tokens_in(text: str) -> list[str]:
    return [
        token for token in text.replace("[rel]", "|[rel]|").replace("<实体>", "|<实体>|").split("|") if token in TOKENS
    ]


def test_a_fast_tokenizer_of_chatglm2_has_the_same_ids(upstream_files: Path) -> None:
    slow = tokenizer_of("chatglm2", upstream_files)
    assert isinstance(slow, ChatGLMTokenizer)
    add_tokens(slow, TOKENS)
    fast = as_fast(slow)
    assert encode_text(fast, TEXTS) == encode_text(slow, TEXTS) and new_tokens_of(fast) == new_tokens_of(slow)


def test_users_mean_new_tokens_and_no_control_tokens() -> None:
    """In a template of the tokenizer's own, too, where every other added token of a question is text."""
    tokenizer = tokenizer_of("tiny_glm", Path())
    add_tokens(tokenizer, TOKENS)
    source = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.chat_template = source
    (prompt,) = TokenizersOwn(source=source).encode(tokenizer, [[Message("user", "a<实体>b<|user|>")]])
    assert list(prompt.input_ids).count(row_of(tokenizer, "<实体>")) == 1
    assert list(prompt.input_ids).count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [0, 40])
def test_rows_start_at_the_mean_of_their_pieces(tied: bool, padding: int, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tokenizer_of("tiny_glm", Path())
    model = llama(tie_word_embeddings=tied, vocab_size=len(tokenizer) + padding)
    before = copy.deepcopy(model)
    add_tokens(tokenizer, TOKENS)
    add_rows(model, tokenizer)
    assert model.config.vocab_size == len(tokenizer) + (padding - 2 if padding else 0)
    for ours, theirs in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        for token in TOKENS:
            expected = torch.stack([theirs[piece] for piece in new_tokens_of(tokenizer)[token]]).mean(0)
            assert torch.allclose(ours[row_of(tokenizer, token)], expected, atol=1e-7)
        assert torch.equal(ours[: len(tokenizer) - 2], theirs[: len(tokenizer) - 2])
    assert ("2 of the rows had been padding of the vocabulary" in " ".join(capsys.readouterr().out.split())) is bool(
        padding
    )
    assert [*new_rows(model)] == ["model.embed_tokens"] + ["lm_head"] * (not tied)
    brought, again = copy.deepcopy(tokenizer), copy.deepcopy(model)
    vars(brought).pop(ADDED)  # as read from its files
    add_tokens(brought, TOKENS)
    with torch.no_grad():
        again.get_input_embeddings().weight.fill_(3)
    add_rows(again, brought)
    assert (again.get_input_embeddings().weight == 3).all() and new_rows(again) == new_rows(model)
    learned = copy.deepcopy(model)
    with torch.no_grad():
        learned.get_input_embeddings().weight[row_of(tokenizer, TOKENS[0])] = 7
    add_rows(learned, tokenizer, learned=TOKENS[:1])
    assert (learned.get_input_embeddings().weight[row_of(tokenizer, TOKENS[0])] == 7).all()


@pytest.mark.parametrize("name", ["ChatGLM", "ChatGLM2", "Glm", "GPT2", "Bloom"])
def test_every_layout_of_embeddings_gets_its_rows(name: str) -> None:
    tokenizer, model = tokenizer_of("tiny_glm", Path()), built(name).float()
    before = model.get_input_embeddings().weight.detach().clone()
    add_tokens(tokenizer, ["<e1>"])
    setattr(tokenizer, ADDED, {"<e1>": [10, 20, 30]})
    add_rows(model, tokenizer)
    row = row_of(tokenizer, "<e1>")
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert model.config.vocab_size == embeddings.shape[0] == head.shape[0] == row + 1
    assert torch.equal(embeddings[: len(before)], before) and torch.allclose(
        embeddings[row], before[[10, 20, 30]].mean(0)
    )
    assert torch.allclose(head[row], head[[10, 20, 30]].mean(0))
    ids = torch.tensor([[11, row, 12, 6, 4]])  # ChatGLM-6B's contexts end in two tokens of their own
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.shape[-1] == row + 1 and logits.isfinite().all()
    if name == "ChatGLM2":
        assert torch.allclose(as_glm(model)(input_ids=ids).logits, logits, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_with_lora_a_step_changes_the_new_rows_alone_also_in_half_precision(tied: bool) -> None:
    tokenizer = tokenizer_of("tiny_glm", Path())
    model = llama(tie_word_embeddings=tied, vocab_size=len(tokenizer)).bfloat16()
    add_tokens(tokenizer, TOKENS)
    add_rows(model, tokenizer)
    before = copy.deepcopy(model)
    method = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0, lora_target=["q_proj"])
    adapted = method.attach(model, family_from_structure(model))
    trained = [value for value in adapted.parameters() if value.requires_grad]
    assert all(value.dtype == torch.float32 for value in trained) and len(trained) == 2 + (1 if tied else 2)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    ids = torch.tensor([[5, row_of(tokenizer, TOKENS[0]), 9, row_of(tokenizer, TOKENS[1])]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged = adapted.merge_and_unload()
    for ours, theirs in zip(
        (merged.get_input_embeddings().weight, merged.get_output_embeddings().weight),
        (before.get_input_embeddings().weight, before.get_output_embeddings().weight),
        strict=True,
    ):
        changed = {*(ours != theirs).any(1).nonzero().flatten().tolist()}
        assert changed <= {row_of(tokenizer, token) for token in TOKENS} and changed


def test_a_head_with_a_bias_and_an_adapter_without_the_rows_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("tiny_glm", Path())
    phi = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
        )
    )
    nn.init.normal_(phi.lm_head.bias)
    add_tokens(tokenizer, TOKENS)
    add_rows(phi, tokenizer)
    pieces, row = new_tokens_of(tokenizer)[TOKENS[0]], row_of(tokenizer, TOKENS[0])
    assert torch.allclose(phi.lm_head.bias[row], phi.lm_head.bias[pieces].mean())
    with pytest.raises(ConfigError, match="type finetuning=full"):
        new_rows(phi)
    model = llama(vocab_size=len(tokenizer))
    add_rows(model, tokenizer)
    method = Lora(finetuning_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0, lora_target=["q_proj"])
    adapted = method.attach(model, family_from_structure(model))
    require_new_rows(adapted, {"trainable_token_indices": {"embed_tokens": [row, row + 1]}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"type model\.resume_lora_training=false"):
        require_new_rows(adapted, {"trainable_token_indices": [row]}, tmp_path)


@pytest.mark.parametrize("kind", ["tiny_glm", "chatglm", "chatglm2"])
def test_what_is_there_already_is_said_or_refused(
    kind: str, upstream_files: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = tokenizer_of(kind, upstream_files)
    size = len(tokenizer)
    for control in ("[gMASK]", tokenizer.eos_token):
        with pytest.raises(
            ConfigError, match="is a control token of this tokenizer; name another one, or leave it out"
        ):
            add_tokens(tokenizer, [control])
    add_tokens(tokenizer, ["的"])
    assert len(tokenizer) == size and "is one token of this tokenizer already" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_name_of_another_entry_is_refused() -> None:
    tokenizer = tokenizer_of("tiny_glm", Path())
    name = next(name for name in tokenizer.get_vocab() if name.startswith("Ġ") and len(name) > 3)
    with pytest.raises(ConfigError, match="which stands for other text"):
        add_tokens(tokenizer, [name])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.new_tokens=['']"], "data.new_tokens has an empty token"),
        (["data.new_tokens=[a1,a1]"], "data.new_tokens names 'a1' 2 times; name each token once"),
        (["data.new_token=[a]"], "did you mean 'new_tokens'?"),
    ],
)
def test_words_that_cannot_be_tokens(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, *words])
    assert told in str(caught.value) and "\n" not in str(caught.value)
