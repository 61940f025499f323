"""Configs of the `chatglm` model type, under the names that the published config.json files use.

Two different architectures share the type: ChatGLM-6B, and ChatGLM2-6B with its successors. The keys of a config.json say
which of them it describes.
"""

from typing import Any

from transformers import PreTrainedConfig

from glmtuner.errors import CheckpointError

OBSOLETE_VOCABULARY = 150528  # ChatGLM-6B before April 2023, with 20,000 image tokens in front
GENERATION_2_KEYS = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size", "kv_channels")


class ChatGLMConfig(PreTrainedConfig):
    """ChatGLM-6B. `from_dict`, and so `from_pretrained`, return a ChatGLM2Config if the keys are those of ChatGLM2."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers", "intermediate_size": "inner_hidden_size",
                     "max_position_embeddings": "max_sequence_length"}  # fmt: skip

    vocab_size: int = 130528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True  # the published files rely on the old default, and store the matrix twice
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    quantization_bit: int | None = None  # of the checkpoint's files; None once they are loaded

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vocab_size == OBSOLETE_VOCABULARY:
            raise CheckpointError(
                f"vocab_size={OBSOLETE_VOCABULARY}: these are ChatGLM-6B files from before April 2023, whose token ids differ "
                "from the current ones; download THUDM/chatglm-6b again (vocab_size 130528)"
            )

    @property
    def sop_token_id(self) -> int:
        """The id of <sop>, where the answer starts; config.json calls it bos_token_id."""
        assert self.bos_token_id is not None
        return self.bos_token_id

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A ChatGLMConfig or a ChatGLM2Config, as the keys of `config_dict` say."""
        if cls is ChatGLMConfig and any(key in config_dict for key in GENERATION_2_KEYS):
            return ChatGLM2Config.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class ChatGLM2Config(PreTrainedConfig):
    """ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as first published.

    `rope_ratio` extends the context in one of two ways that config.json does not distinguish: ChatGLM3-6B-32k and GLM-4
    multiply the rotary base by it; ChatGLM2-6B-32k divides positions by it, which is `rope_interpolation=True`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
        "attention_bias": "add_qkv_bias",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    layernorm_epsilon: float = 1e-5
    seq_length: int = 8192
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    attention_dropout: float = 0.0
    rope_ratio: float = 1.0
    rope_interpolation: bool = False
    rope_parameters: dict[str, Any] | None = None  # computed from the two above, or another type than they can say
    rmsnorm: bool = True
    post_layer_norm: bool = True
    original_rope: bool = True
    apply_residual_connection_post_layernorm: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    quantization_bit: int | None = None  # of the checkpoint's files; None once they are loaded

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.multi_query_attention:
            self.multi_query_group_num = self.num_attention_heads
        self.set_rope()
        super().__post_init__(**kwargs)
        unsupported = [
            f"{name}={getattr(self, name)}"
            for name, published in (
                ("rmsnorm", True),
                ("post_layer_norm", True),
                ("original_rope", True),
                ("apply_residual_connection_post_layernorm", False),
            )
            if getattr(self, name) is not published
        ]
        if unsupported:
            raise CheckpointError(
                f"{', '.join(unsupported)}: no published ChatGLM2, ChatGLM3 or GLM-4 checkpoint has this; download the "
                "checkpoint's config.json again"
            )

    @property
    def has_own_rope(self) -> bool:
        """Whether `rope_parameters` are of `model.rope_scaling`, by a type that `rope_ratio` cannot say."""
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        return kind != "default" and not (kind == "linear" and self.rope_interpolation)

    def set_rope(self) -> None:
        """Compute `rope_parameters` from `rope_ratio` and `rope_interpolation`, unless they are of a type that these cannot say."""
        if self.has_own_rope:
            return
        linear = self.rope_interpolation and self.rope_ratio != 1
        self.rope_parameters = {
            "rope_type": "linear" if linear else "default",
            "rope_theta": 10000.0 if linear else 10000.0 * self.rope_ratio,
            "partial_rotary_factor": 0.5,
            **({"factor": float(self.rope_ratio)} if linear else {}),
        }
