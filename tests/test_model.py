"""Tests of model.py: the forward pass and its cache, and model directories in and out.

golden/models/ holds tiny random checkpoints of each family and what transformers makes of them (make_golden_model.py
made it). Where transformers is installed it is asked directly, too. Set RELAYLLM_MODELS to a folder of real
checkpoints to compare those.
"""
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import CONFIGS, raw_config, safetensors, shuffled, tiny, tokens_of
from data import Tokenizer, save_toy_tokenizer
import model as chapter
from model import (Cache, Transformer, forget, load, parse_config, prepack, read_safetensors, rope_frequencies, save,
                   two_products)

FAMILIES = list(CONFIGS)
GOLDEN = Path(__file__).parent / "golden" / "models"
EXPECTED = read_safetensors(GOLDEN / "expected.safetensors")
CHECKPOINTS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
REAL = os.environ.get("RELAYLLM_MODELS")
REAL = sorted(file.parent for file in Path(REAL).glob("*/config.json")) if REAL else []


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def write_weights(path, tensors):
    """A safetensors file of float32 tensors."""
    header, data = {}, b""
    for name, t in tensors.items():
        raw = t.detach().float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(safetensors(header, data))


def refusal(path, **options):
    """The line with which load() refuses a directory."""
    with pytest.raises(ValueError) as error:
        load(path, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The cache

def poison(cache, rows):
    """What a step may not look at: NaN in idle slots and beyond any possible width, huge (finite) numbers behind the
    lengths of the rows of this step. Returns a function that takes it back."""
    saved = [kv.clone() for kv in cache.layers]
    B, longest = len(rows), max(cache.lengths[:len(rows)])
    for kv in cache.layers:
        kv[:, B:] = math.nan
        kv[:, :B, :, longest + 16:] = math.nan          # a step reads at most 16 tokens here
        for slot in range(B):
            kv[:, slot, :, cache.lengths[slot]:longest + 16] = 1e30

    def undo():
        for kv, old in zip(cache.layers, saved):
            kv[:, B:, :, :old.shape[3]] = old[:, B:]
            kv[:, B:, :, old.shape[3]:] = 0
            for slot in range(len(kv[0, :B])):
                tail = slice(cache.lengths[slot], None)
                kv[:, slot, :, tail] = kv[:, slot, :, tail].nan_to_num(0.0, 0.0, 0.0).clamp(-9, 9)
    return undo


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_reading_with_a_cache_equals_reading_whole_sequences(family):
    """Rows come, stop, wait, are reordered, copied and dropped, and each still sees exactly its own tokens (bugs:
    positions shared by the batch, a mask from the longest row, stale memory of a former row)."""
    model, rng = tiny(family), random.Random(1)
    text = {row: tokens_of(row, rng.randint(20, 90)).tolist() for row in range(9)}
    text[7], text[8] = text[2][:15] + text[7], text[2][:15] + text[8]
    whole = {row: model(torch.tensor([t]))[0] for row, t in text.items()}
    cache, at, live, steps = Cache(model, block=8), dict.fromkeys(range(7), 0), list(range(7)), 0
    with torch.no_grad():
        while live:
            rows = rng.sample(live, rng.randint(1, len(live)))
            order = cache.arrange(rows)
            assert sorted(order) == sorted(rows)
            assert cache.lengths[:len(order)] == [at[row] for row in order]
            counts = [min(len(text[row]) - at[row], rng.randint(1, 16) if rng.random() < 0.6 else 1) for row in order]
            tokens = torch.tensor([text[row][at[row]:at[row] + n] + [rng.randrange(40)] * (max(counts) - n)
                                   for row, n in zip(order, counts)])
            undo = poison(cache, order)
            if rng.random() < 0.5:
                out = model(tokens, cache, counts)
                for i, (row, n) in enumerate(zip(order, counts)):
                    torch.testing.assert_close(out[i, :n], whole[row][at[row]:at[row] + n], atol=1e-10, rtol=0)
            else:
                out = model(tokens, cache, counts, last=True)
                for i, (row, n) in enumerate(zip(order, counts)):
                    torch.testing.assert_close(out[i], whole[row][at[row] + n - 1], atol=1e-10, rtol=0)
            undo()
            for row, n in zip(order, counts):
                at[row] += n
            if 7 not in at and at[2] >= 15:
                cache.copy(2, [7, 8], 15)
                at[7] = at[8] = 15
                live += [7, 8]
            done = [row for row in live if at[row] == len(text[row])]
            if done and (rng.random() < 0.5 or len(done) == len(live)):
                cache.drop(done)
            live = [row for row in live if row not in done]
            steps += 1
    assert steps > 20 and 7 in at


def test_memory_never_written_is_zero_after_every_operation():
    """0 * NaN is NaN: fresh capacity from torch.empty would leak through masked attention weights."""
    model = tiny("qwen3").requires_grad_(False)
    cache = Cache(model, block=4)
    for step in range(12):
        rows = shuffled(range(step % 5 + 1), step)
        order = cache.arrange(rows)
        counts = [1 + (row + step) % 3 for row in order]
        tokens = tokens_of(step, len(order), max(counts))
        assert model(tokens, cache, counts).isfinite().all()          # of the padding, too
        if step == 6:
            cache.copy(0, [10, 11], 2)
        if step % 4 == 3:
            cache.drop([0, 10])
        assert all(kv.isfinite().all() for kv in cache.layers)


def test_dropped_rows_give_their_memory_back():
    """A batch's cache stayed at its widest until the last straggler was done."""
    model = tiny("qwen3").requires_grad_(False)
    cache = Cache(model, block=8)
    cache.arrange(range(8))
    model(tokens_of(0, 8, 50), cache, [50] + [3] * 7)
    before = cache.layers[0].numel()
    cache.drop([0, 1, 2, 3, 5])
    assert sorted(cache.rows) == [4, 6, 7] and cache.lengths == [3, 3, 3]
    assert cache.layers[0].numel() * 8 < before
    cache.drop([4, 6, 7])
    assert cache.layers[0].numel() == 0 and cache.rows == []
    cache.arrange([1])                                                 # and it can be used again
    assert model(tokens_of(1, 1, 4), cache, last=True).isfinite().all()


def test_padding_at_the_end_of_whole_sequences_changes_nothing_before_it():
    """A learner pads its batch; a mask the wrong way round would let the padding in."""
    model, tokens = tiny("llama"), tokens_of(3, 2, 12)
    padded = torch.cat((tokens, tokens_of(4, 2, 7)), dim=1)
    torch.testing.assert_close(model(padded)[:, :12], model(tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize("device, dtype, close", [("cpu", torch.float64, 1e-12), ("cuda", torch.float64, 1e-12),
                                                  ("cuda", torch.bfloat16, 0.01)])
def test_attention_as_two_products_is_that_of_the_kernel(device, dtype, close):
    """Scores are far from 0, as those of Qwen2: rounded to 16 bits they would be off by up to 1."""
    if device == "cuda" and not (torch.cuda.is_available() and chapter.WIDE):
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    kv = torch.randn(2, 7, 3, 40, 16, dtype=torch.float64)
    kv[0] += 100
    kv = kv.to(device, dtype)[:, :5, :, :33]                                                    # as the cache gives it
    q = torch.randn(5, 3, 4, 16, dtype=torch.float64).to(device, dtype)
    last = 8 * torch.arange(5).view(5, 1, 1, 1)                                                 # that a row sees
    mask = torch.zeros(5, 1, 1, 33).masked_fill(torch.arange(33) > last, -torch.inf)
    want = F.scaled_dot_product_attention(*(t.double() for t in (q, *kv)), attn_mask=mask.to(device).double())
    assert (two_products(q, *kv, mask.to(device, dtype)) - want).norm() < close * want.norm()
    want = F.scaled_dot_product_attention(*(t.double() for t in (q, *kv)))                      # equally long rows
    assert (two_products(q, *kv, None) - want).norm() < close * want.norm()


def test_checkpointing_changes_neither_loss_nor_gradient():
    """Layers that are computed again without their cache, grid or positions give another gradient, without an error."""
    model, tokens, grads = tiny("qwen2"), tokens_of(5, 2, 9), []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(tokens).logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_same_seed_gives_the_same_fresh_weights_and_no_other_does():
    """Drawn from the global generator, weights would depend on what was drawn before."""
    a, b, c = (tiny("qwen3").initialize(seed).embed.weight.clone() for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

def test_positions_enter_only_as_differences():
    """Rotary attention of a sequence shifted by a hundred positions is the same, or the angles are wrong."""
    model, tokens = tiny("qwen3"), tokens_of(6, 1, 10)
    seen = []
    for at in (torch.arange(10)[None], 100 + torch.arange(10)[None]):
        angle = at[:, None, :, None].double() * rope_frequencies(model.config).repeat(2)
        sign = torch.tensor([-1.0] * 3 + [1.0] * 3)
        seen.append(model.layers[0](model.embed(tokens), angle.cos(), sign * angle.sin()))
    torch.testing.assert_close(*seen, atol=1e-5, rtol=0)


@pytest.mark.skipif(not chapter.X86, reason="weights are packed on x86 CPUs only")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_give_the_same_logits(family, published):
    """Packing is for speed alone; and it forgot the bias, or the head of a model whose head is its embedding."""
    model = tiny(family, dtype=torch.float32, hidden_size=512, head_dim=128, intermediate_size=300, vocab_size=130)
    model, tokens = model.to(published).float(), tokens_of(0, 3, 7)
    with torch.inference_mode():
        plain, packed = model(tokens), prepack(model)
        assert len(packed) == 2 * 4 + 1 and prepack(model) == []                  # every matrix, the head too; and once
        assert (model(tokens) - plain).abs().max() < 1e-5 * plain.abs().max()
    forget(packed)
    assert not any(hasattr(weight, "packed") for weight in model.parameters())


@pytest.mark.skipif(not chapter.FBGEMM, reason="FBGEMM is for x86 CPUs only")
def test_only_weights_that_half_precision_holds_are_packed_in_it():
    """A policy's weights, which learn in float32, were rounded: its log-probabilities were no longer the learner's."""
    model = tiny("qwen2", dtype=torch.float32, hidden_size=512, intermediate_size=300, vocab_size=130)
    published, learnt, large, broken = (m.weight for m in model.matrices()[:4])
    with torch.no_grad():
        for weight in (published, learnt, large, broken):
            weight.copy_(weight.bfloat16())
        published[0, :3] = torch.tensor([2.0**-20 * 1.5, 1e-30, 60000.0])    # to 2^-25, and up to half's largest number
        learnt[-1, -1] = 0.1
        large[-1, -1] = 2.0**17
        broken[-1, -1] = torch.nan
    prepack(model)
    halved = [isinstance(matrix.weight.packed, torch.ScriptObject) for matrix in model.matrices()[:4]]
    assert halved == [True, False, False, False]


@pytest.mark.skipif(not chapter.X86, reason="weights are packed on x86 CPUs only")
@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16])
def test_a_model_that_is_only_sampled_from_holds_its_weights_once(published):
    """A packed copy beside the original took a laptop's memory twice."""
    model = tiny("qwen2", dtype=torch.float32, hidden_size=512, vocab_size=130).to(published).float()
    tokens = tokens_of(0, 3, 7)
    shapes = [p.shape for p in model.parameters()]
    with torch.inference_mode():
        plain = model(tokens)
        prepack(model, free=True)
        assert (model(tokens) - plain).abs().max() < 1e-5 * plain.abs().max()
    assert [p.shape for p in model.parameters()] == shapes                     # so that parameters are counted right
    held = sum(m.weight.untyped_storage().nbytes() for m in model.matrices() if hasattr(m.weight, "packed"))
    assert held <= 4 * len(model.matrices())


def test_llama3_scaling_changes_the_slow_frequencies_only():
    """The high and low limits were swapped, or the wavelength compared with the new context."""
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    sizes = dict(head_dim=128, rope_theta=5e5)
    plain = rope_frequencies(parse_config(raw_config("llama", **sizes, rope_scaling=None), "c"))
    scaled = rope_frequencies(parse_config(raw_config("llama", **sizes, rope_scaling=scaling), "c"))
    turns = 8192 * plain / (2 * math.pi)
    fast, slow = turns > 4, turns < 1
    assert fast.any() and slow.any() and (~fast & ~slow).any()
    assert scaled[fast].equal(plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert ((between < 1) & (between > 1 / 8)).all() and (between.diff() < 0).all()


def test_linear_scaling_divides_all_frequencies():
    """With the older key, "type", it would be taken for a checkpoint without scaling."""
    for key in ("type", "rope_type"):
        config = parse_config(raw_config("llama", rope_scaling={key: "linear", "factor": 4.0}), "c")
        plain = parse_config(raw_config("llama", rope_scaling=None), "c")
        torch.testing.assert_close(rope_frequencies(config), rope_frequencies(plain) / 4)


def test_rope_parameters_mean_what_rope_theta_and_rope_scaling_mean():
    """transformers 5 moved both settings; a reader of the older keys alone falls back to theta 10,000 in silence."""
    old = raw_config("llama")
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    a, b = (rope_frequencies(parse_config(raw, "c")) for raw in (old, new))
    assert a.equal(b)
    plain = {k: v for k, v in raw_config("qwen3").items() if k != "rope_theta"}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert parse_config(plain, "c").rope_theta == 1e6 and parse_config(plain, "c").rope_scaling is None
    both = plain | {"rope_theta": 7.0}                                       # a leftover; transformers 5 passes it over
    assert parse_config(both, "c").rope_theta == 1e6
    both["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    assert parse_config(both, "c").rope_theta == 7.0 and parse_config(both, "c").rope_scaling["factor"] == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Model directories

@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_equal_logits(family, tmp_path):
    """The one table of both layouts: q, k, v and gate, up in the right order, biases and norms included."""
    model = tiny(family, dtype=torch.float32)
    save(model, tmp_path / "m")
    again, tokens = load(tmp_path / "m"), tokens_of(7, 2, 11)
    assert again(tokens).equal(model(tokens))
    save(again, tmp_path / "n")
    assert (tmp_path / "m/model.safetensors").read_bytes() == (tmp_path / "n/model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*/*.part"))


def test_a_saved_model_has_the_names_and_shapes_of_a_published_one(tmp_path):
    """What we write must load elsewhere: separate q, k, v; head_dim 6 of width 16; no lm_head when tied."""
    save(tiny("qwen3"), tmp_path)
    shapes = {name: list(t.shape) for name, t in read_safetensors(tmp_path / "model.safetensors").items()}
    assert shapes["model.embed_tokens.weight"] == [40, 16] and "lm_head.weight" not in shapes
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == [24, 16]
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == [12, 16]
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == [16, 24]
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == [6]
    assert shapes["model.layers.0.mlp.up_proj.weight"] == [24, 16]
    save(tiny("qwen2"), tmp_path)
    names = set(read_safetensors(tmp_path / "model.safetensors"))
    assert "model.layers.0.self_attn.v_proj.bias" in names and "lm_head.weight" in names
    assert "model.layers.0.self_attn.o_proj.bias" not in names
    save(tiny("llama"), tmp_path)
    assert "model.layers.0.self_attn.o_proj.bias" in read_safetensors(tmp_path / "model.safetensors")


def test_a_model_may_be_saved_over_the_directory_it_came_from(tmp_path):
    """Writing into the mapped file destroyed the weights while they were read."""
    model = tiny("llama", dtype=torch.float32)
    save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}\r\n")
    kept = read_safetensors(tmp_path / "model.safetensors")["model.norm.weight"]     # a map that stays open
    again = load(tmp_path)
    save(again, tmp_path, tmp_path)
    tokens = tokens_of(8, 1, 6)
    assert load(tmp_path)(tokens).equal(model(tokens)) and again(tokens).equal(model(tokens))
    assert kept.equal(model.norm.weight) and (tmp_path / "tokenizer.json").read_bytes() == b"{}\r\n"


def test_tokenizer_and_chat_files_are_copied_byte_for_byte_and_weights_are_not(tmp_path):
    """A stale index or config.json copied from the source contradicts the new weights."""
    source = tmp_path / "source"
    save(tiny("qwen3"), source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "tokenizer.model",
                 "generation_config.json"):
        (source / name).write_bytes(f"{name}\r\n\xe9".encode("latin-1"))
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("pickle")
    save(tiny("qwen3", seed=1, vocab_size=41), tmp_path / "out", source)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merges.txt",
                     "chat_template.jinja", "tokenizer.model", "generation_config.json"}
    assert (tmp_path / "out/merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
    assert load(tmp_path / "out").config.vocab_size == 41


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_kept_in_every_dtype(dtype, tmp_path):
    """numpy has no bfloat16: the bytes must be written without it. config.json names the dtype."""
    model = tiny("qwen2", dtype=dtype, torch_dtype="float32")
    save(model, tmp_path)
    same, wide = load(tmp_path, dtype=dtype), load(tmp_path, dtype=torch.float64)
    for a, b, c in zip(model.parameters(), same.parameters(), wide.parameters()):
        assert b.dtype == dtype and a.equal(b) and a.double().equal(c)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and "torch_dtype" not in config
    assert not same.training and same(tokens_of(9, 1, 5)).isfinite().all()


def test_attention_bias_means_the_output_too_for_llama_alone():
    """Qwen2 has biases on q, k and v whatever its config says, and never on o."""
    for family, changes, qkv, out in (("llama", dict(attention_bias=True), True, True), ("llama", {}, True, True),
                                      ("llama", dict(attention_bias=False), False, False), ("qwen2", {}, True, False),
                                      ("qwen2", dict(attention_bias=True), True, False), ("qwen3", {}, False, False)):
        config = parse_config(raw_config(family, **changes), "c")
        assert (config.qkv_bias, config.o_bias) == (qkv, out)


def test_config_keys_that_we_do_not_know_survive(tmp_path):
    """A checkpoint lost its eos_token_id on the way through us."""
    raw = raw_config("qwen3", eos_token_id=[3, 4], architectures=["Qwen3ForCausalLM"], strange={"a": None})
    save(tiny("qwen3", **raw), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).items() >= raw.items()


def test_shards_load_as_one_model(tmp_path):
    """From 3B on checkpoints come in shards: a reader of one file finds nothing, or half a model."""
    model = tiny("llama", dtype=torch.float32)
    save(model, tmp_path)
    tensors = {n: t.clone() for n, t in read_safetensors(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, part in parts.items():
        write_weights(tmp_path / file, {n: tensors[n] for n in part})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}))
    assert load(tmp_path)(tokens_of(1, 1, 8)).equal(model(tokens_of(1, 1, 8)))
    whole = shutil.copytree(tmp_path, tmp_path / "copy")
    save(load(whole), whole, whole)             # the shards, left behind, would be another model
    assert sorted(file.name for file in whole.iterdir()) == ["config.json", "model.safetensors"]
    assert load(whole)(tokens_of(1, 1, 8)).equal(model(tokens_of(1, 1, 8)))
    write_weights(tmp_path / "a-2.safetensors", {n: tensors[n] for n in names[1::2] + names[:1]})
    assert "another shard" in refusal(tmp_path)
    (tmp_path / "a-2.safetensors").unlink()
    assert "a-2.safetensors" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../a-1.safetensors"}}))
    assert "same directory" in refusal(tmp_path)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    """load_state_dict(strict=False) would leave random weights in silence."""
    save(tiny("qwen2", dtype=torch.float32), tmp_path)
    tensors = {n: t.clone() for n, t in read_safetensors(tmp_path / "model.safetensors").items()}
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(15)
    write_weights(tmp_path / "model.safetensors", tensors)
    line = refusal(tmp_path)
    assert "'model.layers.1.self_attn.k_proj.bias' is absent, not [8]" in line
    assert "'model.norm.weight' is [15], not [16]" in line
    assert "'model.layers.2.mlp.up_proj.weight' is [1], not absent" in line
    edit(tmp_path / "config.json", num_hidden_layers=9)
    assert " 86 tensors" in refusal(tmp_path) and len(refusal(tmp_path)) < 1000


def test_without_tie_word_embeddings_the_file_decides(tmp_path):
    """The key may be absent: then a model is tied if and only if it has no lm_head."""
    for family in ("qwen3", "qwen2"):
        model = tiny(family, dtype=torch.float32)
        save(model, tmp_path / family)
        edit(tmp_path / family / "config.json", tie_word_embeddings=None)
        again = load(tmp_path / family)
        assert again.config.tied == model.config.tied
        assert again(tokens_of(2, 1, 5)).equal(model(tokens_of(2, 1, 5)))
        save(again, tmp_path / "saved")                                      # transformers takes its absence for False
        assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] == model.config.tied
    edit(tmp_path / "qwen3/config.json", tie_word_embeddings=False)
    assert "'lm_head.weight' is absent" in refusal(tmp_path / "qwen3")


