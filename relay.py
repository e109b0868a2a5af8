"""Chapter 3. The relay: two models write one answer.

The SLM writes. When its text contains the command <call>n</call>, the LLM writes the next n tokens of the same answer,
and the SLM goes on from there (RelayLLM, arXiv 2601.05167, section 3). There is no router: the SLM decides. (relay()'s
`router`, `fixed` and `no_calls` are for the rivals in eval.py's table: leave them out on a first reading.)

    SLM's context:  prompt  ... One costs<call>1</call> 26 coins. So 3 cost ...
    LLM's context:  prompt  ... One costs               26 coins. So 3 cost ...   (from 26 on: read at the next call)

Three rules make it exact and cheap:
  1. A model reads each token once. For every row it has a KV cache and a list of tokens that it has still to read; one
     operation, Reader.step(), serves prompt, catch-up after the other model's turn, and decoding. So a hand-off costs
     the tokens since the last one, and a row that never calls costs the LLM nothing.
  2. Tokens cross, not text. What the LLM writes enters the SLM's context as those very tokens. What the SLM wrote
     reaches the LLM token by token, but for the commands; where a command shares a token with its neighbour's bytes,
     those bytes are encoded again and none is lost.
  3. Randomness belongs to the roll-out. Token k of row i is drawn with the k-th uniform number of row i's own seed, so
     a roll-out is the same alone and in any batch (in float32, rounding may decide a near-tie otherwise).

Turns alternate for the whole batch: the SLM runs until every row waits or has ended (or most, where others queue for
their places), then the LLM serves all waiting rows as one batch, because its steps are the expensive ones. Whatever a
model writes is data; nothing raises on it.

Left out: both models at work at the same time (the LLM's batches would be smaller, and a roll-out would depend on the
clock), and an LLM behind a server (what it would have to offer is what Reader does).
"""
import argparse
import codecs
import ctypes
import math
import os
import random
import re
import select
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from data import INSTRUCTION, Tokenizer, grade, load_questions, toy_questions
from model import Cache, forget, load, need, prepack, progress_bar, read_config, read_json, write_json

COMMAND = re.compile(rb"<call>([0-9]{1,9})</call>")   # nine digits at most: the text kept to find one is bounded
LONGEST = len(b"<call></call>") + 9                   # bytes
OPEN = b"<call"                                       # what no_calls=True forbids: no command is without it
CHUNK = 256                                           # tokens of a row read at once: bounds the mask
PASS = 8192                                           # tokens of all rows read at once: bounds the hidden states
STATES = 2**21                                        # on a CPU, at most STATES / ffn tokens at once, and
SLICE = 2**19                                         # logits made probabilities at once: to fit the CPU's own cache


def command(n):
    """The text that asks for n tokens."""
    return f"<call>{n}</call>"


class Call(NamedTuple):
    position: int    # index in the response of the first delivered token
    asked: int       # n in the command; where a router calls, the tokens that are left
    delivered: int   # tokens that the LLM wrote


@dataclass
class Rollout:
    """One response and how it came about.

    logprobs: for each token of the SLM its log-probability at the sampling temperature (at 0: of the plain softmax),
    before top-p cuts, over the tokens that no_calls=True allows; 0.0 for each token of the LLM.
    """
    prompt: list
    tokens: list = field(default_factory=list)      # the response: commands and the end-of-text token included
    by_llm: list = field(default_factory=list)      # for each token: did the LLM write it?
    logprobs: list = field(default_factory=list)    # for each token
    calls: list = field(default_factory=list)       # a Call for each command obeyed, n = 0 too; those counted: served
    end: str = ""                                   # "eos", "eos_by_llm", or "length": the budget is spent
    cost: dict = field(default_factory=dict)        # tokens read: slm_prefill, slm_decode, llm_prefill, llm_decode

    @property
    def rho(self):
        """Call ratio: tokens written by the LLM / all tokens of the response (RelayLLM, section 3)."""
        return sum(self.by_llm) / max(len(self.tokens), 1)

    @property
    def served(self):
        """The calls to which the LLM delivered at least one token."""
        return [call for call in self.calls if call.delivered]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def log_softmax(logits, known, temperature=1.0):
    """Log-probabilities (..., N) over the tokenizer's N ids, from logits (..., V >= N), at a temperature (0 as 1).

    known: (N,) bool; ids that the tokenizer lacks (checkpoints pad their vocabulary) get probability 0. Sampler and
    learner agree because both call this.
    """
    logits = logits[..., :len(known)]
    if known.is_cuda or not known.all():                # on a GPU known.all() would wait for it
        logits = logits.masked_fill(~known, -torch.inf)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits / temperature if temperature not in (0, 1) else logits, dim=-1)


