"""What was typed: commas, quotes, words that live elsewhere, wrong presets and values, combinations that cannot meet."""

import re

import pytest

from glmtuner.config.compose import compose, compose_every_job, presets
from glmtuner.config.overrides import MOVED, bracket_lists, check_overrides, parse
from glmtuner.config.paths import conf_dir
from glmtuner.config.schema import legal_keys, list_keys, needed_groups
from glmtuner.errors import CheckpointError, ConfigError, did_you_mean, nearest
from glmtuner.launch.register import register_presets

register_presets()

PRESETS = presets([conf_dir()])
LISTS = ["data.dataset", "data.eval_dataset", "finetuning.lora_target", "model.checkpoint_dir"]


def refused(*words: str, sweep: bool = False) -> str:
    """The message that these words get."""
    with pytest.raises(ConfigError) as caught:
        compose_every_job(words) if sweep else compose(words)
    return str(caught.value)


# Commas: "and" in a run, "each" in a sweep; brackets are always "and"


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize(
    ("typed", "single", "sweep"),
    [
        ("a", "[a]", "[a]"),
        ("a,b", "[a,b]", "[a],[b]"),
        ("[a,b]", "[a,b]", "[a,b]"),
        ("[a,b],[c]", "[a,b],[c]", "[a,b],[c]"),  # which only a sweep can mean
        ("a,b,c", "[a,b,c]", "[a],[b],[c]"),
        ("a, b", "[a,b]", "[a],[b]"),
        ("choice(a,b)", "[a,b]", "[a],[b]"),
        ('"a,b"', '["a,b"]', '["a,b"]'),
        ("'a,b',c", "['a,b',c]", "['a,b'],[c]"),
        ("a/b.json", "[a/b.json]", "[a/b.json]"),
        ("[]", "[]", "[]"),
        ("", "[]", "[]"),
        ("${name}", "${name}", "${name}"),
    ],
)
def test_the_comma_rule(key, typed, single, sweep):
    assert bracket_lists([f"{key}={typed}"], multirun=False) == [f"{key}={single}"]
    assert bracket_lists([f"{key}={typed}"], multirun=True) == [f"{key}={sweep}"]


@pytest.mark.parametrize(
    ("typed", "single", "sweep"), [("1", "[1]", "[1]"), ("0.5,0.5", "[0.5,0.5]", "[0.5],[0.5]"), ("[0.5,0.5]",) * 3]
)
def test_the_comma_rule_for_numbers(typed, single, sweep):
    key = "data.mix_probabilities"
    assert bracket_lists([f"{key}={typed}"], multirun=False) == [f"{key}={single}"]
    assert bracket_lists([f"{key}={typed}"], multirun=True) == [f"{key}={sweep}"]


def test_brackets_are_added_once_and_only_to_lists():
    words = [
        "data.dataset=a,b",
        "finetuning=lora,freeze",
        "trainer.learning_rate=1e-3,1e-4",
        "name=a",
        "+data.dataset=a,b",
    ]
    settled = bracket_lists(words, multirun=False)
    assert settled == ["data.dataset=[a,b]", *words[1:4], "+data.dataset=[a,b]"]
    assert bracket_lists(settled, multirun=False) == settled


def test_the_comma_lists_of_the_specification_are_lists():
    assert {*LISTS, "data.mix_probabilities"} <= list_keys()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("[a,b]", ["a", "b"]),
        ('"a,b"', ["a,b"]),
        ("'a, b'", ["a, b"]),
        ("'a,b',c", ["a,b", "c"]),
        (r"c\ d.json", ["c d.json"]),
        ("c d.json,e f.json", ["c d.json", "e f.json"]),
    ],
)
def test_the_run_has_the_list_that_was_meant(typed, meant):
    run = compose([f"data.dataset={typed}", f"finetuning.lora_target={typed}"]).run
    assert run.data.dataset == run.finetuning.lora_target == meant


