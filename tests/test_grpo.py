"""GRPO: the reward table, advantages, the loss, and what one update does."""
import copy
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
from conftest import ON_CPU, ByteTokenizer, tiny
from data import toy_questions
from grpo import advantages, examples_of, k3, last_checkpoint, policy_loss, rewards, save_checkpoint, update
from model import Config, Transformer, load, parse_config, save
from needs import memory_needed
from relay import Call, Rollout, Run, WrongArguments, entropy, log_softmax, relay, small_models
from warmup import adamw, join_processes, token_logprobs, warm_up, working_copy, write_answers


@pytest.fixture(scope="module")
def toy(tokenizer):
    """(tokenizer, policy, reference, LLM): random models whose vocabulary is padded by 7 ids."""
    raw = dict(model_type="qwen3", vocab_size=len(tokenizer.known) + 7, hidden_size=16, intermediate_size=32,
               num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    policy, reference, llm = (Transformer(parse_config(raw, "tiny")).initialize(seed) for seed in (1, 1, 2))
    return tokenizer, policy, reference, llm


@pytest.mark.parametrize("words, sign", [
    ("stopped calling", dict(call_rate=0.0)), ("nearly every answer calls", dict(call_rate=1.0, student_solvable=0.0)),
    ("long calls", dict(rho=0.6)), ("30% longer", dict(length=70)), (None, {})])
def test_a_known_collapse_is_told_by_the_last_ten_steps(words, sign):
    """A model that called in every answer, or in none, trained on for hours without a word."""
    fine = dict(call_rate=0.5, student_solvable=0.5, rho=0.01, length=50)
    warning = grpo.watch([fine] + [fine | sign] * 10)
    assert warning is None if words is None else words in warning
    assert grpo.watch([fine | sign] * 9) is None           # too few to tell


def some_rollouts(toy, temperature=1.0):
    """Eight roll-outs with hand-offs: a router calls wherever the SLM is more unsure than at its first token."""
    tokenizer, policy, _, llm = toy
    questions = itertools.islice(toy_questions("train", random.Random(0)), 4)
    prompts = [tokenizer.chat(q.text) for q in questions for _ in range(2)]
    device = policy.embed.weight.device
    known = torch.tensor(tokenizer.known, device=device)
    with torch.no_grad():
        logits = policy(torch.tensor([prompts[0]], device=device))[:, -1]
        first = entropy(log_softmax(logits, known, temperature)).item()
    out = relay(policy, llm, tokenizer, prompts, max_new_tokens=20, temperature=temperature, seed=3,
                router=(first, 1e9))
    assert any(any(r.by_llm) for r in out) and not all(all(r.by_llm) for r in out)
    return out


def settings(**changes):
    return SimpleNamespace(**dict(dict(micro_tokens=1000, temperature=1.0, clip_low=0.2, clip_high=0.3, kl=0.01,
                                       loss="token", llm_tokens_in_loss=False), **changes))


def test_a_right_answer_without_a_call_makes_calls_dear():
    """A bonus that called answers got too would leave nothing to gain by not asking."""
    got = rewards([True, True, False, False], [False, True, False, True], torch.tensor([0.0, 0.2, 0.0, 0.3]))
    assert got.tolist() == pytest.approx([1.5, 0.8, 0, 0])


def test_where_only_calls_are_right_a_wrong_answer_without_a_call_is_punished():
    """Were it 0, as for asking in vain, nothing would teach a model that fails alone to ask."""
    got = rewards([True, False, False], [True, False, True], torch.tensor([0.1, 0.0, 0.4]))
    assert got.tolist() == pytest.approx([0.9, -1, 0])


def test_where_nothing_is_right_asking_is_rewarded_by_rho():
    """All zeros there would end the calls for hard questions, before they can help."""
    assert rewards([False, False], [False, True], torch.tensor([0.0, 0.4])).tolist() == pytest.approx([0, 0.4])


def test_the_scenario_belongs_to_the_group_and_not_to_the_batch():
    """The public code computes it over the whole batch, where one lucky group turns all others student-solvable."""
    right = [[True, False], [True, False], [False, False]]
    called = [[False, True], [True, False], [False, True]]
    rho = torch.tensor([[0, 0.5], [0.5, 0], [0, 0.5]])
    assert rewards(right, called, rho).tolist() == [[1.5, 0], [0.5, -1], [0, 0.5]]


def test_advantages_are_centred_and_divided_by_the_unbiased_std():
    """The biased std, numpy's default, makes every advantage of a small group too large: 1 in place of 0.7071."""
    assert advantages(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.70711, -0.70711], abs=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.9])
def test_equal_rewards_give_advantages_of_exactly_zero(value):
    """The float32 std of equal numbers is not always 0, and dividing by it makes an advantage out of nothing."""
    assert advantages(torch.full((3, 16), value)).abs().max() == 0


def test_a_floor_under_the_std_keeps_the_length_of_right_answers_from_being_an_advantage():
    """With one call of one token each, the longer of two right answers has the smaller rho: the toy learned to pad.

    A group that shows more than that is as without the floor.
    """
    padded = torch.tensor([1 - 1 / 49, 1 - 1 / 49, 1 - 1 / 50, 1 - 1 / 49])
    assert advantages(padded)[2] > 1.4 and 0 < advantages(padded, floor=0.03)[2] < 0.02
    shown = torch.tensor([1 - 1 / 49, 1 - 9 / 57, -1.0, 0.0])
    assert torch.equal(advantages(shown, floor=0.03), advantages(shown))


