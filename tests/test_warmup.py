"""Tests of warmup.py: commands in answers, batches, log-probabilities, an optimizer step, processes."""
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import relay
import warmup
from conftest import ByteTokenizer, some_questions
from model import Transformer, parse_config
from relay import COMMAND, Rollout, WrongArguments, without_commands
from warmup import (Example, adamw, apply_gradient, insert_commands, micro_batches, pack, place, start_processes,
                    supervised_step, token_logprobs, working_copy)

KNOWN = torch.tensor([True] * 20 + [False] + [True] * 9)       # 30 ids, one of which nobody has; the model has 37


def small(seed=0, tied=True):
    """A tiny random model in float64, large embeddings so that its probabilities are far from uniform."""
    raw = dict(model_type="qwen3", vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
               num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied)
    model = Transformer(parse_config(raw, "tiny")).double().initialize(seed)
    with torch.no_grad():
        model.embed.weight.mul_(10)
    return model


def ragged(lengths, seed=0):
    """Examples of these lengths, about half of their tokens to be learned, the first never."""
    rng = random.Random(seed)
    return [Example([rng.randrange(20) for _ in range(n)], [False] + [rng.random() < 0.5 for _ in range(n - 1)])
            for n in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# Commands in an answer

def placed(answer, tokenizer, rng, max_n):
    """[(position in the answer, n)] of the commands that insert_commands put into it, in order."""
    out, found, at, position = insert_commands(answer, tokenizer, rng, max_n), [], 0, 0
    while at < len(out):
        rest = b"".join(tokenizer.token_bytes[t] for t in out[at:at + 30])
        if match := COMMAND.match(rest):
            ids = tokenizer.encode(match[0].decode())
            assert out[at:at + len(ids)] == ids                # written as the tokenizer writes it
            found.append((position, int(match[1])))
            at += len(ids)
        else:
            assert out[at] == answer[position]                 # between commands: the answer, token by token
            at, position = at + 1, position + 1
    assert position == len(answer)
    return found


def own_answer(tokenizer):
    return tokenizer.encode(some_questions(n=1)[0].solution) + [tokenizer.end_id]


def test_an_answer_gets_zero_to_three_commands_equally_often(tokenizer):
    """Without the answers that hold none the model learns to call always."""
    rng, answer = random.Random(0), own_answer(tokenizer)
    counts = [len(placed(answer, tokenizer, rng, 9)) for _ in range(2000)]
    for k in range(4):
        assert counts.count(k) / 2000 == pytest.approx(0.25, abs=0.04)
    assert set(counts) == {0, 1, 2, 3}


def test_commands_stand_at_distinct_positions_from_the_start_up_to_the_end_of_text(tokenizer):
    """Two commands side by side, or one behind the end-of-text token, would be learnt and never come up."""
    rng, answer = random.Random(1), own_answer(tokenizer)
    positions = [[position for position, _ in placed(answer, tokenizer, rng, 9)] for _ in range(1500)]
    assert all(len(set(g)) == len(g) for g in positions)
    assert set(itertools.chain(*positions)) == set(range(len(answer)))      # 0: before all; the last: before the end


def test_a_command_asks_for_one_token_to_as_many_as_are_left(tokenizer):
    """n beyond the answer's end teaches lengths that nothing can fill; <call>0</call> asks for nothing."""
    rng, answer = random.Random(2), own_answer(tokenizer)
    asked = [(position, n) for _ in range(1500) for position, n in placed(answer, tokenizer, rng, 9)]
    assert all(1 <= n <= min(9, len(answer) - position) for position, n in asked)
    assert {n for _, n in asked} == set(range(1, 10))
    assert all(n == 1 for position, n in asked if position == len(answer) - 1)


def test_lengths_are_one_digit_times_a_power_of_ten_up_to_max_n(tokenizer):
    """d * 10^k spreads the lengths over their orders of magnitude: a uniform n would never show a short call."""
    rng, answer = random.Random(3), [tokenizer.encode(" a")[0]] * 9000
    asked = [n for _ in range(150) for at, n in ((m.start(), int(m[1])) for m in COMMAND.finditer(b"".join(
        tokenizer.token_bytes[t] for t in insert_commands(answer, tokenizer, rng, 9000))))]
    cut = [n for n in asked if len(str(n).rstrip("0")) > 1]   # by the end of the answer
    assert {len(str(n)) for n in asked} == {1, 2, 3, 4} and max(asked) <= 9000
    assert len(cut) < 0.25 * len(asked) and all(n >= 10 for n in cut)
    assert max(n for _ in range(150) for _, n in placed(answer[:90], tokenizer, rng, 50)) == 50


def test_an_answer_without_its_commands_is_the_answer(tokenizer):
    """The same cut that the LLM's context gets must give back the very tokens."""
    rng = random.Random(4)
    for question in some_questions(n=100):
        answer = tokenizer.encode(question.solution) + [tokenizer.end_id]
        assert without_commands(insert_commands(answer, tokenizer, rng, 9), tokenizer) == answer
    assert insert_commands([], tokenizer, rng, 9) == []


# ---------------------------------------------------------------------------------------------------------------------
# Batches, log-probabilities, one step

@pytest.mark.parametrize("most", [1, 20, 64, 10**6])
def test_micro_batches_hold_every_example_once_within_the_limit(most):
    """Padding counts: a limit on the sum of lengths lets one long example blow up the batch."""
    examples = ragged([random.Random(most).randint(1, 30) for _ in range(50)] + [30, 1])
    batches = micro_batches(examples, most)
    assert sorted(itertools.chain(*batches)) == list(range(52))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(examples[i].tokens) for i in batch) <= most
    assert micro_batches([], most) == []


