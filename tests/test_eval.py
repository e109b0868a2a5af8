"""The table: intervals, the router that the relay is compared with, the bound."""
import itertools
import random

import pytest

from data import Tokenizer, save_toy_tokenizer, toy_questions
from eval import bound, interval, routers, summary
from relay import Call, Rollout


def row(accuracy, rho=0.0):
    return dict(accuracy=accuracy, rho=rho, ci95=[accuracy, accuracy], questions=100, seed=1, temperature=0.7,
                max_new_tokens=96)


def test_the_papers_own_figures_give_the_papers_cost_reduction():
    """49.52% against 42.50 and 54.12 at rho 1.07%: 60.4% of the gap, 98.2% cheaper (RelayLLM, section 6)."""
    rows = dict(slm=row(0.4250), llm=row(0.5412), relay=row(0.4952, 0.0107))
    router = routers(rows)
    assert router["rho"] == pytest.approx(0.604, abs=1e-3)
    assert rows["relay"]["cost_reduction"] == pytest.approx(0.982, abs=1e-3)


def test_without_a_gap_there_is_no_router():
    """A division by zero would end an evaluation of hours."""
    assert routers(dict(slm=row(0.5), llm=row(0.5), relay=row(0.5))) is None


def test_the_interval_holds_the_mean_and_narrows_with_more_questions():
    """95% of 1,000 fair coins: about 0.469 to 0.531."""
    low, high = interval([0, 1] * 500)
    assert low == pytest.approx(0.469, abs=0.005) and high == pytest.approx(0.531, abs=0.005)
    assert interval([1] * 10) == [1.0, 1.0]


def test_rho_pools_tokens_over_answers():
    """The mean of each answer's rho would weigh a short answer like a long one."""
    long = Rollout([1], tokens=[1] * 98, by_llm=[False] * 98, end="eos")
    short = Rollout([1], tokens=[1, 1], by_llm=[True, True], calls=[Call(0, 5, 2)], end="eos")
    got = summary([True, False], [long, short])
    assert got["rho"] == 0.02 and got["accuracy"] == 0.5 and got["call_rate"] == 0.5 and got["asked"] == 5


def test_the_bound_counts_the_facts_that_the_slm_lacks(tmp_path):
    """Common facts cost nothing, and a set's fact is as long as its parts are many."""
    save_toy_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    common = list(itertools.islice(toy_questions("eval", random.Random(0), rare=0.0), 50))
    rare = list(itertools.islice(toy_questions("eval", random.Random(0), rare=1.0), 50))
    assert bound(common, tokenizer) == 0
    assert 0 < bound(common + rare, tokenizer) < bound(rare, tokenizer) < 0.05