def test_at_ratio_one_the_loss_is_the_plain_policy_gradient():
    """A sign lost, or a clip that acts where nothing has moved yet, and the first update is no policy gradient."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, clipped = policy_loss(logprobs, logprobs.detach(), torch.tensor([2.0, -3.0]))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-2.0, 3.0] and not clipped.any()


def test_the_clip_holds_a_ratio_back_only_where_it_would_gain():
    """With min for max it holds back just the tokens that must return: without a slope below 0.8 where A > 0."""
    ratio = torch.tensor([2.0, 0.5, 0.5, 2.0, 9.0])
    loss, clipped = policy_loss(ratio.log(), torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]))
    assert loss.tolist() == pytest.approx([-1.3, -0.5, 0.8, 2.0, 3.0])
    assert clipped.tolist() == [True, False, True, False, True]


def test_the_kl_estimate_is_zero_with_zero_slope_where_policy_and_reference_agree():
    """k3 must not pull a policy away from a reference that it equals."""
    logprobs = torch.tensor([-1.0, -4.0], requires_grad=True)
    k3(logprobs, logprobs.detach()).sum().backward()
    assert logprobs.grad.abs().max() == 0 and k3(torch.tensor([-1.0]), torch.tensor([-2.0])) > 0


def test_kl_and_the_difference_to_the_sampler_start_at_zero(toy):
    """A reference in another precision, or read without the temperature, pulls at the policy from the first step on."""
    tokenizer, policy, reference, _ = toy
    rollouts = some_rollouts(toy)
    optimizer = SimpleNamespace(param_groups=[dict(params=list(policy.parameters()))], step=lambda: None,
                                zero_grad=lambda set_to_none: policy.zero_grad())
    sums = update(policy, reference, optimizer, rollouts, torch.ones(len(rollouts)), torch.tensor(tokenizer.known),
                  1e-3, settings())
    assert sums["kl"] == 0 and sums["difference"] < 1e-5


STEPS = [dict(step=1, loss=0.1), dict(step=2, loss=None)]    # the metrics of two steps


def test_a_checkpoint_with_other_settings_is_refused(toy, tmp_path):
    """A run that goes on with another learning rate is two half runs under one name."""
    history = [*STEPS, dict(step=3), dict(step=4)]
    save_checkpoint(tmp_path, history, toy[1], adamw(toy[1], 1e-3), None, dict(lr=1, seed=1))
    assert last_checkpoint(tmp_path, dict(lr=1, seed=1)) == (history, tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="lr 1, not 2"):
        last_checkpoint(tmp_path, dict(lr=2, seed=1))


def test_a_question_file_may_move_before_a_run_goes_on(toy, tmp_path):
    """The texts are compared by their hash; the path as well refused a run that lay in another place."""
    save_checkpoint(tmp_path, STEPS, toy[1], adamw(toy[1], 1e-3), None, dict(questions="/old/q", question_texts="1f"))
    assert last_checkpoint(tmp_path, dict(questions="/new/q", question_texts="1f"))[0] == STEPS
    with pytest.raises(ValueError, match="question_texts 1f, not 2e"):
        last_checkpoint(tmp_path, dict(questions="/old/q", question_texts="2e"))
    run = Run(tmp_path)
    shutil.copytree(tmp_path / f"checkpoint-{len(STEPS)}", tmp_path / "warmup")
    run.finish("warmup", dict(questions="/old/q", question_texts="1f"))
    assert run.finished("warmup", dict(questions="/new/q", question_texts="1f"))
    with pytest.raises(ValueError, match="question_texts 1f, not 2e"):
        run.finished("warmup", dict(questions="/old/q", question_texts="2e"))


# ---------------------------------------------------------------------------------------------------------------------
# Exhaustive, and by hand

def test_the_reward_table_holds_in_every_group_of_four():
    """All 256 groups at once, against the table written as ifs: a batch-wide flag would fail nearly all of them."""
    groups = list(itertools.product(itertools.product((False, True), repeat=4), repeat=2))
    rho = [0.1, 0.2, 0.3, 0.4]
    got = rewards([right for right, _ in groups], [called for _, called in groups],
                  torch.tensor([[r if c else 0.0 for r, c in zip(rho, called)] for _, called in groups]))
    for (right, called), row in zip(groups, got.tolist()):
        alone = any(r and not c for r, c in zip(right, called))
        for r, c, share, reward in zip(right, called, rho, row):
            if r:
                want = 1 - share if c else 1.5
            elif alone:
                want = 0
            elif any(right):
                want = 0 if c else -1
            else:
                want = share if c else 0
            assert reward == pytest.approx(want), (right, called)
    assert rewards([True], [False], [0.0], solo=1.0).tolist() == [1.0]


def test_advantages_by_hand_for_two_groups_at_once():
    """A mean or a std over the whole batch mixes easy questions with hard ones. (2, 0, 1, 1) has the std sqrt(2/3)."""
    got = advantages(torch.tensor([[2.0, 0.0, 1.0, 1.0], [4.0, 4.0, 4.0, 0.0]]))
    assert got[0].tolist() == pytest.approx([1.224745, -1.224745, 0, 0], abs=1e-4)
    assert got[1].tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-4)
    assert advantages(torch.tensor([[2.0, 0.0]]), scale=False).tolist() == [[1.0, -1.0]]
    assert advantages(torch.tensor([[0.7], [0.3]])).tolist() == [[0.0], [0.0]]       # groups of one
    assert advantages([4, 4, 4, 0]).tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-4)


def test_a_clipped_token_has_no_gradient_and_one_that_loses_keeps_it():
    """A clip that also stops a token from being pulled back lets the policy run away."""
    ratio = torch.tensor([1.4, 1.25, 0.7, 0.7, 1.4, 2.9, 3.1])
    logprobs = ratio.log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    policy_loss(logprobs, torch.zeros(7), advantage)[0].sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0, -1.25, -0.7, 0, 1.4, 2.9, 0])
    assert (k3(torch.linspace(-30, 0, 50), torch.full((50,), -9.0)) >= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# A step, with roll-outs that are made up

def made_up(right, delivered, asked=0, tokens=10):
    """A roll-out of `tokens` tokens, `delivered` of them by the LLM; its last token says whether it is right."""
    by_llm = [i < delivered for i in range(tokens - 1)] + [False]
    calls = [Call(0, asked, delivered)] if asked else []
    return Rollout([1], [5] * (tokens - 1) + [int(right)], by_llm, [-1.0] * tokens, calls, "eos")


def played(monkeypatch, groups, **changes):
    """train_step on groups of made-up roll-outs of one and the same question: (metrics, what update() was given)."""
    seen = []

    def note(policy, reference, optimizer, rollouts, advantage, known, lr, args):
        seen.append((rollouts, advantage.tolist(), [list(r.logprobs) for r in rollouts]))
        return dict(tokens=1, loss=0.0, kl=0.0, clip_fraction=0.0, entropy=0.0, difference=0.0,
                    norm=changes.get("norm", 0.0))

    monkeypatch.setattr(grpo, "relay", lambda *args, **options: [r for group in groups for r in group])
    monkeypatch.setattr(grpo, "is_right", lambda question, rollout, tokenizer: bool(rollout.tokens[-1]))
    monkeypatch.setattr(grpo, "update", note)
    args = settings(**dict(dict(group=len(groups[0]), seed=0, max_new_tokens=9, llm_temperature=0.7, batch=None,
                                reward="difficulty", updates=1, skip_equal=False, scale_by_std=True, std_floor=0.0,
                                rho_asked=False, batch_scenarios=False), **changes))
    questions = [SimpleNamespace(text="the same text")] * len(groups)
    tokenizer = SimpleNamespace(chat=lambda text: [1])
    known = torch.tensor([True])
    return grpo.train_step(1, questions, None, None, object(), tokenizer, None, known, 1e-3, args)[0], seen


def test_rho_and_calls_count_what_was_delivered_and_not_what_was_asked(monkeypatch):
    """A call of 9,000 cut to one token is a call of one; one that delivered nothing is none, and earns the 1.5."""
    metrics, _ = played(monkeypatch, [[made_up(True, 0, asked=9000), made_up(True, 2, asked=9000)]])
    assert metrics["reward"] == pytest.approx((1.5 + 0.8) / 2)
    assert metrics["call_rate"] == 0.5 and metrics["rho"] == pytest.approx(0.1) and metrics["asked"] == 9000
    metrics, _ = played(monkeypatch, [[made_up(False, 0, asked=5), made_up(True, 1, asked=5)]])
    assert metrics["reward"] == pytest.approx((-1 + 0.9) / 2)          # asked in vain: it should have asked
    metrics, _ = played(monkeypatch, [[made_up(True, 3, asked=3), made_up(False, 5, asked=5)]], reward="simple")
    assert metrics["reward"] == pytest.approx((1 - 0.3 - 0.5) / 2)


def test_two_groups_of_one_and_the_same_question_stay_apart(monkeypatch):
    """Groups kept by prompt text melt together when a question comes twice in a step."""
    groups = [[made_up(True, 0), made_up(False, 0)], [made_up(True, 5, asked=5), made_up(False, 0)]]
    metrics, seen = played(monkeypatch, groups)
    assert metrics["reward"] == pytest.approx((1.5 + 0 + 0.5 - 1) / 4)
    assert metrics["student_solvable"] == metrics["teacher_dependent"] == 0.5 and metrics["teacher_unsolvable"] == 0
    (rollouts, advantage, _), = seen
    assert all(a is b for a, b in zip(rollouts, groups[0] + groups[1]))
    assert advantage == pytest.approx([0.70711, -0.70711] * 2, abs=1e-4)


def test_the_updates_of_a_step_share_its_groups_among_them(monkeypatch):
    """A group cut in two, left out, or learned from with another one's advantages would go unseen in the loss."""
    groups = [[made_up(True, k % 3, asked=1), made_up(k % 2 == 0, 0), made_up(False, 1, asked=1)] for k in range(5)]
    _, seen = played(monkeypatch, groups, updates=2)
    assert [len(rollouts) for rollouts, _, _ in seen] == [9, 6]
    given = [r for rollouts, _, _ in seen for r in rollouts]
    assert sorted(map(id, given)) == sorted(id(r) for group in groups for r in group)
    for rollouts, advantage, logprobs in seen:
        for k in range(0, len(rollouts), 3):
            assert any(all(a is b for a, b in zip(rollouts[k:k + 3], group)) for group in groups)
            assert sum(advantage[k:k + 3]) == pytest.approx(0, abs=1e-5)
            assert logprobs[k] == [-1.0] * 10


