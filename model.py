"""Chapter 1. The transformer: one class, two sizes.

RelayLLM needs two language models that read the same tokens: a small one (SLM) that writes, and a large one (LLM)
that helps. Both are the decoder-only transformer of the Llama and Qwen families:

    x = embed(tokens)
    for each layer:   x = x + attention(rms_norm(x))        grouped-query attention with rotary positions
                      x = x + swiglu(rms_norm(x))
    logits = head(rms_norm(x))                              rms_norm(x) = x / rms(x) * weight, the mean in float32

A relay makes one unusual demand on it. Its rows stop, wait for the other model and go on, each at its own moment, so
every row of a batch has its own length and its own number of new tokens. The KV cache below is written for that: a
row's tokens are read once and stay until the row is done, and the rows of the current batch are brought into its first
slots, so that attention reads a slice of the cache and copies nothing.

The last part reads and writes model directories in the Hugging Face layout (config.json, model.safetensors). A
directory from outside is not trusted: there is no pickle, and every size and offset is checked before it is used.

Shapes in this file: B rows, T tokens of a row in this pass, W that a row can see, H heads, D = head_dim, V logits.

Left out: dropout (no stage uses it); mixture of experts, sliding windows, quantization and YaRN (the families
that the paper uses need none of them).
Sources: RMSNorm (arXiv 1910.07467), RoPE (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202).
"""
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclass
class Config:
    """The shape of a transformer. `raw` keeps config.json as it was read, to be written back by save()."""
    vocab_size: int
    hidden: int            # width of the residual stream
    ffn: int               # width of the SwiGLU's inside
    layers: int
    heads: int             # query heads
    kv_heads: int          # key/value heads; heads / kv_heads queries share one
    head_dim: int          # not always hidden / heads (Qwen3)
    context: int = 32768   # tokens, prompt and response together
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # only llama3's, and linear
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    tied: bool = True      # the output head is the embedding matrix
    raw: dict = field(default_factory=dict, repr=False, compare=False)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass

def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer, eq. 34), in the half-split layout of the published checkpoints.

    Halves (a, b) of x become (a cos - b sin, b cos + a sin). x: (B, H, T, D). cos, sin: (B or 1, 1, T, D): a pair's
    angle stands in both halves, and sin's first half is negated. Returns x's shape and dtype.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def rope_frequencies(config):
    """Angle per position for each of the D/2 pairs, (D/2,) float32: theta^(-2i/D) (RoFormer, section 3.2.2).

    Llama 3's scaling divides by `factor` the frequencies whose wavelength exceeds the old context, keeps the fast
    ones, and blends between (Llama 3 herd of models, arXiv 2407.21783; constants from the checkpoint's config).
    """
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # within the context of pretraining
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling["factor"]


