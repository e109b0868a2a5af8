"""Tests of relay.py: commands, the turns of the two models, and what a roll-out says about itself.

Scripted models write what they are told, so that a test can say what each model must have read. Tiny random models in
float64 are compared with an oracle that runs both of them over whole contexts for every single token.
"""
import itertools
import json
import random
import runpy
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as model_module
import relay as relay_module
from conftest import ByteTokenizer, Scripted, raw_config, shuffled, tiny
from data import Tokenizer
from model import Cache, RecordedStep, save
from relay import (COMMAND, Call, Rollout, Row, command, figures, log_softmax, means, plain_text, relay, sample,
                   without_commands)

PROMPT = b"Q: how much?\n"


def play(tokenizer, slm, llm, budget=60, prompts=1, **options):
    """One relay of scripted models (lists of pieces): (roll-out of row 0, the SLM, the LLM)."""
    writer = Scripted(tokenizer, tokenizer.ids(*slm))
    helper = None if llm is None else Scripted(tokenizer, tokenizer.ids(*llm))
    out = relay(writer, helper, tokenizer, [list(PROMPT)] * prompts, max_new_tokens=budget, **options)
    return out[0], writer, helper


def text_of(tokenizer, ids):
    return b"".join(tokenizer.token_bytes[i] for i in ids)


def told(tokenizer, model, row=0):
    """The text that a scripted model was given to read, after the prompt."""
    heard = text_of(tokenizer, model.heard[row])
    assert heard.startswith(PROMPT)
    return heard[len(PROMPT):]


# ---------------------------------------------------------------------------------------------------------------------
# Commands, however they are cut

def splits(text):
    """Every way to cut bytes into pieces."""
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces, piece = [], text[:1]
        for byte, cut in zip(text[1:], cuts):
            if cut:
                pieces.append(piece)
                piece = b""
            piece += bytes([byte])
        yield pieces + [piece]


def test_a_command_is_the_text_of_the_paper():
    """The released warm-up builder writes it without the number."""
    assert command(12) == "<call>12</call>"


def test_a_command_is_found_at_every_split_into_tokens():
    """A search in single tokens, or in decoded text up to a token's border, misses half of them."""
    row = Row([1], 1, 0)
    for pieces in splits(b"<call>7</call>"):
        row.tail = b"a <call>"
        assert [row.find_command(piece) for piece in pieces] == [None] * (len(pieces) - 1) + [7]
    for a in range(1, 14):
        for b in range(a + 1, 15):
            text = b"<call>12</call>"
            assert [row.find_command(p) for p in (b"so ", text[:a], text[a:b], text[b:] + b" x")][-1] == 12


def test_bytes_that_share_a_token_with_a_command_are_kept_and_others_stay_tokens():
    """Cutting whole tokens loses the neighbour's bytes; encoding all of it again changes tokens that were read."""
    text, command_at = b"a.<call>12</call> b", slice(2, 17)
    pieces = {text[i:j] for i in range(len(text)) for j in range(i + 2, len(text) + 1)}
    tokenizer = ByteTokenizer(*sorted(pieces))
    index = {piece: i for i, piece in enumerate(tokenizer.token_bytes)}
    for a in range(3):                       # a token border up to here before the command, one within, one behind
        for b in range(3, 17):
            for c in range(b + 1, len(text) + 1):
                parts = [p for p in (text[:a], text[a:b], text[b:c], text[c:]) if p]
                kept = without_commands([index[p] for p in parts], tokenizer)
                assert text_of(tokenizer, kept) == b"a. b"
                at = 0
                for part in parts:
                    if at + len(part) <= command_at.start or at >= command_at.stop:
                        assert index[part] in kept
                    at += len(part)


def test_several_commands_and_half_ones_leave_all_other_bytes():
    """Broken UTF-8 included: a piece of a character may share a token with the command."""
    tokenizer = ByteTokenizer(b"\xe2<call>", b"</call>\x82\xac", b"><")
    for text in (b"", b"<call>1</call>", b"a<call>1</call><call>22</call>b<call>", b"<call></call><call>x</call>",
                 b"<call>1234567890</call>", b"<call><call>3</call></call>", b"<call>1</call"):
        kept = without_commands(list(text), tokenizer)
        assert text_of(tokenizer, kept) == COMMAND.sub(b"", text)
    ids = tokenizer.ids(b"\xe2<call>", "5", b"</call>\x82\xac")
    assert text_of(tokenizer, without_commands(ids, tokenizer)) == "€".encode()


EXTRA = (b".<", b"call>", b">.", b" <call", b">2</", b"</call> x", b"a <call>2</call> b", b"<call>2</call>")
WAYS = [["a <call>2</call> b"], ["a ", "<call>2</call>", " b"], [b"a <call>2</call> b"], [b"a <call>2</call> b", "c"],
        [b"a", b" <call", b">2</", "call>", " b"], ["a ", "<call>", "2", b"</call> x", "y"],
        ["a", b".<", b"call>", "2</call", b">.", "b"], ["a ", b"<call>2</call>", b"<", "b"], [b"<call>2</call>"]]


@pytest.mark.parametrize("pieces", WAYS, ids=str)
def test_the_llm_reads_every_byte_but_the_command_and_the_slm_reads_every_token(pieces):
    """The hand-off itself, where < or > shares a token with a neighbour."""
    tokenizer = ByteTokenizer(*EXTRA)
    ids = tokenizer.ids(*pieces)
    at = next(i for i in range(len(ids) + 1) if COMMAND.search(text_of(tokenizer, ids[:i])))
    out, slm, llm = play(tokenizer, pieces, ["1", "4", "z"])
    assert out.tokens == ids[:at] + list(b"14") + ids[at:] + [tokenizer.end_id]
    assert out.by_llm == [False] * at + [True] * 2 + [False] * (len(ids) - at + 1)
    assert out.calls == [(at, 2, 2)] and out.end == "eos"
    assert told(tokenizer, llm) == COMMAND.sub(b"", text_of(tokenizer, ids[:at])) + b"1"
    assert slm.heard[0] == list(PROMPT) + out.tokens[:-1]
    assert plain_text(out, tokenizer) == (COMMAND.sub(b"", text_of(tokenizer, out.tokens[:-1]))).decode()