def test_checkpoints_and_shares_are_lists_too(tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    one.mkdir(), two.mkdir()
    run = compose([f"model.checkpoint_dir={one},{two}", "data.dataset=a,b", "data.mix_probabilities=0.25,0.75"]).run
    assert run.model.checkpoint_dir == [str(one), str(two)]
    assert run.data.mix_probabilities == [0.25, 0.75]


def test_two_mixes_in_one_run_need_a_sweep():
    assert "--multirun" in refused("data.dataset=[a,b],[c]")
    assert compose_every_job(["data.dataset=[a,b],[c]"]) == ["data.dataset=[a,b],[c]"]


def test_every_job_of_a_sweep_is_composed():
    settled = compose_every_job(["data.dataset=a,b", "finetuning=lora,freeze", "trainer.learning_rate=1e-3,1e-4"])
    assert settled == ["data.dataset=[a],[b]", "finetuning=lora,freeze", "trainer.learning_rate=1e-3,1e-4"]
    assert "data.dev_ratio=1.0: a share" in refused("data.dev_ratio=0.1,1", sweep=True)
    assert "quant=int4 stores frozen" in refused("finetuning=lora,full", "quant=none,int4", sweep=True)
    assert "did you mean 'freeze'?" in refused("finetuning=lora,freze", sweep=True)


@pytest.mark.parametrize("words", ["finetuning=lora,freeze", "trainer.learning_rate=1e-3,1e-4", "name=a,b"])
def test_several_values_of_no_list_are_a_sweep(words):
    told = refused(words)
    assert told.startswith(f"{words}: several ") and "type -m before them" in told


# Words that cannot be read, or stand elsewhere


@pytest.mark.parametrize(
    "key", ["data.datset", "data.datast", "dat.dataset", "finetuning.lora_targt", "model.checkpont_dir"]
)
@pytest.mark.parametrize("sweep", [False, True])
def test_a_misspelt_list_key_with_a_comma_is_a_misspelt_key(key, sweep):
    told = refused(f"{key}=a,b", sweep=sweep)
    assert told.startswith(f"unknown key '{key}'; did you mean '")
    assert "ambiguous" not in told.lower() and "multirun" not in told


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--lora_rank=4", "unknown option '--lora_rank=4': .* type finetuning.lora_rank=…"),
        ("--nonsense", "unknown option '--nonsense': .*--help"),
        ("data.dataset", r"'data\.dataset' .*'='.*key=value"),
        ("data.dataset=[a", r"'data\.dataset=\[a' .*quote"),
        ("data.dataset=a,,b", r"'data\.dataset=a,,b' .*quote"),
        ("name='a", '"name=\'a" .*quote'),
        ("name=it's, now", '"name=it\'s, now" .*quote'),
        ("lora_rank=4", r"unknown key 'lora_rank'.* type finetuning\.lora_rank=…"),
        (
            "num_train_epochs=4",
            r"unknown key 'num_train_epochs'.* type trainer\.num_train_epochs=…",
        ),
        ("nonsense=4", "unknown key 'nonsense'.*data, experiment, .*--help"),
        ("trainer.nonsense.deep=4", "unknown key 'trainer.nonsense.deep'"),
    ],
)
def test_words_that_cannot_be_read_say_what_to_type(word, told):
    assert re.match(told, refused(word))


@pytest.mark.parametrize(
    "value", ["it's", "我's", "a=b", "a(b", "50% [x]", "a#b", "a\\b's", "C:\\it's", "two  spaces'", "x]y{z}", "tab\t'"]
)
@pytest.mark.parametrize("key", ["name", "data.dataset"])
def test_a_value_needs_no_quotes_to_be_parsed(key, value):
    (override,) = parse(bracket_lists([f"{key}={value}"], multirun=False))
    assert override.value() == ([value] if key == "data.dataset" else value)


@pytest.mark.parametrize("key", sorted(MOVED))
def test_a_word_of_other_tools_is_answered_with_ours(key):
    value = "4"
    told = refused(f"{key}={value}")
    assert told.startswith(f"{key}={value} ") and "{" not in told
    advised = re.findall(r"type ([\w./]+)=", told)
    assert advised or "leave it out" in told
    for word in advised:
        assert word in legal_keys() or word in PRESETS, told
        assert word not in MOVED


