"""Compensated plans under torch.compile: one graph for all layers and all kinds of steps."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch._dynamo.testing import CompileCounterWithBackend

import visparse


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_all_layers_and_all_kinds_of_steps_share_one_graph(wan, movie, plan, fresh_compiler, sparse, layers):
    torch.manual_seed(0)
    wan.transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=torch._dynamo.config.recompile_limit + 1,
        rope_max_seq_len=64,
    ).eval()
    sparse(wan, plan)
    eager = movie(wan)
    counter = CompileCounterWithBackend("aot_eager")
    wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(movie(wan), eager, atol=1e-6, rtol=1e-5)
    counts = {(x.measured_calls > 0, x.sparse_calls > 0, x.sparse_calls + x.dense_calls) for x in layers(wan)}
    assert counts == {(True, True, 6)}
    movie(wan, guidance=3.0)
    assert counter.frame_count == 1


def test_a_denoiser_compiled_as_a_whole(wan, movie, fresh_compiler, sparse):
    sparse(wan)
    eager, plain = movie(wan), wan.transformer
    wan.transformer = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="compile first and sparsify the compiled denoiser"):
        movie(wan)
    visparse.restore(wan)
    torch.compiler.reset()
    wan.transformer = torch.compile(plain, fullgraph=True, backend="aot_eager")
    sparse(wan)
    torch.testing.assert_close(movie(wan), eager, atol=1e-6, rtol=1e-5)
