import math

import pytest
import torch

from visparse.measure.quality import PSNR_CAP, latent_error, psnr_per_frame, ssim_per_frame


def flat(*levels: int, size: int = 16) -> torch.Tensor:
    return torch.stack([torch.full((size, size, 3), level, dtype=torch.uint8) for level in levels])


def test_psnr_by_hand():
    # An error of 1 and of 16 grey levels everywhere: 20 log10(255 / error).
    found = psnr_per_frame(flat(101, 116, 100), flat(100, 100, 100))
    assert found == pytest.approx([48.1308, 24.0484, PSNR_CAP], abs=1e-3)


def test_psnr_of_one_wrong_point():
    video = flat(100)
    video[0, 3, 4, 1] = 200
    wanted = 10 * math.log10(1 / ((100 / 255) ** 2 / (16 * 16 * 3)))
    assert psnr_per_frame(video, flat(100)) == pytest.approx([wanted], abs=1e-3)


def test_psnr_never_exceeds_the_cap():
    video = flat(100, size=256)
    video[0, 0, 0, 0] = 101
    assert 90 < psnr_per_frame(video, flat(100, size=256))[0] <= PSNR_CAP
    assert psnr_per_frame(video, video) == [PSNR_CAP]


def test_ssim_of_flat_frames_by_hand():
    # Without variance only the luminance term is left: (2ab + c) / (a² + b² + c), c = 0.01².
    a, b = 50 / 255, 200 / 255
    wanted = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim_per_frame(flat(50, 70), flat(200, 70)) == pytest.approx([wanted, 1.0], abs=1e-6)


def test_ssim_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8, generator=generator)
    noise = torch.randn(reference.shape, generator=generator)
    little, much = [(reference + s * noise).clamp(0, 255).to(torch.uint8) for s in (5, 60)]
    assert 1 > ssim_per_frame(little, reference)[0] > ssim_per_frame(much, reference)[0] > 0


def test_latent_error_by_hand():
    assert latent_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert latent_error(torch.ones(3), torch.ones(3)) == 0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: psnr_per_frame(flat(1).float(), flat(1)), TypeError, "video: wanted uint8, got torch.float32"),
        (lambda: psnr_per_frame(flat(1), flat(1, 2)), ValueError, "video: wanted the reference's shape"),
        (lambda: psnr_per_frame(flat(1)[0], flat(1)[0]), ValueError, r"wanted \[frames, height, width, 3\]"),
        (lambda: ssim_per_frame(flat(1, size=8), flat(1, size=8)), ValueError, "at least 11 x 11 pixels, got 8 x 8"),
        (lambda: latent_error(torch.ones(2), torch.ones(3)), ValueError, r"latents: wanted shape \(3,\), got \(2,\)"),
        (lambda: latent_error(torch.ones(2), torch.zeros(2)), ValueError, "reference: wanted finite latents"),
        (lambda: latent_error(torch.ones(1), torch.tensor([math.nan])), ValueError, "reference: wanted finite latents"),
    ],
)
def test_wrong_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