def test_moved_words_keep_what_was_typed():
    assert refused("finetuning.finetuning_type=freeze").endswith("type finetuning=freeze")
    assert refused("dataset=a,b").endswith("type data.dataset=a,b")
    assert refused("trainer.generation_num_beams=4").endswith("type data.eval_num_beams=4")
    assert "type quant=int4, quant=int8 or quant=none" in refused("model.quantization_bit=4")


def test_all_wrong_words_are_told_at_once():
    told = refused("trainer.learning_rat=1", "finetuning=lorra", "data.dataset=a", "seed=3")
    assert len(told.split("; also: ")) == 3
    for part in ("unknown key 'trainer.learning_rat'", "finetuning=lorra", "seed=3 ", "type trainer.seed=3"):
        assert part in told


# Groups and presets


@pytest.mark.parametrize(
    ("words", "home", "here"),
    [
        (["finetuning.num_layer_trainable=2"], "freeze", "lora"),
        (["finetuning=freeze", "finetuning.lora_rank=4"], "lora", "freeze"),
        (["finetuning=full", "finetuning.pre_seq_len=4"], "p_tuning", "full"),
        (["finetuning=none", "trainer=evaluate", "finetuning.lora_dropout=0"], "lora", "none"),
    ],
)
def test_a_key_of_another_method(words, home, here):
    key = words[-1].partition("=")[0]
    told = refused(*words)
    assert told.startswith(f"unknown key '{key}'") and f"finetuning={here}" in told
    assert f"type finetuning={home}, or leave {key.partition('.')[2]} out" in told


@pytest.mark.parametrize("group", sorted(PRESETS))
def test_a_wrong_preset_lists_all_of_its_group(group):
    told = refused(f"{group}=zzzzzzzzzz")
    assert told.startswith(f"{group}=zzzzzzzzzz: ")
    assert told.partition("legal: ")[2].split(", ") == PRESETS[group]


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("finetuning=lorra", "'lora'"),
        ("model=chatglm4_6b", "'chatglm2_6b' or 'chatglm3_6b' or 'chatglm_6b'"),
        ("quant=int9", "'int4' or 'int8'"),
        ("trainer=predikt", "'predict'"),
    ],
)
def test_ties_name_all_the_nearest(typed, near):
    assert f"did you mean {near}? legal: " in refused(typed)


def test_nearest_counts_a_swap_as_one_edit_and_keeps_ties():
    assert nearest("lroa", ["lora", "lra", "full"]) == ["lora", "lra"]
    assert nearest("int9", ["int4", "int8", "none"]) == ["int4", "int8"]
    assert nearest("zzzzzz", ["lora"]) == []
    assert did_you_mean("zzzzzz", ["lora"], "legal: lora") == "; legal: lora"


