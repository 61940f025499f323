"""The text of an answer as its tokens come: pieces that are never taken back, and together are what `decode` gives."""

import random
import shutil
import time
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

import glmtuner.models  # noqa: F401, makes chatglm known
from glmtuner.config.compose import compose
from glmtuner.inference.generate import MAX_ROWS_CPU, AnswerText, rows_that_fit
from glmtuner.inference.predict import batch_size_of
from glmtuner.launch.register import register_presets

TEXTS = [
    "你好，世界！",
    "  spaces   before,  between and after  ",
    "\n\nlines\n\n\tand tabs\t\n",
    "混合 English 和 emoji 😀👩‍👩‍👧‍👦 与生僻字𠮷龘",
    "def f(x):\n    return x  # 四个空格\n",
    "ｆｕｌｌ－ｗｉｄｔｈ， ①②③",
    "Stop. END of it",
    "a",
    "",
]
FOLDERS = {
    "v1": ("tokenizer_v1", "ice_text.model", "chatglm_v1"),
    "v2": ("chatglm2_realvocab", "tokenizer.model", "chatglm2"),
}


@pytest.fixture(scope="module", params=["tiny_glm", "v1", "v2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "tiny_glm":
        return AutoTokenizer.from_pretrained(str(files("glmtuner.assets") / "tiny_glm"))
    goldens = request.getfixturevalue("upstream_files")
    source, file, config = FOLDERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copyfile(goldens / source / file, folder / file)
    shutil.copyfile(goldens / source / "tokenizer_config.json", folder / "tokenizer_config.json")
    shutil.copyfile(goldens / config / "config.json", folder / "config.json")
    return AutoTokenizer.from_pretrained(folder)


def told(tokenizer: Any, tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = AnswerText(tokenizer, stops)
    pieces = []
    for token in tokens:
        pieces.append(text.put(token))
        if text.stopped:
            return pieces, True
    return [*pieces, text.finish()], text.stopped


def test_the_pieces_are_the_decoded_answer(tokenizer: Any, record_texts: list[str]) -> None:
    for written in [*TEXTS, *record_texts[:180]]:
        tokens = tokenizer(written, add_special_tokens=False).input_ids
        wanted = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        pieces, _ = told(tokenizer, tokens)
        assert "".join(pieces) == wanted
        assert not any("\ufffd" in piece for piece in pieces)
        assert not pieces[0].startswith((" ", "\n"))


def test_a_stop_text_ends_the_answer_before_it(tokenizer: Any) -> None:
    tokens = tokenizer("一二三四五六七八九十 and the END of it, END", add_special_tokens=False).input_ids
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    for stops in (("END",), ("五六",), ("the END of", "d of"), ("never", "十")):
        pieces, stopped = told(tokenizer, tokens, stops)
        first = min(whole.index(stop) for stop in stops if stop in whole)
        assert stopped and "".join(pieces) == whole[:first].strip()
    pieces, stopped = told(tokenizer, tokens, ("of it, ENDING", "ENDE"))  # it begins like the end, and is not
    assert not stopped and "".join(pieces) == whole.strip()


class Characters:
    """A tokenizer with a token for each character."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012  # as that of a tokenizer without control tokens
    all_special_ids = all_special_tokens = ()

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def test_any_stop_texts_end_an_answer_where_a_search_from_its_start_finds_them() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        written = "".join(draw.choice("aab \n") for _ in range(draw.randint(0, 30)))
        stops = tuple(
            "".join(draw.choice("aab ") for _ in range(draw.randint(1, 7))) for _ in range(draw.randint(0, 4))
        )
        text = written.lstrip()
        ends = (end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops))
        end = next(ends, None)
        wanted = text.rstrip()
        if end is not None:
            wanted = text[: min(end - len(stop) for stop in stops if text[:end].endswith(stop))].rstrip()
        pieces, stopped = told(Characters(), list(map(ord, written)), stops)
        assert ("".join(pieces), stopped) == (wanted, end is not None), (written, stops)


def test_the_longest_stop_texts_cost_little() -> None:
    stops = tuple("a" * 1000 + letter for letter in "wxyz")
    text = AnswerText(cast(Any, Characters()), stops)
    started = time.process_time()
    pieces = [text.put(ord("a")) for _ in range(20_000)]
    assert time.process_time() - started < 5  # a search from the start for each token takes minutes
    assert len("".join(pieces)) == 20_000 - 1000  # what may be the beginning of a stop text is held back


def test_bytes_that_are_no_text_do_not_hold_an_answer_back(tokenizer: Any) -> None:
    half = tokenizer("龘", add_special_tokens=False).input_ids[:-1]
    assert "\ufffd" in tokenizer.decode(half)
    letters = tokenizer(" abc" * 10, add_special_tokens=False).input_ids
    pieces, _ = told(tokenizer, [*half * 12, *letters])
    assert "abc" in "".join(pieces) and "\ufffd" in "".join(pieces)
    assert "abc" in "".join(pieces[:-1])


def test_as_many_rows_as_half_of_the_free_memory_holds(monkeypatch):
    import psutil
    from small_models import built

    model = built("Glm")
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8  # float64
    for free, rows in ((2 * a_token * 100 * 5, 5), (1, 1), (2**40, MAX_ROWS_CPU)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert rows_that_fit(model, tokens=100) == rows


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ([], MAX_ROWS_CPU),
        (["trainer.per_device_eval_batch_size=3"], 3),
        (["generation.max_batch_size=5", "trainer.per_device_eval_batch_size=3"], 5),
        (["data.eval_num_beams=2"], 8),
    ],
)
def test_how_many_answers_are_generated_at_once(words, rows):
    from small_models import built

    register_presets()
    run = compose(["trainer=predict", "model=tiny_glm", *words]).run
    assert batch_size_of(run, built("Glm"), [[1, 2, 3]], new_tokens=8) == rows