def test_copies_that_some_checkpoints_keep_are_passed_over(tmp_path):
    """An lm_head beside tie_word_embeddings, an old Llama's rotary_emb.inv_freq: surplus, and no reason to refuse."""
    model = tiny("qwen3", dtype=torch.float32)
    save(model, tmp_path)
    tensors = {n: t.clone() for n, t in read_safetensors(tmp_path / "model.safetensors").items()}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    write_weights(tmp_path / "model.safetensors", tensors)
    again = load(tmp_path)
    assert again.config.tied and again(tokens_of(2, 1, 5)).equal(model(tokens_of(2, 1, 5)))


def test_an_output_head_of_its_own_counts_although_the_config_calls_it_tied(tmp_path):
    """A tied model was trained untied and its config kept: without its head it talks nonsense (so transformers 5)."""
    model = tiny("qwen3", dtype=torch.float32, tie_word_embeddings=False)
    save(model, tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    again = load(tmp_path)
    assert again(tokens_of(2, 1, 5)).equal(model(tokens_of(2, 1, 5)))
    save(again, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("changes, word", [
    (dict(model_type="mamba"), "mamba"), (dict(model_type=None), "model_type"), (dict(vocab_size=-1), "vocab_size"),
    (dict(hidden_size=True), "hidden_size"), (dict(hidden_size="16"), "hidden_size"), (dict(head_dim=7), "heads"),
    (dict(num_key_value_heads=3), "key/value"), (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    (dict(rope_scaling={"rope_type": "llama3"}), "factor"), (dict(rope_scaling="x"), "rope"),
    (dict(use_sliding_window=True), "sliding"), (dict(hidden_act="gelu"), "gelu"), (dict(rope_theta=-1), "rope_theta"),
    (dict(rope_scaling={"rope_type": "linear", "factor": "4"}), "factor"), (dict(rms_norm_eps="x"), "rms_norm_eps"),
    (dict(layer_types=["sliding_attention"]), "full_attention"), (dict(rope_theta=10**400), "rope_theta"),
    (dict(num_hidden_layers=2**31 - 1), "layers"), (dict(vocab_size=2**31 - 1, hidden_size=2**31 - 1), "size"),
    (dict(num_hidden_layers=2000), "2000 layers"),
])
def test_a_foreign_config_is_refused_in_one_line(changes, word, tmp_path):
    """A model that we cannot run must not run wrongly, nor end in a traceback."""
    save(tiny("qwen3"), tmp_path)
    edit(tmp_path / "config.json", **changes)
    assert word in refusal(tmp_path)


def test_a_directory_without_its_files_is_refused_in_one_line(tmp_path):
    """Typing errors in --slm are the most frequent fault of all."""
    assert "config.json" in refusal(tmp_path / "nowhere") and "config.json" in refusal(tmp_path)
    for text in ("{", "[]", '"\udce9', "[" * 100_000):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw_config("qwen3")))
    assert "model.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors" in refusal(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as transformers

def distance(ours, theirs):
    """The greatest difference of two tensors of logits, relative to the greatest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def read_in_pieces(model, tokens):
    """The logits of one text of 40 tokens, twice: two rows read it through a cache in pieces of their own lengths."""
    cache, at, out = Cache(model, block=8), [0, 0], [[], []]
    cache.arrange([0, 1])
    for counts in ((1, 16), (7, 1), (1, 2), (20, 1), (11, 20)):
        pieces = [tokens[0, start:start + n] for start, n in zip(at, counts)]
        logits = model(torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), cache, list(counts))
        for row, n in enumerate(counts):
            out[row].append(logits[row, :n])
            at[row] += n
    return torch.stack([torch.cat(row) for row in out])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_a_checkpoint_are_those_of_transformers(name):
    """A bias forgotten, theta or the scaling of the rotation not found under its older or newer key, halves of q and k
    swapped, the wrong head: each gives a model that talks, only worse."""
    model, tokens = load(GOLDEN / name), EXPECTED["tokens"].long()
    assert distance(model(tokens), EXPECTED[name]) < 1e-5
    assert distance(read_in_pieces(model, tokens), EXPECTED[name]) < 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_agrees_on_fresh_weights_and_reads_what_we_save(name, tmp_path):
    """The golden files might be stale; and a model that only we can read is of no use to anybody."""
    pytest.importorskip("transformers")
    import make_golden_model as golden
    golden.make(name, tmp_path / "theirs", seed=100)
    model, tokens = load(tmp_path / "theirs"), golden.tokens(seed=100)
    want = golden.logits(tmp_path / "theirs", tokens)
    assert distance(model(tokens), want) < 1e-5 and distance(read_in_pieces(model, tokens), want) < 1e-5
    save(model, tmp_path / "ours", tmp_path / "theirs")
    assert distance(golden.logits(tmp_path / "ours", tokens), want) < 1e-5


def test_transformers_loads_the_tokenizer_that_we_copy(tmp_path):
    """AutoTokenizer wants tokenizer_config.json, and a config.json that it understands."""
    transformers = pytest.importorskip("transformers")
    save_toy_tokenizer(tmp_path / "source")
    save(tiny("qwen3", vocab_size=2000), tmp_path / "out", tmp_path / "source")
    ours, theirs = Tokenizer(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("One lamp costs <call>3</call> 7 coins .", "caf\u00e9 \u4f60\u597d\n\n <|im_end|>"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.chat("What does a lamp cost ?") == theirs.apply_chat_template(
        [{"role": "user", "content": "What does a lamp cost ?"}], add_generation_prompt=True, return_dict=False)


@pytest.mark.skipif(not REAL, reason="RELAYLLM_MODELS names no folder of real checkpoints")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
@torch.no_grad()
def test_a_real_checkpoint_writes_what_transformers_would_write(path):
    """Greedy, 200 tokens, three prompts side by side in one cache: each token must be the one that transformers, which
    reads the whole text at once, finds most likely."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load(path), Tokenizer(path)
    texts = [tokenizer.chat(question) for question in (
        "What is the capital of France?", "Tom has 3 boxes of 12 pens and gives away 7. How many pens are left?",
        "Write a Python function that returns the n-th Fibonacci number.")]
    prompts, cache, pending = [len(text) for text in texts], Cache(model), list(texts)
    cache.arrange([0, 1, 2])
    for _ in range(200):
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in pending], batch_first=True)
        chosen = model(batch, cache, [len(p) for p in pending], last=True).argmax(-1).tolist()
        texts, pending = [text + [t] for text, t in zip(texts, chosen)], [[t] for t in chosen]
    reader = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for text, start in zip(texts, prompts):
        want = reader(torch.tensor([text])).logits[0]
        assert distance(model(torch.tensor([text]))[0], want) < 1e-5
        assert want[start - 1:-1].argmax(-1).tolist() == text[start:]