def test_groups_of_equal_rewards_are_skipped_only_where_that_is_asked_for(monkeypatch):
    """They carry no policy gradient, but they count in the loss's denominator and in the KL."""
    groups = [[made_up(True, 0), made_up(True, 0)], [made_up(True, 0), made_up(False, 0)]]
    metrics, seen = played(monkeypatch, groups, skip_equal=True)
    assert len(seen) == 1 and len(seen[0][0]) == 2 and metrics["equal_groups"] == 0.5
    assert len(played(monkeypatch, groups)[1][0][0]) == 4
    assert played(monkeypatch, groups[:1], skip_equal=True)[1] == [([], [], [])]


# ---------------------------------------------------------------------------------------------------------------------
# Roll-outs whose commands are obeyed: a tokenizer of six letters in which a command is one token

@pytest.fixture(scope="module")
def letters():
    """(tokenizer, policy, reference, LLM, roll-outs): float64, and all hand-offs come from commands."""
    tokenizer = ByteTokenizer(b"<call>2</call>", b"<call>3</call>b", only=b"abcdef", unknown=3)
    make = lambda seed: tiny("qwen3", seed, vocab_size=len(tokenizer.known) + 5)
    policy, reference, llm = make(1), make(2), make(3)
    with torch.no_grad():
        for model in (policy, reference, llm):
            model.embed.weight.mul_(0.3)
    prompts = [[97 + i % 6] * (1 + i % 4) for i in range(12)]
    return tokenizer, policy, reference, llm, relay(policy, llm, tokenizer, prompts, max_new_tokens=12, seed=5,
                                                    temperature=1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch", [None, 5])
def test_the_learner_recomputes_what_the_sampler_stored_through_commands(letters, temperature, batch):
    """In float32: a hand-off that shifts a position, a padded id with probability, a temperature on one side only."""
    tokenizer = letters[0]
    policy, llm = (copy.deepcopy(model).float() for model in (letters[1], letters[3]))
    prompts = [r.prompt for r in letters[4]]
    rollouts = relay(policy, llm, tokenizer, prompts, max_new_tokens=16, temperature=temperature, seed=9, batch=batch)
    assert sum(call.delivered > 0 for r in rollouts for call in r.calls) >= 4
    assert len({len(r.tokens) for r in rollouts}) > 3
    with torch.no_grad():
        learner, _ = token_logprobs(policy, examples_of(rollouts), torch.tensor(tokenizer.known), temperature)
    sampler = torch.tensor([lp for r in rollouts for lp, b in zip(r.logprobs, r.by_llm) if not b])
    assert len(learner) == len(sampler) and (learner - sampler).abs().max() < 1e-5


def test_commands_and_the_own_end_of_text_are_learned_and_the_llms_are_not(letters):
    """An end-of-text token lost from the loss is a model that never learns to stop."""
    tokenizer, rollouts = letters[0], letters[4]
    kinds = set()
    for r, e in zip(rollouts, examples_of(rollouts)):
        assert e.tokens == r.prompt + r.tokens and e.learn == [False] * len(r.prompt) + [not b for b in r.by_llm]
        kinds.add(r.end)
        if r.end == "eos":
            assert e.tokens[-1] == tokenizer.end_id and e.learn[-1]
        for call in r.calls:
            assert e.learn[len(r.prompt) + call.position - 1]          # the command's own token
            assert not any(e.learn[len(r.prompt) + call.position:][:call.delivered])
    assert "eos" in kinds


def stepped(letters, rollouts=None, advantage=None, **changes):
    """(gradient of one update as a list of tensors, its sums). The gradient is not clipped away: rate 1, SGD."""
    tokenizer, policy, reference, _, own = letters
    policy, rollouts = copy.deepcopy(policy), own if rollouts is None else rollouts
    before = [p.detach().clone() for p in policy.parameters()]
    advantage = torch.linspace(-2, 1.5, len(rollouts)) if advantage is None else advantage
    sums = update(policy, reference, torch.optim.SGD(policy.parameters(), lr=1.0), rollouts, advantage,
                  torch.tensor(tokenizer.known), 1.0, settings(kl=0.5, **changes))
    scale = max(1.0, sums["norm"] + 1e-6)                              # undo the clip to norm 1 (torch adds 1e-6)
    return [(b - p.detach()) * scale for b, p in zip(before, policy.parameters())], sums


def test_the_gradient_of_an_update_is_that_of_the_formula_token_by_token(letters):
    """A lost weight or a shift by one token trains all the same, only worse: so here it is as loops, in float64."""
    tokenizer, policy, reference, _, rollouts = letters
    policy, advantage, n = copy.deepcopy(policy), torch.linspace(-2, 1.5, len(rollouts)), len(tokenizer.known)
    terms = []
    for a, r in zip(advantage.tolist(), rollouts):
        ids = torch.tensor([r.prompt + r.tokens])
        ours, theirs = (m(ids)[0, :, :n].masked_fill(~torch.tensor(tokenizer.known), -torch.inf).log_softmax(-1)
                        for m in (policy, reference))
        for i, (token, by_llm) in enumerate(zip(r.tokens, r.by_llm), len(r.prompt) - 1):
            if not by_llm:
                lp, ref = ours[i, token], theirs[i, token].detach()
                terms.append(-a * (lp - lp.detach()).exp() + 0.5 * ((ref - lp).exp() - (ref - lp) - 1))
    torch.stack(terms).mean().backward()
    got, sums = stepped(letters)
    assert sums["tokens"] == len(terms) and sums["loss"] == pytest.approx(torch.stack(terms).mean().item())
    for a, p in zip(got, policy.parameters()):
        assert torch.allclose(a, p.grad, rtol=0, atol=1e-7)


def test_micro_batches_more_padding_and_order_leave_the_gradient_as_it_is(letters):
    """A long row of the LLM's tokens only pads all others (or is a micro-batch with nothing to learn)."""
    rollouts, advantage = letters[4], torch.linspace(-2, 1.5, len(letters[4]))
    whole, sums = stepped(letters)
    padding = Rollout([97] * 30, [98] * 30, [True] * 30, [0.0] * 30)
    wide = torch.cat([advantage, torch.tensor([9.0])])
    order = list(reversed(range(len(rollouts))))
    for other, more in (stepped(letters, micro_tokens=1), stepped(letters, micro_tokens=40),
                        stepped(letters, rollouts + [padding], wide),
                        stepped(letters, rollouts + [padding], wide, micro_tokens=1),
                        stepped(letters, [rollouts[i] for i in order], advantage[order])):
        assert more["tokens"] == sums["tokens"] and more["loss"] == pytest.approx(sums["loss"])
        for a, b in zip(other, whole):
            assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_the_old_log_probabilities_stay_those_of_sampling(letters):
    """Recomputed before each update they would make every ratio 1, and the clip would never hold anything back."""
    tokenizer, policy, reference, _, rollouts = letters
    policy, known = copy.deepcopy(policy), torch.tensor(tokenizer.known)
    stored = [list(r.logprobs) for r in rollouts]
    optimizer = adamw(policy, 0.03)
    for k in range(3):
        with torch.no_grad():
            now = token_logprobs(policy, examples_of(rollouts), known)[0]
        sampled = torch.tensor([lp for r in rollouts for lp, b in zip(r.logprobs, r.by_llm) if not b])
        sums = update(policy, reference, optimizer, rollouts, torch.ones(len(rollouts)), known, 0.03, settings())
        assert sums["difference"] == pytest.approx((now - sampled).abs().max().item(), abs=1e-6)
        assert (sums["difference"] > 0.05) == (sums["clip_fraction"] > 0) == (k > 0)
    assert stored == [r.logprobs for r in rollouts]


def test_without_tokens_of_the_slm_the_optimizer_is_not_touched(letters):
    """AdamW's averages and step count move even at a gradient of zero."""
    tokenizer, policy, reference, _, _ = letters
    optimizer = adamw(policy, 1.0)
    optimizer.step = optimizer.zero_grad = lambda *args, **options: pytest.fail("the optimizer was used")
    sums = update(policy, reference, optimizer, [Rollout([97], [98, 99], [True, True], [0.0, 0.0])], torch.ones(1),
                  torch.tensor(tokenizer.known), 1.0, settings())
    assert sums["tokens"] == 0 and sums["norm"] is None


def test_every_pass_over_the_pool_asks_every_question_once():
    """Drawing with replacement leaves a third of the pool unasked; the same order each time is learnt by heart."""
    pool = [f"question {i}" for i in range(13)]
    stream = grpo.endless(pool, 1)
    passes = [list(itertools.islice(stream, 13)) for _ in range(3)]
    assert all(sorted(p) == sorted(pool) for p in passes) and len({tuple(p) for p in passes}) == 3


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_huge_log_ratio_leaves_the_gradient_finite(advantage):
    """The clip holds the loss, but the slope of an exp that overflowed is 0 * inf, NaN."""
    logprobs = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(3), torch.full((3,), advantage))
    (loss + k3(logprobs, torch.zeros(3))).sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()


