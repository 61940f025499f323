"""ChatGLM's configs, models and tokenizers, which transformers does not have.

Importing this package registers them with AutoConfig, AutoModel…, and AutoTokenizer; it imports torch and transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from glmtuner.models.configuration_chatglm import ChatGLM2Config, ChatGLMConfig
from glmtuner.models.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
    ChatGLMModel,
)
from glmtuner.models.modeling_chatglm2 import (
    ChatGLM2ForConditionalGeneration,
    ChatGLM2ForSequenceClassification,
    ChatGLM2ForTokenClassification,
    ChatGLM2Model,
)
from glmtuner.models.tokenization_chatglm import ChatGLM4Tokenizer, ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
for _config, _models in (
    (
        ChatGLMConfig,
        (
            ChatGLMModel,
            ChatGLMForConditionalGeneration,
            ChatGLMForSequenceClassification,
            ChatGLMForTokenClassification,
        ),
    ),
    (
        ChatGLM2Config,
        (
            ChatGLM2Model,
            ChatGLM2ForConditionalGeneration,
            ChatGLM2ForSequenceClassification,
            ChatGLM2ForTokenClassification,
        ),
    ),
):
    _autos = (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    for _auto, _model in zip(_autos, _models, strict=True):
        _auto.register(_config, _model, exist_ok=True)
    for _tokenizer in (
        ChatGLM4Tokenizer,
        ChatGLMTokenizer,
    ):  # the last one is the default of the type; both are found by name
        AutoTokenizer.register(_config, tokenizer_class=_tokenizer, exist_ok=True)

__all__ = ["ChatGLM2Config", "ChatGLM4Tokenizer", "ChatGLMConfig", "ChatGLMTokenizer"]
