"""What a plan may say, and what it refuses, naming the setting."""

import pytest

import longtrain as lt
from longtrain.span import Span


@pytest.mark.parametrize("device, host", [(0.7, 0.3), (0.9, 0.1), (0.35, 0.65), (1.0, 0.0), (0.0, 1.0)])
def test_shares_that_make_up_the_whole_leave_nothing_for_the_disk(device, host):
    split = lt.Split(device=device, host=host)  # 1 - 0.7 - 0.3 is 6e-17
    assert split.disk == 0.0
    offload = lt.Offload(outputs=split, host_bytes=1 << 20)
    assert offload.split("outputs", 3) is split
    assert {split.place(Span(t, t + 1), 20).tier for t in range(20)} == {t for t, share in (("device", device), ("host", host)) if share}


def test_where_each_extent_goes_is_decided_by_its_first_token():
    split = lt.Split(device=0.25, host=0.5, compress=True)
    placed = [split.place(Span(t, t + 1), 8) for t in range(8)]
    assert [p.tier for p in placed] == ["disk"] * 2 + ["host"] * 4 + ["device"] * 2
    assert [p.compress for p in placed] == [True] * 6 + [False] * 2


@pytest.mark.parametrize("make, said", [
    (lambda: lt.Split(device=0.6, host=0.5), "device and host must be shares from 0 to 1, together at most 1, found 0.6 and 0.5"),
    (lambda: lt.Split(device=-0.1), "found -0.1"),
    (lambda: lt.Offload(kv=lt.Split(host=1.0)), "offload.host_bytes is 0"),
    (lambda: lt.Offload(kv=(lt.Split(device=1.0), lt.Split())), "offload.disk is not set"),
    (lambda: lt.Plan(chunk_tokens=0), "chunk_tokens must be an integer of at least 1, found 0"),
    (lambda: lt.Plan(chunk_tokens=True), "chunk_tokens must be an integer"),
    (lambda: lt.Plan(chunk_tokens=8, store_kv=1.5), "store_kv must be a fraction from 0 to 1"),
    (lambda: lt.Plan(chunk_tokens=8, store_outputs=(0.5, 2)), "store_outputs must be a fraction"),
    (lambda: lt.Plan(chunk_tokens=8, boundaries="none"), "boundaries must be one of stream, tensor"),
    (lambda: lt.Plan(chunk_tokens=8, kv_block_tokens=12), r"kv_block_tokens must be a multiple of chunk_tokens \(8\), found 12"),
    (lambda: lt.Plan(chunk_tokens=8, boundaries="tensor", offload=lt.Offload(inputs=lt.Split(host=1.0), host_bytes=9)),
     'use boundaries="stream"'),
    (lambda: lt.Plan(chunk_tokens=8, store_kv=(0.0, 1.0)).check_layers(3), "store_kv names 2 layers, the model has 3"),
])  # fmt: skip
def test_what_is_wrong_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()
