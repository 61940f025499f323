"""What ranks that share a row refuse, before anything is exchanged; tests/e2e/test_sequence_parallel.py has what they compute."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from glmtuner.data.segments import Segments
from glmtuner.errors import ConfigError
from glmtuner.kernels.choose import require_shared_rows
from glmtuner.kernels.shared_rows import over_ranks, with_share
from glmtuner.launch.checks import check_shared_heads


def test_heads_that_do_not_divide_are_refused():
    attention = over_ranks(lambda *args, **options: pytest.fail("called"))
    states = torch.zeros(1, 6, 4, 8)
    segments = Segments((16,), (0,), (16,), parts=(4, 4, 4, 4))
    with pytest.raises(ConfigError, match=r"parallel\.sequence=4: Linear has 6 heads.*; type parallel\.sequence=2"):
        attention(nn.Linear(1, 1), states, states, states, None, segments=segments)


@pytest.mark.parametrize("config", [{"num_attention_heads": 6}, {"text_config": {"num_attention_heads": 6}}])
def test_heads_are_looked_up_before_anything_is_loaded(config: dict[str, Any]):
    run = SimpleNamespace(parallel=SimpleNamespace(ranks_per_row=4))
    with pytest.raises(ConfigError, match=r"parallel\.sequence=4: the model has 6 heads .*; type parallel\.sequence=2"):
        check_shared_heads(run, config)
    check_shared_heads(SimpleNamespace(parallel=SimpleNamespace(ranks_per_row=3)), config)


def test_without_parts_attention_is_given_what_it_was():
    given = torch.zeros(1, 6, 4, 8)
    attention = over_ranks(lambda module, query, key, value, mask, **options: (query, options))
    query, options = attention(
        nn.Linear(1, 1), given, given, given, None, segments=Segments((4,), (0,), (4,)), scaling=2
    )
    assert query is given and options["scaling"] == 2


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_of_a_row_are_refused(kind: str):
    own = {"factor": 2.0} if kind == "dynamic" else {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 32, **own},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(
        ConfigError, match=rf"parallel\.sequence=2: the positions .*\(rope_type={kind}\); type parallel\.sequence=1"
    ):
        require_shared_rows(model, [], lambda rows: {}, lambda rows: {}, contextlib.nullcontext, 2)


def test_a_layer_has_its_own_grouping_and_prefix_again_afterwards():
    keys, values = torch.arange(4.0).view(2, 1, 2), torch.ones(2, 1, 3)
    layer = SimpleNamespace(num_key_value_groups=4, prefix=lambda: (keys, values))
    before = dict(vars(layer))
    with with_share(layer, times=2, count=4, own=2):  # of heads 0 0 1 1 the third
        assert layer.num_key_value_groups == 2
        mine, others = layer.prefix()
        assert mine.tolist() == [[[2.0, 3.0]]] and others.shape == (1, 1, 3)
    assert vars(layer) == before