# Values


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("trainer.learning_rate=abc", " a number"),
        ("trainer.fp16=maybe", " true or false"),
        ("data.max_samples=1.5", " a whole number or null"),
        ("data.max_target_length=many", " a whole number"),
        ("trainer.num_train_epochs=three", " a number"),
        ("finetuning.lora_rank=big", " a whole number"),
        ("data.loss_on=every_answers", "; did you mean 'every_answer'? legal: every_answer, last_answer"),
        ("model.dtype=float61", "; did you mean 'float16'? legal: auto, float32, float16, bfloat16"),
        ("quant.quantization_type=nf8", "; did you mean 'nf4'? legal: nf4, fp4"),
    ],
)
def test_a_value_of_the_wrong_type(word, told):
    message = refused(word)
    assert message.startswith(f"{word}: ") and message.endswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.dataset=[]"], "data.dataset=[]: name at least one dataset"),
        (["data.dev_ratio=1"], "data.dev_ratio=1.0: a share of the data in [0, 1)"),
        (["data.dev_ratio=-0.1"], "data.dev_ratio=-0.1: a share of the data in [0, 1)"),
        (["data.max_samples=0"], "data.max_samples=0: 1 or more, or null"),
        (["data.max_source_length=2"], "data.max_source_length=2: at least 8 tokens"),
        (["data.max_bad_records=-1"], "data.max_bad_records=-1: 0 or more"),
        (
            ["data.mix_probabilities=0.5", "data.dataset=a,b"],
            "data.mix_probabilities=[0.5]: 1 shares for the 2 datasets [a,b]",
        ),
        (
            ["data.mix_probabilities=0.5,0.6", "data.dataset=a,b"],
            "data.mix_probabilities=[0.5,0.6]: shares are above 0 and sum to 1",
        ),
        (["data.mix_probabilities=1,0", "data.dataset=a,b"], "data.mix_probabilities=[1.0,0.0]: shares are above 0"),
        (["finetuning.lora_rank=0"], "finetuning.lora_rank=0: a rank is at least 1"),
        (["finetuning.lora_alpha=0"], "finetuning.lora_alpha=0.0: above 0"),
        (["finetuning.lora_dropout=1"], "finetuning.lora_dropout=1.0: a share in [0, 1)"),
        (
            ["finetuning=freeze", "finetuning.num_layer_trainable=0"],
            "finetuning.num_layer_trainable=0 trains nothing; type 3",
        ),
        (["finetuning=freeze", "finetuning.name_module_trainable=qkvs"], "did you mean 'qkv'? legal: mlp, qkv"),
        (
            ["finetuning=p_tuning", "finetuning.pre_seq_len=0"],
            "finetuning.pre_seq_len=0: a prefix has at least 1 token",
        ),
        (
            ["generation.top_p=2", "generation.top_k=-1"],
            "generation.top_p=2.0: in (0, 1]; generation.top_k=-1: 0 or more",
        ),
        (["trainer.learning_rate=-1"], "trainer.learning_rate=-1.0: 0 or more"),
        (["trainer.per_device_train_batch_size=0"], "trainer.per_device_train_batch_size=0: 1 or more"),
        (["trainer.num_train_epochs=0"], "trainer.num_train_epochs=0.0: above 0"),
        (["trainer.seed=-1"], "trainer.seed=-1: 0 to 4294967295"),
        (["model=causal_lm"], "model.model_name_or_path has no value yet; type model.model_name_or_path=…"),
        (["model.family=glm5"], "no model family named 'glm5'; did you mean 'glm' or 'glm4'?"),
    ],
)
def test_a_value_out_of_range(words, told):
    assert told in refused(*words)


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(CheckpointError, match=r"model\.checkpoint_dir=nowhere: no such folder; name a run folder"):
        compose(["model.checkpoint_dir=nowhere"])


