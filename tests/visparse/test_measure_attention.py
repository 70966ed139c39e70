import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from visparse.measure.attention import RolledKeys, SelfAttentionProbe, amdahl_ceiling


def operands(tokens: int = 37, keys: int | None = None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, 8, generator=generator).to(dtype) for n in (tokens, keys or tokens, keys or tokens)]


def test_probe_counts_self_attention_only():
    probe = SelfAttentionProbe()
    with probe:
        attention(*operands(37))
        attention(query=operands(64)[0], key=operands(64)[1], value=operands(64)[2])
        attention(*operands(37, keys=5))
    attention(*operands(99))
    assert (probe.calls, probe.shape) == (2, (1, 2, 64, 8))
    assert probe.seconds > 0
    probe.reset()
    assert (probe.calls, probe.seconds, probe.shape) == (0, 0.0, None)


def test_rolled_keys_are_exact_and_round_otherwise():
    q, k, v = operands(301)
    dense = attention(q, k, v)
    with RolledKeys() as rolled:
        again = attention(q, k, v)
        named = attention(query=q, key=k, value=v)
    exact = attention(q.double(), k.double(), v.double())
    assert rolled.calls == 2
    assert torch.equal(again, named)
    assert not torch.equal(again, dense)
    assert (again - exact).abs().max() <= 4 * (dense - exact).abs().max()


def test_rolled_keys_leave_masked_calls_alone():
    q, k, v = operands(16)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    with RolledKeys() as rolled:
        assert torch.equal(attention(q, k, v, attn_mask=mask), attention(q, k, v, mask))
        causal = attention(q, k, v, is_causal=True)
        positional = attention(q, k, v, None, 0.0, True)
    assert rolled.calls == 0
    assert torch.equal(causal, positional)


def test_ceiling_by_hand():
    assert amdahl_ceiling(0.0, 0.5) == 1
    assert amdahl_ceiling(0.5, 0.0) == 2
    assert amdahl_ceiling(0.8, 0.25) == pytest.approx(2.5)
    with pytest.raises(ValueError, match=r"block_density: wanted 0 to 1, got 1.5"):
        amdahl_ceiling(0.5, 1.5)
    with pytest.raises(ValueError, match="leaves no work and has no ceiling"):
        amdahl_ceiling(1.0, 0.0)
