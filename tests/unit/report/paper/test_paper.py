"""The LaTeX of sweeps and runs written by hand: its tables, its set-up, and what it says where something is missing."""

import json
import re
import string
from statistics import fmean, stdev

import pytest
from scipy import stats

from glmtuner.errors import ConfigError
from glmtuner.report.paper import write_paper
from glmtuner.report.paper.figures import file_name
from glmtuner.report.paper.words import LANGUAGES
from glmtuner.report.ranking import rank_sweep

RATES = (0.1, 0.2, 0.3)
LOSSES = {  # rate and seed -> the loss of each record; one token each, so that means are those of records
    (0.1, 1): [1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 3.0, 2.0, 1.0, 3.0],
    (0.1, 2): [1.2, 2.2, 3.2, 2.2, 1.2, 2.2, 3.2, 2.2, 1.2, 3.2],
    (0.2, 1): [1.1, 2.0, 3.1, 2.0, 1.1, 1.9, 3.0, 2.0, 1.2, 3.0],
    (0.2, 2): [1.3, 2.1, 3.3, 2.3, 1.1, 2.2, 3.1, 2.3, 1.2, 3.3],
    (0.3, 1): [2.0, 3.0, 4.0, 3.0, 2.0, 3.0, 4.0, 3.0, 2.0, 4.0],
    (0.3, 2): [2.2, 3.2, 4.2, 3.2, 2.2, 3.2, 4.2, 3.2, 2.2, 4.2],
}
TRAINS = {"trainer.do_train": True, "trainer.do_eval": True, "trainer.optim": "adamw_torch", "parallel.name": "none",
          "data.max_source_length": 512, "data.max_target_length": 64, "data.dev_ratio": 0.0, "data.eval_dataset": ["own.jsonl"]}  # fmt: skip
PROVENANCE = {
    "command": "python -m glmtuner", "python": "3.11.7", "packages": {"glmtuner": "0.1.0", "torch": "2.13.0", "peft": None},
    "glmtuner_commit": "0123456789abcdef0123-dirty", "git": {"commit": "fedcba9876543210", "dirty": False},
    "hardware": [{"device": "cuda", "name": "NVIDIA H100 80GB", "memory_gib": 79.2, "processes": 8, "cores": 16, "threads": 8}],
    "data": {
        "belle_sample": {"records": 120, "bad_records": 2, "prompts_cut": 3, "answers_cut": 1, "license": "apache-2.0",
                         "source": "package://belle_sample.json"},
        "own.jsonl": {"records": 10, "license": None, "source": None},
    },
}  # fmt: skip


@pytest.fixture
def seeded(sweep, job):
    """Three rates with two seeds each, and their provenance."""
    for (rate, seed), losses in LOSSES.items():
        values = {**TRAINS, "trainer.learning_rate": rate, "trainer.seed": seed}
        metrics = {
            "train_loss": 3.0,
            "train_runtime": 100.0 * seed,
            "trained_parameters": 32256,
            "total_parameters": 2250432,
        }
        words = [f"trainer.learning_rate={rate}", f"trainer.seed={seed}"]
        folder = job(f"r{rate}_{seed}", values, words, metrics=metrics, losses=[(loss, 1) for loss in losses])
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    return sweep


def text_of(folder, name="results.tex"):
    return (folder / "paper" / name).read_text(encoding="utf-8")


def rows_of(text, label):
    """The cells of the body of a table."""
    body = text.partition(rf"\label{{tab:{label}}}")[2].partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    return [line.removesuffix(r" \\").split(" & ") for line in body.strip().splitlines() if line != r"\midrule"]


def test_seeds_are_folded_to_mean_and_deviation_and_the_best_is_bold(seeded):
    write_paper(seeded, "en")
    rows = rows_of(text_of(seeded), "results")
    assert [row[0] for row in rows] == ["0.1", "0.2", "0.3"] and all(row[1] == "2" for row in rows)
    for row, rate in zip(rows, RATES, strict=True):
        means = [fmean(LOSSES[rate, seed]) for seed in (1, 2)]
        assert f"{fmean(means):.4f} $\\pm$ {stdev(means):.4f}" in row[2]
    assert rows[0][2].startswith(r"\textbf{2.1000") and r"\textbf" not in rows[1][2] + rows[2][2]
    assert rows[0][4:] == ["--", "--"]
    assert rows[2][4].startswith("1.0000 [1.0000, 1.0000]"), "each record is worse by 1"


def test_p_values_are_those_of_scipy_corrected_by_holm(seeded):
    write_paper(seeded, "en")
    rows = rows_of(text_of(seeded), "results")
    best, *others = ([fmean(pair) for pair in zip(LOSSES[rate, 1], LOSSES[rate, 2], strict=True)] for rate in RATES)
    raw = [
        stats.permutation_test(
            (other, best), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="samples", n_resamples=float("inf"),
            vectorized=True,
        ).pvalue
        for other in others
    ]  # fmt: skip
    assert raw[1] == 2 / 2**10 and raw[0] > 0.05
    assert rows[2][5] == f"{2 * raw[1]:.3f}" and rows[2][2].endswith(r"$^{\ddagger}$")
    assert rows[1][5] == f"{max(raw[0], 2 * raw[1]):.3f}" and "dagger" not in rows[1][2]
    assert "2 were compared with it, of which 1 differ significantly" in text_of(seeded)


def test_the_setup_says_what_the_runs_were(seeded):
    write_paper(seeded, "en")
    setup = text_of(seeded, "setup.tex")
    for part in (
        r"We train tiny\_\allowbreak{}glm (2,250,432 parameters, those of the method included) by supervised fine-tuning with "
        r"LoRA~\cite{hu2022lora} (32,256 trained parameters).",
        r"Training data: belle\_\allowbreak{}sample (120 records, 2 broken ones left out, 4 shortened to the limits of length).",
        "Evaluation data: own.jsonl (10 records).", "evaluated on 10 records each",
        r"AdamW~\cite{loshchilov2019adamw}", "random seeds 1 and 2", "over 2 runs",
        r"percentile bootstrap intervals~\cite{efron1979bootstrap} of 2,000 resamples",
        r"corrected for the 2 comparisons with the best setting by Holm's method~\cite{holm1979}",
        r"glmtuner 0.1.0 (commit \texttt{0123456789ab-dirty})", r"PyTorch 2.13.0~\cite{paszke2019pytorch} on Python 3.11.7",
        r"8 $\times$ NVIDIA H100 80GB (79.2 GiB)", r"at commit \texttt{fedcba987654}",
        "Training took 15 min 00 s in all (6 runs, 1 min 40 s to 3 min 20 s each)",
    ):  # fmt: skip
        assert part in setup, part
    assert rows_of(setup, "varied") == [["learning rate", "0.1, 0.2, 0.3"]]
    common = dict(rows_of(setup, "common"))
    assert (
        common["LoRA rank"] == "8"
        and common["longest answer (tokens)"] == "64"
        and common["optimizer"] == r"adamw\_\allowbreak{}torch"
    )
    assert "learning rate" not in common and "Decoding" not in setup, "no answers were decoded"


def test_references_are_those_that_the_text_cites_and_no_others(seeded):
    write_paper(seeded, "en")
    texts = "".join(text_of(seeded, name) for name in ("setup.tex", "results.tex", "assets.tex", "figures.tex"))
    cited = {key for keys in re.findall(r"\\cite\{(.*?)\}", texts) for key in keys.split(",")}
    assert cited == set(re.findall(r"^@\w+\{(\w+),", text_of(seeded, "references.bib"), re.MULTILINE))
    assert {
        "hu2022lora",
        "holm1979",
        "noreen1989",
        "koehn2004significance",
        "efron1979bootstrap",
        "paszke2019pytorch",
    } <= cited
    assert r"\bibliography{references}" in text_of(seeded, "main.tex")