def test_the_second_call_brings_the_llm_only_what_is_new():
    """Its own tokens and the earlier text must not be fed twice; its last token must not be left out."""
    tokenizer = ByteTokenizer(*EXTRA)
    out, slm, llm = play(tokenizer, ["one<call>1</call>two", b".<", "call>3</call>three<call>1</call>"], "ABCDE")
    assert text_of(tokenizer, out.tokens[:-1]) == b"one<call>1</call>Atwo.<call>3</call>BCDthree<call>1</call>E"
    assert told(tokenizer, llm) == b"oneAtwo.BCDthree"
    assert [c.delivered for c in out.calls] == [1, 3, 1]
    assert out.cost == dict(slm_prefill=len(PROMPT) + 5, slm_decode=len(out.tokens) - 6,
                            llm_prefill=len(PROMPT) + 3 + 4 + 5, llm_decode=4)
    assert out.rho == 5 / len(out.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever a model writes has one outcome

def test_a_call_for_nothing_is_noted_and_the_slm_goes_on():
    """n = 0 must neither hang nor wake the LLM; a later call does not show it the command."""
    tokenizer = ByteTokenizer()
    out, _, llm = play(tokenizer, ["a<call>0</call>b<call>00</call>c"], "XYZ")
    assert text_of(tokenizer, out.tokens[:-1]) == b"a<call>0</call>b<call>00</call>c" and not any(out.by_llm)
    assert [c[1:] for c in out.calls] == [(0, 0), (0, 0)] and llm.heard == {}
    assert out.cost["llm_prefill"] == out.cost["llm_decode"] == 0
    out, _, llm = play(tokenizer, ["a<call>0</call>b<call>1</call>c"], "XYZ")
    assert told(tokenizer, llm) == b"ab" and out.calls == [(15, 0, 0), (30, 1, 1)]


def test_a_call_beyond_the_budget_is_cut_to_it():
    """n = 999999999 must not allocate, and the budget holds for both models together."""
    tokenizer = ByteTokenizer()
    for n in (999, 999_999_999):
        out, _, llm = play(tokenizer, ["ab", command(n)], "X" * 99, budget=40)
        head = 2 + len(command(n))
        assert len(out.tokens) == len(out.logprobs) == 40 and out.end == "length"
        assert out.calls == [(head, n, 40 - head)] and out.by_llm == [False] * head + [True] * (40 - head)
        assert llm.asked[0] == 40 - head


@pytest.mark.parametrize("text", [
    "<call>3<call>", "<call></call>", "<call>x</call>", "<call> 3</call>", "<call>-3</call>", "<call>1234567890</call>",
    "<call>3</call", "<CALL>3</CALL>", "<call>3.0</call>", "call>3</call>", "<call>\u0663</call>"])
def test_what_is_no_command_stays_text(text):
    """No closing tag, no digits, ten digits, other digits than ASCII's: nobody is called and nothing is cut."""
    tokenizer = ByteTokenizer()
    out, _, llm = play(tokenizer, [text, "!"], "XYZ")
    assert text_of(tokenizer, out.tokens[:-1]) == text.encode() + b"!"
    assert out.calls == [] and llm.heard == {} and plain_text(out, tokenizer) == text + "!"


def test_leading_zeros_and_nine_digits_are_a_number():
    """A search for a first digit of 1 to 9 would leave it as text."""
    out, _, _ = play(ByteTokenizer(), ["<call>000000002</call>"], "XYZ")
    assert out.calls == [(22, 2, 2)]


def test_a_command_within_the_llms_text_calls_nobody():
    """The LLM would call itself; and its half a command must not be completed by the SLM's next bytes."""
    tokenizer = ByteTokenizer()
    out, _, llm = play(tokenizer, ["a<call>14</call>b<call>1</call>"], ["<call>5</call>Z", "q"])
    assert text_of(tokenizer, out.tokens[:-1]) == b"a<call>14</call><call>5</call>b<call>1</call>Z"
    assert len(out.calls) == 2 and told(tokenizer, llm) == b"a<call>5</call>b"
    out, _, llm = play(tokenizer, ["a<call>6</call>5</call>b"], ["<call>Z"])
    assert len(out.calls) == 1 and text_of(tokenizer, out.tokens[:-1]) == b"a<call>6</call><call>5</call>b"
    out, _, llm = play(tokenizer, ["<ca<call>1</call>ll>5</call>b<call>1</call>"], ["xyz"])
    assert len(out.calls) == 2 and told(tokenizer, llm) == b"<caxll>5</call>b"


def test_a_token_may_end_one_command_and_begin_the_next():
    """The rest of that token counts while the SLM goes on (n = 0), and no longer once the LLM's text stands between."""
    tokenizer = ByteTokenizer(b"</call><ca", b"</call><call>2</call>")
    out, _, llm = play(tokenizer, ["<call>0", b"</call><ca", "ll>2</call>b"], ["XYZ"])
    assert [c[1:] for c in out.calls] == [(0, 0), (2, 2)] and told(tokenizer, llm) == b"X"
    out, _, llm = play(tokenizer, ["<call>1", b"</call><ca", "ll>2</call>b<call>1</call>"], ["XYZ"])
    assert [c[1:] for c in out.calls] == [(1, 1), (1, 1)] and told(tokenizer, llm) == b"<caXll>2</call>b"
    out, _, llm = play(tokenizer, ["a<call>1", b"</call><call>2</call>", "b"], ["XYZ"])
    assert [c[1:] for c in out.calls] == [(2, 2)] and told(tokenizer, llm) == b"aX"      # the last one is obeyed


def test_an_end_of_text_by_the_llm_ends_the_response():
    """It used to be swallowed, and the SLM went on after the end."""
    tokenizer = ByteTokenizer()
    out, slm, _ = play(tokenizer, ["a<call>9</call>b"], ["XY", None, "Z"])
    assert out.end == "eos_by_llm" and out.tokens[-3:] == list(b"XY") + [tokenizer.end_id]
    assert out.by_llm[-3:] == [True] * 3 and out.calls == [(15, 9, 3)]
    assert plain_text(out, tokenizer) == "aXY"


def test_every_end_token_ends_and_the_text_of_one_does_not():
    """Llama 3 has several; and "<|end|>" spelled in bytes is text."""
    tokenizer = ByteTokenizer(b"<|stop|>")
    tokenizer.end_ids = {256, 257}
    out, _, _ = play(tokenizer, ["<|end|>", b"a"], None)
    assert out.tokens == [256] and out.end == "eos"
    out, _, _ = play(tokenizer, ["a", b"<|stop|>", "b"], None)
    assert out.tokens == [97, 257]
    out, _, _ = play(tokenizer, ["<|", "end|>"], None)
    assert text_of(tokenizer, out.tokens[:-1]) == b"<|end|>" and len(out.tokens) == 8


@pytest.mark.parametrize("budget", range(1, 20))
def test_the_budget_may_be_spent_anywhere(budget):
    """Before, within, by and after the command: never a token too many, never a call without room for it."""
    tokenizer = ByteTokenizer()
    out, slm, llm = play(tokenizer, ["a<call>2</call>b"], "XYZ", budget=budget)
    whole = list(b"a<call>2</call>XYb") + [tokenizer.end_id]
    assert out.tokens == whole[:budget] and len(out.by_llm) == len(out.logprobs) == len(out.tokens)
    assert out.end == ("eos" if budget == 19 else "length")
    assert [c.delivered for c in out.calls] == ([] if budget <= 15 else [min(2, budget - 15)])
    if budget <= 15:
        assert llm.heard == {}


def test_the_context_of_either_model_cuts_the_budget():
    """A position beyond the context was read in silence."""
    tokenizer = ByteTokenizer()
    for contexts in ((40, 4096), (4096, 40)):
        slm, llm = (Scripted(tokenizer, list(b"x" * 99), context=c) for c in contexts)
        out, = relay(slm, llm, tokenizer, [list(PROMPT)], max_new_tokens=60)
        assert len(PROMPT) + len(out.tokens) == 40 and out.end == "length"
    for prompt in ([], [1] * 40):
        with pytest.raises(ValueError, match="prompt 0 has"):
            relay(slm, llm, tokenizer, [prompt], max_new_tokens=5)
    assert relay(slm, llm, tokenizer, [], max_new_tokens=5) == []


def test_without_an_llm_commands_stay_as_text():
    """llm=None: the SLM alone, the tags as they are."""
    out, slm, _ = play(ByteTokenizer(), ["a<call>2</call>b"], None)
    assert out.tokens == list(b"a<call>2</call>b") + [256] and out.calls == [] and out.rho == 0
    assert out.cost == dict(slm_prefill=len(PROMPT), slm_decode=16, llm_prefill=0, llm_decode=0)


def test_a_fixed_length_replaces_what_was_asked():
    """The paper's fixed-length rows: N tokens, also where n = 0 was asked; `asked` keeps n."""
    out, _, _ = play(ByteTokenizer(), ["a<call>9</call>b<call>0</call>c"], "UVWXYZ", fixed=3)
    assert [c[1:] for c in out.calls] == [(9, 3), (0, 3)] and sum(out.by_llm) == 6
    assert b"".join(bytes([t]) for t in out.tokens[:-1]) == b"a<call>9</call>UVWb<call>0</call>XYZc"


def test_without_calls_the_opening_is_never_written():
    """Teacher-free evaluation: the ban must hold however the opening is cut, and forbid nothing else."""
    tokenizer = ByteTokenizer(b"<call", b"<call>1</call>", b"x<ca", b"ll>", b"a<cal", b"l>", b"<c", only=b"<cal>x")
    slm = tiny("qwen3", vocab_size=len(tokenizer.known), tie_word_embeddings=False)
    prompts = [list(b"<cal"), list(b"xx"), list(b"<ca")] * 8
    out = relay(slm, None, tokenizer, prompts, max_new_tokens=60, temperature=1.5, no_calls=True)
    texts = [text_of(tokenizer, o.tokens) for o in out]
    assert not any(b"<call" in t for t in texts)
    assert any(b"<cal" in t for t in texts) and any(b"ll>" in t for t in texts)      # what is near it is allowed
    free = relay(slm, None, tokenizer, prompts, max_new_tokens=60, temperature=1.5)
    assert any(b"<call" in text_of(tokenizer, o.tokens) for o in free)


def test_a_router_discards_the_slms_token_and_commands_are_text():
    """router=(high, low): an unsure SLM hands over at once, a sure LLM hands back after one token."""
    tokenizer = ByteTokenizer()
    out, slm, llm = play(tokenizer, ["a<call>2</call>b"], "XYZ", router=(1.0, 0.5))
    assert out.tokens == list(b"a<call>2</call>b") + [256] and out.calls == [] and llm.heard == {}
    out, slm, llm = play(tokenizer, ["abcdefghi"], "XYZ", router=(-1.0, 0.5))
    assert text_of(tokenizer, out.tokens[:-1]) == b"XYZ" and all(out.by_llm) and out.end == "eos_by_llm"
    assert [c.delivered for c in out.calls] == [1] * 4 and slm.asked[0] == 4
    out, slm, llm = play(tokenizer, ["abcdefghi"], "XYZXYZ", router=(-1.0, -0.5), budget=5)
    assert text_of(tokenizer, out.tokens) == b"XYZXY" and len(out.calls) == 1 and slm.asked[0] == 1


def test_the_bar_does_not_wait_for_what_an_answer_leaves_of_its_budget(monkeypatch):
    """It stood at a tenth when all was written, and its estimate was ten times too long."""
    tokenizer, bars, real = ByteTokenizer(), [], relay_module.progress_bar
    monkeypatch.setattr(relay_module, "progress_bar", lambda **options: bars.append(real(**options)) or bars[-1])
    slm, llm = Scripted(tokenizer, list(b"a<call>2</call>b"), list(b"cd")), Scripted(tokenizer, list(b"XY"))
    out = relay(slm, llm, tokenizer, [list(PROMPT)] * 4, max_new_tokens=200, batch=2, label="answers")
    assert bars[0].n == bars[0].total == sum(len(o.tokens) for o in out) == 2 * (19 + 3)
    relay(slm, llm, tokenizer, [list(PROMPT)], max_new_tokens=20)
    assert bars[1].n == 0                                                    # no label, no bar


def test_what_is_written_is_told_in_order():
    """A token told twice, or under another row, would be seen on the screen only, not in the roll-out."""
    tokenizer, seen, done = ByteTokenizer(), {}, []
    slm = Scripted(tokenizer, list(b"a<call>2</call>b"), list(b"cd"))
    llm = Scripted(tokenizer, list(b"XYZ"))
    out = relay(slm, llm, tokenizer, [list(PROMPT), [65, 66]] * 2, max_new_tokens=30, batch=2,
                on_end=lambda row, rollout: done.append((row, rollout)),
                on_token=lambda row, token, by_llm: seen.setdefault(row, []).append((token, by_llm)))
    assert sorted(done) == list(enumerate(out))
    assert [seen[i] for i in range(4)] == [list(zip(o.tokens, o.by_llm)) for o in out]
    assert [o.prompt for o in out] == [list(PROMPT), [65, 66]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Cost

def test_equal_prompts_are_read_once():
    """The G roll-outs of a question: one reads the prompt, the others only its last token; the LLM likewise."""
    tokenizer = ByteTokenizer()
    slm = Scripted(tokenizer, list(b"a<call>1</call>b"))
    llm = Scripted(tokenizer, list(b"X"))
    prompts = [list(PROMPT)] * 5 + [list(PROMPT) + [1]]
    out = relay(slm, llm, tokenizer, prompts, max_new_tokens=30)
    P = len(PROMPT)
    prefill = sorted(o.cost["slm_prefill"] - 1 for o in out)                        # less the LLM's one token
    assert prefill == [1] * 4 + [P, P + 1]
    assert sorted(o.cost["llm_prefill"] - 1 for o in out) == [1] * 4 + [P, P + 1]   # less the "a"
    assert len({tuple(o.tokens) for o in out}) == 1


def test_a_row_that_never_calls_costs_the_llm_nothing():
    """The LLM's prefill of all prompts at the start is the dearest bug of all."""
    tokenizer = ByteTokenizer()
    slm = Scripted(tokenizer, list(b"ab"), list(b"a<call>1</call>"), list(b"abc"))
    llm = Scripted(tokenizer, list(b"XYZ"))
    out = relay(slm, llm, tokenizer, [list(PROMPT), [7, 8, 9], [7, 8]], max_new_tokens=30)
    assert list(llm.heard) == [1] and [o.cost["llm_prefill"] for o in out] == [0, 4, 0]
    assert sum(o.cost["llm_decode"] for o in out) == 0                              # its one token is never read


def test_equal_prompts_of_one_token_are_read_like_any_other():
    """Without the last token, which each row reads itself, nothing is left to share: an empty pass would crash."""
    out, _, _ = play(ByteTokenizer(), ["ab"], None)
    slm = Scripted(ByteTokenizer(), list(b"ab"))
    outs = relay(slm, None, ByteTokenizer(), [[65], [65]], max_new_tokens=9)
    assert [o.tokens for o in outs] == [out.tokens] * 2


def test_all_waiting_rows_are_served_as_one_batch():
    """LLM steps are the dear ones: few and full."""
    tokenizer, sizes = ByteTokenizer(), []
    slm = Scripted(tokenizer, *[list(b"a" * i + b"<call>3</call>b") for i in range(5)])
    llm = Scripted(tokenizer, list(b"XYZ"))
    llm.register_forward_hook(lambda model, args, out: sizes.append(len(args[0])))
    relay(slm, llm, tokenizer, [list(PROMPT) + [i] for i in range(5)], max_new_tokens=30)
    assert sizes == [5, 5, 5]


def test_where_more_rows_are_to_come_the_llm_serves_when_most_wait():
    """Rows that wait keep places: in the end one row alone would be decoded, and the others wait for its call."""
    tokenizer, sizes = ByteTokenizer(), []
    slm = Scripted(tokenizer, *[list(b"a<call>1</call>b") if i % 2 else list(b"a" * 20) for i in range(40)])
    llm = Scripted(tokenizer, list(b"X"))
    slm.register_forward_hook(lambda model, args, out: sizes.append(len(args[0])))
    outs = relay(slm, llm, tokenizer, [list(PROMPT) + [i] for i in range(40)], max_new_tokens=60, batch=8)
    assert [len(o.calls) for o in outs] == [0, 1] * 20
    assert min(sizes[:-40]) >= 4 and max(sizes) == 8


def test_where_a_row_has_ended_another_takes_its_place():
    """Batch after batch, the short answers of a batch wait for its longest one: 51 steps instead of 36."""
    tokenizer, sizes = ByteTokenizer(), []
    slm = Scripted(tokenizer, list(b"a" * 30), *[list(b"abcd")] * 8)                # and each an end of text
    slm.register_forward_hook(lambda model, args, out: sizes.append(len(args[0])))
    outs = relay(slm, None, tokenizer, [list(PROMPT) + [i] for i in range(9)], max_new_tokens=60, batch=2)
    assert sizes == [2] * 35 + [1]
    assert [len(o.tokens) for o in outs] == [31] + [5] * 8


# ---------------------------------------------------------------------------------------------------------------------
# Models that babble

FRAGMENTS = (b"<call>", b"</call>", b"<call>2</call>", b"<ca", b"ll>", b"</", b"1</call>", b"<call>3", b"call>", b"00",
             b"999999999", b"7</call><call>1", b"x<call>1</call>y", b"\xe2<call>4</call>\x82", b"</call><call>")


class Babbling(Scripted):
    """Writes random bytes, half of the time a fragment of a command instead, and seldom the end."""

    def __init__(self, tokenizer, seed):
        super().__init__(tokenizer, [])
        self.random = torch.Generator().manual_seed(seed)

    def forward(self, tokens, cache=None, counts=None, last=False):
        logits = super().forward(tokens, cache, counts, last)
        size = (len(logits), 1)
        ids = torch.where(torch.rand(size, generator=self.random) < 0.5,
                          torch.randint(self.end + 1, logits.shape[1], size, generator=self.random),
                          torch.randint(self.end + 1, size, generator=self.random))
        return torch.zeros_like(logits).scatter(1, ids, 100.0)


def test_each_model_reads_all_that_it_should_and_nothing_else():
    """A token of the LLM reaches the SLM as that token; every byte outside commands reaches the LLM, and no other."""
    tokenizer = ByteTokenizer(*FRAGMENTS)
    slm, llm = Babbling(tokenizer, 1), Babbling(tokenizer, 2)
    prompts = [list(PROMPT) + [65 + i // 26, 65 + i % 26] for i in range(200)]
    outs = relay(slm, llm, tokenizer, prompts, max_new_tokens=50, temperature=1.0)
    assert sum(any(o.by_llm) for o in outs) > 100
    for row, (prompt, out) in enumerate(zip(prompts, outs)):
        drawn = max(i for i, by_llm in enumerate(out.by_llm) if not by_llm)      # its last token it need not read
        assert slm.heard[row] == prompt + out.tokens[:drawn]
        if not any(out.by_llm):
            assert row not in llm.heard
            continue
        last = max(i for i, by_llm in enumerate(out.by_llm) if by_llm)
        want = bytes(prompt)
        for by_llm, part in itertools.groupby(range(last), key=lambda i: out.by_llm[i]):
            text = text_of(tokenizer, [out.tokens[i] for i in part])
            want += text if by_llm else COMMAND.sub(b"", text)
        assert text_of(tokenizer, llm.heard[row]) == want


def resident():
    """Bytes of memory that this process holds; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


@pytest.mark.slow
def test_ten_thousand_roll_outs_of_babble_stay_within_budget_and_memory():
    """Whatever models write has an outcome, and nothing of a finished batch stays behind."""
    tokenizer, ends, calls, held = ByteTokenizer(*FRAGMENTS), Counter(), 0, []
    slm, llm = Babbling(tokenizer, 1), Babbling(tokenizer, 2)
    for batch in range(40):
        prompts = [list(b"?" * (1 + i % 40)) for i in range(250)]
        budget = 1 + 2 * batch
        for out in relay(slm, llm, tokenizer, prompts, max_new_tokens=budget, temperature=1.0, seed=batch):
            assert 0 < len(out.tokens) <= budget and len(out.tokens) == len(out.by_llm) == len(out.logprobs)
            assert (out.end == "length") == (len(out.tokens) == budget and out.tokens[-1] != tokenizer.end_id)
            assert sum(out.by_llm) == sum(c.delivered for c in out.calls)
            assert all(0 <= c.delivered <= c.asked and c.position < budget for c in out.calls)
            assert sum(out.cost.values()) <= 2 * len(out.prompt) + len(out.tokens) + len(text_of(tokenizer, out.tokens))
            assert isinstance(plain_text(out, tokenizer), str)
            ends[out.end] += 1
            calls += len(out.calls)
        slm.heard.clear(), llm.heard.clear()
        held.append(resident())
    assert sum(ends.values()) == 10_000 and calls > 10_000 and min(ends.values()) > 100 and len(ends) == 3
    assert max(held[20:]) - held[19] < 2**25          # later batches are longer, but what they need is given back


# ---------------------------------------------------------------------------------------------------------------------
# The oracle

LETTERS = b"ab<>/l3"
PIECES = (b"<call>2</call>", b"a<call>1</call>b", b"<call>0</call>", b"<call>", b"3</call>", b"x<ca", b"ll>4</call>.",
          b"<call>77</call>", b"ab", b">a")
TOKENIZER = ByteTokenizer(*PIECES, only=LETTERS, unknown=3)
WIDTHS = dict(slm=len(TOKENIZER.known), llm=len(TOKENIZER.known) + 5)     # a pair whose vocabularies are padded apart


def pair(slm="qwen3", llm="llama"):
    """A random SLM and LLM that write commands often and end seldom."""
    return [tiny(slm, 1, vocab_size=WIDTHS["slm"], tie_word_embeddings=False).requires_grad_(False),
            tiny(llm, 2, vocab_size=WIDTHS["llm"], tie_word_embeddings=False).requires_grad_(False)]


def questions(n=8):
    rng = np.random.default_rng(0)
    return [rng.choice(list(LETTERS), size=size).tolist() for size in rng.integers(2, 30, size=n)]


def oracle(slm, llm, tokenizer, prompt, budget, seed, temperature, llm_temperature, fixed=None):
    """The relay as its definition says, without any cache: (tokens, by_llm, logprobs, calls, end)."""
    known, uniforms = torch.tensor(tokenizer.known), np.random.default_rng(seed).random(budget)
    tokens, by_llm, logprobs, calls, owed = [], [], [], [], 0
    stretch, helped = [], list(prompt)                                   # the SLM's tokens since; what the LLM has seen

    def next_token(model, context, temperature):
        logits = model(torch.tensor([context]))[0, -1, :len(known)].masked_fill(~known, -torch.inf)
        p = torch.log_softmax(logits / (temperature or 1), -1)
        if temperature == 0:
            return int(logits.argmax()), p
        below = p.exp().cumsum(-1)
        return int((below <= uniforms[len(tokens)] * below[-1]).sum()), p

    while len(tokens) < budget:
        if owed:
            token, _ = next_token(llm, helped, llm_temperature)
            helped.append(token)
            owed -= 1
            calls[-1][2] += 1
        else:
            token, p = next_token(slm, list(prompt) + tokens, temperature)
        tokens.append(token)
        by_llm.append(bool(calls) and calls[-1][2] > 0 and len(tokens) <= calls[-1][0] + calls[-1][2])
        logprobs.append(0.0 if by_llm[-1] else float(p[token]))
        if token in tokenizer.end_ids:
            return tokens, by_llm, logprobs, calls, "eos_by_llm" if by_llm[-1] else "eos"
        if by_llm[-1]:
            stretch = []
            continue
        stretch.append(token)
        text = text_of(tokenizer, stretch)
        found = list(COMMAND.finditer(text))
        if found and found[-1].end() > len(text) - len(tokenizer.token_bytes[token]) and len(tokens) < budget:
            asked = int(found[-1][1])
            owed = min(asked if fixed is None else fixed, budget - len(tokens))
            calls.append([len(tokens), asked, 0])
            if owed:
                helped += cut_out(stretch, [m.span() for m in found], tokenizer)
    return tokens, by_llm, logprobs, calls, "length"


def cut_out(tokens, spans, tokenizer):
    """Byte by byte: a byte within a command goes; a token with a byte gone is spelled by those that are left."""
    gone, at, out = {i for a, b in spans for i in range(a, b)}, 0, []
    for token in tokens:
        piece = tokenizer.token_bytes[token]
        here = range(at, at + len(piece))
        out += [token] if gone.isdisjoint(here) else [piece[i - at] for i in here if i not in gone]
        at += len(piece)
    return out


def facts(out):
    return out.tokens, out.by_llm, [list(c) for c in out.calls], out.end


def same(a, b):
    assert facts(a) == facts(b)
    assert np.allclose(a.logprobs, b.logprobs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fixed", [None, 2])
@pytest.mark.parametrize("temperature, llm_temperature", [(0, 0), (1.0, 0.7), (0.6, 0), (0, 1.3)])
def test_a_roll_out_is_what_the_definition_says(temperature, llm_temperature, fixed):
    """Whole contexts for every single token, no cache: every hand-off bug shows here as a different token."""
    slm, llm = pair()
    prompts, seeds = questions(), list(range(100, 108))
    outs = relay(slm, llm, TOKENIZER, prompts, max_new_tokens=30, temperature=temperature, seed=seeds,
                 llm_temperature=llm_temperature, fixed=fixed)
    for out, prompt, seed in zip(outs, prompts, seeds):
        tokens, by_llm, logprobs, calls, end = oracle(slm, llm, TOKENIZER, prompt, 30, seed, temperature,
                                                      llm_temperature, fixed)
        assert facts(out) == (tokens, by_llm, calls, end)
        assert np.allclose(out.logprobs, logprobs, atol=1e-10, rtol=0)
    if temperature == 1.0:                                        # the test itself: it must see what it is about
        assert sum(len(o.calls) for o in outs) > 8 and len({o.end for o in outs}) >= 2
        assert any(c.delivered < c.asked for o in outs for c in o.calls)


@pytest.mark.parametrize("families", [("qwen3", "llama"), ("qwen2", "qwen3"), ("llama", "qwen2")])
def test_a_roll_out_is_the_same_alone_and_in_any_batch_and_order(families):
    """Randomness, masks, positions and budgets that leak from one row to another."""
    slm, llm = pair(*families)
    prompts = questions(9) + questions(3)                         # three prompts stand there twice
    seeds = [(5, i) for i in range(12)]
    options = dict(max_new_tokens=40, temperature=1.0)
    alone = [relay(slm, llm, TOKENIZER, [p], seed=[s], **options)[0] for p, s in zip(prompts, seeds)]
    assert sum(len(o.calls) for o in alone) > 10 and len({tuple(o.tokens) for o in alone}) == 12
    for out, other in zip(alone, relay(slm, llm, TOKENIZER, prompts, seed=5, **options)):
        same(out, other)
    for batch in (1, 5, 12):
        order = shuffled(range(12), batch)
        outs = relay(slm, llm, TOKENIZER, [prompts[i] for i in order], seed=[seeds[i] for i in order], batch=batch,
                     **options)
        for i, out in zip(order, outs):
            same(alone[i], out)


@pytest.mark.parametrize("options", [{}, dict(no_calls=True), dict(router=(2.5, 2.5)), dict(top_p=0.9)], ids=str)
def test_sampling_for_a_few_rows_at_a_time_changes_nothing(options, monkeypatch):
    """Each row's id, log-probability, entropy and command's opening have to stay with their row."""
    slm, llm = pair()
    options = dict(max_new_tokens=30, temperature=1.0, seed=3) | options
    want = relay(slm, llm, TOKENIZER, questions(7), **options)
    assert options.get("no_calls") or any(o.calls for o in want)
    monkeypatch.setattr(relay_module, "SLICE", 3 * len(TOKENIZER.known))          # three rows, three rows, one
    for one, other in zip(want, relay(slm, llm, TOKENIZER, questions(7), **options)):
        same(one, other)


def test_chunks_of_a_long_prompt_change_nothing(monkeypatch):
    """A prompt longer than one chunk is read in several; so is a long catch-up after the other model's turn."""
    slm, llm = pair()
    prompts = questions(6) + questions(2)
    options = dict(max_new_tokens=40, temperature=1.0, seed=3)
    want = relay(slm, llm, TOKENIZER, prompts, **options)
    for chunk, most in ((1, 8192), (2, 8192), (7, 8192), (256, 1), (256, 20)):
        monkeypatch.setattr(relay_module, "CHUNK", chunk)
        monkeypatch.setattr(relay_module, "PASS", most)
        for a, b in zip(want, relay(slm, llm, TOKENIZER, prompts, **options)):
            same(a, b)
            assert a.cost == b.cost


def test_the_block_in_which_a_cache_grows_changes_nothing(monkeypatch):
    """Old tokens lost when the tensors are made anew, or addresses computed from the former capacity."""
    slm, llm = pair()
    prompts, options = questions(6) + questions(2), dict(max_new_tokens=40, temperature=1.0, seed=3)
    want = relay(slm, llm, TOKENIZER, prompts, **options)
    assert sum(len(o.calls) for o in want) > 5
    for block in (1, 3, 16, 500):
        monkeypatch.setattr(relay_module, "Cache", partial(Cache, block=block))
        for a, b in zip(want, relay(slm, llm, TOKENIZER, prompts, **options)):
            same(a, b)
            assert a.cost == b.cost


def nudge(model, script):
    """Make a model write script[n] after a context of n tokens, where the script has such an n."""
    plain = model.forward

    def forward(tokens, cache=None, counts=None, last=False):
        logits = plain(tokens, cache, counts, last)
        lengths = range(1, tokens.shape[1] + 1) if cache is None else cache.lengths[:len(tokens)]
        after = logits[0] if cache is None else logits             # one context that grows, or one for each row
        for at, n in enumerate(lengths):
            if n in script:
                after[at, script[n]] += 1e3
        return logits
    model.forward = forward
    return model.requires_grad_(False)


def random_case(rng):
    """(SLM, LLM, tokenizer, prompts): commands of any number, cut into tokens at random, forced into the SLM's text
    and now and then into the LLM's, which may end the text, too."""
    asked = rng.choice((0, 1, 1, 2, 3, 40))
    text = rng.choice(("", "a", "<", ">b")) + command(asked) + rng.choice(("", "<", "b<ca"))
    cuts = sorted(rng.sample(range(1, len(text)), rng.randint(0, 4)))
    pieces = [text[i:j].encode() for i, j in zip([0, *cuts], [*cuts, len(text)])]
    tokenizer = ByteTokenizer(*{p for p in pieces if len(p) > 1}, only=b"ab<>/cl012340", unknown=rng.randrange(3))
    models = []
    for times, ends in ((rng.randint(1, 3), False), (rng.randrange(2), rng.random() < 0.3)):
        script, n = {}, rng.randint(2, 9)
        for _ in range(times):
            script |= dict(enumerate(tokenizer.ids(*pieces), n))
            n = max(script) + rng.randint(1, 5)
        if ends:
            script[rng.randint(12, 20)] = tokenizer.end_id
        model = tiny(rng.choice(("qwen3", "qwen2", "llama")), rng.randrange(10**6), num_hidden_layers=1,
                     vocab_size=len(tokenizer.known) + rng.randrange(4), tie_word_embeddings=False)
        models.append(nudge(model, script))
    one, two = ([rng.choice(b"ab<>") for _ in range(rng.randint(1, 9))] for _ in range(2))
    return *models, tokenizer, [one, one if rng.random() < 0.3 else two]


def test_hundreds_of_random_pairs_do_what_the_definition_says(monkeypatch):
    """Combinations that nobody thought of: cuts, numbers, half commands, adjacent commands, ends, ragged rows.

    Every other pair attends by two_products().
    """
    rng, seen = random.Random(0), Counter()
    for case in range(200):
        monkeypatch.setattr(model_module, "two_products_pay", lambda *what: seen.update(attended=1) or case % 2 > 0)
        slm, llm, tokenizer, prompts = random_case(rng)
        temperature, llm_temperature = rng.choice((0, 0.7, 1.0)), rng.choice((0, 0.7))
        budget, seeds = rng.randint(8, 20), [(case, i) for i in range(len(prompts))]
        outs = relay(slm, llm, tokenizer, prompts, max_new_tokens=budget, temperature=temperature, seed=seeds,
                     llm_temperature=llm_temperature, batch=rng.choice((None, 1, 2)))
        for out, prompt, seed in zip(outs, prompts, seeds):
            want = oracle(slm, llm, tokenizer, prompt, budget, seed, temperature, llm_temperature)
            assert facts(out) == (want[0], want[1], want[3], want[4]), f"case {case}"
            assert np.allclose(out.logprobs, want[2], atol=1e-10, rtol=0)
            seen.update([out.end, "served"] if any(out.by_llm) else [out.end])
            seen["calls"] += len(out.calls)
    assert seen["served"] > 150 and seen["calls"] > 250 and min(seen["eos"], seen["eos_by_llm"], seen["length"]) > 3
    assert seen["attended"] > 400


def test_another_seed_gives_another_roll_out():
    """Rows with equal prompts must not draw the same numbers."""
    slm, llm = pair()
    one, two = (relay(slm, llm, TOKENIZER, [questions()[0]] * 8, max_new_tokens=30, temperature=1.0, seed=seed)
                for seed in (1, 2))
    one, two = ([tuple(o.tokens) for o in outs if len(o.tokens) > 5] for outs in (one, two))
    assert len(one) > 4 and len(two) > 4 and len({*one, *two}) == len(one) + len(two)


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 1.7])
def test_log_probabilities_equal_the_learners_recomputation(temperature):
    """Sampler = learner: through hand-offs, ragged rows, temperature and padded vocabulary; 0.0 where the LLM wrote."""
    slm, llm = pair()
    known = torch.tensor(TOKENIZER.known)
    outs = relay(slm, llm, TOKENIZER, questions(), max_new_tokens=30, temperature=temperature)
    texts = [o.prompt + o.tokens for o in outs]
    width = max(map(len, texts))
    logits = slm(torch.tensor([t + [0] * (width - len(t)) for t in texts]))
    logp = log_softmax(logits, known, temperature)
    for i, (o, t) in enumerate(zip(outs, texts)):
        at = torch.arange(len(o.prompt) - 1, len(t) - 1)
        want = logp[i, at, torch.tensor(o.tokens)].masked_fill(torch.tensor(o.by_llm), 0.0)
        assert (want - torch.tensor(o.logprobs, dtype=torch.float64)).abs().max() < 1e-10
        assert all(TOKENIZER.known[token] for token in o.tokens)


def test_costs_are_the_tokens_that_the_models_really_ran():
    """A count of what should have run, not of what ran, hides a context that is read twice: so hooks count."""
    slm, llm = pair()
    ran = Counter()
    slm.embed.register_forward_hook(lambda m, args, out: ran.update(slm=args[0].numel()))
    llm.embed.register_forward_hook(lambda m, args, out: ran.update(llm=args[0].numel()))
    prompts, options = questions(), dict(max_new_tokens=40, temperature=1.0)
    batch = relay(slm, llm, TOKENIZER, prompts, **options)
    for i, (prompt, out) in enumerate(zip(prompts, batch)):
        ran.clear()
        alone, = relay(slm, llm, TOKENIZER, [prompt], seed=[(0, i)], **options)
        drawn = max(k for k, by in enumerate(out.by_llm) if not by)        # the SLM read all before its last token
        assert ran["slm"] == alone.cost["slm_prefill"] + alone.cost["slm_decode"] == len(prompt) + drawn
        assert ran["llm"] == alone.cost["llm_prefill"] + alone.cost["llm_decode"]
        assert alone.cost == out.cost and (out.calls or ran["llm"] == 0)
        assert alone.cost["slm_decode"] <= sum(not by for by in out.by_llm)


def test_a_model_that_wrote_can_be_trained():
    """Tensors made in inference mode (rotary frequencies, say) must not stay behind in the model."""
    slm, llm = pair()
    outs = relay(slm.requires_grad_(True), llm, TOKENIZER, questions(2), max_new_tokens=9)
    slm.checkpointing = True
    slm(torch.tensor([outs[0].prompt + outs[0].tokens])).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slm.parameters())


def test_sampling_follows_weights_that_have_learned():
    """Weights packed for one step's sampling were those that the next one sampled with; an error kept them, too."""
    sizes = dict(vocab_size=WIDTHS["slm"], hidden_size=256, head_dim=64, intermediate_size=300)
    slm, later = (tiny("qwen2", seed, torch.float32, **sizes) for seed in (1, 2))
    write = lambda model, **options: relay(model, None, TOKENIZER, questions(3), max_new_tokens=9, **options)
    with pytest.raises(ZeroDivisionError):
        write(slm, on_token=lambda *token: 1 / 0)
    first = write(slm)
    slm.load_state_dict(later.state_dict())
    assert write(slm) == write(later) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_of_lower_precision_keeps_every_rule(dtype):
    """The LLM may be bfloat16 beside a float32 SLM: log-probabilities are float32's, and only known ids are drawn."""
    slm = tiny("qwen2", 1, torch.float32, vocab_size=WIDTHS["slm"])
    llm = tiny("llama", 2, dtype, vocab_size=WIDTHS["llm"])
    outs = relay(slm, llm, TOKENIZER, questions() + questions(), max_new_tokens=40, temperature=1.0, seed=4)
    assert sum(len(o.calls) for o in outs) > 8
    for o in outs:
        logp = log_softmax(slm(torch.tensor([o.prompt + o.tokens]))[0], torch.tensor(TOKENIZER.known))
        at = torch.arange(len(o.prompt) - 1, len(o.prompt) + len(o.tokens) - 1)
        want = logp[at, torch.tensor(o.tokens)].masked_fill(torch.tensor(o.by_llm), 0.0)
        assert (want - torch.tensor(o.logprobs)).abs().max() < 1e-4
        assert sum(o.by_llm) == sum(c.delivered for c in o.calls) and all(TOKENIZER.known[t] for t in o.tokens)


class Unrecorded(RecordedStep):
    """A recorded step on the CPU, where nothing can be recorded: its replay computes it anew."""

    def __init__(self, model, cache, rows):
        self.cache = cache
        self.graph = SimpleNamespace(replay=lambda: setattr(self, "out", model.hidden_states(self.tokens, self)))
        self.tokens, self.position = torch.zeros(2, rows, 1, dtype=torch.int64)


def test_recorded_decoding_steps_change_nothing(monkeypatch):
    """A GPU's steps run over more slots than rows: a waiting or an empty slot's stray keys were seen, or a full
    cache overflowed into the next head's."""
    slm, llm = pair()
    prompts, options = questions(9) + questions(3), dict(max_new_tokens=60, temperature=1.0, seed=8)
    want, replays, replay = relay(slm, llm, TOKENIZER, prompts, **options), [], RecordedStep.replay
    monkeypatch.setattr(model_module, "RecordedStep", Unrecorded)
    monkeypatch.setattr(model_module, "RECORD", 1)
    monkeypatch.setattr(model_module, "two_products_pay", lambda q, config: True)
    monkeypatch.setattr(RecordedStep, "replay", lambda step, tokens: replays.append(len(tokens)) or replay(step, tokens))
    for block, batch in ((1, 12), (3, 12), (16, 12), (100, 12), (3, 5), (100, 2)):
        monkeypatch.setattr(relay_module, "Cache", lambda model: recording(Cache(model, block=block)))
        for a, b in zip(want, relay(slm, llm, TOKENIZER, prompts, batch=batch, **options)):
            same(a, b)
            assert a.cost == b.cost or batch < 12           # of equal prompts, one that comes late may be read again
    assert len(replays) > 20 and len(set(replays)) > 3


def recording(cache):
    cache.records = True
    return cache


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("families", [("qwen3", "llama"), ("qwen2", "qwen3"), ("llama", "qwen2")])
def test_on_a_gpu_roll_outs_are_those_of_the_cpu(families):
    """A graph recorded for other tensors, a step replayed with the positions of the one before."""
    slm, llm = pair(*families)
    prompts = questions(20) + questions(6) + [prompt * 8 for prompt in questions(6)]   # beyond a block of a GPU's cache
    options = dict(max_new_tokens=300, temperature=1.0, seed=8)
    want = relay(slm, llm, TOKENIZER, prompts, **options)
    for batch in (len(prompts), 7):
        for a, b in zip(want, relay(slm.cuda(), llm.cuda(), TOKENIZER, prompts, batch=batch, **options)):
            assert facts(a) == facts(b) and (a.cost == b.cost or batch == 7)
            assert np.allclose(a.logprobs, b.logprobs, atol=1e-6, rtol=0)      # angles of rotation are in float32


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def test_sampling_follows_the_inverse_cdf():
    """Off by one at a border: an impossible id is drawn, or by 1 - 2^-53 one behind the last."""
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64).log()
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert sample(logprobs, [u]).tolist() == [token]
    assert sample(logprobs, [0.99], temperature=0).tolist() == [3]
    many = sample(logprobs.expand(4000, 6), np.random.default_rng(0).random(4000).tolist()).bincount(minlength=6) / 4000
    assert (many - logprobs[0].exp()).abs().max() < 0.02


