"""What tests share: a byte tokenizer, tiny random models of each family, and a model that writes what it is told."""
import itertools
import json
import os
import random
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Tokenizer, save_toy_tokenizer, toy_questions  # noqa: E402
from model import Config, Transformer, parse_config  # noqa: E402

torch.set_num_threads(1)
ON_CPU = dict(os.environ, CUDA_VISIBLE_DEVICES="")     # of scripts in tests: the same on every machine


class ByteTokenizer:
    """Token i is the byte i, 256 ends the text, then come `extra` tokens of several bytes, then ids that nobody has.

    only: the bytes that it has (default: all 256); the others are unknown ids, which may never be sampled.
    """

    def __init__(self, *extra, only=None, unknown=0):
        self.token_bytes = [bytes([i]) for i in range(256)] + [b"<|end|>", *extra] + [b""] * unknown
        self.known = [only is None or i in only for i in range(256)] + [True] * (1 + len(extra)) + [False] * unknown
        self.end_id, self.end_ids = 256, {256}

    def encode_bytes(self, data):
        return list(data)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "replace")

    def chat(self, text):
        return self.encode(f"Q:{text}\nA:")

    def ids(self, *pieces):
        """Ids of pieces: each as one token where there is such a token, else byte by byte; None is the end token."""
        out = []
        for piece in pieces:
            piece = piece.encode() if isinstance(piece, str) else piece
            if piece is None:
                out.append(self.end_id)
            elif piece in self.token_bytes:
                out.append(self.token_bytes.index(piece))
            else:
                out += list(piece)
        return out


class Scripted(Transformer):
    """A model that writes what it is told: the k-th time that row r is asked, the k-th token of script r, then the end.

    scripts: one list of ids for each row, or one for all. `heard` keeps what each row was really given to read, and
    `asked` how often it was asked. Its cache is a real one.
    """

    def __init__(self, tokenizer, *scripts, context=4096):
        super().__init__(Config(vocab_size=len(tokenizer.known), hidden=2, ffn=2, layers=1, heads=1, kv_heads=1,
                                head_dim=2, context=context))
        self.initialize(0)
        self.scripts, self.end = scripts, tokenizer.end_id
        self.heard, self.asked = {}, Counter()

    def forward(self, tokens, cache=None, counts=None, last=False):
        super().forward(tokens, cache, counts, last)
        out = torch.zeros(len(tokens), self.config.vocab_size)
        for slot, row in enumerate(cache.rows[:len(tokens)]):
            script, k = self.scripts[row % len(self.scripts)], self.asked[row]
            out[slot, script[k] if k < len(script) else self.end] = 100.0
            self.asked[row] += 1
        return out

    def hidden_states(self, tokens, cache=None, counts=None):
        for slot, row in enumerate(cache.rows[:len(tokens)]):
            self.heard[row] = self.heard.get(row, []) + tokens[slot, :counts[slot]].tolist()
        return super().hidden_states(tokens, cache, counts)


CONFIGS = {
    "qwen3": dict(model_type="qwen3", head_dim=6, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=False, rope_theta=1e6),
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_theta=5e5,
                  rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                    original_max_position_embeddings=64)),
}


def raw_config(family, **changes):
    """config.json of a tiny model of a family."""
    return dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5) | CONFIGS[family] | changes


def tiny(family, seed=0, dtype=torch.float64, **changes):
    """A tiny random model: every weight random, biases and norms too."""
    model = Transformer(parse_config(raw_config(family, **changes), "config.json")).to(dtype).initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(len(parameter), generator=generator).to(dtype)
        model.embed.weight.normal_(generator=generator)
    return model.eval()


def tokens_of(seed, *shape, vocab=40):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def safetensors(header, data=b"", length=None, before=b"", after=b""):
    """The bytes of a safetensors file, right or wrong."""
    text = header if isinstance(header, bytes) else before + json.dumps(header).encode() + after
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def shuffled(items, seed):
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


@pytest.fixture(scope="session")
def toy_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    save_toy_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(toy_directory):
    return Tokenizer(toy_directory)


def some_questions(split="train", n=400, seed=0, **options):
    return list(itertools.islice(toy_questions(split, random.Random(seed), **options), n))
