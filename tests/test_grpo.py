"""GRPO: the reward table, advantages, the loss, and what one update does."""
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from data import Tokenizer, save_toy_tokenizer, toy_questions
from grpo import advantages, examples_of, k3, last_checkpoint, policy_loss, rewards, save_checkpoint, simple_rewards, update
from model import Transformer, parse_config
from relay import command, entropy, log_softmax, relay
from warmup import adamw, token_logprobs


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(tokenizer, policy, reference, LLM): random models whose vocabulary is padded by 7 ids."""
    folder = tmp_path_factory.mktemp("toy")
    save_toy_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    raw = dict(model_type="qwen3", vocab_size=len(tokenizer.known) + 7, hidden_size=16, intermediate_size=32,
               num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    policy, reference, llm = (Transformer(parse_config(raw, "tiny")).initialize(seed) for seed in (1, 1, 2))
    return tokenizer, policy, reference, llm


def some_rollouts(toy, temperature=1.0):
    """Eight roll-outs with hand-offs: a router calls wherever the SLM is more unsure than at its first token."""
    tokenizer, policy, _, llm = toy
    questions = itertools.islice(toy_questions("train", random.Random(0)), 4)
    prompts = [tokenizer.chat(q.text) for q in questions for _ in range(2)]
    known = torch.tensor(tokenizer.known)
    with torch.no_grad():
        first = entropy(log_softmax(policy(torch.tensor([prompts[0]]))[:, -1], known, temperature)).item()
    out = relay(policy, llm, tokenizer, prompts, max_new_tokens=20, temperature=temperature, seed=3, router=(first, 1e9))
    assert any(any(r.by_llm) for r in out) and not all(all(r.by_llm) for r in out)
    return out


def settings(**changes):
    return SimpleNamespace(**dict(dict(micro_tokens=1000, temperature=1.0, clip_low=0.2, clip_high=0.3, kl=0.01,
                                       rate=1e-3), **changes))


def test_a_right_answer_without_a_call_makes_calls_dear():
    """Student-solvable: 1.5, 1 - rho, 0, 0."""
    got = rewards([True, True, False, False], [False, True, False, True], torch.tensor([0.0, 0.2, 0.0, 0.3]))
    assert got.tolist() == pytest.approx([1.5, 0.8, 0, 0])


def test_where_only_calls_are_right_a_wrong_answer_without_a_call_is_punished():
    """Teacher-dependent: 1 - rho for a right call, -1 for not asking, 0 for asking in vain."""
    got = rewards([True, False, False], [True, False, True], torch.tensor([0.1, 0.0, 0.4]))
    assert got.tolist() == pytest.approx([0.9, -1, 0])


def test_where_nothing_is_right_asking_is_rewarded_by_rho():
    """Teacher-unsolvable: the exploration reward."""
    assert rewards([False, False], [False, True], torch.tensor([0.0, 0.4])).tolist() == pytest.approx([0, 0.4])


def test_the_scenario_belongs_to_the_group_and_not_to_the_batch():
    """The public code computes it over the whole batch, where one lucky group turns all others student-solvable."""
    right = [[True, False], [True, False], [False, False]]
    called = [[False, True], [True, False], [False, True]]
    rho = torch.tensor([[0, 0.5], [0.5, 0], [0, 0.5]])
    assert rewards(right, called, rho).tolist() == [[1.5, 0], [0.5, -1], [0, 0.5]]


def test_the_simple_reward_is_accuracy_minus_rho():
    """The rival reward of the paper."""
    assert simple_rewards([True, False], torch.tensor([0.25, 0.5])).tolist() == [0.75, -0.5]


def test_advantages_are_centred_and_divided_by_the_unbiased_std():
    """(1, 0): mean 0.5, unbiased std 0.7071."""
    assert advantages(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.70711, -0.70711], abs=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.9])
def test_equal_rewards_give_advantages_of_exactly_zero(value):
    """The float32 std of equal numbers is not always 0, and dividing by it makes an advantage out of nothing."""
    assert advantages(torch.full((3, 16), value)).abs().max() == 0


def test_at_ratio_one_the_loss_is_the_plain_policy_gradient():
    """d loss / d logprob = -A, whatever the clip."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, clipped = policy_loss(logprobs, logprobs.detach(), torch.tensor([2.0, -3.0]))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-2.0, 3.0] and not clipped.any()


def test_the_clip_holds_a_ratio_back_only_where_it_would_gain():
    """A > 0: above 1.3 no gradient, below 0.8 the plain one. A < 0: below 0.8 none, and at most 3 |A| above."""
    ratio = torch.tensor([2.0, 0.5, 0.5, 2.0, 9.0])
    loss, clipped = policy_loss(ratio.log(), torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]))
    assert loss.tolist() == pytest.approx([-1.3, -0.5, 0.8, 2.0, 3.0])
    assert clipped.tolist() == [True, False, True, False, True]


