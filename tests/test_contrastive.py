"""Contrastive steps one sample at a time: the gradients of the whole batch, exactly."""

import pytest
import torch
from torch import nn

import longtrain as lt
from longtrain.contrastive import backward_by_sample, info_nce
from longtrain.nn import MonarchMixerBlock


class Encoder(nn.Module):
    """Token ids ``[T]`` to a vector, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dropout = nn.Embedding(11, 8), nn.Dropout(0.3)
        self.layers = nn.ModuleList(MonarchMixerBlock(8, 24, layer_index=i) for i in range(2))

    def forward(self, ids):
        x = self.dropout(self.embed(ids))[None]
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x[0].mean(0))


class Loss(nn.Module):
    """InfoNCE whose temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))

    def forward(self, embedded):
        n = len(embedded) // 2
        return info_nce(embedded[:n], embedded[n:], temperature=self.log_temperature.exp())


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(*modules):
    found = [p.grad.clone() for m in modules for p in m.parameters()]
    for m in modules:
        m.zero_grad()
    return found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_gradients_are_those_of_the_whole_batch(dropout, streamed):
    encoder, loss = Encoder().train(dropout), Loss()
    samples = [torch.randint(11, (tokens,)) for tokens in (3, 5, 4, 20, 24, 17)]
    if streamed:
        lt.apply(encoder, lt.Plan(chunk_tokens=7))
    torch.manual_seed(4)
    whole = loss(torch.stack([encoder(s) for s in samples]))
    whole.backward()
    expected, after = gradients(encoder, loss), torch.rand(())
    torch.manual_seed(4)
    value = backward_by_sample(encoder, samples, loss)
    assert abs(value - whole) <= 1e-12 * abs(whole) and not value.requires_grad
    for ours, theirs in zip(gradients(encoder, loss), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
    assert torch.rand(()) == after


def test_one_samples_graph_at_a_time():
    encoder, alive, most = Encoder(), [0], [0]
    samples = [torch.randint(11, (24,)) for _ in range(6)]

    class Counted:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t, Counted()), lambda pair: pair[0]):
        backward_by_sample(encoder, samples[:1] * 2, Loss())
        for_two = most[0]
        backward_by_sample(encoder, samples, Loss())
    assert most[0] <= for_two + 4 * len(samples)  # the loss' own, of vectors


def test_info_nce_by_hand():
    queries, documents = torch.eye(2), torch.tensor([[3.0, 0.0], [3.0, 3.0]])
    cosines = torch.tensor([[1.0, 0.5**0.5], [0.0, 0.5**0.5]])
    expected = -(cosines / 0.5).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(info_nce(queries, documents, temperature=0.5), expected)


def test_bad_input():
    encoder = Encoder()
    with pytest.raises(ValueError, match="at least one sample"):
        backward_by_sample(encoder, [], Loss())
    with pytest.raises(ValueError, match=r"one vector \[E\] a sample, found \[3, 8\]"):
        backward_by_sample(encoder.embed, [torch.tensor([1, 2, 3])], Loss())
    with pytest.raises(ValueError, match="pairs"):
        info_nce(torch.ones(2, 3), torch.ones(3, 3))