def naive(model, examples, known, temperature):
    """The same log-probabilities the plain way: one example at a time, all logits, the whole vocabulary."""
    out = []
    for e in examples:
        logits = model(torch.tensor([e.tokens]))[0, :-1].clone()
        refused = torch.cat([~known, torch.ones(logits.shape[-1] - len(known), dtype=torch.bool)])
        logprobs = (logits.masked_fill(refused, -torch.inf) / temperature).log_softmax(-1)
        out += [logprobs[i - 1, t] for i, t in enumerate(e.tokens) if e.learn[i]]
    return torch.stack(out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_gradients_are_those_of_a_plain_softmax(chunk, temperature, tied, monkeypatch):
    """Off by one position, padding that leaks in, padded ids with probability, or a chunk whose gradient is lost."""
    monkeypatch.setattr(warmup, "HEAD", chunk * 37)
    monkeypatch.setattr(relay, "SLICE", 3 * 37)                    # of a chunk of 7: three rows, three rows, one
    model, examples = small(tied=tied), ragged([9, 2, 14, 5])
    weight = torch.linspace(-1, 2, sum(sum(e.learn) for e in examples), dtype=torch.float64)
    results = []
    for logprobs in (token_logprobs(model, examples, KNOWN, temperature)[0],
                     naive(model, examples, KNOWN, temperature)):
        model.zero_grad()
        (logprobs * weight).sum().backward()
        results.append([logprobs.detach()] + [p.grad.clone() for p in model.parameters()])
    assert len(results[0][0]) == len(weight) > chunk or chunk == 2048
    for ours, plain in zip(*results):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-10)


def test_a_prompt_that_examples_share_is_read_once_and_its_gradient_is_that_of_all():
    """Its keys serve every roll-out of the group: lose one roll-out's share of their gradient and the prompt is not
    learned from; take the prompt of the wrong group and nothing fails but the result."""
    model, (a, b) = small(), ([3, 1, 4, 1, 5], [3, 1, 4])          # one prompt begins with the other
    examples = [Example(p + r, [False] * len(p) + [True] * len(r), tuple(p))
                for p, r in ((a, [2, 7]), (b, [1, 8, 2, 8]), (a, [1]), (b, [9]), (a, [2, 7, 1]))]
    tokens, grid, at, targets = pack(examples, "cpu")
    assert len(tokens) == len(grid.put) == len(a) + len(b) + (1 + 3 + 0 + 0 + 2)
    assert len(at) == len(targets) == 2 + 4 + 1 + 1 + 3
    results = []
    for logprobs in (token_logprobs(model, examples, KNOWN)[0], naive(model, examples, KNOWN, 1.0)):
        model.zero_grad()
        (logprobs * torch.linspace(-1, 2, 11, dtype=torch.float64)).sum().backward()
        results.append([logprobs.detach()] + [p.grad.clone() for p in model.parameters()])
    for ours, plain in zip(*results):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-10)