def chi_squared(counts, probs):
    """(Pearson's statistic, what it exceeds once in a thousand times if `counts` were drawn from `probs`)."""
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected, free = probs[possible] * counts.sum(), int(possible.sum()) - 1
    limit = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3        # Wilson and Hilferty
    return float(((counts[possible] - expected) ** 2 / expected).sum()), limit


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 1.0), (1.0, 0.8), (1.4, 0.6)])
def test_first_tokens_follow_the_models_distribution(temperature, top_p):
    """Rows whose numbers depend on each other, a temperature applied twice, a top-p taken before its temperature."""
    tokenizer, prompt = ByteTokenizer(only=b"abcdefgh"), list(b"abc")
    slm = tiny("qwen3", 5, vocab_size=len(tokenizer.known), tie_word_embeddings=False)
    outs = relay(slm, None, tokenizer, [prompt] * 4000, max_new_tokens=1, temperature=temperature, top_p=top_p, seed=7)
    counts = torch.tensor([o.tokens[0] for o in outs]).bincount(minlength=len(tokenizer.known))

    def distribution(temperature):
        logits = slm(torch.tensor([prompt]))[0, -1].detach().masked_fill(~torch.tensor(tokenizer.known), -torch.inf)
        probs = (logits / temperature).softmax(-1)
        kept = torch.zeros_like(probs)
        for i in probs.argsort(descending=True).tolist():
            if kept.sum() < top_p:
                kept[i] = probs[i]
        return kept / kept.sum()

    statistic, limit = chi_squared(counts, distribution(temperature))
    assert statistic < limit
    other = distribution(temperature * 1.4)                       # the test itself: it must tell this one apart
    assert other[counts > 0].min() == 0 or chi_squared(counts, other)[0] > limit


