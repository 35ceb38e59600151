"""The native model: names and numbers of Llama, and its checks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from longtrain.nn import LanguageModel, ModelConfig, RMSNorm, RotaryEmbedding, count_targets

SHAPE = dict(vocab_size=50, num_layers=2, hidden_size=24, intermediate_size=32, num_heads=4, num_kv_heads=2)


def test_parameter_names_are_llama_s():
    names = {name for name, _ in LanguageModel(ModelConfig(**SHAPE)).named_parameters()}
    layer = {"input_layernorm", "post_attention_layernorm"} | {f"self_attn.{p}_proj" for p in "qkvo"}
    layer |= {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_round_trip(tmp_path, tied):
    a, b = (LanguageModel(ModelConfig(**SHAPE, tie_embeddings=tied)) for _ in range(2))
    a.save_safetensors(tmp_path / "m.safetensors")
    assert ("lm_head.weight" in load_file(tmp_path / "m.safetensors")) != tied
    b.load_safetensors(tmp_path / "m.safetensors")
    ids = torch.randint(50, (1, 9))
    assert torch.equal(a(ids).logits, b(ids).logits)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    LanguageModel(ModelConfig(**SHAPE)).save_safetensors(tmp_path / "m.safetensors")
    for changes, message in [
        (dict(num_layers=3), "missing"),
        (dict(num_layers=1), "not in the model"),
        (dict(vocab_size=51), "wrong shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            LanguageModel(ModelConfig(**{**SHAPE, **changes})).load_safetensors(tmp_path / "m.safetensors")


def test_embeddings_begin_as_large_as_asked_and_everything_else_as_before():
    torch.manual_seed(0)
    usual = LanguageModel(ModelConfig(**SHAPE, initializer_range=0.06)).state_dict()
    torch.manual_seed(0)
    found = LanguageModel(ModelConfig(**SHAPE, initializer_range=0.06, embedding_range=0.5)).state_dict()
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(found.pop(embedding), usual.pop(embedding) * (0.5 / 0.06))
    assert all(torch.equal(found[name], usual[name]) for name in usual)


def test_packed_documents_are_as_if_alone():
    model = LanguageModel(ModelConfig(**SHAPE)).double()
    ids = torch.randint(50, (1, 20))
    packed = model(ids, cu_seqlens=torch.tensor([0, 6, 7, 20])).logits
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in [(0, 6), (6, 7), (7, 20)]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-14)


def test_a_window_sees_as_many_tokens_as_it_says():
    model = LanguageModel(ModelConfig(**{**SHAPE, "num_layers": 1}, window=(3,))).double()
    ids = torch.randint(50, (1, 9))
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 50
    differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert differs.tolist() == [False, False, True, True, True, False, False, False, False]


def test_rms_norm():
    x, norm = torch.randn(3, 8, dtype=torch.float64), RMSNorm(8, eps=1e-5).double()
    norm.weight.data.uniform_()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_rotary_depends_on_distance_alone(fraction):
    rotary = RotaryEmbedding(8, base=100.0, fraction=fraction)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 5, 1, 8), torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 5, 1, 8)
    for shift in (0, 1000, 2**20):
        angles = rotary.angles(torch.arange(5)[None] + shift, torch.float64)
        scores = torch.einsum("bthd,bshd->ts", rotary(q, angles), rotary(k, angles))
        for distance in range(5):
            diagonal = scores.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head_dim, fraction", [(6, 0.5), (8, 1.25), (8, -0.25)])
def test_rotary_turns_pairs_of_a_head_s_features(head_dim, fraction):
    with pytest.raises(ValueError, match="need an even number"):
        RotaryEmbedding(head_dim, fraction=fraction)


def test_rotary_at_a_million_tokens_is_as_exact_as_at_the_start():
    rotary = RotaryEmbedding(16)
    position = torch.tensor([[2**20 + 7]])
    single, double = (rotary.angles(position, dtype)[0].double() for dtype in (torch.float32, torch.float64))
    assert (single - double).abs().max() < 2e-7


def test_count_targets():
    labels = torch.tensor([[1, 2, -100, 4, 5]])
    assert count_targets(labels) == 3
    assert count_targets(labels, [0, 4, 5]) == 2


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(num_layers=0), "num_layers"),
        (dict(num_kv_heads=3), "num_kv_heads"),
        (dict(hidden_size=25), "hidden_size"),
        (dict(window=(0,)), "window"),
        (dict(window=()), "window"),
        (dict(attention_dropout=1.0), "attention_dropout"),
        (dict(rope_fraction=0.5, head_dim=6), "rope_fraction"),
        (dict(norm_eps=0), "norm_eps"),
        (dict(embedding_range=0.0), "embedding_range"),
        (dict(embedding_range=0.5, tie_embeddings=True), "embedding_range"),
        (dict(vocab_size=True), "vocab_size"),
    ],
)
def test_wrong_shapes_name_their_setting(changes, name):
    with pytest.raises(ValueError, match=f"model.{name}"):
        ModelConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(input_ids=torch.zeros(5, dtype=torch.long)), "input_ids must be"),
        (dict(input_ids=torch.zeros(2, 5, dtype=torch.long), cu_seqlens=torch.tensor([0, 5])), "batch must be 1"),
        (dict(input_ids=torch.zeros(1, 5, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)), "labels must have"),
        (dict(input_ids=torch.zeros(1, 5, dtype=torch.long), cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must rise"),
        (dict(input_ids=torch.zeros(1, 5, dtype=torch.long), labels=torch.full((1, 5), 99)), "vocab|99"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(ModelConfig(**SHAPE))(**call)
