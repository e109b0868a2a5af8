"""The toy's data, the warm-up's commands, and what both training stages share."""
import itertools
import random

import pytest
import torch

from data import FACT, UNSEEN, Tokenizer, grade, save_toy_tokenizer, toy_questions, with_asides
from relay import COMMAND, log_softmax, without_commands
from warmup import Example, adamw, apply_gradient, insert_commands, micro_batches, supervised_step, token_logprobs
from conftest import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    save_toy_tokenizer(folder)
    return Tokenizer(folder)


def questions(split, seed, n, **options):
    return list(itertools.islice(toy_questions(split, random.Random(seed), **options), n))


@pytest.mark.parametrize("seeds", list(itertools.product((1, 2, 3), repeat=2)))
def test_training_and_evaluation_questions_are_disjoint_for_every_pair_of_seeds(seeds):
    """The question space is small: without a split by text, a fresh seed meets old questions."""
    train = {q.text for q in questions("train", seeds[0], 1500)}
    assert not train & {q.text for split in ("eval", "held_out") for q in questions(split, seeds[1], 300)}


def test_training_names_no_unseen_fact():
    """Else the row `unseen` of the table says nothing."""
    assert not any(q.kind == "unseen" or any(item in q.text for item in UNSEEN)
                   for q in questions("train", 0, 3000, unseen=False))
    assert any(q.kind == "unseen" for q in questions("eval", 0, 300))


def test_only_rare_facts_are_made_up():
    """A corpus that is unreliable on common things, too, leaves an SLM that knows nothing."""
    def facts(kinds, unreliable):
        return {q.text: q.answer for q in questions("train", 5, 3000, unreliable=unreliable) if (q.kind == "common") in kinds}
    told, true = facts((True,), True), facts((True,), False)
    assert all(true[text] == told[text] for text in set(true) & set(told)) and set(true) & set(told)
    made_up = [q for q in questions("train", 5, 500, rare=1.0, unreliable=True)]
    wrong = sum(not any(q.fact == "".join(f" {n}" for n in fact) for item, fact in FACT.items() if f" {item}" in q.text)
                for q in made_up)
    assert wrong > 0.8 * len(made_up)


def test_a_worked_solution_grades_as_right():
    """Arithmetic and grader agree on every form of question."""
    assert all(grade(q.solution, q.answer) and q.solution.endswith(f"\\boxed{{{q.answer}}}")
               for q in questions("train", 9, 1000))


def test_every_word_of_the_toy_is_one_token(tokenizer):
    """A fact is then as many tokens as it has numbers."""
    for q in questions("eval", 2, 200):
        assert len(tokenizer.encode(q.fact)) == len(q.fact.split())
        assert len(tokenizer.encode(q.solution)) < 1.6 * len(q.solution.split())
        assert tokenizer.decode(tokenizer.encode(q.solution)) == q.solution


def test_an_aside_is_learned_but_for_its_first_token(tokenizer):
    """Nothing tells where an aside stands; what follows its opening can be told."""
    text = tokenizer.encode("Let us see what Ann pays.")
    ids, learn = with_asides(text, tokenizer, random.Random(1), 1.0)
    assert len(ids) == len(learn) > len(text)
    assert {tokenizer.decode([i]) for i, known in zip(ids, learn) if not known} == {"<"}
    assert with_asides(text, tokenizer, random.Random(1), 0.0) == (text, [True] * len(text))


@pytest.mark.parametrize("max_n", [9, 90, 9000])
def test_commands_go_between_tokens_and_ask_for_no_more_than_is_left(tokenizer, max_n):
    """Cut out again, the answer is what the model wrote."""
    answer, rng, seen = tokenizer.encode("One lute costs 7 coins. So 2 cost 2 * 7 = 14 coins.") + [tokenizer.end_id], \
        random.Random(0), set()
    for _ in range(300):
        out = insert_commands(answer, tokenizer, rng, max_n)
        assert without_commands(out, tokenizer) == answer
        text = b"".join(tokenizer.token_bytes[t] for t in out)
        asked = [int(m[1]) for m in COMMAND.finditer(text)]
        assert all(1 <= n <= min(max_n, len(answer)) for n in asked)
        seen.add(len(asked))
    assert seen == {0, 1, 2, 3}


def test_micro_batches_hold_every_example_once_within_the_limit():
    """A lost example is a lost gradient."""
    examples = [Example([0] * n, [True] * n) for n in random.Random(0).choices(range(1, 50), k=40)]
    batches = micro_batches(examples, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert all(len(b) * max(len(examples[i].tokens) for i in b) <= 100 for b in batches)


@pytest.mark.parametrize("chunk", [2048, 3])
def test_log_probabilities_in_chunks_equal_the_plain_softmax(chunk):
    """Gradients too: the head is computed again in the backward pass."""
    model, known = tiny("qwen3"), torch.ones(40, dtype=torch.bool)
    examples = [Example([1, 2, 3, 4, 5, 6], [False, True, False, True, True, True]), Example([7, 8, 9], [False, False, True])]
    got, _ = token_logprobs(model, examples, known, 0.7, chunk=chunk)
    got.sum().backward()
    gradient = model.embed.weight.grad.clone()
    model.zero_grad()
    want = torch.cat([torch.stack([log_softmax(model(torch.tensor([e.tokens]))[0, i - 1], known, 0.7)[e.tokens[i]]
                                   for i, learned in enumerate(e.learn) if learned]) for e in examples])
    want.sum().backward()
    assert torch.allclose(got, want) and torch.allclose(gradient, model.embed.weight.grad)


def test_a_supervised_step_does_not_depend_on_the_micro_batches():
    """The mean is over the tokens of the whole update."""
    after = []
    for most in (1000, 7):
        model = tiny("qwen3")
        examples = [Example(list(range(1, n)), [False] + [True] * (n - 2)) for n in (4, 7, 12)]
        supervised_step(model, adamw(model, 1e-3), examples, torch.ones(40, dtype=torch.bool), 1e-3, most)
        after.append(model.embed.weight.detach())
    assert torch.allclose(after[0], after[1], atol=1e-9)


def test_a_gradient_that_is_not_finite_takes_no_step():
    """One NaN would end the run for good."""
    model = tiny("qwen3")
    before = model.embed.weight.detach().clone()
    model.embed.weight.grad = torch.full_like(model.embed.weight, float("nan"))
    apply_gradient(model, adamw(model, 1.0), 1.0)
    assert torch.equal(before, model.embed.weight)