# Combinations that cannot meet


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quant=int4", "finetuning=full"], ["quant=int4", "finetuning=full", "type finetuning=lora, or quant=none"]),
        (
            ["quant=int8", "finetuning=freeze"],
            ["quant=int8", "finetuning=freeze", "type finetuning=lora, or quant=none"],
        ),
        (
            ["quant=int8", "finetuning=p_tuning", "trainer.fp16=true"],
            ["trainer.fp16=true with quant=int8 and finetuning=p_tuning", "type trainer.fp16=false"],
        ),
        (
            ["generation.engine=vllm", "quant=int4", "finetuning=p_tuning", "data.eval_num_beams=2", "parallel=ddp"],
            [
                "generation.engine=vllm with trainer.do_train=true",
                "type trainer=predict",
                "type finetuning=lora",
                "type data.eval_num_beams=1",
                "type parallel=none",
                "generation.engine=vllm with quant=int4",
                "type quant=none, or generation.engine=transformers",
                "generation.engine=vllm with finetuning=p_tuning",
                "generation.engine=vllm with data.eval_num_beams=2",
                "generation.engine=vllm with parallel=ddp",
            ],
        ),
        (
            ["trainer.do_train=false", "trainer.do_predict=true"],
            [
                "trainer.do_predict=true without trainer.predict_with_generate=true",
                "type trainer.predict_with_generate=true, or trainer=evaluate",
            ],
        ),
        (
            ["trainer=predict", "trainer.predict_with_generate=false"],
            [
                "trainer.do_predict=true without trainer.predict_with_generate=true",
                "type trainer.predict_with_generate=true",
            ],
        ),
        (
            ["finetuning=none"],
            ["finetuning=none trains nothing and trainer.do_train=true", "type trainer=evaluate or trainer=predict"],
        ),
        (
            ["trainer.do_train=false"],
            [
                "nothing to do: trainer.do_train, trainer.do_eval and trainer.do_predict are all false",
                "type trainer=train",
            ],
        ),
        (["trainer.do_eval=true"], ["evaluation after training", "type data.dev_ratio=0.1, or data.eval_dataset="]),
        (["trainer.eval_strategy=steps"], ["evaluation after training", "type data.dev_ratio=0.1"]),
        (["trainer.eval_on_start=true"], ["evaluation after training", "type data.dev_ratio=0.1"]),
        (
            ["data.dev_ratio=0.1", "data.eval_dataset=x"],
            ["data.dev_ratio=0.1 with data.eval_dataset=[x]", "choose one"],
        ),
        (
            ["trainer.load_best_model_at_end=true"],
            ["trainer.load_best_model_at_end=true with trainer.eval_strategy=no and trainer.save_strategy=steps"],
        ),
        (["trainer.fp16=true", "trainer.bf16=true"], ["trainer.fp16=true with trainer.bf16=true: choose one"]),
        (["data.packing=true", "stage=kto"], ["data.packing=true with stage=kto", "type data.packing=false"]),
        (["data.packing=true", "data.padding_free=false"], ["data.packing=true with data.padding_free=false"]),
    ],
)
def test_values_that_cannot_meet(words, told):
    message = refused(*words)
    assert [part for part in told if part not in message] == []


def test_all_impossible_combinations_are_told_at_once():
    told = refused(
        "quant=int4", "finetuning=full", "trainer.do_eval=true", "data.packing=true", "data.padding_free=false"
    )
    assert len(told.split("; also: ")) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["quant=int4"],
        ["quant=int8", "finetuning=p_tuning"],
        ["quant=int4", "finetuning=full", "trainer=evaluate"],
        ["finetuning=none", "trainer=predict"],
        ["data.dev_ratio=0.1", "trainer.do_predict=true", "trainer.predict_with_generate=true"],
        [
            "data.eval_dataset=x",
            "trainer.eval_strategy=epoch",
            "trainer.save_strategy=epoch",
            "trainer.load_best_model_at_end=true",
        ],
        ["trainer=evaluate"],
        ["data.dev_ratio=0"],
    ],
)
def test_values_that_can_meet(words):
    compose(words)


def test_legal_words_pass():
    check_overrides(
        parse(["finetuning=lora", "finetuning.lora_rank=4", "name=x", "hydra.run.dir=x"]), PRESETS, multirun=False
    )
    check_overrides(parse(["finetuning=lora,freeze", "trainer.seed=1,2"]), PRESETS, multirun=True)


@pytest.mark.parametrize("words", [["quant.quantization_bit=4"], ["quant=int8", "quant.quantization_bit=4"]])
def test_bits_that_are_not_the_preset_s_are_refused(words):
    assert "type quant=int4" in refused(*words)


def test_no_experiment_is_null():
    assert compose(["experiment=null"]).config == compose([]).config


def test_a_glob_is_every_preset():
    words = ["experiment=glob(*)", "model.checkpoint_dir=[]"]  # what one of them starts from, another one makes
    assert compose_every_job(words) == words


def test_a_dictionary_is_given_whole():
    told = refused("trainer.lr_scheduler_kwargs.num_cycles=2")
    assert "type 'trainer.lr_scheduler_kwargs={num_cycles: 2}'" in told
    words = ["trainer.lr_scheduler_type=cosine", "trainer.lr_scheduler_kwargs={num_cycles: 2}"]
    assert compose(words).run.trainer.lr_scheduler_kwargs == {"num_cycles": 2}


def test_an_integer_that_no_float_holds():
    too_large = "9" * 400
    assert refused(f"trainer.learning_rate={too_large}") == (
        "trainer.learning_rate: expected a number, and this one is too large"
    )
    kwargs = f"trainer.lr_scheduler_kwargs={{num_cycles: {too_large}}}"
    assert refused("trainer.lr_scheduler_type=cosine", kwargs).endswith("expected a number, 0 or more")


