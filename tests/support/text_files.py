"""Small text networks: their settings, random parameters, tokenizers, and files of them."""

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "blue",
    "apple",
    "cat",
    "sleeping",
    "the",
    "of",
    "on",
]
T5 = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 20,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": 20,
    "max_position_embeddings": 16,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recipe by which the parameters of the reference cases were drawn."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name.lower() and name.endswith("weight"):
        return 1 + np.float32(0.1) * z
    if any(part in name for part in ("bias", "embed", "shared")):
        return z
    return z / np.float32(np.sqrt(shape[-1]))


def write_tokenizer(path: Path, words=WORDS, end: str = "</s>") -> None:
    """Words between spaces; `end` is added to every text."""
    vocabulary = {word: n for n, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    # As in published files, whose settings are not those of an encoder here.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))


def write_t5(folder: Path, shapes: dict[str, tuple[int, ...]], **changes) -> dict[str, np.ndarray]:
    """Writes a folder with random parameters, and returns these."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(T5 | changes))
    write_tokenizer(folder / "tokenizer.json")
    tensors = {name: draw(name, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors
