"""The table: intervals, the router that the relay is compared with, the bound."""
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as eval_module
from conftest import ByteTokenizer, tiny
from data import Question, load_questions, split_of, toy_questions
from eval import Answers, bound, fit_questions, interval, routers, where_calls_happen
from relay import Call, Rollout


def row(rho=0.0):
    return dict(method="relay", rho=rho, questions=10000, seed=1, temperature=0.7, top_p=1.0, max_new_tokens=96,
                repeat=1)


def hits(accuracy, n=10000):
    return np.arange(n) < accuracy * n


def test_the_papers_own_figures_give_the_papers_cost_reduction():
    """1 - rho / p with p the wrong way round still looks plausible. (RelayLLM, section 6: 60.4% of the gap, 98.2%.)"""
    rows = dict(relay=row(0.0107))
    routers(rows, dict(slm=hits(0.4250), llm=hits(0.5412), relay=hits(0.4952)))
    assert rows["random_router"]["rho"] == pytest.approx(0.604, abs=1e-3)
    assert rows["random_router"]["accuracy"] == pytest.approx(0.4952)
    assert rows["relay"]["gap_closed"] == pytest.approx(0.604, abs=1e-3)
    assert rows["relay"]["cost_reduction"] == pytest.approx(0.982, abs=1e-3)
    equal = rows["random_router_equal_cost"]
    assert equal["rho"] == 0.0107
    assert 0.4952 - equal["accuracy"] == pytest.approx(0.069, abs=1e-3)        # the paper's 6.9 points


def test_the_interval_of_the_gap_is_paired():
    """Intervals of three independent accuracies would be several times too wide."""
    rows = dict(relay=row(0.01))
    slm, llm = hits(0.5, 1000), hits(1.0, 1000)
    routers(rows, dict(slm=slm, llm=llm, relay=llm))
    assert rows["relay"]["gap_closed_ci95"] == [1.0, 1.0]


def test_without_a_gap_there_is_nothing_to_close():
    """A division by zero would end an evaluation of hours."""
    rows = dict(relay=row())
    routers(rows, dict(slm=hits(0.5, 100), llm=hits(0.5, 100), relay=hits(0.7, 100)))
    assert rows["relay"]["gap_closed"] is None and rows["random_router"]["rho"] == 0


def test_where_resamples_have_no_gap_the_share_of_it_has_no_interval():
    """Divided by almost nothing: 7 of 30 against 5 of 30 gave a share of up to some billions of percent."""
    rows = dict(relay=row())
    routers(rows, dict(slm=hits(5 / 30, 30), llm=hits(7 / 30, 30)[::-1], relay=hits(6 / 30, 30)))
    assert rows["relay"]["gap_closed"] == pytest.approx(0.5) and rows["relay"]["gap_closed_ci95"] is None


def test_the_token_router_is_fitted_on_questions_that_nobody_trained_on_and_nobody_reports(tmp_path):
    """On GRPO's own questions the relay is too good, so that the router was fitted to be too dear."""
    texts = [f"question {i}" for i in range(200)]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(dict(question=t, answer=1)) for t in texts))
    run = SimpleNamespace(path=tmp_path, info=dict(stages=dict(grpo=dict(questions="q.jsonl"))))     # inside the run
    every = load_questions(tmp_path / "q.jsonl")
    held_out = [q for q in every if split_of(q.text) == "held_out"]
    assert len(held_out) > 9
    assert fit_questions(SimpleNamespace(fit=99), run, held_out[:3]) == held_out[3:]
    assert fit_questions(SimpleNamespace(fit=2), run, every[:0]) == held_out[:2]
    with pytest.raises(ValueError, match="--rows"):
        fit_questions(SimpleNamespace(fit=99), run, every)


def test_the_interval_holds_the_mean_and_narrows_with_more_questions():
    """A std for a standard error is 30 times too wide. (95% of 1,000 fair coins: about 0.469 to 0.531.)"""
    low, high = interval([0, 1] * 500)
    assert low == pytest.approx(0.469, abs=0.005) and high == pytest.approx(0.531, abs=0.005)
    assert interval([1] * 10) == [1.0, 1.0]


def test_the_bound_counts_the_facts_that_the_slm_lacks(tokenizer):
    """A bound that counted common facts, too, would make any relay look better than what is possible."""
    common = list(itertools.islice(toy_questions("eval", random.Random(0), rare=0.0), 50))
    rare = list(itertools.islice(toy_questions("eval", random.Random(0), rare=1.0), 50))
    assert bound(common, tokenizer) == 0
    assert 0 < bound(common + rare, tokenizer) < bound(rare, tokenizer) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are kept

ARGS = dict(temperature=1.0, top_p=1.0, llm_temperature=0.7, max_new_tokens=8, seed=1, batch=3)


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """write(**changes) asks two models three questions, twice each: (roll-outs, how many really ran)."""
    tokenizer = ByteTokenizer(b"<call>2</call>", only=b"abcdef")
    slm, llm = (tiny("qwen3", seed, vocab_size=len(tokenizer.known)) for seed in (1, 2))
    ran = []
    real = eval_module.relay
    monkeypatch.setattr(eval_module, "relay",
                        lambda *args, **options: ran.append(len(args[3])) or real(*args, **options))

    def write(marks=("a", "b"), options={}, **changes):
        ran.clear()
        answers = Answers(tmp_path / "answers.jsonl")
        asked = [Question(text, "1") for text in ("ab", "ab", "c", "c", "ab", "ab")]
        rollouts, _ = answers.write("m", slm, llm, list(marks), tokenizer, asked,
                                    SimpleNamespace(**dict(ARGS, **changes)), **options)
        return rollouts, sum(ran)

    write.file = tmp_path / "answers.jsonl"
    return write


def test_an_answer_is_written_once_and_read_back_as_it_was(writer):
    """A second evaluation of the same must cost nothing and change nothing."""
    calling = dict(options=dict(router=(0.5, 1e9)))
    first, ran = writer(**calling)
    again, more = writer(**calling)
    assert ran == 6 and more == 0
    for a, b in zip(first, again):
        for key in ("prompt", "tokens", "by_llm", "calls", "end", "cost"):
            assert getattr(a, key) == getattr(b, key)
    assert any(any(r.by_llm) for r in first) and len({tuple(r.tokens) for r in first}) > 2


@pytest.mark.parametrize("changes", [dict(seed=2), dict(temperature=0.5), dict(top_p=0.5), dict(llm_temperature=0.5),
                                     dict(max_new_tokens=7), dict(marks=("a", "c")), dict(options=dict(fixed=3)),
                                     dict(options=dict(no_calls=True))])
def test_an_answer_of_other_settings_is_never_taken_for_this_ones(writer, changes):
    """A table of last week's checkpoint under this week's name."""
    writer()
    assert writer(**changes)[1] == 6


def test_an_interrupted_evaluation_goes_on_where_it_stopped(writer):
    """Its last line may be half a line."""
    whole = [r.tokens for r in writer()[0]]
    lines = writer.file.read_text().splitlines(keepends=True)
    writer.file.write_text("".join(lines[:2]) + lines[2][:20])
    rollouts, ran = writer()
    assert ran == 4 and [r.tokens for r in rollouts] == whole
    writer.file.write_text(writer.file.read_text() + json.dumps(dict(json.loads(lines[0]), calls=[7])) + "\n")
    size = writer.file.stat().st_size
    assert writer()[1] == 0 and writer.file.stat().st_size == size      # a broken line once made each load add more


def test_where_calls_happen_is_counted_by_the_words_before_them():
    """Commands of their own must not count as words."""
    tokenizer = ByteTokenizer()
    text = b"it costs <call>2</call>"
    r = Rollout([1], list(text) + [49, 49], [False] * len(text) + [True] * 2, calls=[Call(len(text), 2, 2)],
                end="length")
    got = where_calls_happen([(Question("q", "1", "price"), r)], tokenizer)
    assert got == {"calls in the part of the answer from": {"90%": 1}, "words before a call": {"it costs": 1},
                   "n asked, price": {2: 1}}


def test_the_page_shows_what_a_model_wrote_as_text():
    """What a model writes is data: a page must not run it."""
    tokenizer = ByteTokenizer()
    text = list(b"<script>alert(1)</script>")
    r = Rollout([1], text + [256], [i > 7 for i in range(len(text))] + [False], calls=[Call(8, 17, 17)], end="eos")
    shown = eval_module.page([], [(Question("a < b", "1", "x"), r)], tokenizer, Path("nothing.png"))
    assert "<script" not in shown and "a &lt; b" in shown and "<mark>alert(1)&lt;/script&gt;</mark>" in shown
    assert "http" not in shown


def test_a_picture_is_drawn_where_matplotlib_is_there(tmp_path):
    """A method with rho 0 has no place on a logarithmic axis, an interval may have no width."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    points = (("slm", 0.0, 0.5), ("llm", 1.0, 1.0), ("relay", 0.01, 0.9))
    rows = {name: dict(rho=rho, accuracy=a, ci95=[a, a]) for name, rho, a in points}
    metrics = [dict(step=i, accuracy=0.5, rho=0.1, length=9.0) for i in (1, 2)]
    eval_module.plot(rows, {0.1: dict(rho=0.0, accuracy=0.5)}, metrics, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