def test_an_experiment_that_does_not_fit_is_named():
    told = refused("experiment=quickstart", "finetuning=freeze")
    assert told.startswith("experiment=quickstart ") and "unknown key 'finetuning.lora_target'" in told


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("data.dataset=我的.json", ["我的.json"]),
        ("data.dataset=/数据/a b/我的.json,belle", ["/数据/a b/我的.json", "belle"]),
        ("data.dataset=[ 我的.json , b ]", ["我的.json", "b"]),
        ("data.dataset='我的.json'", ["我的.json"]),
        ('data.dataset="我,的.json",é.json', ["我,的.json", "é.json"]),
        ("+x={a: 问题, b: [答案, c]}", {"a": "问题", "b": ["答案", "c"]}),
        ("+x={a: '问题'}", {"a": "问题"}),
        ("name=小格", "小格"),
        ("name=${oc.env:名}", None),  # left to OmegaConf
    ],
)
def test_values_may_hold_any_characters(typed, wanted):
    (word,) = bracket_lists([typed], multirun=False)
    if wanted is None:
        assert word == typed
        return
    (override,) = parse([word])
    value = override.value()
    assert (value if isinstance(value, (list, dict)) else str(value)) == wanted
    assert bracket_lists([word], multirun=False) == [word]


def test_a_sweep_over_names_of_any_characters():
    assert bracket_lists(["data.dataset=我的.json,belle"], multirun=True) == ["data.dataset=['我的.json'],[belle]"]
    assert bracket_lists(["name=甲,乙"], multirun=True) == ["name='甲','乙'"]


def test_a_glob_that_matches_no_preset():
    message = refused("experiment=glob(zzz*)", sweep=True)
    assert message.startswith("experiment=glob(zzz*): ") and "quickstart" in message


# --config-dir


@pytest.mark.parametrize("preset", ["finetuning/lora", "hydra/launcher/slurm", "experiment/quickstart"])
def test_a_preset_named_like_a_shipped_one_is_refused(preset, tmp_path):
    group, _, name = preset.rpartition("/")
    file = tmp_path / f"{preset}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"defaults: [/{preset}@_here_]\n", encoding="utf-8")
    for composing in (compose, compose_every_job):
        with pytest.raises(ConfigError) as caught:
            composing([], config_dir=str(tmp_path))
        message = str(caught.value)
        assert message.startswith(f"--config-dir {tmp_path}: {preset}.yaml ") and "\n" not in message
        assert f"{group}/my_{name}.yaml" in message and f"type {group}=my_{name}" in message


def test_presets_with_names_of_their_own_and_any_dataset_are_accepted(tmp_path):
    for name in ("finetuning/small.yaml", "dataset/belle_sample.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("defaults: [lora]\nlora_rank: 3\n", encoding="utf-8")
    assert compose(["finetuning=small"], config_dir=str(tmp_path)).run.finetuning.lora_rank == 3
    assert compose([], config_dir=str(conf_dir())).config == compose([]).config


@pytest.mark.parametrize("key", [*LISTS, "trainer.label_names", "tracker.tags", "plugins"])
@pytest.mark.parametrize("value", ["[[a]]", "[{a: 1}]", "{a: 1}", "[a,[b]]"])
def test_a_list_of_plain_values_takes_no_list_and_no_dictionary(key, value):
    assert refused(f"{key}={value}").startswith((f"{key}: its list holds ", f"{key}=", f"{key}.", "unknown key"))


@pytest.mark.parametrize("group", sorted(needed_groups()))
def test_a_group_that_every_run_needs_is_not_deleted(group):
    assert refused(f"~{group}").startswith(f"~{group}: every run needs a {group}; type {group}=<preset>; legal: ")


@pytest.mark.parametrize("name", ["", ".", "..", " "])
def test_a_name_names_a_folder(name):
    assert refused(f"name='{name}'").startswith("name=")
