"""Make tests/golden/models/: tiny random checkpoints of each family, and the logits that transformers gives for them.

Needs transformers (which brings safetensors); the project and its tests do not. Run it once, from anywhere:

    pip install transformers && python tests/make_golden_model.py

transformers writes each checkpoint; where OLDER says so, its config.json is put back into the keys of the years before
transformers 5. expected.safetensors holds "tokens" and, by the checkpoint's name, their logits in float32.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).parent / "golden" / "models"
VOCAB, LENGTH = 60, 40

SIZES = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, max_position_embeddings=256,
             num_attention_heads=3, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5)
# Angles small enough, and an old context short enough, that some frequencies are kept, some blended, some divided.
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
MILLION = dict(rope_type="default", rope_theta=1e6)
QWEN3 = dict(model_type="qwen3", num_attention_heads=4, num_key_value_heads=2)  # heads times head_dim is not the width
QWEN2 = dict(model_type="qwen2", num_attention_heads=6, num_key_value_heads=2, head_dim=4)
MODELS = {
    "qwen3": dict(QWEN3, tie_word_embeddings=True, rope_parameters=MILLION),
    "qwen3-untied": dict(QWEN3, tie_word_embeddings=False, rope_parameters=MILLION, attention_bias=True),
    "qwen2": dict(QWEN2, tie_word_embeddings=False, rope_parameters=MILLION),
    "qwen2-bf16": dict(QWEN2, tie_word_embeddings=True, rope_parameters=MILLION, dtype="bfloat16"),
    "llama": dict(model_type="llama", tie_word_embeddings=True),
    "llama3": dict(model_type="llama", tie_word_embeddings=False, rope_parameters=LLAMA3),
    "llama3-sharded": dict(model_type="llama", tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama-biases-fp16": dict(model_type="llama", attention_bias=True, mlp_bias=True, dtype="float16"),
    "llama-linear": dict(model_type="llama", num_key_value_heads=3, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
}
OLDER = {  # name: keys that the published files of that time do not have
    "qwen3-untied": ["layer_types"], "qwen2": ["layer_types", "head_dim"], "llama": ["head_dim"],
    "llama3-sharded": [], "llama-linear": ["head_dim"]}


def to_older_keys(raw, absent):
    """config.json as transformers 4 wrote it."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], raw["torch_dtype"] = rope.pop("rope_theta"), raw.pop("dtype")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind, **rope}
    return {key: value for key, value in raw.items() if key not in absent}


def make(name, folder, seed):
    """Write checkpoint `name` of MODELS with random weights, none of them zero or one, as transformers saves it."""
    settings = SIZES | MODELS[name]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model, generator = AutoModelForCausalLM.from_config(config).float(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_((0.0 if key.endswith("bias") else 1.0) + 0.3 * noise)
            else:
                parameter.copy_(noise if "embed" in key else 1.5 * parameter.shape[1] ** -0.5 * noise)
    model.to(config.dtype or torch.float32)
    model.save_pretrained(folder, max_shard_size="16KB" if "sharded" in name else "1GB")
    if name in OLDER:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(to_older_keys(json.loads(file.read_text()), OLDER[name]), indent=2) + "\n")


def tokens(seed=0):
    return torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits(folder, tokens):
    """What transformers makes of a directory's checkpoint in float32, (B, T, V)."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    expected = {"tokens": tokens().float()}
    for seed, name in enumerate(MODELS):
        make(name, OUT / name, seed)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
        expected[name] = logits(OUT / name, tokens())
    save_file(expected, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