def test_a_huge_log_ratio_stays_finite():
    """exp(200) is inf, and inf * 0 is NaN."""
    loss, _ = policy_loss(torch.tensor([200.0, -200.0]), torch.zeros(2), torch.tensor([-1.0, 1.0]))
    assert loss.isfinite().all() and k3(torch.tensor([-200.0]), torch.zeros(1)).isfinite().all()


def test_the_kl_estimate_is_zero_with_zero_slope_where_policy_and_reference_agree():
    """k3 must not pull a policy away from a reference that it equals."""
    logprobs = torch.tensor([-1.0, -4.0], requires_grad=True)
    k3(logprobs, logprobs.detach()).sum().backward()
    assert logprobs.grad.abs().max() == 0 and k3(torch.tensor([-1.0]), torch.tensor([-2.0])) > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_learner_agree_on_every_log_probability(toy, temperature):
    """Through hand-offs, ragged rows, a temperature and a padded vocabulary: else the ratio is not 1 at the start."""
    tokenizer, policy, _, _ = toy
    rollouts = some_rollouts(toy, temperature)
    with torch.no_grad():
        learner, _ = token_logprobs(policy, examples_of(rollouts), torch.tensor(tokenizer.known), temperature)
    sampler = [lp for r in rollouts for lp, by_llm in zip(r.logprobs, r.by_llm) if not by_llm]
    assert (learner - torch.tensor(sampler)).abs().max() < 1e-5


def test_the_learned_tokens_are_those_that_the_slm_sampled():
    """The mask comes from by_llm: the LLM may well write a token that the SLM writes too."""
    rollout = SimpleNamespace(prompt=[1, 2], tokens=[5, 5, 6], by_llm=[False, True, False])
    assert examples_of([rollout])[0].learn == [False, False, True, False, True]


def gradient(toy, **changes):
    """The policy's gradient of one update with made-up advantages, which apply_gradient would have used."""
    tokenizer, policy, reference, _ = toy
    rollouts = some_rollouts(toy)
    seen = {}
    optimizer = SimpleNamespace(param_groups=[{}], zero_grad=lambda set_to_none: policy.zero_grad(), step=lambda: seen.update(
        {name: p.grad.clone() for name, p in policy.named_parameters()}))
    update(policy, reference, optimizer, rollouts, torch.linspace(-1, 1, len(rollouts)),
           torch.tensor(tokenizer.known), settings(**changes))
    return seen


def test_the_gradient_does_not_depend_on_the_micro_batches(toy):
    """The denominator is the token count of the whole update, not the mean of means."""
    whole, split = gradient(toy), gradient(toy, micro_tokens=60)
    for name in whole:
        assert torch.allclose(whole[name], split[name], atol=1e-6), name
    assert any(g.abs().max() > 1e-4 for g in whole.values())


def test_an_update_without_slm_tokens_takes_no_step(toy):
    """0 / 0 is NaN, and AdamW moves weights even at a gradient of zero."""
    tokenizer, policy, reference, _ = toy
    rollouts = some_rollouts(toy)
    for r in rollouts:
        r.by_llm = [True] * len(r.tokens)
    before = policy.embed.weight.clone()
    sums = update(policy, reference, adamw(policy, 1.0), rollouts, torch.ones(len(rollouts)),
                  torch.tensor(tokenizer.known), settings())
    assert sums["tokens"] == 0 and torch.equal(before, policy.embed.weight)


def test_kl_and_drift_start_at_zero(toy):
    """Policy and reference are the same weights before the first update, in the same precision."""
    tokenizer, policy, reference, _ = toy
    rollouts = some_rollouts(toy)
    optimizer = SimpleNamespace(param_groups=[{}], zero_grad=lambda set_to_none: policy.zero_grad(), step=lambda: None)
    sums = update(policy, reference, optimizer, rollouts, torch.ones(len(rollouts)), torch.tensor(tokenizer.known),
                  settings())
    assert sums["kl"] == 0 and sums["drift"] < 1e-5


def test_a_checkpoint_with_other_settings_is_refused(toy, tmp_path):
    """A run that goes on with another learning rate is two half runs under one name."""
    from grpo import SETTINGS
    args = SimpleNamespace(**{key: 1 for key in SETTINGS})
    save_checkpoint(tmp_path, 4, toy[1], adamw(toy[1], 1e-3), None, args)
    assert last_checkpoint(tmp_path, args) == (4, tmp_path / "checkpoint-4")
    args.lr = 2
    with pytest.raises(ValueError, match="lr 1, not 2"):
        last_checkpoint(tmp_path, args)


def test_a_command_is_the_text_of_the_paper():
    """The released warm-up builder writes it without the number."""
    assert command(12) == "<call>12</call>"