def sample(logprobs, uniforms, temperature=1.0, top_p=1.0):
    """One token a row by inverse CDF: the first id whose cumulative probability exceeds the row's uniform number.

    logprobs: (B, N). uniforms: B numbers in [0, 1). Returns ids (B,). No sort of the vocabulary unless top_p < 1, which
    keeps the smallest set of most likely ids with at least that probability. Temperature 0 takes the most likely id.
    """
    if temperature == 0:
        return logprobs.argmax(dim=-1)
    logprobs = logprobs.cpu() if logprobs.device.type == "mps" else logprobs      # mps has no float64
    probs = logprobs.exp()
    if top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True)
        surplus = ordered.cumsum(dim=-1) - ordered >= top_p           # the ids before it hold top_p already
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered.masked_fill(surplus, 0))
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    u = torch.tensor(uniforms, dtype=torch.float64, device=cdf.device)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)


def few_rows(logits, *others):
    """Slices of logits (B, V) and of others (B, ...): on a CPU of so few rows that the processor's own cache holds what
    comes of them."""
    size = SLICE // logits.shape[-1] if logits.device.type == "cpu" else len(logits)
    return zip(*(x.split(max(1, size)) for x in (logits, *others)))


def entropy(logprobs):
    """Entropy in nats of each distribution, (..., N) to (...)."""
    return -logprobs.exp().mul_(logprobs.clamp(min=-100)).sum(dim=-1)   # 0 * -inf is NaN


# ---------------------------------------------------------------------------------------------------------------------
# One model's side

@dataclass
class Text:
    """What one model is to see of a row, and how far it has come."""
    prompt: tuple
    tokens: list        # the prompt, and what followed it so far
    own: list           # for each of those: did this model write it?
    cached: int = 0     # how many of them are in the cache,
    copied: int = 0     # and how many of these another row has read


class Reader:
    """A model, its KV cache, and for every row the text that the model is to see.

    This is what the relay asks of either model: begin() a row with its prompt, feed() it tokens, step() some rows
    for the logits of their next token, tell the cost() of one, drop() what has ended.
    """

    def __init__(self, model):
        self.model, self.cache = model, Cache(model)
        self.texts = {}     # row -> Text

    def begin(self, row, prompt):
        self.texts[row] = Text(tuple(prompt), list(prompt), [False] * len(prompt))

    def feed(self, row, tokens, own=False):
        self.texts[row].tokens += tokens
        self.texts[row].own += [own] * len(tokens)

    def cost(self, row):
        """(prefill, decode): tokens of this row that the model really read: written by others, and by itself."""
        text = self.texts[row]
        decode = sum(text.own[:text.cached])
        return text.cached - text.copied - decode, decode

    def step(self, rows):
        """Read all that is new for `rows`. Returns them in cache order, and the logits (B, V) after each one's last."""
        if new := [row for row in rows if self.texts[row].cached == 0 and len(self.texts[row].prompt) > 1]:
            self.read_prompts({row: self.texts[row].prompt for row in new})
        return self.read({row: len(self.texts[row].tokens) for row in rows}, last=True)

    def read_prompts(self, new):
        """Read the prompts of new rows, {row: prompt}, equal ones once: a question is read once for all its roll-outs.

        All but the last token, which each row reads itself, because it needs the logits after it.
        """
        # prompt -> the first row that has read it, or that will
        holder = {self.texts[row].prompt: row for row in reversed([*self.cache.rows, *new])}
        if readers := [row for row, prompt in new.items() if holder[prompt] == row]:
            self.read({row: len(new[row]) - 1 for row in readers})
        for source in {holder[prompt] for prompt in new.values()}:
            prompt = self.texts[source].prompt
            if copies := [row for row in new if new[row] == prompt and row != source]:
                self.cache.copy(source, copies, len(prompt) - 1)
            for row in copies:
                self.texts[row].cached = self.texts[row].copied = len(prompt) - 1

    def read(self, goal, last=False):
        """Read each row up to goal[row] tokens: long rows a chunk at a time, then the rest of all rows at once.

        Returns the rows in cache order and what the last pass gave: hidden states, or logits (B, V) with last=True.
        """
        most = min(PASS, STATES // self.model.config.ffn) if self.cache.like.device.type == "cpu" else PASS
        chunk, texts = max(min(CHUNK, most // len(goal)), 1), self.texts
        while True:
            long = [row for row in goal if goal[row] - texts[row].cached > chunk]
            order = self.cache.arrange(long or list(goal))
            parts = [texts[row].tokens[texts[row].cached:min(goal[row], texts[row].cached + chunk)] for row in order]
            counts = [len(part) for part in parts]
            width, flat = max(counts), []                          # one list: made a tensor three times as fast
            for part in parts:
                flat += part + [0] * (width - len(part))           # shorter rows are padded behind
            tokens = torch.tensor(flat, device=self.cache.like.device).view(-1, width)
            out = (self.model(tokens, self.cache, counts, last=True) if last and not long
                   else self.model.hidden_states(tokens, self.cache, counts))
            for row, count in zip(order, counts):
                texts[row].cached += count
            if not long:
                return order, out

    def drop(self, rows):
        """Forget rows that have ended, and give their part of the cache back."""
        for row in rows:
            del self.texts[row]
        self.cache.drop(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def without_commands(tokens, tokenizer):
    """The token ids of the same text with every command cut out.

    A token that no command touches stays as it is. Bytes that share a token with a command are encoded again.
    """
    pieces = [tokenizer.token_bytes[t] for t in tokens]
    gone = {i for match in COMMAND.finditer(b"".join(pieces)) for i in range(*match.span())}    # places of bytes
    kept, rest, at = [], b"", 0
    for token, piece in zip(tokens, pieces):
        here, at = range(at, at + len(piece)), at + len(piece)
        if gone.isdisjoint(here):
            kept += tokenizer.encode_bytes(rest) + [token]
            rest = b""
        else:
            rest += bytes(byte for i, byte in zip(here, piece) if i not in gone)
    return kept + tokenizer.encode_bytes(rest)


def begun(tail):
    """How many bytes of a command's opening stand at the end of this text."""
    return max(n for n in range(len(OPEN)) if tail.endswith(OPEN[:n]))


def completing(tokenizer, device):
    """(len(OPEN), N) bool, for no_calls=True: row n marks the ids that complete OPEN behind its first n bytes."""
    return torch.tensor([[OPEN in OPEN[:n] + piece for piece in tokenizer.token_bytes] for n in range(len(OPEN))],
                        device=device)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

class Row:
    """The state of one roll-out while it is written."""

    def __init__(self, prompt, budget, seed):
        self.out = Rollout(list(prompt))
        self.left = budget   # tokens that may still be written, at least 1
        self.uniforms = np.random.default_rng(seed).random(budget)     # one for each token, whoever writes it
        self.since = 0       # index of the first token that the LLM has not been fed: the one after its own last
        self.tail = b""      # the end of the SLM's text from there on, where a command may stand
        self.owed = 0        # tokens that the LLM has still to write; above 0 the row waits for it

    def append(self, token, by_llm, logprob, ends):
        """Add one token; decides whether the response ends with it."""
        out = self.out
        self.left -= 1
        out.tokens.append(token)
        out.by_llm.append(by_llm)
        out.logprobs.append(logprob)
        if by_llm:
            self.owed -= 1
            self.since, self.tail = len(out.tokens), b""
            out.calls[-1] = out.calls[-1]._replace(delivered=out.calls[-1].delivered + 1)
        if token in ends:
            out.end = "eos_by_llm" if by_llm else "eos"
        elif self.left == 0:
            out.end = "length"

    def call(self, asked, granted):
        """The LLM is asked for `granted` tokens, cut to the budget left. Zero: noted, and the SLM goes on at once."""
        self.owed = min(granted, self.left)
        self.out.calls.append(Call(len(self.out.tokens), asked, 0))

    def find_command(self, piece):
        """n, if the token with these bytes completes a command, else None. A command is found however it is cut."""
        self.tail += piece
        found = list(COMMAND.finditer(self.tail)) if b">" in piece else []      # few tokens can end a command
        if not found:
            self.tail = self.tail[-LONGEST:]
            return None
        self.tail = self.tail[found[-1].end():]                                 # if one token ends two, the last counts
        return int(found[-1][1])


@torch.inference_mode()
def relay(slm, llm, tokenizer, prompts, *, max_new_tokens, temperature=0.7, seed=0, llm_temperature=0.7, top_p=1.0,
          fixed=None, router=None, no_calls=False, batch=None, on_token=None, on_end=None, label=None):
    """Write a response to every prompt. Returns a list of Rollout.

    slm, llm: Transformers that share `tokenizer`; llm=None: nobody is called, and commands stay as text.
    prompts: lists of token ids. max_new_tokens: budget of a response, the LLM's tokens and the commands included; it is
    cut where the context of a model would overflow. temperature (0: greedy) and top_p are the SLM's; the LLM samples at
    llm_temperature. seed: one int (row i draws from (seed, i)), or one seed for each row.
    fixed=N: every call delivers N tokens, whatever was asked. router=(high, low): commands are not obeyed; instead,
    where the SLM's next-token entropy exceeds `high` nats, its token is discarded and the LLM writes until its own
    entropy falls below `low` (R-Stitch, arXiv 2507.17307). no_calls=True: the SLM cannot write a command's opening.
    batch: rows decoded at once (default: all); where some have ended others take their places. on_token(row, token,
    by_llm) sees tokens as they are written, on_end(row, rollout) roll-outs as they end. label: a progress bar's.
    """
    seeds = [(seed, i) for i in range(len(prompts))] if isinstance(seed, (int, np.integer)) else list(seed)
    need(len(seeds) == len(prompts) and 0 < top_p <= 1 and max_new_tokens >= 1,
         f"{len(seeds)} seeds for {len(prompts)} prompts (one each), top_p {top_p} (above 0, to 1), max_new_tokens "
         f"{max_new_tokens} (at least 1)")
    need(min(temperature, llm_temperature, fixed or 0) >= 0,
         f"temperature {temperature}, llm_temperature {llm_temperature}, fixed {fixed}: none may be below 0")
    context = min(model.config.context for model in (slm, llm) if model is not None)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, the context holds 1 to {context - 1}; shorten "
                             f"the question: {tokenizer.decode(prompt)[:80]!r} ...")
    rows = [(i, p, min(max_new_tokens, context - len(p)), s) for i, (p, s) in enumerate(zip(prompts, seeds))]
    options = SimpleNamespace(temperature=temperature, llm_temperature=llm_temperature, top_p=top_p, fixed=fixed,
                              router=router, no_calls=no_calls, places=batch or len(rows), on_token=on_token,
                              on_end=on_end)
    packed = prepack(slm) if rows else []                  # the same weights, in an order that is faster to read
    try:
        with progress_bar(total=sum(budget for _, _, budget, _ in rows), desc=label, unit="token", unit_scale=True,
                          delay=1, leave=False, disable=label is None) as bar:      # not for a step of the toy's
            done = Turns(slm, llm, tokenizer, rows, bar, options).write()
    finally:
        forget(packed)
    return [done[i] for i in range(len(rows))]


class Turns:
    """The rows of one relay(), and the turns of its two models. `row` is a Row here, `r` its index (what Reader calls
    row). options: relay()'s arguments of the same names."""

    def __init__(self, slm, llm, tokenizer, rows, bar, options):
        self.tokenizer, self.bar, self.options = tokenizer, bar, options
        self.slm, self.llm = Reader(slm), None if llm is None else Reader(llm)    # without an LLM nobody ever waits
        self.readers = [self.slm, self.llm] if self.llm else [self.slm]
        self.known = torch.tensor(tokenizer.known, device=slm.embed.weight.device)
        self.banned = completing(tokenizer, self.known.device) if options.no_calls else None
        self.coming = deque(rows)          # (index, prompt, budget, seed) of those that have no place yet
        self.rows, self.done = {}, {}      # index -> Row, of those that have one; index -> Rollout

    def write(self):
        """Write the responses of all rows. Returns {index: Rollout}."""
        self.renew()
        while self.rows:
            self.slm_turn()
            self.llm_turn()
        return self.done

    def slm_turn(self):
        """The SLM writes until every row waits for the LLM; or, where more rows are to come, until most wait: rows that
        wait hold places that others could take."""
        o, turn = self.options, dict(self.rows)
        while turn:
            drawn = self.draw(self.slm, turn, o.temperature, o.top_p, self.banned)
            for r, row, token, logprob, nats in drawn:
                if self.llm and o.router and nats > o.router[0]:      # what it drew is not written
                    row.call(row.left, row.left)                      # until the LLM is sure: see llm_turn()
                    continue
                self.append(r, row, token, False, logprob)
                n = row.find_command(self.tokenizer.token_bytes[token])      # always: it keeps row.tail, for no_calls
                if n is not None and self.llm and not o.router and not row.out.end:
                    row.call(n, n if o.fixed is None else o.fixed)
            came = self.renew()
            turn = {r: row for r, row, *_ in drawn if not row.owed and not row.out.end} | came
            if self.coming and 2 * len(turn) < len(self.rows):
                break

    def llm_turn(self):
        """The LLM serves all rows that wait, as one batch."""
        o, turn = self.options, {r: row for r, row in self.rows.items() if row.owed}
        for r, row in turn.items():
            new = row.out.tokens[row.since:]                          # what it has not been fed
            self.llm.feed(r, new if o.router else without_commands(new, self.tokenizer))    # a router's are text
        while turn:
            drawn = self.draw(self.llm, turn, o.llm_temperature)
            for r, row, token, _, nats in drawn:
                self.append(r, row, token, True)
                if o.router and nats < o.router[1]:
                    row.owed = 0
            self.renew()                                              # who comes now waits for the SLM's turn
            turn = {r: row for r, row, *_ in drawn if row.owed and not row.out.end}

    def draw(self, reader, turn, temperature, top_p=1.0, banned=None):
        """One step of a model for the rows of `turn`, {index: Row}. Returns [(index, Row, sampled id, its
        log-probability, entropy if a router asks)]. banned: see completing()."""
        (order, logits), drawn = reader.step(list(turn)), []
        for some, in few_rows(logits):
            part = order[len(drawn):len(drawn) + len(some)]
            rows = [turn[r] for r in part]
            logprobs = log_softmax(some, self.known, temperature)
            if banned is not None:
                opening = banned[[begun(row.tail) for row in rows]]                    # (B, N)
                logprobs = torch.log_softmax(logprobs.masked_fill(opening, -torch.inf), dim=-1)
            ids = sample(logprobs, [row.uniforms.item(len(row.out.tokens)) for row in rows], temperature, top_p)
            chosen = logprobs.gather(-1, ids[:, None].to(logprobs.device))[:, 0].tolist()
            need(not any(map(math.isnan, chosen)),         # where one is, all of its row are: nothing could be sampled
                 "a model's logits are not finite at this --temperature and --dtype (float16 overflows: try another)")
            nats = entropy(logprobs).tolist() if self.options.router else [0.0] * len(part)
            drawn += zip(part, rows, ids.tolist(), chosen, nats)
        return drawn

    def append(self, r, row, token, by_llm, logprob=0.0):
        """Add a token to a row. The SLM has still to read it, whoever wrote it; the LLM reads its own at its next step,
        and the SLM's at its next turn, without the commands: see llm_turn()."""
        row.append(token, by_llm, logprob, self.tokenizer.end_ids)
        if by_llm:
            self.llm.feed(r, [token], own=True)
        self.slm.feed(r, [token], own=not by_llm)
        self.bar.update()
        if self.options.on_token:
            self.options.on_token(r, token, by_llm)

    def renew(self):
        """Take the rows that have ended out, and let others in. Returns those that came, {index: Row}.

        They come when an eighth of the places is free: to read the prompt of one takes as long as of several.
        """
        if ended := [r for r, row in self.rows.items() if row.out.end]:
            for r in ended:
                row = self.rows.pop(r)
                cost = self.slm.cost(r) + (self.llm.cost(r) if self.llm else (0, 0))
                row.out.cost = dict(zip(("slm_prefill", "slm_decode", "llm_prefill", "llm_decode"), cost))
                self.done[r] = row.out
                self.bar.total -= row.left                 # what it leaves of its budget is not waited for
                if self.options.on_end:
                    self.options.on_end(r, row.out)
            for reader in self.readers:
                reader.drop(ended)
        free, came = self.options.places - len(self.rows), {}
        while self.coming and len(came) < free and free >= self.options.places / 8:
            r, prompt, budget, seed = self.coming.popleft()
            came[r] = self.rows[r] = Row(prompt, budget, seed)
            for reader in self.readers:
                reader.begin(r, prompt)
        return came


def plain_text(rollout, tokenizer):
    """The response as a reader sees it: without commands, without the end-of-text token."""
    written = list(zip(rollout.tokens, rollout.by_llm))[:-1 if rollout.end.startswith("eos") else None]
    text = b""
    for by_llm, part in groupby(written, key=lambda pair: pair[1]):     # only what the SLM writes is ever a command
        piece = b"".join(tokenizer.token_bytes[token] for token, _ in part)
        text += piece if by_llm else COMMAND.sub(b"", piece)
    return text.decode("utf-8", errors="replace")


def is_right(question, rollout, tokenizer):
    """Is the response right, commands apart? A strict one (the toy's) wants its answer last, then an end of text."""
    text = plain_text(rollout, tokenizer)
    if question.strict:
        return rollout.end != "length" and text.endswith(f"\\boxed{{{question.answer}}}")
    return grade(text, question.answer)


def figures(right, rollouts):
    """What answers show, for each figure a sum and what to divide it by: those of several processes add up.

    right: is it right?, for each answer.
    """
    asked = [[call.asked for call in r.served] for r in rollouts]
    values = dict(
        accuracy=right, accuracy_called=[hit for hit, n in zip(right, asked) if n],
        accuracy_alone=[hit for hit, n in zip(right, asked) if not n],
        call_rate=[bool(n) for n in asked], calls=[len(n) for n in asked], asked=sum(asked, []),
        rho=[by_llm for r in rollouts for by_llm in r.by_llm], llm_tokens=[sum(r.by_llm) for r in rollouts],
        length=[len(r.tokens) for r in rollouts], cut=[r.end == "length" for r in rollouts])
    return {name: (sum(each), len(each)) for name, each in values.items()}


def means(sums):
    """{figure: its mean} from {figure: (sum, divisor)}; None where there is nothing to divide by."""
    return {name: total / count if count else None for name, (total, count) in sums.items()}


def graded(questions, rollouts, tokenizer):
    """means() of the figures of answers, one to each question."""
    return means(figures([is_right(q, r, tokenizer) for q, r in zip(questions, rollouts)], rollouts))


# ---------------------------------------------------------------------------------------------------------------------
# What all scripts share on the command line (skip it on a first reading)

class WrongArguments(ValueError):
    """Arguments that do not go together: exit code 2, where other faults have 1."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists what there is)\n")


def positive(kind, or_zero=False, most=10**15):
    """An argparse type: a number above 0 (or also 0), of at most `most` (by default what any dtype or seed holds)."""
    def number(text):
        with suppress(ValueError):
            value = kind(text)
            if 0 <= value <= most and (value or or_zero):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number "
                                         f"{'of 0 or more' if or_zero else 'above 0'}, up to {most:g}")
    return number


def at_least_zero(kind, most=10**15):
    return positive(kind, or_zero=True, most=most)


def parser(description, example, top_p=False):
    """The flags that all scripts have. top_p: that one too; what is learned from must be samples of the whole model."""
    p = Parser(usage=f"{example}\n\n{description}")
    g = p.add_argument_group("what")
    g.add_argument("--run", type=Path, default=Path("runs/toy"), help="where everything of a run lies (runs/toy)")
    g.add_argument("--slm", type=Path, metavar="DIR", help="the small model's directory, instead of the run's own")
    g.add_argument("--llm", type=Path, metavar="DIR", help="the large model's directory, instead of the run's own")
    g.add_argument("--questions", type=lambda text: Path(text).resolve(), metavar="FILE",
                   help="questions, .jsonl or .json (default: the toy's)")
    g.add_argument("--limit", type=positive(int), metavar="N", help="at most N questions")
    g.add_argument("--seed", type=at_least_zero(int), default=1, help="for sampling, initialization and order (1)")
    g.add_argument("--temperature", type=at_least_zero(float), metavar="T",
                   help="the SLM's sampling temperature; 0 is greedy")
    g.add_argument("--max-new-tokens", type=positive(int), metavar="N", help="budget of a response, in tokens")
    if top_p:
        g.add_argument("--top-p", type=positive(float, most=1), default=1.0, metavar="P",
                       help="sample among the likeliest tokens only that have this probability together (1: all; "
                            "within a call the LLM always takes all)")
    g = p.add_argument_group("on which machine")
    g.add_argument("--batch", type=positive(int), default=256, metavar="ROWS", help="roll-outs decoded at once (256)")
    g.add_argument("--device", default="auto",
                   help="auto, cpu, cuda, cuda:1, mps (auto: CUDA where there is one, but the CPU for the toy)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                   help="of frozen models (auto: bfloat16 where the hardware has it, but float32 for the toy)")
    return p


def show_presets(p, toy, real, **more):
    """Say in --help what flags are where they are not given, and `more`: what else is to be said of one here."""
    for action in p._actions:
        action.help += more.get(action.dest, "")
        if action.dest in toy:
            action.help += f" (toy {toy[action.dest]}, real models {real.get(action.dest, 'all')})"


def fill_in(args, preset):
    """Flags that were not given take the preset's values: the toy's, or those for real models."""
    for key, value in preset.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def differing(there, settings):
    """The first setting in which two stages differ, as text; None if none. (The question file may have moved.)"""
    for key in [*sorted({*there, *settings} - {"questions", "question_texts"}), "question_texts"]:
        if there.get(key) != settings.get(key):
            return f"{key} {there.get(key)}, not {settings.get(key)}"


class Run:
    """A run's directory, and run.json in it: where SLM and LLM lie, and the settings of each finished stage."""

    def __init__(self, path):
        self.path, self.file = Path(path), Path(path) / "run.json"
        self.info = read_json(self.file, {"stages": {}})
        stages = self.info.get("stages")
        need(isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values()),
             f"{self.file}: not a file of this program (no stages in it); choose another --run")

    def has(self, stage):
        """Is this stage finished, and its model still there (config.json is what save() writes last)?"""
        return stage in self.info["stages"] and (self.path / stage.removeprefix("pretrain ") / "config.json").exists()

    def open(self):
        """Make the directory. Fails now, and not after hours of work, where nothing can be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path).close()

    def directory(self, name):
        """Where "slm" or "llm" lies: as given to warmup.py, or (the toy's) inside the run."""
        return self.path / self.info.get(name, name)      # an absolute path stays what it is

    def finished(self, stage, settings):
        """Is this stage there, with these settings? One with others is not overwritten: ValueError."""
        if not self.has(stage):
            return False
        if difference := differing(self.info["stages"][stage], settings):
            raise ValueError(f"{self.path} holds a finished {stage} with {difference}; choose another --run")
        return True

    def finish(self, stage, settings):
        """Note in run.json that this stage is there, made with these settings."""
        self.info["stages"] = Run(self.path).info["stages"] | {stage: settings}     # others may have finished since
        write_json(self.file, self.info)

    @property
    def toy(self):
        return self.info.get("toy", False)

    @property
    def llm_temperature(self):
        """The LLM's, inside a call, as in training."""
        return self.info["stages"].get("grpo", {}).get("llm_temperature", 0.7)

    def command_line(self, script, *more):
        """What to type for a script on this run. more: what real models need besides."""
        return shlex.join(["python", script, "--run", self.path.as_posix(), *([] if self.toy else more)])


def glibc(function, *numbers):
    """Call a function of the C library that manages memory; nothing happens where there is none of that name."""
    with suppress(AttributeError, OSError, TypeError):     # another system, another C library
        getattr(ctypes.CDLL(None), function)(*numbers)


def small_models():
    """Settings for models as small as the toy's: one thread, because a second one gains next to nothing; and glibc
    keeps freed memory instead of giving it back to Linux page by page at each step, a third of the time."""
    torch.set_num_threads(1)
    glibc("mallopt", -1, 1 << 30)                          # M_TRIM_THRESHOLD
    glibc("mallopt", -3, 1 << 25)                          # M_MMAP_THRESHOLD


def give_back(model):
    """With --checkpointing on a CPU, where memory counts more than time: give freed memory back to Linux. glibc keeps
    gigabytes of it between the micro-batches of a real model."""
    if model.checkpointing and model.embed.weight.device.type == "cpu":
        glibc("malloc_trim", 0)


def machine(args, toy=False):
    """(device, dtype of frozen models) that --device and --dtype ask for; for the toy "auto" is float32."""
    if toy:
        small_models()
    device = args.device
    if device == "auto":                                 # a Mac's GPU only if asked for: README.md says why
        gpu = torch.cuda.is_available() and not toy      # so small a model would wait for it
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    try:
        torch.zeros(1, device=device).item()             # "meta" has no values
    except (RuntimeError, AssertionError, ImportError):
        raise WrongArguments(f"--device {device} is not to be had on this machine; try --device cpu") from None
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")       # TF32: factors of 10 bits, sums in float32; many times as fast
        torch.backends.cuda.enable_cudnn_sdp(False)      # it plans anew for every shape, and each turn has its own
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    native = device.startswith("cuda") or device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return device, torch.bfloat16 if native and not toy else torch.float32


def load_pair(slm_path, llm_path, device, dtype, learns=False):
    """(SLM, LLM, their tokenizer). A pair that does not read the same tokens is refused.

    dtype: that of models which do not learn. An SLM that learns is in float32; all others are packed, once and for all.
    """
    configs = {path: read_config(path) for path in (slm_path, llm_path)}    # first of all: it names the model type
    tokenizer, other = Tokenizer(slm_path), Tokenizer(llm_path)
    if difference := tokenizer.difference(other):
        raise ValueError(f"{slm_path} and {llm_path} do not have the same tokenizer (take two models of one family): "
                         f"{difference}")
    tokenizer.end_ids |= other.end_ids                               # what ends a text of either ends it
    for path, config in configs.items():
        need(config.vocab_size >= len(tokenizer.known),
             f"{path}: {config.vocab_size} embeddings for {len(tokenizer.known)} token ids")
    slm, llm = load(slm_path, device, torch.float32 if learns else dtype), load(llm_path, device, dtype)
    for model in [llm] if learns else [slm, llm]:
        prepack(model, free=True)
    return slm, llm, tokenizer


def hear_signals(handler):
    """Ctrl-C, and SIGTERM as schedulers send it."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, handler)


def run_script(main):
    """Run a script's main(): a user's mistake or bad data ends in one line, never in a traceback."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)        # as schedulers send it: like Ctrl-C
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")                     # whatever a model writes can be printed
        sys.stdin.reconfigure(errors="replace")                      # and whatever is piped in be read
    try:
        try:
            main()
            if "RANK" in os.environ:                                 # one of several processes: torch's threads now and
                sys.stdout.flush()                                   # then abort one that ends in the usual way
                os._exit(0)
        except (ValueError, OSError, KeyboardInterrupt):
            if os.environ.get("RANK", "0") != "0":                   # of several processes the first one says it
                time.sleep(1)
            raise
    except WrongArguments as error:
        Parser(prog=name).error(str(error))
    except ValueError as error:
        sys.exit(f"{name}: {error}")                                 # exit code 1
    except BrokenPipeError:                                          # as behind "| head": nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{name}: {error.filename or 'file system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        hear_signals(signal.SIG_IGN)                                 # a second one would interrupt the last words
        sys.exit(f"{name}: stopped; what earlier stages wrote is kept")
    except (MemoryError, RuntimeError) as error:                     # torch has an error of its own for GPUs alone
        if not re.search("MemoryError|out of memory|not enough memory|can't allocate memory", repr(error), re.I):
            raise
        sys.exit(f"{name}: out of memory; try a smaller --batch (sampling) or --micro-tokens (learning)")


# ---------------------------------------------------------------------------------------------------------------------
# The script: one relay, to look at

def show(text, slm, llm, tokenizer, args, colour):
    """Print one relay as it is written, the LLM's tokens in colour or in brackets, and then what it cost."""
    marks = ("\033[92m", "\033[0m") if colour else ("[", "]")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")    # shows a character of several bytes when it is whole
    last = False

    def show_token(row, token, by_llm):
        nonlocal last
        if by_llm != last:
            print(marks[0] if by_llm else marks[1], end="")
        last = by_llm
        if token not in tokenizer.end_ids:                        # no bells, no clearing of the screen
            written = re.sub(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]", "\ufffd", decoder.decode(tokenizer.token_bytes[token]))
            print(written, end="", flush=True)

    start = time.perf_counter()
    try:
        rollout, = relay(slm, llm, tokenizer, [tokenizer.chat(text)], seed=args.seed, on_token=show_token,
                         max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                         llm_temperature=args.llm_temperature, top_p=args.top_p)
    finally:                                                      # also where Ctrl-C has stopped it
        print(decoder.decode(b"", final=True) + (marks[1] if last else ""))
    seconds, calls = time.perf_counter() - start, rollout.served
    again, context, since = 0, len(rollout.prompt), 0             # the LLM's context at each call, all of it sent
    for call in calls:
        context += len(without_commands(rollout.tokens[since:call.position], tokenizer))
        again += context + call.delivered - 1                     # its own last token it reads only with what follows
        context, since = context + call.delivered, call.position + call.delivered
    print(f"{len(rollout.tokens)} tokens, {sum(rollout.by_llm)} by the LLM (rho {rollout.rho:.1%}) in {len(calls)} "
          f"call{'s' * (len(calls) != 1)}; {len(rollout.tokens) / seconds:.0f} tokens/s; "
          f"the LLM read {rollout.cost['llm_prefill'] + rollout.cost['llm_decode']} tokens "
          f"(sending the whole context at each call: {again})")


TOY = dict(temperature=0.7, max_new_tokens=96)
REAL = dict(temperature=0.7, max_new_tokens=2048)


def questions_to_show(args, toy):
    """The questions to show, one by one."""
    if args.interactive:
        with suppress(EOFError):                                     # the end of what is typed
            while True:
                yield input("question> " if sys.stdin.isatty() else "").strip()
    elif args.questions:
        for question in load_questions(args.questions, args.limit):
            yield question.text.removesuffix(f"\n{INSTRUCTION}")
    elif args.question is not None:
        yield args.question
    else:
        piped, own = "", next(toy_questions("eval", random.Random(args.seed), rare=1.0)).text if toy else ""
        with suppress(OSError):                                      # Windows, where one cannot look without waiting
            if sys.stdin and not sys.stdin.isatty():
                if not own or select.select([sys.stdin], [], [], 0)[0]:
                    piped = sys.stdin.read().strip()
                else:                                                # who has a question does not wait for another
                    print("nothing has come through the pipe yet: one of the toy's questions", file=sys.stderr)
        yield piped or own


def main():
    p = parser("Show one relay: the LLM's tokens in colour, or in [brackets] when the output is no terminal.",
               'python relay.py "Dan buys 3 lutes and a basket for 2 coins. How many coins does Dan pay?"', top_p=True)
    p.add_argument("question", nargs="?", help="default: one of the toy's; with real models: standard input")
    p.add_argument("--interactive", action="store_true", help="ask for questions, a line each, until the input ends")
    show_presets(p, TOY, REAL, slm=" (RUN/grpo, before that RUN/warmup)")
    args = p.parse_args()
    run = Run(args.run)
    toy = run.toy and args.llm is None                               # with --slm alone: another SLM for the toy's LLM
    need(args.slm or run.has("warmup"), f"{run.path} holds no trained model; run: {run.command_line('warmup.py')}, "
         "or give --slm, --llm")
    need(args.llm or not args.slm or run.info["stages"], "--slm and --llm go together", WrongArguments)
    need(args.question is None or not (args.questions or args.interactive),
         "a question, --questions and --interactive: only one of them", WrongArguments)
    fill_in(args, TOY if toy else REAL)
    trained = "grpo" if run.has("grpo") else "warmup"
    args.llm_temperature = run.llm_temperature
    device, dtype = machine(args, toy)
    slm, llm, tokenizer = load_pair(args.slm or run.path / trained, args.llm or run.directory("llm"), device, dtype)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for text in questions_to_show(args, toy):
        try:
            need(text.strip(), "the question is empty; give one as an argument, or pipe it in")
            if not args.interactive or not sys.stdin.isatty():       # else it has just been typed
                print(text)
            show(text if toy else f"{text}\n{INSTRUCTION}", slm, llm, tokenizer, args, colour)
        except (ValueError, KeyboardInterrupt) as error:
            if not args.interactive:                                 # where the next question may be fine
                raise
            print(error)
    own = not (args.slm and args.llm)                                # else it is a pair for a run of its own
    stage = next((name for name in ("warmup", "grpo") if not (own and run.has(name))), "eval")
    pair = ["--slm", str(args.slm), "--llm", str(args.llm or run.directory("llm"))] if stage == "warmup" else []
    print(f"next: {(run if own else Run('runs/real')).command_line(f'{stage}.py', *pair, '--questions', 'FILE')}")


if __name__ == "__main__":
    run_script(main)