# ---------------------------------------------------------------------------------------------------------------------
# Memory

WATCH = """
import sys, threading, time, torch
from model import load
torch.set_num_threads(1)
peak = 0

def anonymous():
    global peak
    with open("/proc/self/status") as status:
        now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    peak = max(peak, now)
    return now

def watch():
    while True:
        anonymous()
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
for path, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    before = peak = anonymous()
    model = load(path, dtype=getattr(torch, dtype))
    anonymous()
    print((peak - before) / sum(p.nbytes for p in model.parameters()))
    del model
"""


def has_anonymous_memory():
    try:
        return "RssAnon" in Path("/proc/self/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not has_anonymous_memory(), reason="only Linux tells a process its anonymous memory")
def test_loading_needs_no_memory_beyond_the_finished_model():
    """A second copy of the weights, a float32 copy of bfloat16 ones, or an unaligned file read as a whole: 8B models
    then need twice the machine. (The first load also imported torch's compiler, 100 MB, to make weights it never used.)
    Pages of the mapped file do not count: the system takes them back when it likes.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = Transformer(parse_config(raw_config("qwen3", vocab_size=8192, hidden_size=1024, head_dim=64,
                                                    intermediate_size=4096), "c")).initialize(0)
        assert 1.1e8 < sum(p.nbytes for p in model.parameters()) < 1.6e8
        save(model, folder / "float32")
        save(model.bfloat16(), folder / "bfloat16")
        save(model, folder / "unaligned")
        whole = (folder / "bfloat16/model.safetensors").read_bytes()
        length, = struct.unpack_from("<Q", whole)
        (folder / "unaligned/model.safetensors").write_bytes(
            struct.pack("<Q", length + 1) + whole[8:8 + length] + b" " + whole[8 + length:])
        cases = [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("unaligned", "float32")]
        # A fixed threshold makes malloc give the memory of one case back before the next.
        done = subprocess.run([sys.executable, "-c", WATCH, *(str(x) for path, t in cases for x in (folder / path, t))],
                              env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True,
                              cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        factors = dict(zip(cases, map(float, done.stdout.split())))
        assert all(0.9 < factor < 1.15 for factor in factors.values()), factors


# ---------------------------------------------------------------------------------------------------------------------
# The safetensors reader, against files made by hand

def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1, 1], 8, 12)}
BROKEN = {
    "empty": b"", "short": b"\1\0\0\0", "short header": safetensors(TWO, length=10_000),
    "huge header": safetensors(TWO, bytes(12), length=2**63), "header beyond 100 MB": safetensors(TWO, length=2**27),
    "no header": safetensors(b""), "not JSON": safetensors(b"{nonsense", bytes(12)),
    "not UTF-8": safetensors(b'{"\xff": 1}', bytes(12)), "not an object": safetensors([1]),
    "too deep": safetensors(b"[" * 100_000), "trailing bytes": safetensors(TWO, bytes(13)),
    "data too short": safetensors(TWO, bytes(11)),
    "overlap": safetensors({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "same place": safetensors({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, bytes(8)),
    "hole": safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
    "hole at the start": safetensors({"a": entry("F32", [1], 4, 8)}, bytes(8)),
    "out of the file": safetensors({"a": entry("F32", [1000], 0, 4000)}, bytes(8)),
    "too much room": safetensors({"a": entry("F32", [1], 0, 8)}, bytes(8)),
    "wrong size": safetensors({"a": entry("F32", [3], 0, 8)}, bytes(8)),
    "size that overflows": safetensors({"a": entry("F32", [2**32, 2**32], 0, 8)}, bytes(8)),
    "negative shape": safetensors({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8)),
    "negative offset": safetensors({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "backwards": safetensors({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "fraction": safetensors({"a": entry("F32", [2.0], 0, 8)}, bytes(8)),
    "bool": safetensors({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)),
    "unknown dtype": safetensors({"a": entry("F4", [2], 0, 8)}, bytes(8)),
    "dtype a list": safetensors({"a": entry([], [2], 0, 8)}, bytes(8)),
    "three offsets": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "shape a number": safetensors({"a": entry("F32", 2, 0, 8)}, bytes(8)),
    "entry a list": safetensors({"a": [1]}, bytes(8)),
    "zero-size shape that overflows": safetensors({"a": entry("F32", [2**70, 0], 0, 0)}),
    "shape an object": safetensors({"a": entry("F32", {}, 0, 4)}, bytes(4)),
    "shape a text": safetensors({"a": entry("F32", "", 0, 4)}, bytes(4)),
    "number of 5,000 digits": safetensors(b'{"a": ' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_safetensors_file_is_refused_in_one_line(fault, tmp_path):
    """Nothing that a file says about itself is believed: no crash, no wild read, no silent garbage."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(BROKEN[fault])
    with pytest.raises(ValueError) as error:
        read_safetensors(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_tensor_name_cannot_break_the_line(tmp_path):
    """A name is data, too: a newline in it forges a second line of output."""
    save(tiny("qwen3"), tmp_path)
    tensors = {n: t.clone() for n, t in read_safetensors(tmp_path / "model.safetensors").items()}
    write_weights(tmp_path / "model.safetensors", tensors | {"a\nb": torch.zeros(1)})
    refusal(tmp_path)


def test_a_header_over_100_mb_is_refused_before_it_is_read(tmp_path):
    """The format's limit: JSON of a gigabyte takes ten of memory."""
    with open(tmp_path / "x", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)                  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="header of 100000001 bytes"):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("cut", range(0, 140, 7))
def test_a_safetensors_file_cut_anywhere_is_refused(cut, tmp_path):
    """A download that broke off."""
    whole = safetensors(TWO, bytes(12))
    assert len(whole) > 140
    (tmp_path / "x").write_bytes(whole[:cut])
    with pytest.raises(ValueError):
        read_safetensors(tmp_path / "x")


def test_legal_oddities_of_safetensors_load(tmp_path):
    """A check too many refuses files that others read: white space, scalars, empty tensors, unaligned data."""
    data = struct.pack("<3f", 1.5, -2.0, 7.0) + b"\x40\x40"                         # and 3 in bfloat16
    header = {"half": entry("BF16", [1], 12, 14), "__metadata__": {"format": "pt"}, "scalar": entry("F32", [], 8, 12),
              "nothing": entry("F32", [0, 5], 8, 8), "pair": entry("F32", [2, 1], 0, 8),
              "end": entry("F64", [0], 14, 14)}
    for pad in range(9):
        (tmp_path / "x").write_bytes(safetensors(header, data, before=b" \n" * pad, after=b"\t \r\n" + b" " * pad))
        t = read_safetensors(tmp_path / "x")
        assert t["scalar"].shape == () and t["scalar"].item() == 7.0
        assert t["nothing"].shape == (0, 5) and t["end"].dtype == torch.float64
        assert t["pair"].tolist() == [[1.5], [-2.0]] and t["half"].item() == 3.0
        assert set(t) == set(header) - {"__metadata__"}
    (tmp_path / "x").write_bytes(safetensors(b"{}"))
    assert read_safetensors(tmp_path / "x") == {}