def test_licences_are_named_and_what_is_unknown_is_said(seeded, capsys):
    write_paper(seeded, "en")
    rows = {row[1]: row[2:] for row in rows_of(text_of(seeded, "assets.tex"), "assets")}
    assert rows[
        r"belle\_\allowbreak{}sample (package:/\allowbreak{}/\allowbreak{}belle\_\allowbreak{}sample.json)"
    ] == ["apache-2.0", "--"]
    assert rows["own.jsonl"] == ["unknown", "unknown"]
    assert rows["PyTorch 2.13.0"] == ["BSD-3-Clause", r"\cite{paszke2019pytorch}"]
    told = capsys.readouterr().out
    assert "unknown licence: own.jsonl;" in told and "unknown citation: own.jsonl;" in told
    assert "paper/main.tex; compile it in its folder: pdflatex main && bibtex main" in told


def test_an_unknown_model_and_a_method_of_peft_are_not_guessed(sweep, job, capsys):
    values = {
        **TRAINS,
        "model.model_name_or_path": "/models/glm-4-9b-chat",
        "finetuning.finetuning_type": "peft",
        "finetuning.peft_type": "LOHA",
    }
    job("one", values, metrics={"eval_loss": 2.0})
    write_paper(sweep, "en")
    assert r"with \texttt{LOHA}" in text_of(sweep, "setup.tex") and "hu2022lora" not in text_of(sweep, "references.bib")
    assert rows_of(text_of(sweep, "assets.tex"), "assets")[0][2:] == ["unknown", "unknown"]
    assert "unknown citation: /models/glm-4-9b-chat" in (told := capsys.readouterr().out) and "LOHA" in told


def test_pictures_are_vector_graphics_that_repeat(seeded):
    write_paper(seeded, "en")
    figures = seeded / "paper/figures"
    names = sorted(path.name for path in figures.iterdir())
    assert names == ["eval_loss_by_learning_rate.pdf", "loss.pdf"]
    before = {name: (figures / name).read_bytes() for name in names}
    assert all(content.startswith(b"%PDF-") and b"/Type3" not in content for content in before.values())
    assert all(
        rf"\includegraphics[width=0.8\linewidth]{{\glmtunerpath figures/{name}}}" in text_of(seeded, "figures.tex")
        for name in names
    )
    (figures / "mine.pdf").write_bytes(b"%PDF-1.4 mine")
    write_paper(seeded, "en")
    assert {name: (figures / name).read_bytes() for name in names} == before and (figures / "mine.pdf").exists()
    for path in seeded.glob("r0.[23]*/config.yaml"):  # nothing is varied any more
        path.write_text(re.sub(r"learning_rate: [\d.]+", "learning_rate: 0.1", path.read_text()))
    write_paper(seeded, "en")
    assert sorted(path.name for path in figures.iterdir()) == ["loss.pdf", "mine.pdf"]


def test_names_of_pictures_are_those_of_every_latex():
    assert file_name("predict_rouge-l by 学习 率.x", {}) == "predict_rouge-l-by-x.pdf"
    assert file_name("学", {}) == "figure.pdf" and file_name("a b", {"a-b.pdf": b""}) == "a-b-2.pdf"


def test_what_was_edited_by_hand_is_not_overwritten(seeded, capsys):
    folder = write_paper(seeded, "en")
    main = folder / "main.tex"
    main.write_text(mine := main.read_text() + "% mine\n")
    write_paper(seeded, "en")
    assert main.read_text() == mine and f"{main} was edited by hand, and is kept" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"main\.tex was edited by hand, and is in the other language; type --paper en"
    ):
        write_paper(seeded, "zh")
    main.unlink()
    results = folder / "results.tex"
    results.write_text(mine := results.read_text().replace("0.1", "0.7"))
    with pytest.raises(
        ConfigError, match=r"--paper en: .*results.tex was edited by hand, and would be overwritten; .* remove it"
    ):
        write_paper(seeded, "en")
    assert results.read_text() == mine and not main.exists(), "nothing is written"
    (folder / "setup.tex").write_text("my own file of that name")
    with pytest.raises(ConfigError, match=r"setup.tex, .*results.tex were edited"):
        write_paper(seeded, "en")