def test_the_filter_keeps_what_the_llm_solves_often_enough_and_asks_it_once(tmp_path, monkeypatch):
    """170,000 answers of the LLM were written again by every --resume and every variant."""
    monkeypatch.setattr(grpo, "fingerprint", str)
    asked = []

    def answers(llm, nobody, tokenizer, questions, args, label, keep, temperature, numbers):
        asked.append(len(questions))
        return [q.number >= number % args.filter_samples for number, q in zip(numbers, questions, strict=True)]

    monkeypatch.setattr(grpo, "write_answers", answers)
    pool = [SimpleNamespace(text=f"question {i}", number=i - 1) for i in range(6)]      # solved 0, 1, 2, 3, 4, 4 times

    def choose(dtype=torch.float32, llm="llm", **changes):
        args = settings(**dict(dict(filter_samples=4, pass_rate=0.5, llm=None, seed=1, llm_temperature=0.7,
                                    max_new_tokens=9), **changes))
        kept = grpo.filter_questions(pool, tiny("qwen3", dtype=dtype), llm, None, args, tmp_path / "filter.json")
        return [q.number for q in kept]

    assert choose() == [1, 2, 3, 4] and asked == [12, 2, 1]                              # not 24: the rest is decided
    assert choose(pass_rate=0.75) == [2, 3, 4] and asked == [12, 2, 1, 4, 1]             # only what is not known yet
    assert choose(filter_samples=2) == [0, 1, 2, 3, 4] and asked[5:] == [6, 1]
    assert choose(filter_samples=0) == choose(pass_rate=0) == [-1, 0, 1, 2, 3, 4] and len(asked) == 7
    assert choose() == [1, 2, 3, 4] and len(asked) == 7                                  # both are kept
    assert choose(dtype=torch.bfloat16) == [1, 2, 3, 4] and asked[7:] == [12, 2, 1]      # another LLM, in effect
    assert choose(llm="other") == [1, 2, 3, 4] and asked[10:] == [12, 2, 1]
    monkeypatch.setattr(grpo, "FILTERED", 4)

    def killed(*args, **options):
        if len(asked) > 13:
            raise KeyboardInterrupt
        return answers(*args, **options)

    monkeypatch.setattr(grpo, "write_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        choose(seed=2)
    monkeypatch.setattr(grpo, "write_answers", answers)
    assert choose(seed=2) == [1, 2, 3, 4] and asked[13:] == [8, 6, 1]                    # goes on after the first part


@pytest.mark.parametrize("n, rate", [(1, 0.5), (2, 0.5), (10, 0.5), (10, 0.05), (10, 1.0), (16, 0.3), (7, 0.7)])
def test_the_filter_decides_as_all_answers_would(n, rate, tmp_path, monkeypatch):
    """Answers that can no longer decide are not written: that must not change what is kept."""
    monkeypatch.setattr(grpo, "fingerprint", str)
    rng = random.Random(n)
    table = [[rng.random() < share for _ in range(n)] for share in (i / 199 for i in range(200))]
    written = []

    def answers(llm, nobody, tokenizer, questions, args, label, keep, temperature, numbers):
        written.extend(numbers)
        return [table[number // n][number % n] for number in numbers]

    monkeypatch.setattr(grpo, "write_answers", answers)
    pool = [SimpleNamespace(text=str(i), number=i) for i in range(200)]
    args = settings(filter_samples=n, pass_rate=rate, llm=None, seed=1, llm_temperature=0.7, max_new_tokens=9)
    kept = grpo.filter_questions(pool, tiny("qwen3"), "llm", None, args, tmp_path / "filter.json")
    assert [q.number for q in kept] == [i for i in range(200) if sum(table[i]) / n >= rate]
    assert len(written) == len(set(written)) <= 200 * n and (n == 1 or len(written) < 170 * n)


def test_an_answer_of_the_filter_is_the_same_in_whichever_round_it_is_written(tmp_path, monkeypatch):
    """Its random numbers belong to question and answer, not to the place in a round."""
    monkeypatch.setattr(grpo, "fingerprint", str)
    tokenizer = ByteTokenizer()
    llm = tiny("qwen3", vocab_size=len(tokenizer.known))
    pool = [SimpleNamespace(text="abcdefghi"[:1 + i % 9] * 2 + str(i)) for i in range(30)]
    args = settings(filter_samples=6, pass_rate=0.5, seed=1, llm_temperature=1.0, max_new_tokens=5, batch=7)
    right = lambda question, rollout, tokenizer: sum(rollout.tokens) % 2 == 0
    monkeypatch.setattr(grpo, "is_right", right)
    kept = grpo.filter_questions(pool, llm, "llm", tokenizer, args, tmp_path / "filter.json")
    every = write_answers(llm, None, tokenizer, [q for q in pool for _ in range(6)], args, "all", temperature=1.0,
                          keep=lambda question, rollout: right(question, rollout, tokenizer))
    assert kept == [q for i, q in enumerate(pool) if sum(every[6 * i:6 * i + 6]) >= 3] and 5 < len(kept) < 25


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and runs that are killed

def one_step(tokenizer, changes):
    """One train_step() over six questions, with rewards made up: (its metrics, the weights after it)."""
    policy, reference, llm = (tiny("qwen3", seed, vocab_size=len(tokenizer.known)) for seed in (1, 2, 3))
    with torch.no_grad():
        for model in (policy, reference, llm):
            model.embed.weight.mul_(0.3)                   # roll-outs of many lengths
    start = [p.detach().clone() for p in policy.parameters()]
    questions = [SimpleNamespace(text="abcdef"[:1 + i % 5], number=i) for i in range(6)]
    args = settings(**dict(dict(group=4, seed=7, max_new_tokens=12, llm_temperature=0.7, batch=None, updates=2, kl=0.1,
                                skip_equal=True, scale_by_std=True, std_floor=0.0, odd=2), **changes))
    metrics, groups = grpo.train_step(3, questions, policy, reference, llm, tokenizer, adamw(policy, 1e-3),
                                      torch.tensor(tokenizer.known), 1e-3, args)
    assert len({len(r.tokens) for group in groups for r in group}) > 2
    assert max((p - old).abs().max() for p, old in zip(policy.parameters(), start)) > 5e-4
    return metrics, [p.detach() for p in policy.parameters()]


def made_up_score(questions, groups, tokenizer, args):
    right = torch.tensor([[len(r.tokens) % 2 > 0 for r in group] for group in groups])
    reward = torch.tensor([[float(sum(r.tokens) % 7) if q.number % 2 < args.odd else 0.0 for r in group]
                           for q, group in zip(questions, groups)])
    return right, torch.tensor([[any(r.by_llm) for r in group] for group in groups]), reward


def warmed_weights(tokenizer):
    """({}, the weights after warm_up() on answers of many lengths)."""
    model = tiny("qwen3", 1, vocab_size=len(tokenizer.known))
    answers = [Rollout([1, 2, 3], list(range(40, 45 + 3 * i))) for i in range(7)]
    warm_up(model, adamw(model, 1e-2), tokenizer, answers, settings(lr=1e-2, epochs=2, batch_size=3, max_n=9, seed=1))
    return {}, [p.detach() for p in model.parameters()]


CHANGES = [dict(), dict(odd=1), dict(loss="sequence"), dict(llm_tokens_in_loss=True), dict(updates=1)]


def all_steps(rank, size, port, out):
    """In process `rank` of `size`: one_step() with each of CHANGES; the first process saves what came out."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    join_processes("cpu")
    grpo.score = made_up_score
    results = [one_step(ByteTokenizer(b"<call>2</call>", b"<call>3</call>b", only=b"abcdef"), c) for c in CHANGES]
    results.append(warmed_weights(ByteTokenizer()))
    if rank == 0:
        torch.save(results, out)
    if size > 1:
        os._exit(0)                                        # as run_script() does, and why


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_take_the_same_step_as_one(tmp_path, monkeypatch):
    """Each dividing by its own token count; or (odd=1) the second, with nothing to learn, hanging or making NaN.

    And the warm-up: its learning rate was counted by a progress bar, which in all processes but the first is off.
    """
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")                      # put back after the test
    monkeypatch.setattr(grpo, "score", grpo.score)
    port = free_port()
    both = torch.multiprocessing.spawn(all_steps, (2, port, tmp_path / "2"), nprocs=2, join=False)
    all_steps(0, 1, 0, tmp_path / "1")                     # while those two start
    while not both.join():
        pass
    alone, together = (torch.load(tmp_path / name, weights_only=True) for name in "12")
    for (metrics, one), (others, two), changes in zip(alone, together, [*CHANGES, "the warm-up"]):
        for a, b in zip(one, two):
            assert torch.allclose(a, b, rtol=0, atol=1e-9), changes
        for key in set(metrics) - {"sample_seconds", "learn_seconds", "sampler_learner_difference"}:
            assert metrics[key] == pytest.approx(others[key]), (changes, key)


@pytest.fixture
def warmed_up(tmp_path, toy_directory, tokenizer):
    """A run of the toy whose models are tiny and random, ready for grpo.py; now and then they write a 7."""
    run = tmp_path / "run"
    raw = dict(model_type="qwen3", vocab_size=len(tokenizer.known), hidden_size=16, intermediate_size=32,
               num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    for seed, name in enumerate(("slm", "llm", "warmup")):
        shutil.copytree(toy_directory, run / name)
        model = Transformer(parse_config(raw, "tiny")).initialize(seed)
        with torch.no_grad():
            model.embed.weight[tokenizer.encode(" 7")] *= 10
        save(model, run / name)
    (run / "run.json").write_text(json.dumps(dict(toy=True, stages=dict(warmup={}))))
    return run


FLAGS = ("--steps 40 --questions-per-step 4 --group 4 --filter-samples 0 --pool 9 --max-new-tokens 9 --save-every 3 "
         "--eval-every 0").split()


def started(run, *flags):
    """grpo.py as a process of its own."""
    return subprocess.Popen([sys.executable, Path(grpo.__file__), "--run", run, *FLAGS, *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=ON_CPU)


def called(monkeypatch, run, *flags):
    """grpo.py's main() in this process: to start another takes seconds, for what only a kill or a signal needs."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--run", str(run), *FLAGS, *flags])
    monkeypatch.setattr(grpo, "hear_signals", lambda handler: None)        # the handler would stay
    grpo.main()


def write_questions(file, answers):
    file.write_text("".join(json.dumps(dict(problem=f"What is {i}?", answer=answer)) + "\n"
                            for i, answer in enumerate(answers)))


def lines_of(run):
    """How many steps metrics.jsonl tells of."""
    metrics = run / "grpo" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_lines(run, n, process):
    while process.poll() is None and lines_of(run) < n:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bytes(warmed_up, tmp_path, monkeypatch, capsys):
    """A laptop that sleeps, a scheduler that stops the job: the order of questions or a random state would differ."""
    other, file = tmp_path / "other", tmp_path / "questions.jsonl"
    shutil.copytree(warmed_up, other)
    write_questions(file, [7] * 30)
    questions = "--questions", str(file)
    process = started(warmed_up, *questions)
    wait_for_lines(warmed_up, 8, process)
    process.kill()
    process.communicate()
    for flags, word in (((), "--resume"), (("--lr", "0.5", "--resume"), "lr 0.001, not 0.5")):
        with pytest.raises(ValueError, match=word):
            called(monkeypatch, warmed_up, *questions, *flags)
    process = started(warmed_up, *questions, "--resume")
    wait_for_lines(warmed_up, lines_of(warmed_up) + 4, process)            # beyond those of the killed one
    process.terminate()
    process.terminate()
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "go on with --resume" in errors and "Traceback" not in errors
    called(monkeypatch, warmed_up, *questions, "--resume")
    called(monkeypatch, other, *questions)                                 # undisturbed
    assert [json.loads(line)["step"] for line in (warmed_up / "grpo" / "metrics.jsonl").open()] == list(range(1, 41))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (warmed_up / "grpo" / name).read_bytes() == (other / "grpo" / name).read_bytes()
    learned, start = (warmed_up / name / "model.safetensors" for name in ("grpo", "warmup"))
    assert learned.read_bytes() != start.read_bytes()                      # the test itself: bytes that learning made
    capsys.readouterr()
    called(monkeypatch, warmed_up, *questions, "--resume")
    assert "finished" in capsys.readouterr().out


def test_in_sixteen_bits_kl_starts_at_zero_and_a_stopped_run_ends_with_the_same_bytes(warmed_up, tmp_path,
                                                                                      monkeypatch):
    """The float32 weights are what is kept: from a copy's rounded ones a run would go on elsewhere."""
    other, train_step, file = tmp_path / "other", grpo.train_step, tmp_path / "questions.jsonl"
    shutil.copytree(warmed_up, other)
    write_questions(file, [7] * 30)
    questions = "--questions", str(file)
    sixteen = *questions, "--train-dtype", "bfloat16"

    def five(step, questions, policy, reference, *rest):
        assert policy.embed.weight.dtype == reference.embed.weight.dtype == torch.bfloat16
        if step > 5 and not resumed:
            raise KeyboardInterrupt
        return train_step(step, questions, policy, reference, *rest)

    monkeypatch.setattr(grpo, "train_step", five)
    resumed = False
    with pytest.raises(SystemExit, match="stopped after step 5"):
        called(monkeypatch, warmed_up, *sixteen)
    with pytest.raises(ValueError, match="train_dtype bfloat16, not float32"):
        called(monkeypatch, warmed_up, *questions, "--resume")
    resumed = True
    called(monkeypatch, warmed_up, *sixteen, "--resume")
    called(monkeypatch, other, *sixteen)
    learned, undisturbed = ((run / "grpo" / "model.safetensors").read_bytes() for run in (warmed_up, other))
    assert learned == undisturbed
    assert load(warmed_up / "grpo").embed.weight.ne(load(warmed_up / "warmup").embed.weight).any()
    assert json.loads((other / "grpo" / "config.json").read_text())["dtype"] == "float32"
    steps = [json.loads(line) for line in (other / "grpo" / "metrics.jsonl").open()]
    first, *_, last = [step for step in steps if step["kl"] is not None]   # of those that had something to learn
    assert first["kl"] == 0 < last["kl"] and first["sampler_learner_difference"] < 0.1


def test_a_checkpoint_of_another_start_or_model_is_refused(warmed_up, tmp_path, monkeypatch):
    """A warm-up made anew, other questions in the file, another model's weights: it went on, or ended in a traceback."""
    file = tmp_path / "questions.jsonl"
    write_questions(file, range(30))
    steps, train_step = itertools.count(1), grpo.train_step

    def four(*args):
        if next(steps) > 4:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(grpo, "train_step", four)
    with pytest.raises(SystemExit, match="stopped after step 4"):
        called(monkeypatch, warmed_up, "--questions", str(file))
    state = json.loads((warmed_up / "grpo" / "checkpoint.json").read_text())
    folder = warmed_up / "grpo" / f"checkpoint-{len(state['history'])}"

    def other(directory, hidden):
        config = json.loads((directory / "config.json").read_text()) | dict(hidden_size=hidden)
        save(Transformer(parse_config(config, "tiny")).initialize(9), directory)

    for where, fault in ((warmed_up / "warmup", "weights_at_start"), (folder, "shape")):
        kept = shutil.copytree(where, tmp_path / "kept", dirs_exist_ok=True)
        other(where, 24)
        with pytest.raises(ValueError, match=fault):
            called(monkeypatch, warmed_up, "--questions", str(file), "--resume")
        shutil.copytree(kept, where, dirs_exist_ok=True)
        shutil.rmtree(kept)
    file.write_text(file.read_text().replace("What is", "How much is"))
    with pytest.raises(ValueError, match="question_texts"):
        called(monkeypatch, warmed_up, "--questions", str(file), "--resume")
    with pytest.raises(WrongArguments, match="5 updates"):
        called(monkeypatch, warmed_up, "--updates", "5", "--resume")


def test_an_optimizer_of_a_model_of_another_shape_is_refused(tmp_path):
    """Two models of one family have the same number of tensors, which is all that load_state_dict() compares."""
    small, large = (adamw(tiny("qwen3", hidden_size=n), 1e-3) for n in (16, 24))
    for group in small.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    small.step()
    torch.save(small.state_dict(), tmp_path / "optimizer.pt")
    grpo.load_optimizer(small, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="not of this run"):
        grpo.load_optimizer(large, tmp_path / "optimizer.pt")
    state = small.state_dict()
    state["state"][0]["exp_avg_sq"] = torch.zeros(3)       # the step read behind its end
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="not of this run"):
        grpo.load_optimizer(small, tmp_path / "optimizer.pt")


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(toy, toy_directory, tmp_path, monkeypatch):
    """Overwriting the last checkpoint, or naming the new one before it is whole, loses both."""
    calls, real = itertools.count(), os.replace

    def replace(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        real(*args)

    for at in range(8):
        out = tmp_path / str(at)
        out.mkdir()
        save_checkpoint(out, STEPS[:1], toy[1], adamw(toy[1], 1e-3), toy_directory, dict(lr=1))
        monkeypatch.setattr(os, "replace", replace)
        calls = itertools.count()
        try:
            save_checkpoint(out, STEPS, toy[1], adamw(toy[1], 1e-3), toy_directory, dict(lr=1))
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", real)
        history, folder = last_checkpoint(out, dict(lr=1))
        assert history == STEPS[:2 if at == 7 else 1]      # seven files are moved into place
        load(folder)
        grpo.load_optimizer(adamw(toy[1], 1e-3), folder / "optimizer.pt")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "history": 3}', '{"settings": {}, "history": [3]}',
                                  '{"settings": {}, "history": [{}]}'])