def test_the_roll_outs_of_a_prompt_stay_together():
    """Sorted by length alone, every micro-batch would read every prompt."""
    examples = [Example([p] * 4 + [0] * n, [False] * 4 + [True] * n, (p,) * 4) for n in (3, 9, 5) for p in (1, 2, 3)]
    assert [sorted({examples[i].tokens[0] for i in batch}) for batch in micro_batches(examples, 39)] == [[1], [2], [3]]


def test_entropies_are_those_of_the_distribution_at_each_learned_token(monkeypatch):
    """0 * -inf of an id that nobody has is NaN; and the entropy must carry no gradient."""
    monkeypatch.setattr(warmup, "HEAD", 3 * 37)
    model, examples = small(), ragged([6, 10])
    _, entropies = token_logprobs(model, examples, KNOWN, entropies=True)
    expected = []
    for e in examples:
        probs = model(torch.tensor([e.tokens]))[0, :-1, :len(KNOWN)].masked_fill(~KNOWN, -torch.inf).softmax(-1)
        expected += [torch.special.entr(probs[i - 1]).sum() for i in range(1, len(e.tokens)) if e.learn[i]]
    assert torch.allclose(entropies, torch.stack(expected)) and not entropies.requires_grad


def test_the_supervised_step_does_not_depend_on_the_micro_batches():
    """A mean of means weighs the tokens of a short micro-batch more; and more padding must change nothing."""
    results = []
    for most in (1, 25, 10**6):
        model = small()
        loss = supervised_step(model, torch.optim.SGD(model.parameters(), lr=1.0), ragged([9, 2, 14, 5, 5, 12]), KNOWN,
                               1.0, most)
        results.append([torch.tensor([loss], dtype=torch.float64), *model.parameters()])
    for split in results[:2]:
        for a, b in zip(split, results[2]):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)
    start = small()
    expected = -naive(start, ragged([9, 2, 14, 5, 5, 12]), KNOWN, 1.0).mean().item()
    assert results[2][0][0].item() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_takes_no_step(bad):
    """One overflow would turn every weight, and AdamW's averages for good, into NaN."""
    model = small()
    optimizer = adamw(model, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.norm.weight.grad[0] = bad
    assert not torch.tensor(apply_gradient(optimizer, 1.0)).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


def test_adamws_first_step_is_the_rate_against_the_gradients_sign_beside_the_decay():
    """Fused, it has other code; and its rate is set anew at each step, which must be where that code looks."""
    model = torch.nn.Linear(10, 10, bias=False)
    before, optimizer = model.weight.detach().clone(), adamw(model, 1.0)
    gradient = torch.randn_like(before)
    model.weight.grad = gradient + gradient.sign()                 # none of it near 0, where the sign means little
    optimizer.param_groups[0]["lr"] = 0.1                          # as apply_gradient() does, before each step
    optimizer.step()
    expected = before * (1 - 0.1 * 0.01) - 0.1 * model.weight.grad.sign()
    assert optimizer.defaults["fused"]
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-5)


def test_a_step_has_the_gradient_clipped_and_returns_the_norm_before():
    """The logged norm must show what the clip hides."""
    model = small()
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = apply_gradient(torch.optim.SGD(model.parameters(), lr=9.0), lr=0.5)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert norm == pytest.approx(len(before) ** 0.5)
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)     # the rate given, times a gradient of norm 1


def test_gradients_of_a_sixteen_bit_copy_are_added_up_in_float32():
    """A sum in bfloat16 loses what is smaller than a 512th of it, however often that comes."""
    master, examples = small().float(), ragged([9, 2, 14, 5])
    copy = working_copy(master, adamw(master, 1.0), "bfloat16")
    for scale in [1.0] + [2**-9] * 64:                             # powers of two: exact in both dtypes
        (scale * token_logprobs(copy, examples, KNOWN)[0].sum()).backward()
        if scale == 1:
            first = [p.grad.clone() for p in master.parameters()]
    for p, gradient in zip(master.parameters(), first):
        assert gradient.any() and torch.equal(p.grad, (1 + 64 * 2**-9) * gradient)
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in copy.parameters())


