"""Structural similarity that can be differentiated and lifted."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d

_WINDOW = 7


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each pair of images with pixels in [0, 1], mean over positions of a uniform window: (b, c, h, w) to (b,).

    ``(2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2))`` with c1 = 0.01^2 and c2 = 0.03^2; the
    window has 7x7 pixels, fewer where the image has fewer.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, https://doi.org/10.1109/TIP.2003.819861, equation 13. Differences:
    theirs is a Gaussian window. The metric that results are scored with is another code, which cannot be lifted.
    """
    window = min(_WINDOW, *a.shape[-2:])

    def mean(x: Tensor) -> Tensor:
        return avg_pool2d(x, window, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    spread = mean(a * a) - mean_a.square() + mean(b * b) - mean_b.square()
    together = mean(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    return (light * (2 * together + 0.03**2) / (spread + 0.03**2)).flatten(1).mean(1)
