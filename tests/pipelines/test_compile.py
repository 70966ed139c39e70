"""Sparsified denoisers under torch.compile, in one graph."""

import pytest
import torch

import visparse

SMALL = {"window": (2, 3, 3), "stride": 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compile_after_sparsify(wan, film):
    visparse.sparsify(wan, "neighborhood", dense_steps=1, **SMALL)
    eager = film(wan)
    plain = wan.transformer
    wan.transformer = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(film(wan), eager, atol=1e-5, rtol=1e-4)
    other = film(wan, height=96)
    wan.transformer = plain
    torch.testing.assert_close(other, film(wan, height=96), atol=1e-5, rtol=1e-4)


def test_sparsify_after_compile(wan, film):
    visparse.sparsify(wan, "neighborhood", dense_steps=1, **SMALL)
    eager = film(wan)
    visparse.restore(wan)
    dense = film(wan)
    wan.transformer = torch.compile(wan.transformer, fullgraph=True, backend="aot_eager")
    with visparse.sparsify(wan, "neighborhood", dense_steps=1, **SMALL) as handle:
        torch.testing.assert_close(film(wan), eager, atol=1e-5, rtol=1e-4)
        assert handle.report().models[0].model_class == "WanTransformer3DModel"
    torch.testing.assert_close(film(wan), dense, atol=1e-5, rtol=1e-4)


def test_compiled_blocks(wan, film):
    visparse.sparsify(wan, "neighborhood", dense_steps=1, dense_layers=[1], **SMALL)
    eager = film(wan)
    wan.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(film(wan), eager, atol=1e-5, rtol=1e-4)


def test_compiled_dit(dit, picture):
    visparse.sparsify(dit, "neighborhood", dense_steps=0)
    eager = picture(dit)
    dit.transformer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(picture(dit), eager, atol=1e-5, rtol=1e-4)


def test_compiled_denoiser_that_cannot_tell_the_step(dit, picture):
    visparse.sparsify(dit, "neighborhood", dense_steps=1)
    dit.transformer.compile(fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="the plan depends on the step"):
        picture(dit)


def test_sparsify_after_compile_without_cache_context(dit):
    def denoise(model):
        with torch.no_grad():
            return torch.stack([model(latents, torch.tensor([t, t]), labels).sample for t in (900, 500, 100)])

    latents, labels = torch.randn(2, 4, 16, 16), torch.tensor([3, 1000])
    with visparse.sparsify(dit.transformer, "neighborhood", dense_steps=1):
        eager = denoise(dit.transformer)
    compiled = torch.compile(dit.transformer, fullgraph=True, backend="aot_eager")
    with visparse.sparsify(compiled, "neighborhood", dense_steps=1) as handle:
        torch.testing.assert_close(denoise(compiled), eager, atol=1e-5, rtol=1e-4)
        assert handle.report().models[0].runs == 1