def test_steps_too_small_for_sixteen_bits_are_not_lost():
    """At the paper's rate of 1e-6 a bfloat16 weight of 1 would never move: its neighbours are 0.004 away."""
    master = small().float()
    optimizer = adamw(master, 1.0)
    copy = working_copy(master, optimizer, "bfloat16")
    for step in range(64):
        for p in master.parameters():
            p.grad = torch.ones_like(p)
        apply_gradient(optimizer, 1e-4)
        assert all(torch.equal(p, m.bfloat16()) for p, m in zip(copy.parameters(), master.parameters()))
        assert step or (copy.norm.weight == 1).all() and (master.norm.weight < 1).all()
    assert (copy.norm.weight < 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# What the two supervised stages learn from

@pytest.fixture
def seen(monkeypatch):
    """All examples that a stage hands to supervised_step, which does nothing but note them and their rates."""
    seen = SimpleNamespace(examples=[], rates=[])

    def note(model, optimizer, examples, known, lr, most):
        seen.examples += examples
        seen.rates.append(lr)
        return 0.0

    monkeypatch.setattr(warmup, "supervised_step", note)
    monkeypatch.setattr(warmup, "save", lambda model, path: None)
    return seen


def test_pretraining_learns_the_answer_and_its_end_of_text_but_not_the_prompt(seen, toy_directory, tokenizer):
    """A model that never learnt its end of text writes until the budget is spent."""
    warmup.pretrain(0, [("slm", toy_directory, 3, 0)], batch=8)
    assert len(seen.examples) == 24
    for e in seen.examples:
        start = len(e.tokens) - e.tokens[::-1].index(tokenizer.encode("assistant")[0]) + 1   # behind "assistant\n"
        assert len(e.learn) == len(e.tokens) and not any(e.learn[:start])
        assert e.tokens[-1] == tokenizer.end_id and e.learn[-1]
        assert tokenizer.end_id not in e.tokens[start:-1]


def test_the_warm_up_learns_every_token_of_an_answer_and_none_of_its_prompt(seen, tokenizer):
    """The end-of-text token and the commands included; what goes in must be the roll-outs', each once an epoch."""
    rollouts = [Rollout(tokenizer.chat(q.text), tokenizer.encode(q.solution) + [tokenizer.end_id])
                for q in some_questions(n=10)]
    originals = sorted((r.prompt, r.tokens) for r in rollouts)
    args = SimpleNamespace(seed=1, lr=1.0, batch_size=4, epochs=2, max_n=9, micro_tokens=1500)
    warmup.warm_up(small(), None, tokenizer, rollouts, args)
    parts = []
    for e in seen.examples:
        prompt = e.learn.index(True)
        assert all(e.learn[prompt:]) and e.tokens[-1] == tokenizer.end_id and len(e.learn) == len(e.tokens)
        parts.append((e.tokens[:prompt], without_commands(e.tokens[prompt:], tokenizer)))
    assert sorted(parts[:10]) == originals and sorted(parts[10:]) == originals
    assert any(b"<call>" in b"".join(tokenizer.token_bytes[t] for t in e.tokens) for e in seen.examples)
    assert len(seen.rates) == 6 and seen.rates == sorted(seen.rates, reverse=True) and seen.rates[-1] > 0


def test_questions_that_leave_no_room_are_left_out_and_counted(capsys):
    """One prompt over a model's context ended a run of days, when its turn came, and again at every resume."""
    short, long = SimpleNamespace(text="abc"), SimpleNamespace(text="abcd")       # the byte tokenizer adds 5
    small, large = (SimpleNamespace(config=SimpleNamespace(context=n)) for n in (9, 99))
    for pair in ((small, large), (large, small)):
        assert warmup.short([short, long, short], ByteTokenizer(), *pair) == [short, short]
        assert "1 of 3" in capsys.readouterr().out
    assert warmup.short([short, long], ByteTokenizer(), large, large, most=8) == [short]


def test_models_inside_a_run_move_with_it():
    """A run that was copied to another machine asked for the first one's directories."""
    assert place(Path("runs/a/models/slm"), Path("runs/a")) == place(Path("runs/a/models/slm").resolve(), Path("runs/a"))
    assert Path(place(Path("runs/a/models/slm"), Path("runs/a"))) == Path("models/slm")
    assert Path(place(Path("slm"), Path("runs/a"))) == Path("slm").resolve()


@pytest.mark.parametrize("device, fault", [("auto", "this machine has 1"), ("cuda:0", "leave out --device")])
def test_more_gpus_than_there_are_is_one_line(monkeypatch, device, fault):
    """Found out by the second process only, it would be a traceback among others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(WrongArguments, match=fault):
        start_processes(SimpleNamespace(gpus=2, device=device))