def test_a_chinese_paper_is_chinese_and_says_the_same_numbers(seeded, monkeypatch, capsys):
    write_paper(seeded, "en")
    english = rows_of(text_of(seeded), "results")
    capsys.readouterr()
    monkeypatch.setattr("glmtuner.report.paper.figures.has_chinese_font", lambda: False)
    write_paper(seeded, "zh")
    assert rows_of(text_of(seeded), "results") == english
    setup, main = text_of(seeded, "setup.tex"), text_of(seeded, "main.tex")
    assert (
        r"我们以监督微调训练tiny\_\allowbreak{}glm（含方法自身共 2,250,432 个参数），方法为LoRA~\cite{hu2022lora}（训练 32,256 个参数）。"
        in setup
    )
    assert r"\section{实验设置}" in main and "xelatex main" in main and "ctex" in text_of(seeded, "preamble.tex")
    told = capsys.readouterr().out
    assert "matplotlib finds no Chinese font; install one" in told and "xelatex main && bibtex main" in told


def test_both_languages_have_the_same_phrases_with_the_same_places():
    english, chinese = LANGUAGES["en"], LANGUAGES["zh"]

    def places(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    assert english.phrases.keys() == chinese.phrases.keys() and english.titles.keys() == chinese.titles.keys()
    for name, text in english.phrases.items():
        assert places(text) == places(chinese.phrases[name]), name
        assert text.isascii(), name
        filled = dict.fromkeys(places(text), "x")
        for words in (english, chinese):
            assert words.say(name, **filled).count("{") == words.say(name, **filled).count("}"), name


def test_lists_in_sentences():
    english, chinese = LANGUAGES["en"], LANGUAGES["zh"]
    assert [english.listed(list("abc")[:count]) for count in range(4)] == ["", "a", "a and b", "a, b, and c"]
    assert (
        chinese.listed(["a", "b", "c"]) == "a、b和c"
        and english.in_brackets(["a", "b"]) == " (a, b)"
        and chinese.in_brackets([]) == ""
    )


def test_what_comes_with_a_method_is_in_the_table_of_each(sweep, job):
    for method, rank, dropout in (("lora", 8, 0.1), ("pissa", 16, 0.1), ("p_tuning", None, None)):
        values = {
            **TRAINS,
            "finetuning.finetuning_type": "p_tuning" if rank is None else "lora",
            "trainer.weight_decay": 0.0,
        }
        values |= (
            {"finetuning.pre_seq_len": 64}
            if rank is None
            else {"finetuning.lora_rank": rank, "finetuning.lora_dropout": dropout}
        )
        job(
            method,
            values,
            [f"finetuning={method}"],
            metrics={"eval_loss": 1.0},
            without=("finetuning.lora_rank",) if rank is None else (),
        )
    write_paper(sweep, "en")
    setup = text_of(sweep, "setup.tex")
    assert rows_of(setup, "varied") == [["method", r"lora, p\_\allowbreak{}tuning, pissa"]]
    common = dict(rows_of(setup, "common"))
    assert (common["LoRA rank (lora)"], common["LoRA rank (pissa)"]) == ("8", "16")
    assert common["LoRA dropout (lora, pissa)"] == "0.1" and common[r"prefix length (p\_\allowbreak{}tuning)"] == "64"
    assert common["weight decay"] == "0", "what every reader asks for is shown at its default, too"


def test_chinese_in_pictures_without_a_font_is_said(sweep, job, monkeypatch, capsys):
    monkeypatch.setattr("glmtuner.report.paper.figures.has_chinese_font", lambda: False)
    for prefix in ("plain", "中文"):
        job(
            prefix,
            {**TRAINS, "data.source_prefix": prefix},
            [f"data.source_prefix={prefix}"],
            metrics={"eval_loss": 1.0},
        )
    write_paper(sweep, "en")
    assert "the pictures have boxes for Chinese characters" in capsys.readouterr().out


# -- where something is missing ------------------------------------------------------------------------------------------


def test_a_single_run_has_no_comparison(sweep, job):
    folder = job(
        "one",
        {**TRAINS, "trainer.learning_rate": 5e-5},
        metrics={"train_loss": 2.0},
        losses=[(2.0, 1), (3.0, 1), (2.5, 1)],
    )
    write_paper(folder, "en")
    results, setup = text_of(folder), text_of(folder, "setup.tex")
    ((name, value, interval),) = rows_of(results, "results")
    assert name == "one" and value == "2.5000" and interval.startswith("[2.") and "Results of the run." in results
    assert "significan" not in results and "noreen" not in setup and "Bold" not in results
    assert dict(rows_of(setup, "common"))["learning rate"] == r"$5 \cdot 10^{-5}$"
    assert (folder / "paper/figures/loss.pdf").is_file()


def test_jobs_without_results_are_listed_with_their_reasons(sweep, job, failed):
    job("good", {**TRAINS, "trainer.learning_rate": 0.1}, metrics={"eval_loss": 2.0})
    job("half", {**TRAINS, "trainer.learning_rate": 0.2})
    failed("bad", ["trainer.learning_rate=0.3"], reason="50% of $x & {y}\n\\end{table}")
    failed("big", ["trainer.learning_rate=0.4"], kind="infeasible")
    write_paper(sweep, "en")
    rows = rows_of(text_of(sweep), "unranked")
    assert [row[:2] for row in rows] == [
        [r"learning\_\allowbreak{}rate 0.3", "failed"], [r"learning\_\allowbreak{}rate 0.4", "out of memory"],
        [r"learning\_\allowbreak{}rate 0.2", "unfinished"],
    ]  # fmt: skip
    assert r"50\% of \$x \& \{y\} \textbackslash{}end\{table\}" in text_of(sweep)
    assert "1 failed, 1 out of memory, 1 unfinished" in text_of(sweep, "setup.tex")
    assert "There are no scores of single records, and so no intervals and no test." in text_of(sweep, "setup.tex")


def test_a_sweep_in_which_nothing_finished_says_so(sweep, job, failed, capsys):
    failed("bad", ["trainer.learning_rate=0.3"])
    write_paper(sweep, "en")
    assert "No run has finished" in text_of(sweep) and "No run has finished" in text_of(sweep, "setup.tex")
    assert r"\bibliography" not in text_of(sweep, "main.tex"), "an empty bibliography does not compile"
    write_paper(sweep, "zh")
    assert "没有运行完成" in text_of(sweep)


def test_without_evaluation_the_training_loss_ranks_and_nothing_is_tested(sweep, job):
    values = {**TRAINS, "trainer.do_eval": False, "data.eval_dataset": []}
    for rate in (0.1, 0.2):
        job(
            f"r{rate}",
            {**values, "trainer.learning_rate": rate},
            [f"trainer.learning_rate={rate}"],
            metrics={"train_loss": 1 + rate},
        )
    write_paper(sweep, "en")
    assert [row[1] for row in rows_of(text_of(sweep), "results")] == [r"\textbf{1.1000}", "1.2000"]
    assert "training loss (lower is better)" in text_of(sweep) and "The runs were not evaluated." in text_of(
        sweep, "setup.tex"
    )


def test_a_sweep_that_measured_nothing_says_so(sweep, job):
    job("a", TRAINS, metrics={})
    write_paper(sweep, "en")
    assert "No finished run measured a score." in text_of(sweep) and "tab:results" not in text_of(sweep)


def test_settings_that_measured_other_metrics_have_dashes_and_a_count(sweep, job):
    job(
        "a",
        {**TRAINS, "trainer.learning_rate": 0.1},
        ["trainer.learning_rate=0.1"],
        metrics={"eval_loss": 2.0, "eval_accuracy": 0.5},
    )
    job("b", {**TRAINS, "trainer.learning_rate": 0.2}, ["trainer.learning_rate=0.2"], metrics={"train_loss": 9.0})
    write_paper(sweep, "en")
    assert rows_of(text_of(sweep), "results")[1][1] == "--" and "1 settings did not measure it." in text_of(sweep)
    assert rows_of(text_of(sweep), "metrics") == [["0.1", "0.5000", "--"], ["0.2", "--", "9.0000"]]


def test_settings_evaluated_on_other_records_are_counted_and_not_compared(sweep, job):
    for rate, size in ((0.1, 6), (0.2, 6), (0.3, 6)):
        values = {
            **TRAINS,
            "trainer.learning_rate": rate,
            "data.eval_dataset": ["own.jsonl" if rate < 0.3 else "other.jsonl"],
        }
        job(
            f"r{rate}",
            values,
            [f"trainer.learning_rate={rate}"],
            losses=[(rate + place % 2, 1) for place in range(size)],
        )
    write_paper(sweep, "en")
    rows = rows_of(text_of(sweep), "results")
    assert rows[2][-1] == "--" == rows[2][-2] and rows[1][-1] == "0.031", "2 / 2^6, one comparison"
    assert "1 settings were evaluated on other records than the best one" in text_of(sweep)


@pytest.mark.parametrize(
    "damage", [("provenance.json", "{"), ("provenance.json", None), ("metrics.json", "{"), ("config.yaml", "a: [1")]
)
def test_a_damaged_run_is_named(seeded, capsys, damage):
    name, text = damage
    path = seeded / "r0.1_1" / name
    path.write_text(text) if text else path.unlink()
    write_paper(seeded, "en")
    setup, told = text_of(seeded, "setup.tex"), capsys.readouterr().out
    if name == "provenance.json":
        assert "The set-up of 1 runs could not be read" in setup and "r0.1_1" in told
        assert len(rows_of(text_of(seeded), "results")) == 3
    else:
        assert "1 failed" in setup and "damaged" in text_of(seeded)


def test_hostile_names_are_plain_text_in_every_piece(sweep, job):
    hostile = r"\input{x} $ % & # _ ^ ~ { } 😀 中文"
    for rate in (0.1, 0.2):
        values = {**TRAINS, "data.source_prefix": f"{hostile}{rate}", "data.dataset": [hostile], "model.model_name_or_path": hostile,
                  "finetuning.finetuning_type": hostile, "model.template": hostile, "model.model_revision": hostile}  # fmt: skip
        folder = job(f"a{rate}", values, [], metrics={"eval_loss": rate, f"eval_{hostile}": 1.0})
        about = {
            **PROVENANCE,
            "hardware": [{"device": "cpu", "name": hostile}],
            "packages": {"torch": hostile},
            "python": hostile,
        }
        (folder / "provenance.json").write_text(
            json.dumps({**about, "data": {hostile: {"records": 1, "license": hostile, "source": hostile}}})
        )
    write_paper(sweep, "en")
    for name in ("setup.tex", "results.tex", "assets.tex", "figures.tex"):
        text = text_of(sweep, name).partition("\n")[2]
        bare = re.sub(r"\\[&%$#_{}]", "", re.sub(r"^% .*$", "", text, flags=re.MULTILINE))
        assert r"\input" not in bare and not re.search(r"[#~](?!\\cite|\\ref)", bare), name
        assert (
            bare.count("{") == bare.count("}") and "😀" not in bare and "U+1F600" in text
        ) or name == "figures.tex", name
        assert all(part.startswith("%") for part in re.findall(r"%.*", bare) if part != "%"), name
    assert rank_sweep(sweep).rows
