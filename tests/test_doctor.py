"""`longtrain doctor` and `longtrain.backends.explain`: they say what is so, and a wrong backend fails the self-test."""

import pytest
import torch

from longtrain import backends, doctor
from longtrain.ops.linear_cross_entropy import chunked


def test_doctor_names_machine_backends_and_errors(capsys):
    assert doctor.run() == 0
    out = capsys.readouterr().out
    for word in (
        "processor",
        "memory",
        "disk here",
        "GPU",
        f"torch {torch.__version__}",
        "compiler",
        "extension",
        "attention",
        "linear_cross_entropy",
        "long_conv",
        " not by ",
        "gradient error",
        "all well",
    ):
        assert word in out, word


@pytest.mark.parametrize("broken", [lambda g: None, lambda g: g.mul_(float("nan")), lambda g: g.mul_(1.1)], ids=["none", "nan", "10%"])
def test_a_wrong_backend_fails_the_self_test(broken, monkeypatch, capsys):
    right = chunked._dlogits

    def wrong(*arguments):
        g = right(*arguments)
        broken(g)
        return g

    monkeypatch.setattr(chunked, "_dlogits", wrong)
    status = doctor.run()
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.endswith("FAILED")]
    if broken(torch.ones(1)) is None:
        assert status == 0 and not failed
    else:
        assert status == 1 and len(failed) == 2 and all("linear_cross_entropy" in line for line in failed)


def test_every_op_is_explained_and_every_choice_is_a_backend_that_does_not_refuse():
    served = backends.explain(device="cpu")
    assert {s.op for s in served} == {"attention", "linear_attention", "linear_cross_entropy", "long_conv"}
    for s in served:
        assert s.backend not in s.refusals and all(s.refusals.values()), s


def test_a_call_is_explained_by_its_own_arguments():
    x, w, t = torch.empty(4, 3), torch.empty(5, 3), torch.zeros(4, dtype=torch.int64)
    plain, = backends.explain("linear_cross_entropy", input=x, weight=w, target=t)
    capped, = backends.explain("linear_cross_entropy", input=x, weight=w, target=t, softcap=3.0)
    assert "torch" in capped.refusals and "softcap" in capped.refusals["torch"] and "softcap" in str(capped)
    assert "softcap" not in str(plain)


def test_unknown_ops_and_calls_without_an_op_are_refused():
    with pytest.raises(ValueError, match="op must be one of attention, linear_attention, linear_cross_entropy, long_conv"):
        backends.explain("conv")
    with pytest.raises(ValueError, match="needs its op"):
        backends.explain(causal=True)


def test_shapes_will_do_for_a_device_that_is_not_here():
    shapes = dict(q=(1, 8192, 32, 128), k=(1, 131072, 8, 128), v=(1, 131072, 8, 128))
    found, = backends.explain("attention", **shapes, causal=True, dtype=torch.bfloat16, device="cuda")
    text = str(found)
    assert "cpu" not in found.refusals["flash"] and "tensors are on cuda" in text and "gradient of the LSE" in text
    if not torch.cuda.is_available():
        assert found.backend == "tiled" and "more than ten times slower" in text