def test_top_p_keeps_the_smallest_set_of_likely_ids():
    """Off by one: the id that crosses the border belongs to the set."""
    logprobs = torch.tensor([[0.1, 0.5, 0.4]]).log()
    assert {int(sample(logprobs, [u], top_p=0.45)) for u in (0.0, 0.5, 0.99)} == {1}
    assert {int(sample(logprobs, [u], top_p=0.6)) for u in (0.0, 0.5, 0.99)} == {1, 2}
    assert {int(sample(logprobs, [u], top_p=0.95)) for u in (0.0, 0.5, 0.99)} == {0, 1, 2}
    assert int(sample(logprobs, [0.99], top_p=1e-9)) == 1


def test_ids_that_the_tokenizer_lacks_have_probability_zero():
    """Padding beyond the list, and holes within it; the others sum to one at any temperature and in bfloat16."""
    known = torch.tensor([True, False, True, True])
    for dtype, temperature in itertools.product((torch.float32, torch.bfloat16, torch.float64), (0, 0.3, 1, 2)):
        logp = log_softmax(torch.tensor([[1.0, 99.0, 0.0, -1.0, 99.0]], dtype=dtype), known, temperature)
        assert logp.shape == (1, 4) and logp[0, 1] == -torch.inf and logp.dtype != torch.bfloat16
        assert abs(float(logp.exp().sum()) - 1) < 1e-6
        assert abs(float(logp[0, 0] - logp[0, 2]) - 1 / (temperature or 1)) < 1e-5


