"""Bad input to attention: one ValueError that names the argument, what was found and what was expected."""

import pytest
import torch

from longtrain.ops.attention import attention, attention_backward, explain


def qkv(**changes):
    shapes = {"q": (1, 6, 4, 8), "k": (1, 6, 2, 8), "v": (1, 6, 2, 8)} | changes
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


CU = {"cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 6])}
WRONG = [
    (qkv(q=(6, 4, 8)), {}, "q: found shape"),
    (qkv(k=(1, 6, 3, 8), v=(1, 6, 3, 8)), {}, "k: found 3 kv heads, expected a divisor of q's 4"),
    (qkv(k=(1, 6, 2, 7)), {}, "k: found head dim 7, expected q's head dim 8"),
    (qkv(k=(2, 6, 2, 8)), {}, "k: found batch 2"),
    (qkv(v=(1, 5, 2, 8)), {}, "v: found shape"),
    (qkv() | {"k": torch.zeros(1, 6, 2, 8, dtype=torch.float64)}, {}, "k: found torch.float64, expected q's dtype"),
    (qkv() | {"v": torch.zeros(1, 6, 2, 8, device="meta")}, {}, "v: found meta, expected q's device"),
    (qkv() | {"q": torch.zeros(1, 6, 4, 8, dtype=torch.int32)}, {}, "q: found torch.int32"),
    (qkv(), {"causal": None}, "causal: found None"),
    (qkv(), {"window_size": (-2, 0)}, r"window_size \(left\): found -2"),
    (qkv(), {"window_size": (1, -3)}, r"window_size \(right\): found -3"),
    (qkv(), {"window_size": 5}, "window_size: found 5"),
    (qkv(), {"q_offset": 1.5}, "q_offset: found 1.5"),
    (qkv(), {"k_offset": None}, "k_offset: found None"),
    (qkv(), {"sink_tokens": -1}, "sink_tokens: found -1"),
    (qkv(), {"head_offset": -1}, "head_offset: found -1"),
    (qkv(), {"sink_logits": torch.zeros(3)}, "sink_logits: found shape"),
    (qkv(), {"block_stride": 0}, "block_stride"),
    (qkv(), {"block_stride": (1, 2, 3)}, "block_stride"),
    (qkv(), {"softcap": 0.0}, "softcap: found 0.0"),
    (qkv(), {"scale": float("nan")}, "scale: found nan"),
    (qkv(), {"dropout_p": 1.0, "dropout_seed": 1}, "dropout_p: found 1.0"),
    (qkv(), {"dropout_p": 0.1}, "dropout_seed: found None"),
    (qkv(), {"dropout_p": 0.1, "dropout_seed": 2**63}, "dropout_seed"),
    (qkv(), {"backend": "fastest"}, "backend: found 'fastest', expected 'auto' or one of"),
    (qkv(), {"backend": "sdpa", "softcap": 1.0}, "backend: found 'sdpa'.*no softcap"),
    (qkv(), CU | {"cu_seqlens_q": torch.tensor([0, 4, 2, 6]), "cu_seqlens_k": torch.tensor([0, 2, 4, 6])},
     "cu_seqlens_q: found 2 after 4"),
    (qkv(), CU | {"cu_seqlens_k": torch.tensor([0, 5])}, "cu_seqlens_k: found last entry 5"),
    (qkv(), CU | {"cu_seqlens_q": torch.tensor([1, 6])}, "cu_seqlens_q: found first entry 1"),
    (qkv(), CU | {"cu_seqlens_q": torch.tensor([0, 3, 6])}, "cu_seqlens_k: found 2 entries"),
    (qkv(), CU | {"cu_seqlens_q": torch.tensor([0.0, 6.0])}, "cu_seqlens_q: found torch.float32"),
    (qkv(), CU | {"max_seqlen_k": 5}, "max_seqlen_k: found 5, expected at least the longest document, 6"),
    (qkv(q=(2, 6, 4, 8), k=(2, 6, 2, 8), v=(2, 6, 2, 8)), CU, "q: found batch 2, expected batch 1"),
]


@pytest.mark.parametrize("tensors,options,message", WRONG, ids=[message[:40] for *_, message in WRONG])
def test_bad_input_is_named(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        attention(**tensors, **({"causal": True} | options))


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("dk", torch.zeros(1, 6, 2, 8, dtype=torch.bfloat16), "dk: found torch.bfloat16, expected torch.float32"),
        ("dv", torch.zeros(1, 6, 2, 7), "dv: found shape"),
        ("lse", torch.zeros(1, 6, 4, dtype=torch.float64), "lse: found torch.float64"),
        ("dout", torch.zeros(1, 5, 4, 8), "dout: found shape"),
        ("dsink", torch.zeros(4), "dsink: found a tensor, expected None"),
    ],
)
def test_bad_input_to_the_backward_is_named(name, value, message):
    x = qkv()
    arguments = {
        "dout": torch.zeros(1, 6, 4, 8), **x, "out": torch.zeros(1, 6, 4, 8), "lse": torch.zeros(1, 6, 4),
        "dk": torch.zeros(1, 6, 2, 8), "dv": torch.zeros(1, 6, 2, 8),
    }
    with pytest.raises(ValueError, match=message):
        attention_backward(**(arguments | {name: value}), causal=True)


def test_explain_tells_the_choice_and_every_refusal():
    x = qkv()
    found = explain(**x, causal=True, softcap=2.0)
    assert found.chosen not in found.refusals
    assert found.refusals["sdpa"] == "no softcap" and "cpu" in found.refusals["flash"]
    assert explain(**x, causal=True, backend="sdpa").chosen == "sdpa"