class Grid(NamedTuple):
    """Sequences without padding, for learning: N tokens in one list, and how they stand in rows for attention.

    Most of a layer's work looks at one token alone, so it pays to have each token once: no padding, and a prompt that
    many rows begin with only one time. pack() in warmup.py makes them, and has an example.
    """
    take: torch.Tensor     # (B, T) int64: the place in the list of each row's tokens; anything behind a row's end
    put: torch.Tensor      # (N,) int64: row * T + column where each token stands (one of them: its copies are equal)


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    q, k and v share one matrix, and so do gate and up: three matrix products fewer, where a decoding step is bound by
    the number of operations and the bytes of weights. (linear(m, x) is m(x), or the same by a faster way; see below.)
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.attn_norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.qkv = nn.Linear(c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps), nn.RMSNorm(c.head_dim, c.norm_eps)
        self.out = nn.Linear(c.heads * c.head_dim, c.hidden, bias=c.o_bias)
        self.ffn_norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.gate_up = nn.Linear(c.hidden, 2 * c.ffn, bias=c.mlp_bias)
        self.down = nn.Linear(c.ffn, c.hidden, bias=c.mlp_bias)

    def forward(self, x, cos, sin, past=None, grid=None):
        """x: (B, T, hidden), or with a Grid (N, hidden). past: see Cache.access(); None for whole sequences."""
        x = x + linear(self.out, self.attention(self.attn_norm(x), cos, sin, past, grid))
        gate, up = linear(self.gate_up, self.ffn_norm(x)).chunk(2, dim=-1)
        return x + linear(self.down, F.silu(gate) * up)

    def attention(self, x, cos, sin, past, grid):
        """Causal attention of the normed x, (B, T, hidden) or (N, hidden), to heads * head_dim numbers a token."""
        c, qkv = self.config, linear(self.qkv, x)
        if grid is not None:                                                   # (N, ...) to (B, T, ...)
            qkv = F.embedding(grid.take, qkv)                                  # qkv[grid.take], with a faster gradient
        B, T, _ = qkv.shape
        qkv = qkv.view(B, T, -1, c.head_dim).transpose(1, 2)                   # (B, heads + 2 * kv_heads, T, D)
        qk, v = qkv.split((c.heads + c.kv_heads, c.kv_heads), dim=1)
        if c.qk_norm:
            q, k = qk.split((c.heads, c.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split((c.heads, c.kv_heads), dim=1)        # one rotation for both: fewer operations
        group = c.heads // c.kv_heads
        if past is None:                       # is_causal wants a key for each query head: here the keys are copied
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            if q.device.type == "cpu" and q.dtype.itemsize == 2:               # else the gradient takes twice as long
                q, k, v = q.float(), k.float(), v.float()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).to(x.dtype)
        else:
            k, v, mask = past(k, v)                                            # (B, kv_heads, W, D), all tokens so far
            # All queries of a group see the same keys: stacked along the time axis they share them without a copy.
            q = q.reshape(B, c.kv_heads, group * T, c.head_dim)
            # A decoding step (see below); for one row that needs no mask PyTorch's kernel is the faster one.
            by_hand = T == 1 and (B > 1 or mask is not None) and two_products_pay(q, c)
            y = (two_products if by_hand else F.scaled_dot_product_attention)(q, k, v, attn_mask=mask)
        y = y.reshape(B, c.heads, T, c.head_dim).transpose(1, 2).reshape(B, T, -1)
        return y if grid is None else F.embedding(grid.put, y.flatten(0, 1))   # and back to (N, ...)


class Transformer(nn.Module):
    """The whole model: embedding, layers, final norm, output head. Calling it is forward(): tokens to logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # nn.Embedding() draws its weights, which on load()'s meta device imports torch's compiler: 66 MB, two seconds.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.checkpointing = False  # True: recompute each layer in the backward pass instead of keeping its insides
        self.freq = None            # rope_frequencies on this model's device, made at the first forward pass

    def initialize(self, seed):
        """Fresh weights: normal with standard deviation fan_in^-0.5 (embedding: 0.05), zero biases. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.05 if parameter is self.embed.weight else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return self

    def hidden_states(self, tokens, cache=None, counts=None, grid=None):
        """The last layer's normed output, (B, T, hidden), for tokens (B, T); with a Grid, (N, hidden) for tokens (N,).

        With a cache, row i is the cache's slot i, its tokens stand after those it holds, and only the first counts[i]
        of them are real (default: all T); the rest is padding, whose outputs mean nothing. Without one, every row is a
        whole sequence from position 0; padding at its end is seen by nothing before it.
        """
        B, T = tokens.shape if grid is None else grid.take.shape
        if self.freq is None or self.freq.device != tokens.device:
            self.freq = rope_frequencies(self.config).to(tokens.device)
        if cache is None:
            position, past = torch.arange(T, device=tokens.device)[None], [None] * len(self.layers)    # (1, T)
        elif T == 1 and cache.records and (step := cache.recorded(self, B)):     # on a GPU: the same, launched as one
            return step.replay(tokens)
        else:
            position, past = cache.open(T, [T] * B if counts is None else counts)                      # (B, T)
        angle = position[:, None, :, None].float() * self.freq                 # (B or 1, 1, T, D/2)
        x, cos, sin = self.embed(tokens), angle.cos(), angle.sin()
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
        for layer, layer_past in zip(self.layers, past):
            inputs = x, cos, sin, layer_past, grid
            recompute = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        return self.norm(x)

    def logits(self, hidden):
        """(..., hidden) to (..., vocab_size), in the model's dtype."""
        return linear(self.embed if self.config.tied else self.head, hidden)

    def matrices(self):
        """The modules whose weight is a matrix to multiply with."""
        return [m for m in self.modules() if isinstance(m, nn.Linear)] + ([self.embed] if self.config.tied else [])

    def forward(self, tokens, cache=None, counts=None, last=False):
        """Next-token logits: (B, T, V), or with last=True (B, V), those after each row's last real token alone.

        tokens: (B, T) int64. cache, counts: as in hidden_states(). last=True never makes a long prompt's (T, V) logits.
        """
        x = self.hidden_states(tokens, cache, counts)
        if last:
            x = x[:, -1] if counts is None or x.shape[1] == 1 else x[list(range(len(x))), [n - 1 for n in counts]]
        return self.logits(x)


# ---------------------------------------------------------------------------------------------------------------------
# The KV cache

class Cache:
    """Keys and values of all tokens that a model has read, for rows of different lengths.

    A row is one roll-out; a slot is its present place in the tensors, one per layer: (2, slots, kv_heads, capacity, D).
    arrange() brings the rows of the next batch to the front. Capacity grows in blocks of tokens. What lies behind a
    row's length is always finite (zeros, or padding that was read), because a masked weight of 0 times NaN is NaN.
    """

    def __init__(self, model, block=32):
        self.config = model.config
        self.like = model.embed.weight          # for its device and dtype
        self.records = self.like.is_cuda        # see RecordedStep
        self.block = 128 if self.records else block
        self.rows, self.lengths = [], []        # slot -> row; slot -> tokens held
        self.layers = [self.like.new_zeros(2, 0, self.config.kv_heads, 0, self.config.head_dim)] * self.config.layers
        self.resize(0, 0)

    def resize(self, slots, tokens):
        """Reallocate to this many slots and tokens, one layer after the other: never two whole caches at once."""
        capacity = -(-tokens // self.block) * self.block                         # whole blocks
        for i, kv in enumerate(self.layers):                                     # a negative number cuts off
            self.layers[i] = F.pad(kv, (0, 0, 0, capacity - kv.shape[3], 0, 0, 0, slots - kv.shape[1]))
        self.taken, self.steps = Counter(), {}  # number of slots -> decoding steps taken with it; their RecordedStep

    def arrange(self, rows):
        """Bring `rows` to the first slots (any order among them), new rows with length 0. Returns them slot by slot."""
        if rows == self.rows[:len(rows)]:       # as in most steps: nobody came, left or waits
            return rows
        here, wanted, n, first = set(self.rows), set(rows), len(rows), len(self.rows)
        new = [row for row in rows if row not in here]
        self.rows, self.lengths = self.rows + new, self.lengths + [0] * len(new)
        if len(self.rows) > self.layers[0].shape[1]:
            self.resize(len(self.rows), self.layers[0].shape[3])
        out = [slot for slot in range(n) if self.rows[slot] not in wanted]     # stand in front, have to leave
        back = [slot for slot in range(n, len(self.rows)) if self.rows[slot] in wanted]
        for kv in self.layers:
            if new:
                kv[:, first:len(self.rows)] = 0     # what an earlier row left here may have overflowed
            if out:
                kv[:, out + back] = kv[:, back + out]
        for one, other in zip(out, back):
            for held in (self.rows, self.lengths):
                held[one], held[other] = held[other], held[one]
        return self.rows[:n]

    def copy(self, source, rows, length):
        """Give new `rows` the first `length` tokens of row `source`: a prompt is read once for all its roll-outs."""
        self.arrange(rows)
        at = self.rows.index(source)
        for kv in self.layers:
            kv[:, :len(rows), :, :length] = kv[:, at:at + 1, :, :length]
        self.lengths[:len(rows)] = [length] * len(rows)

    def drop(self, rows):
        """Forget finished rows. Memory goes back when a fifth of the slots stand empty (on a GPU half of them, since
        new tensors want new recordings)."""
        gone = set(rows)
        kept = [row for row in self.rows if row not in gone]
        self.arrange(kept)
        self.rows, self.lengths = self.rows[:len(kept)], self.lengths[:len(kept)]
        if len(kept) <= (0.5 if self.records else 0.8) * self.layers[0].shape[1]:
            self.resize(len(kept), max(self.lengths, default=0))

    def open(self, T, counts):
        """Make room for T more tokens in the first slots, of which the first counts[i] of slot i are to stay. Returns
        their positions (B, T), and what each layer's attention calls (see access)."""
        lengths, device = self.lengths[:len(counts)], self.like.device
        width = max(lengths) + T
        if width > self.layers[0].shape[3]:
            self.resize(self.layers[0].shape[1], width)
        self.lengths[:len(counts)] = [length + count for length, count in zip(lengths, counts)]
        position = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)
        return position, self.access(position, width, masked=T > 1 or min(lengths) + 1 < width)

    def access(self, position, width, masked=True):
        """For tokens at `position` (B, T): for each layer the function that its attention calls.

        past(k, v) stores the new keys and values (B, kv_heads, T, D) and returns the first `width` tokens of these
        rows, as views of the cache, with the mask (B, 1, group * T or 1, width), which is added to the scores: a token
        sees its own row up to itself. None when all see all. Mask and addresses are made once for all layers.
        """
        (B, T), kv_heads, device = position.shape, self.config.kv_heads, position.device
        slots, capacity = self.layers[0].shape[1], self.layers[0].shape[3]
        mask = None
        if masked:
            unseen = torch.arange(width, device=device) > position[:, :, None]                # (B, T, width)
            mask = torch.zeros(unseen.shape, dtype=self.like.dtype, device=device).masked_fill_(unseen, -torch.inf)
            mask = mask[:, None].repeat(1, 1, self.config.heads // kv_heads, 1) if T > 1 else mask[:, None]
        # Flattened, a layer's cache is a list of vectors of D numbers; that of (key or value, slot, head, token) stands
        # at ((kind * slots + slot) * kv_heads + head) * capacity + token. So one index_copy_ stores all that is new.
        lists = torch.arange(2 * slots * kv_heads, device=device).view(2, slots, kv_heads, 1)[:, :B] * capacity
        address = (lists + position[:, None]).view(-1)                                        # of (2, B, kv_heads, T)

        def past(kv, k, v):
            new = torch.stack((k, v))                                                         # (2, B, kv_heads, T, D)
            kv.view(-1, kv.shape[-1]).index_copy_(0, address, new.view(-1, kv.shape[-1]))
            return *kv[:, :B, :, :width], mask
        return [partial(past, kv) for kv in self.layers]

    def recorded(self, model, B):
        """The RecordedStep of the first B slots, from their fourth decoding step on; until then None."""
        slots, capacity = self.layers[0].shape[1], self.layers[0].shape[3]
        rows = min(1 << (B - 1).bit_length(), slots)       # powers of two: few recordings serve any number of rows
        if max(self.lengths[:rows]) == capacity:
            self.resize(slots, capacity + 1)
        self.taken[rows] += 1
        if self.taken[rows] == RECORD:
            self.steps[rows] = RecordedStep(model, self, rows)
        return self.steps.get(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Faster products and attention, for decoding (skip it on a first reading)

X86 = (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
       and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))     # private: another release may not have it
FBGEMM = (X86 and torch.backends.quantized.engine in ("x86", "fbgemm")
          and hasattr(torch.ops.quantized, "linear_prepack_fp16"))


def prepack(model, free=False):
    """Copy weight matrices into the order in which matrix products on x86 CPUs read them. Elsewhere: nothing.

    PyTorch brings a matrix into that order anew for every product, which for few rows takes longer than the product:
    packed for oneDNN, a decoding step of 1 to 32 rows takes a half to two thirds of the time. Float32 weights that came
    from a checkpoint of 16 bits are packed in half precision, for FBGEMM: half as much to read from memory, a half to
    70% of that time. (Matrices of up to 2^16 numbers are in a processor's cache anyway, and left alone.)

    The copies do not follow the weights: whoever samples from a model that learns calls forget() with what this
    returns. free=True is for one that does not learn: the originals are freed.
    """
    packed, embed = [], model.embed.weight
    single = embed.dtype == torch.float32
    if not X86 or embed.device.type != "cpu" or not (
            single or embed.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return packed
    for matrix in model.matrices():
        weight, data = matrix.weight, matrix.weight.detach()
        if weight.numel() > 2**16 and not hasattr(weight, "packed"):
            if FBGEMM and single and fits_half(data):
                weight.packed = torch.ops.quantized.linear_prepack_fp16(data, getattr(matrix, "bias", None))
            else:
                weight.packed = torch.ops.mkldnn._reorder_linear_weight(data)
            packed.append(weight)
            if free and weight is not embed:               # whose rows are still looked up
                weight.data = data.new_zeros(1).expand(data.shape)
    return packed


def fits_half(weight):
    """Whether half precision holds these float32 numbers to 2^-25 (3e-8): those of bfloat16 exactly down to 2^-17, and
    smaller ones to that. Weights that have learnt in float32 do not fit."""
    return all((part.half().float() - part).abs().max() <= 2**-25 for part in weight.split(256))


def forget(weights):
    """Drop the packed copies of these weights."""
    for weight in weights:
        del weight.packed


def linear(matrix, x):
    """x W^T + b: (..., in) to (..., out), by the packed copy of W where there is one."""
    packed, bias = getattr(matrix.weight, "packed", None), getattr(matrix, "bias", None)    # an embedding has no bias
    if packed is None:
        return F.linear(x, matrix.weight, bias)
    if isinstance(packed, torch.ScriptObject):             # FBGEMM's, in half precision; the bias is in it
        return torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


WIDE = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None    # products of 16 bits kept in 32, on CUDA
RECORD = 4      # the 4th decoding step of a given number of rows is recorded: that takes the time of two steps


def two_products(q, k, v, attn_mask):
    """F.scaled_dot_product_attention written out, softmax(q k^T D^-0.5 + mask) v: for one new token a row.

    PyTorch's kernels are made for many queries, and on a GPU take for one up to five times as long. Scores of 16 bits
    are kept in 32. q: (B, kv_heads, heads / kv_heads, D). k, v: (B, kv_heads, W, D). attn_mask: (B, 1, 1, W), or None.
    """
    product = partial(torch.bmm, out_dtype=torch.float32) if q.dtype.itemsize == 2 else torch.bmm
    scores = product(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2])       # (B, H, T, W)
    scale = q.shape[-1] ** -0.5
    scores = scores * scale if attn_mask is None else torch.add(attn_mask, scores, alpha=scale)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def two_products_pay(q, config):
    """Whether two_products() is faster and as exact. Qwen2's biases make keys too large for the ten bits of TF32, in
    which the scripts let a GPU multiply float32."""
    if q.dtype.itemsize == 2:
        return q.is_cuda and WIDE
    if q.is_cuda:
        return not config.qkv_bias or torch.get_float32_matmul_precision() == "highest"
    return q.device.type == "cpu" and torch.get_num_threads() > 1      # with one it takes as long


class RecordedStep:
    """A decoding step, one token a row, recorded on a CUDA GPU and then replayed (a CUDA graph).

    A step launches some 25 operations a layer; for a small model or few rows that takes several times as long as to
    compute them, and a graph is launched as one. It holds for the cache's tensors as they are, so they grow in larger
    blocks there. Slots behind the batch compute too: what they store stands behind their row's length, until its next
    token comes.
    """
    records = False     # while the step is recorded this is the cache of hidden_states(): nothing to replay yet

    def __init__(self, model, cache, rows):
        self.cache, self.graph = cache, torch.cuda.CUDAGraph()
        self.tokens, self.position = torch.zeros(2, rows, 1, dtype=torch.int64, device=cache.like.device)
        aside = side_stream(cache.like.device)             # nothing can be recorded on the default one
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.graph.capture_begin()
            self.out = model.hidden_states(self.tokens, self)
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(aside)

    def open(self, T, counts):
        """Cache.open() while the step is recorded: all slots, the whole capacity."""
        return self.position, self.cache.access(self.position, self.cache.layers[0].shape[3])

    def replay(self, tokens):
        """Transformer.hidden_states() of tokens (B, 1); what it returns the next replay overwrites."""
        B, lengths = len(tokens), self.cache.lengths
        here = lengths[:len(self.position)]
        self.tokens[:B] = tokens
        self.position[:len(here), 0] = torch.tensor(here)
        self.graph.replay()
        lengths[:B] = [length + 1 for length in lengths[:B]]
        return self.out[:B]


@lru_cache
def side_stream(device):
    """The stream that steps are recorded on: one for all, since each keeps working memory of its own."""
    return torch.cuda.Stream(device)


# ---------------------------------------------------------------------------------------------------------------------
# Model directories (skip it on a first reading; but need() is everywhere: a ValueError with a line unless all is fine)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROPE_NEEDS = {"default": [], "linear": ["factor"],      # what each way of scaling the rotations needs to know
              "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
PARTS = {   # our module: what a checkpoint calls it, or the parts that lie in it one below the other
    "embed": "embed_tokens", "norm": "norm", "head": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "out": "self_attn.o_proj",
    "gate_up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj"}


@contextmanager
def naming(path):
    """Whatever turns out to be wrong with a file becomes a ValueError of one line that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:        # it holds other things than it should
        raise ValueError(f"{path}: malformed ({error!r})") from None


def need(fine, fault, error=ValueError):
    """ValueError (or another) that says the fault, unless all is fine."""
    if not fine:
        raise error(fault)


def read_json(path, default=None):
    """The JSON object in a file (`default`, where given, if there is none); ValueError with one line otherwise."""
    if default is not None and not Path(path).exists():
        return default
    with naming(path):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        need(isinstance(value, dict), "not a JSON object")
    return value


def parse_config(raw, path):
    """What config.json of a Qwen3, Qwen2 or Llama checkpoint says, as a Config; ValueError for what we cannot run."""
    def number(key, default=None, kinds=int, values=raw):
        value = default if values.get(key) is None else values[key]
        need(isinstance(value, kinds) and value is not True and 0 < value < (2**24 if kinds is int else 1e30),
             f"{key} is {value!r}, not a positive number")
        return value

    with naming(path):
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}     # older; transformers 5, which reads both
        rope = dict(rope) if isinstance(rope, dict) else {"rope_type": rope}
        rope["rope_type"] = scaling = rope.get("rope_type", rope.get("type", "default"))
        kind = raw.get("model_type")
        for key, value, supported in (
                ("model_type", kind, ["qwen3", "qwen2", "llama"]), ("rope type", scaling, list(ROPE_NEEDS)),
                ("hidden_act", raw.get("hidden_act", "silu"), ["silu"]),
                ("use_sliding_window", raw.get("use_sliding_window") or False, [False]),
                *(("layer_types", layer, ["full_attention"]) for layer in raw.get("layer_types") or ())):
            need(value in supported, f"{key} {value!r} is not supported (supported: {', '.join(map(str, supported))})")
        for key in ROPE_NEEDS[scaling]:
            number(key, kinds=(int, float), values=rope)
        need(scaling != "llama3" or rope["high_freq_factor"] > rope["low_freq_factor"],
             "high_freq_factor must exceed low_freq_factor")
        heads, hidden, biased = number("num_attention_heads"), number("hidden_size"), bool(raw.get("attention_bias"))
        c = Config(
            vocab_size=number("vocab_size"), hidden=hidden, ffn=number("intermediate_size"),
            layers=number("num_hidden_layers"), heads=heads, kv_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", 128 if kind == "qwen3" else max(hidden // heads, 1)),
            context=number("max_position_embeddings", 2048), rope_scaling=None if scaling == "default" else rope,
            rope_theta=float(number("rope_theta", 10000.0, (int, float), rope if rope.get("rope_theta") else raw)),
            norm_eps=float(number("rms_norm_eps", 1e-6, (int, float))),
            qkv_bias=biased or kind == "qwen2",           # Qwen2 always has them, and its config does not say so
            o_bias=biased and kind != "qwen2", mlp_bias=bool(raw.get("mlp_bias")), qk_norm=kind == "qwen3",
            tied=bool(raw.get("tie_word_embeddings")), raw=raw)
        need(c.layers <= 1000 and c.heads % c.kv_heads == 0 and c.head_dim % 2 == 0, f"{c.layers} layers, {c.heads} "
             f"heads, {c.kv_heads} key/value heads of {c.head_dim} do not fit together")
    return c


def read_safetensors(path):
    """The tensors of a safetensors file, {name: tensor}, memory-mapped: nothing is read before it is used.

    The file: 8 bytes, little-endian, the header's length; the header, JSON: {name: {dtype, shape, data_offsets}};
    then the tensors, end to end without holes. ValueError with one line for everything that departs from it. After a
    header of unusual length they lie at addresses that their dtype forbids: copy before computing (see load).
    """
    with naming(path):
        data = np.memmap(path, np.uint8, "c")                            # copy on write: nobody changes the file
        start = 8 + int.from_bytes(data[:8], "little")
        need(start <= min(100_000_008, len(data)),                       # the format's own limit, and the file's
             f"header of {start - 8} bytes in a file of {len(data)}")
        header, tensors, end = json.loads(data[8:start].tobytes().decode()), {}, 0
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape = entry["dtype"], entry["shape"]
            need(kind in DTYPES, f"tensor {name!r} has dtype {kind!r} (supported: {', '.join(DTYPES)})")
            need(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
                 and math.prod(n or 1 for n in shape) < 2**48, f"tensor {name!r} has no sane shape")
            begin, end = end, end + math.prod(shape) * DTYPES[kind].itemsize    # it begins where the one before it ends
            need(entry["data_offsets"] == [begin, end] and {*map(type, entry["data_offsets"])} == {int}
                 and start + end <= len(data),
                 f"tensor {name!r} should fill bytes {begin} to {end} behind the header, without overlap or hole")
            tensors[name] = torch.from_numpy(data[start + begin:start + end]).view(DTYPES[kind]).view(shape)
        need(start + end == len(data), f"{len(data) - start - end} bytes behind its last tensor")
    return tensors


def checkpoint_tensors(model):
    """{name in a checkpoint: view of our parameter}. The one place that knows both layouts: load() copies into the
    views, save() writes them."""
    c, tensors = model.config, {}
    for name, parameter in model.named_parameters():                     # such as layers.0.qkv.weight
        *layer, module, kind = name.rsplit(".", 2)
        parts = PARTS[module].split()
        heads = (c.heads, c.kv_heads, c.kv_heads) if module == "qkv" else ()
        rows = [n * c.head_dim for n in heads] or len(parameter) // len(parts)
        for part, view in zip(parts, parameter.split(rows)):
            tensors[".".join(["model", *layer, part, kind]).replace("model.lm_head", "lm_head")] = view
    return tensors


def weight_files(path):
    """model.safetensors, or else the shards that model.safetensors.index.json names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    names = read_json(index).get("weight_map")
    need(isinstance(names, dict) and all(re.fullmatch(r"[^/\\:\0-\x1f]+\.safetensors", str(name))
                                         for name in names.values()),
         f"{index}: weight_map must map tensors to safetensors files of the same directory")
    return [path / name for name in sorted(set(names.values()))]


def progress_bar(*args, disable=False, **options):
    """tqdm's; of several processes only the first one shows it. In a file it comes every ten seconds."""
    return tqdm(*args, dynamic_ncols=True, disable=disable or os.environ.get("RANK", "0") != "0",
                mininterval=0.1 if sys.stderr and sys.stderr.isatty() else 10, **options)


def digest(value):
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(path):
    """A hash of a model directory's weights: tells one model from another, wherever they lie."""
    weights, block = hashlib.sha256(), 2**26
    for file in weight_files(path):
        with naming(file):
            data = np.memmap(file, np.uint8, "r")
            for start in progress_bar(range(0, len(data), block), desc=f"hash {file}", delay=5, leave=False):
                weights.update(data[start:start + block])
    return weights.hexdigest()


def read_config(path):
    """The Config of a model directory; ValueError for what is no such directory, or of a family we cannot run."""
    need((path / "config.json").exists(), f"{path}: no model directory (it has no config.json); a published model is "
         "downloaded by: hf download NAME --local-dir DIR")
    return parse_config(read_json(path / "config.json"), path / "config.json")


def load(path, device="cpu", dtype=torch.float32):
    """The model of a directory with config.json and safetensors weights, on `device` in `dtype`.

    Raises ValueError with one line that names the file and the fault. Tensors are converted one at a time from the
    mapped file, so the memory needed is that of the finished model.
    """
    path = Path(path)
    config, found = read_config(path), {}
    for file in weight_files(path):
        tensors = read_safetensors(file)
        need(not found.keys() & tensors, f"{file}: some of its tensors stand in another shard too")
        found |= tensors
    head, embed = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    config.tied = bool(config.raw.get("tie_word_embeddings", head is None))
    if config.tied and None not in (head, embed):   # the config says tied, the head is another matrix: then it is not
        config.tied = torch.equal(*(t.flatten().view(torch.uint8) for t in (head, embed)))
    with naming(path / "config.json"), torch.device("meta"):    # shapes only, so that a wrong file costs no memory
        model = Transformer(config)
    wanted, there = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (checkpoint_tensors(model), found))
    faults = [f"{name!r} is {there.get(name, 'absent')}, not {wanted.get(name, 'absent')}"
              for name in wanted | there if there.get(name) != wanted.get(name)
              and (name in wanted or not name.endswith(("lm_head.weight", "rotary_emb.inv_freq")))]     # spare copies
    need(not faults, f"{path}: {len(faults)} tensors do not fit config.json: {'; '.join(faults[:8])}")
    model.load_state_dict({name: torch.empty(p.shape, dtype=dtype, device=device)     # to_empty() would do it, but
                           for name, p in model.named_parameters()}, assign=True)     # imports torch's compiler, too
    with torch.no_grad():
        for name, view in progress_bar(checkpoint_tensors(model).items(), desc=f"load {path}", delay=5, leave=False):
            tensor = found.pop(name)
            if tensor.data_ptr() % tensor.element_size():   # unaligned: copied byte by byte
                tensor = tensor.view(torch.uint8).clone().view(tensor.dtype)
            view.copy_(tensor)
    return model.eval()


def write_beside(path, write):
    """Write a file under another name and move it over `path`: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:                    # such as a full disk, which does not say of which file it speaks
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file, beside and then over what is there."""
    write_beside(path, lambda file: file.write(json.dumps(value, indent=2).encode() + b"\n"))


def save(model, path, source=None):
    """Write `model` as a directory that load(), transformers and vLLM read, in the model's dtype.

    source: the directory it came from; its tokenizer and chat files are copied byte for byte. It may be `path` itself.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    stale = {*weight_files(path), path / "model.safetensors.index.json"} - {path / "model.safetensors"}
    tensors, names = checkpoint_tensors(model), {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [end, end := end + t.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)             # the data starts aligned
    blocks = (t.detach().cpu().view(torch.uint8).numpy() for t in tensors.values())    # one by one: no second model
    write_beside(path / "model.safetensors",
                 lambda file: file.writelines(itertools.chain([len(text).to_bytes(8, "little"), text], blocks)))
    for file in sorted(Path(source).iterdir() if source is not None else ()):
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not re.search("^config|safetensors", file.name):
            write_beside(path / file.name, lambda copy: copy.write(file.read_bytes()))
    config = dict(model.config.raw, dtype=str(model.embed.weight.dtype).removeprefix("torch."),
                  tie_word_embeddings=model.config.tied)   # where it is absent, transformers expects an lm_head
    config.pop("torch_dtype", None)             # the older name of dtype
    write_json(path / "config.json", config)
    for file in stale:                          # what was there before in shards is another model now
        file.unlink(missing_ok=True)