def test_rho_pools_tokens_over_answers():
    """The mean of each answer's rho would weigh a short answer like a long one."""
    long = Rollout([1], tokens=[1] * 98, by_llm=[False] * 98, end="eos")
    short = Rollout([1], tokens=[1, 1], by_llm=[True, True], calls=[Call(0, 5, 2)], end="eos")
    got = means(figures([True, False], [long, short]))
    assert got["rho"] == 0.02 and got["accuracy"] == 0.5 and got["call_rate"] == 0.5 and got["asked"] == 5


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

def test_the_benchmark_runs_at_a_very_small_size(capsys, monkeypatch):
    """A benchmark that nobody runs is broken by the next change of the engine. (It says nothing about time.)"""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--threads", "1"])
    monkeypatch.setattr(relay_module, "Reader", relay_module.Reader)       # put back after the test, even if it fails
    runpy.run_path(str(Path(__file__).with_name("bench.py")), run_name="__main__")
    said = capsys.readouterr().out
    for work in ("relay", "hand-off of 20 tokens at 80", "prompt of", "memory of a cache", "tokens that flip"):
        assert work in said
    assert "skipped, for want of transformers" in said or "generate" in said


@pytest.mark.parametrize("colour", [False, True])
def test_a_character_is_shown_when_it_is_whole_also_across_a_hand_off(capsys, colour):
    """Half a character is a question mark on the screen, on both sides of the hand-off."""
    tokenizer = ByteTokenizer()
    slm, llm = Scripted(tokenizer, list(b"<call>1</call>\xa9x")), Scripted(tokenizer, [0xc3])
    args = SimpleNamespace(seed=1, max_new_tokens=40, temperature=0, top_p=1.0, llm_temperature=0)
    relay_module.show("hi", slm, llm, tokenizer, args, colour)
    said = capsys.readouterr().out
    assert "\u00e9x" in said and "\ufffd" not in said and ("\033[92m" in said) == colour == ("[]" not in said)