def test_a_damaged_or_foreign_checkpoint_is_one_line(tmp_path, text):
    """A traceback tells nobody what to do."""
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(ValueError, match="checkpoint.json"):
        last_checkpoint(tmp_path, {})


def test_a_damaged_optimizer_file_is_one_line(toy, tmp_path):
    """torch raises a different error for each way in which a file can be broken."""
    file = tmp_path / "optimizer.pt"
    optimizer = adamw(toy[1], 1e-3)
    torch.save(optimizer.state_dict(), file)
    whole = file.read_bytes()
    for broken in (b"", b"junk", whole[:len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="optimizer.pt"):
            grpo.load_optimizer(optimizer, file)
    torch.save(adamw(torch.nn.Linear(2, 2), 1.0).state_dict(), file)
    with pytest.raises(ValueError, match="optimizer.pt"):
        grpo.load_optimizer(optimizer, file)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_fills_while_the_optimizer_is_saved_is_one_line(toy, tmp_path):
    """torch.save() says it with an error of its own, which was a traceback; the checkpoint before must stay."""
    import resource
    policy = copy.deepcopy(toy[1])
    optimizer = adamw(policy, 1e-3)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()                           # now its two averages are twice as large as the model
    save_checkpoint(tmp_path, STEPS[:1], policy, optimizer, None, {})
    most = int(1.5 * (tmp_path / "checkpoint-1" / "model.safetensors").stat().st_size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        with pytest.raises((ValueError, OSError), match="checkpoint-2|too large") as error:
            save_checkpoint(tmp_path, STEPS, policy, optimizer, None, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and last_checkpoint(tmp_path, {})[0] == STEPS[:1]


def test_updates_without_a_finite_gradient_are_counted(monkeypatch):
    """A run that silently stands still looks like one that has converged."""
    groups = [[made_up(True, 0), made_up(False, 0)]]
    metrics, _ = played(monkeypatch, groups, norm=float("nan"))
    assert metrics["skipped"] == 1 and played(monkeypatch, groups)[0]["skipped"] == 0


def trained(monkeypatch, norms):
    """train() over steps whose updates had these gradient norms, on nothing: (steps done, steps that were kept).

    nan: skipped. None: an update without anything to learn.
    """
    def step(step, *rest):
        norm = norms[step - 1]
        return dict(step=step, accuracy=0.5, call_rate=0.5, rho=0.1, asked=None, length=9.0, reward=float("nan"),
                    grad_norm=math.nan if norm is None else norm, skipped=int(norm is not None and norm != norm)), []

    history, kept, log = [], [], io.StringIO()

    monkeypatch.setattr(grpo, "train_step", step)
    args = settings(steps=len(norms), questions_per_step=1, lr=1e-3, ramp=None, eval_every=0, updates=1,
                    save_every=1, seed=0)
    try:
        grpo.train(history, ["a", "b"], [], tiny("qwen3"), None, None, ByteTokenizer(), None,
                   [], lambda: kept.append(len(history)), log, args)
    except ValueError as error:
        assert "5 steps in a row" in str(error) and "\n" not in str(error)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in log.getvalue().splitlines()]     # no NaN in JSON
    assert lines == history
    return len(history), kept


def test_five_steps_in_a_row_without_a_finite_gradient_end_the_run(monkeypatch):
    """It went on for days with weights that no longer moved. Four in a row, and then a good one, are bad luck."""
    bad = math.nan
    assert trained(monkeypatch, [bad] * 4 + [1.0] + [bad] * 4) == (9, [1, 2, 3, 4, 5, 6, 7, 8])
    assert trained(monkeypatch, [1.0] + [bad] * 5 + [1.0]) == (6, [1, 2, 3, 4, 5])  # nothing is kept of the last one
    assert trained(monkeypatch, [bad, None, bad, bad, None, bad, bad, 1.0])[0] == 7      # nor is nothing to learn a cure


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the list of children from Linux's /proc")
def test_a_second_training_is_refused_and_a_process_that_dies_ends_the_others(warmed_up, monkeypatch):
    """The others would wait for it in the next sum over processes, for ever; and nobody would say why they end."""
    process = started(warmed_up, "--gpus", "2", "--steps", "10000")
    wait_for_lines(warmed_up, 3, process)
    with pytest.raises(ValueError, match="another process is training there"):     # steps of both would be mixed
        called(monkeypatch, warmed_up, "--steps", "10000", "--resume")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert "grpo.py: a process was killed by signal 9" in process.communicate(timeout=60)[1] and process.returncode == 1
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the list of children from Linux's /proc")
def test_processes_end_when_the_one_that_started_them_is_killed(warmed_up):
    """They trained on, and deleted the checkpoints under the run that had been resumed meanwhile."""
    process = started(warmed_up, "--gpus", "2", "--steps", "10000")
    wait_for_lines(warmed_up, 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    alive = lambda child: Path(f"/proc/{child}/exe").exists()          # a zombie has none
    for _ in range(600):
        if not any(map(alive, children)):
            break
        time.sleep(0.1)
    assert not any(map(alive, children))


def test_torchrun_on_two_nodes_trains_what_one_process_trains(warmed_up, tmp_path):
    """Ranks of our own beside torchrun's would wait for each other. (Both nodes are this machine, one process each.)"""
    alone, file = tmp_path / "alone", tmp_path / "questions.jsonl"
    shutil.copytree(warmed_up, alone)
    write_questions(file, [7] * 30)
    port = free_port()
    steps = *("--steps 4 --questions-per-step 8 --group 8 --max-new-tokens 40 --eval-every 2 --eval-questions 3 "
              "--questions").split(), file
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
                               "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "--",
                               Path(grpo.__file__), "--run", warmed_up, *FLAGS, *steps], env=ON_CPU,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (0, 1)]
    single = started(alone, *steps)
    said = [process.communicate(timeout=170)[0] for process in (*nodes, single)]
    assert [process.returncode for process in (*nodes, single)] == [0, 0, 0], said
    assert "CPU, 2 processes" in said[0] and "next:" not in said[1]          # only the first one speaks
    first, other = (load(run / "grpo").state_dict() for run in (warmed_up, alone))
    assert all(torch.allclose(first[name], other[name], rtol=0, atol=1e-5) for name in first)
    moved = load(warmed_up / "warmup").state_dict()
    assert any(not torch.allclose(first[name], moved[name], rtol=0, atol=1e-4) for name in first)
    assert lines_of(warmed_up) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def memory_of_updates(config, rollouts, length, device="cpu", train_dtype="float32", **options):
    """(bytes at the peak of two updates, bytes that memory_needed() says): policy, reference and learning.

    rollouts: how many, each of a prompt of 8 tokens and a response of `length`. Measured: what no file backs (Linux),
    or what PyTorch has allocated on a GPU.
    """
    def anonymous():
        if device != "cpu":
            return torch.cuda.max_memory_allocated()
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

    args = settings(batch=256, questions_per_step=1, group=rollouts, prompt_tokens=8, max_new_tokens=length,
                    train_dtype=train_dtype, **options)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()             # to what is allocated now
    before = anonymous()
    master, reference = (Transformer(config).initialize(0).to(device) for _ in range(2))
    reference.to(getattr(torch, train_dtype))
    optimizer, known = adamw(master, 1e-5), torch.ones(config.vocab_size, dtype=torch.bool, device=device)
    policy = working_copy(master, optimizer, train_dtype)
    policy.checkpointing = args.checkpointing
    written = [Rollout([1] * 8, list(range(length)), [False] * length, [-9.0] * length) for _ in range(rollouts)]
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(2):
        update(policy, reference, optimizer, written, torch.randn(rollouts), known, 1e-3, args)
    most = max(most, anonymous())
    done.set()
    thread.join()
    needed = memory_needed(config, config, args, llm_bytes=0)
    return most - before, needed["policy"] + needed["reference"] + needed["learning"]


def measure_a_learning_step(train_dtype):
    """Run in a fresh process: prints measured and expected bytes."""
    small_models()
    config = Config(vocab_size=9000, hidden=192, ffn=512, layers=5, heads=6, kv_heads=2, head_dim=32)
    print(*memory_of_updates(config, rollouts=8, length=180, train_dtype=train_dtype, micro_tokens=1500,
                             checkpointing=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_learning_step_takes_the_memory_that_the_function_says():
    """The optimizer's temporaries were whole models there."""
    config = Config(vocab_size=9000, hidden=192, ffn=512, layers=5, heads=6, kv_heads=2, head_dim=32)
    measured, said = memory_of_updates(config, 8, 180, "cuda", micro_tokens=1500, checkpointing=False)
    assert measured == pytest.approx(said, rel=0.25)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_learner_recomputes_what_the_sampler_stored(toy):
    """Attention, norms and products have other kernels there."""
    tokenizer, policy, _, llm = toy
    policy, llm = (copy.deepcopy(model).cuda() for model in (policy, llm))
    rollouts = some_rollouts((tokenizer, policy, None, llm))
    logprobs, _ = token_logprobs(policy, examples_of(rollouts), torch.tensor(tokenizer.known, device="cuda"))
    stored = [lp for r in rollouts for lp, by_llm in zip(r.logprobs, r.by_llm) if not by_llm]
    assert logprobs.tolist() == pytest.approx(stored, abs=1e-4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_a_learning_step_is_what_the_function_says(dtype):
    """A table of what fits which GPU is worth nothing when nobody has measured it."""
    code = f"import conftest, test_grpo; test_grpo.measure_a_learning_step({dtype!r})"
    out = subprocess.run([sys.executable, "-c", code], text=True, cwd=Path(__file__).parent, capture_output=True,
                         timeout=120)
    measured, said = map(int, out.stdout.split())
    assert measured == pytest.approx(said, rel=0.25), out.stderr