def test_what_ends_a_text_of_either_model_ends_a_response(tmp_path, toy_directory):
    """Only the SLM's directory was asked; behind an end that the LLM alone knows the response went on."""
    for name, end in (("slm", []), ("llm", [65, 66])):
        shutil.copytree(toy_directory, tmp_path / name)
        raw = raw_config("qwen3", vocab_size=len(Tokenizer(toy_directory).known), eos_token_id=end)
        save(tiny("qwen3", dtype=torch.float32, **raw), tmp_path / name)
    tokenizer = relay_module.load_pair(tmp_path / "slm", tmp_path / "llm", "cpu", torch.float32)[2]
    assert tokenizer.end_ids == Tokenizer(tmp_path / "slm").end_ids | {65, 66}


@pytest.mark.parametrize("change, words", [("merges", "do not have the same tokenizer"), ("width", "embeddings for")])
def test_a_pair_that_does_not_read_the_same_tokens_is_refused(change, words, tmp_path, toy_directory):
    """The LLM's ids would be other words to the SLM, without an error anywhere."""
    for name in ("slm", "llm"):
        shutil.copytree(toy_directory, tmp_path / name)
        width = len(Tokenizer(toy_directory).known) - (change == "width" and name == "llm")
        save(tiny("qwen3", dtype=torch.float32, **raw_config("qwen3", vocab_size=width)), tmp_path / name)
    if change == "merges":
        spec = json.loads((tmp_path / "llm" / "tokenizer.json").read_text())
        spec["model"]["merges"].pop()
        (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=words):
        relay_module.load_pair(tmp_path / "slm", tmp_path / "llm", "cpu", torch.float32)


def test_frozen_models_are_in_bfloat16_where_the_hardware_has_it_but_never_the_toy(monkeypatch):
    """The toy's answers hung on the machine: the README's figures are float32's."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    args = SimpleNamespace(device="cpu", dtype="auto")
    assert relay_module.machine(args)[1] == torch.bfloat16
    assert relay_module.machine(args, toy=True)[1] == torch.float32
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")      # as in another release
    assert relay_module.machine(args)[1] == torch.float32


def shown(capsys, script, told, **more):
    """What show() prints of a scripted pair."""
    tokenizer = ByteTokenizer()
    args = SimpleNamespace(**dict(seed=1, max_new_tokens=80, temperature=0, top_p=1.0, llm_temperature=0) | more)
    relay_module.show("hi", Scripted(tokenizer, script), Scripted(tokenizer, told), tokenizer, args, colour=True)
    return capsys.readouterr().out


def test_the_last_line_says_what_sending_the_whole_context_would_cost(capsys):
    """It counted the commands, which no context of the LLM holds, and forgot the LLM's own tokens."""
    said = shown(capsys, list(b"ab<call>3</call>c<call>2</call>d"), list(b"12345"))
    prompt = len(ByteTokenizer().chat("hi"))
    first, second = prompt + 2 + 2, prompt + 2 + 3 + 1 + 1            # of what a call delivers the last is not read
    assert f"the LLM read {second} tokens (sending the whole context at each call: {first + second})" in said


def test_a_model_cannot_clear_the_screen_nor_fake_the_colour(capsys):
    """Whatever a model writes is data, for the terminal too."""
    said = shown(capsys, list(b"a\x1b[92mb\x07\x0e\n\tc"), [])
    assert "a\ufffd[92mb\ufffd\ufffd\n\tc" in said and "\x1b" not in said


def test_an_answer_that_is_stopped_leaves_no_colour_behind(capsys, monkeypatch):
    """Ctrl-C within the LLM's text left the terminal green."""
    def stopped(*_, on_token, **__):
        on_token(0, 97, True)
        raise KeyboardInterrupt
    monkeypatch.setattr(relay_module, "relay", stopped)
    with pytest.raises(KeyboardInterrupt):
        shown(capsys, [], [])
    assert capsys.readouterr().out.endswith("a\033[0m\n")


def test_nothing_is_sampled_from_numbers_that_are_not_finite():
    """NaN gave the last id of the vocabulary, in silence; so does a top-p of 0."""
    slm, llm = tiny("qwen3"), tiny("llama", vocab_size=40)
    tokenizer = ByteTokenizer(40)
    for options in (dict(top_p=0.0), dict(temperature=1e-320), dict(temperature=-1.0), dict(fixed=-1)):
        with pytest.raises(ValueError, match="top_p|not finite|below 0"):
            relay(slm, llm, tokenizer, [[1, 2]], max_new_tokens=3, **options)
    slm.norm.weight.data[0] = torch.nan
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            relay(slm, llm, tokenizer, [[1, 2]], max_new_tokens=3, temperature=temperature)
